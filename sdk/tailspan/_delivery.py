"""Waits until the agent has delivered a job to its last line, by polling the agent's server on ``agent.listen``."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from tailspan._net import host_port
from tailspan.errors import AuthError, ConfigError, ProtocolError, ServiceUnavailableError, WaitTimeoutError
from tailspan.http.client import BROKEN, HttpClient
from tailspan.models import JobStatus

if TYPE_CHECKING:
    from tailspan._clock import Clock
    from tailspan.config import Settings
    from tailspan.services import JobService

__all__ = ["wait_until_delivered"]

_TIMEOUT_S = 10.0
_POLL_S = 0.2
_MAX_BYTES = 64 << 10


async def wait_until_delivered(
    settings: Settings, service: JobService, status: JobStatus, clock: Clock, deadline: float
) -> None:
    """Return once the endpoint has acknowledged the last line of an ended job.

    Args:
        settings: Has the address and the token of the agent.
        service: Where the job ran.
        status: The job's final status.
        clock: The clock that deadline and waits go by.
        deadline: When to give up, in seconds of the clock's monotonic time.

    Raises:
        ConfigError: `agent.listen` is empty.
        ServiceUnavailableError: The agent does not answer.
        AuthError: The agent refused the token.
        ProtocolError: The server there is not a Tailspan agent.
        WaitTimeoutError: The agent had not delivered all lines in time.
    """
    address, socket = settings.agent.listen_address, settings.agent.listen_socket
    if address is None and socket is None:
        raise ConfigError("agent.listen is empty: set it to where the agent reports its deliveries", key="agent.listen")
    url = f"http://{host_port(*address) if address else 'localhost'}/delivery"
    token = settings.agent.read_token()
    client = HttpClient(
        url,
        key="agent.listen",
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout_s=_TIMEOUT_S,
        keep_alive_s=_TIMEOUT_S,
        max_idle=1,
        uses_proxy=False,
        socket=socket,
    )
    query = urlencode({"identity": service.identity, "job_id": status.job_id})
    try:
        while not await _is_complete(client, url, query):
            left_s = deadline - clock.monotonic_s()
            if left_s <= 0:
                raise WaitTimeoutError(
                    f"job {status.job_id} has ended, but the agent had not delivered its last line in time",
                    last_status=status,
                    service=service.name,
                    job_id=status.job_id,
                )
            await clock.sleep(min(_POLL_S, left_s))
    finally:
        await client.aclose()


async def _is_complete(client: HttpClient, url: str, query: str) -> bool:
    try:
        reply, body = await client.fetch("GET", query=query, max_bytes=_MAX_BYTES)
    except (*BROKEN, zlib.error) as error:
        raise ServiceUnavailableError(
            f"the agent at {url} does not answer ({str(error) or type(error).__name__}): start it (tailspan agent run),"
            " or correct agent.listen"
        ) from None
    if reply.status in (401, 403):
        raise AuthError(f"the agent at {url} refused the token: set agent.token_file to the agent's own token file")
    if not reply.is_success:
        raise ProtocolError(f"{url} answered {reply.status}: check that a Tailspan agent listens there (agent.listen)")
    try:
        complete = json.loads(body)["logs_complete"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ProtocolError(f"the server at {url} is not a Tailspan agent: correct agent.listen") from None
    return complete is True
