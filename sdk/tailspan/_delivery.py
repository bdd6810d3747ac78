"""Whether the agent has relayed a job to its last line: asked of the agent's own server, on ``agent.listen``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from tailspan.errors import AuthError, ConfigError, ProtocolError, ServiceUnavailableError, WaitTimeoutError
from tailspan.models import RunResponse

if TYPE_CHECKING:
    from tailspan._clock import Clock
    from tailspan.config import Settings
    from tailspan.services import JobService

__all__ = ["wait_until_delivered"]

_TIMEOUT_S = 10.0
_POLL_S = 0.2


async def wait_until_delivered(
    settings: Settings, service: JobService, status: RunResponse, clock: Clock, deadline: float
) -> None:
    """Return once the agent has acked the last line of an ended job.

    Args:
        settings: Says where the agent listens, and its token.
        service: The job's service.
        status: The job's final status.
        clock: What tells the time and waits.
        deadline: When to give up, on that clock, in seconds.

    Raises:
        ConfigError: The agent has no address to ask.
        ServiceUnavailableError: The agent does not answer.
        AuthError: The agent wants another token.
        ProtocolError: What listens there is no agent.
        WaitTimeoutError: The agent had not acked all in time.
    """
    address = settings.agent.listen_address
    if address is None:
        raise ConfigError("agent.listen is empty: delivery is asked of the agent there", key="agent.listen")
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{host}:{address[1]}/delivery"
    token = settings.agent.read_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = {"identity": service.identity, "job_id": status.job_id}
    async with httpx.AsyncClient(headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client:
        while not await _is_complete(client, url, asked):
            left_s = deadline - clock.monotonic_s()
            if left_s <= 0:
                raise WaitTimeoutError(
                    f"job {status.job_id} has ended, but the agent had not acked its last line in time",
                    last_status=status,
                    service=service.name,
                    job_id=status.job_id,
                )
            await clock.sleep(min(_POLL_S, left_s))


async def _is_complete(client: httpx.AsyncClient, url: str, asked: dict[str, str]) -> bool:
    try:
        answer = await client.get(url, params=asked)
        answer.raise_for_status()
        complete = answer.json()["logs_complete"]
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise AuthError("the agent wants another token: set agent.token_file as the agent has it") from None
        raise ProtocolError(f"the agent at {url} answered {error.response.status_code}: is it one?") from None
    except httpx.TransportError as error:
        raise ServiceUnavailableError(
            f"the agent at {url} does not answer ({error}): start it (tailspan agent run), or mend agent.listen"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ProtocolError(f"what answers at {url} is no Tailspan agent: mend agent.listen") from None
    return complete is True
