"""`PrefectChanges`: the events of Prefect's runs, and its logs with new lines, as change notifications.

Prefect sends an event for each change of a state, and none for a line. So one request every few seconds asks which of
the followed runs have new lines, whatever their number.

Source: Prefect 3.9.1, as measured: ``/events/out``. Without ``until``, its filter ends at the present, and no event of
the future matches.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from tailspan.services import LATE_WINDOW_S
from tailspan.services._requests import Authorization, ServiceRequests
from tailspan.services._socket_changes import SocketChanges
from tailspan.services.prefect.rows import EPOCH, SeenEntries

if TYPE_CHECKING:
    from tailspan.http.websocket import WebSocket

__all__ = ["PrefectChanges"]

_FLOW_RUN, _TASK_RUN = "prefect.flow-run.", "prefect.task-run."
_HEARTBEAT = ".heartbeat"
_RUNS_A_REQUEST = 500

_NewEntries = Callable[[Sequence[str], SeenEntries, datetime], AsyncGenerator[list[dict[str, Any]], None]]


class PrefectChanges(SocketChanges):
    """See the module."""

    probe_s = 5.0

    def __init__(
        self, http: ServiceRequests, flow_runs_of: Callable[[str], Collection[str]], new_entries: _NewEntries
    ) -> None:
        """Open nothing yet.

        Args:
            http: Sends the requests.
            flow_runs_of: Returns the ids of a job's flow runs: its own, and those of its known sub flows.
            new_entries: Yields the log entries of flow runs that a position does not have, since a time.
        """
        super().__init__(http, "/events/out", subprotocol="prefect")
        self._flow_runs_of = flow_runs_of
        self._new_entries = new_entries
        self._position: SeenEntries | None = None

    async def subscribe(self, socket: WebSocket) -> None:
        """Send the token and the filter; see `SocketChanges`."""
        await socket.send({"type": "auth", "token": _token(await self.http.authorization())})
        await socket.receive()  # the server answers a wrong token by closing the connection
        wanted = {"event": {"prefix": [_FLOW_RUN, _TASK_RUN]}, "occurred": {"until": "9999-01-01T00:00:00Z"}}
        await socket.send({"type": "filter", "filter": wanted, "backfill": False})

    def read(self, message: Any) -> None:
        """Add the job of an event; see `SocketChanges`."""
        event = message["event"]
        if event["event"].endswith(_HEARTBEAT):
            return
        roles = {one.get("prefect.resource.role"): _id(one) for one in event["related"]}
        is_flow_run = event["event"].startswith(_FLOW_RUN)
        run_id = _id(event["resource"]) if is_flow_run else roles.get("flow-run", "")
        # Only an event of another run can be of a sub flow.
        job_id = run_id if run_id in self.followed else self._jobs().get(run_id)
        if job_id is not None:
            self.changed.add(job_id)
        elif is_flow_run and "task-run" not in roles:
            # A new job. Of a new sub flow, a line of the flow that calls it says so.
            self.changed.add(run_id)

    async def probe(self) -> None:
        """Add the jobs with new lines; see `SocketChanges`."""
        if self._position is None:
            self._position = await self._newest()
        jobs, position = self._jobs(), self._position
        after = max(EPOCH, position.newest - timedelta(seconds=LATE_WINDOW_S))
        for runs in _parts(list(jobs), _RUNS_A_REQUEST):
            async with aclosing(self._new_entries(runs, position, after)) as pages:
                async for entries in pages:
                    for entry in entries:
                        position.add(entry)
                        self.changed.add(jobs[entry["flow_run_id"]])
        position.forget(LATE_WINDOW_S)

    def _jobs(self) -> Mapping[str, str]:
        """Return the followed jobs by the ids of their flow runs."""
        return {run_id: job_id for job_id in self.followed for run_id in self._flow_runs_of(job_id)}

    async def _newest(self) -> SeenEntries:
        """Return the position of the newest line of all runs: what is older was read by polls."""
        position = SeenEntries(EPOCH, {})
        body = {"sort": "TIMESTAMP_DESC", "limit": 1}
        for entry in await self.http.send_json("POST", "/logs/filter", body, reads=True):
            position.add(entry)
        return position


def _id(resource: Mapping[str, str]) -> str:
    return resource["prefect.resource.id"].removeprefix(_FLOW_RUN).removeprefix(_TASK_RUN)


def _token(authorization: Authorization) -> str | None:
    """Return what Prefect's own client sends: the API key, or user and password."""
    scheme, _, token = authorization.value.rpartition(" ")
    return base64.b64decode(token).decode() if scheme == "Basic" else token or None


def _parts(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
