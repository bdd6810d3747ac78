"""Jobs that other agents of the fleet follow, as snapshots made of what those agents have stored."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tailspan._identity import trace_id
from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.job.ledger import JobLedger
from tailspan_agent.web.fleet_members import follower_of

if TYPE_CHECKING:
    from tailspan_agent.fleet.overview import FleetOverview

__all__ = ["SharedJobs", "stored_snapshot", "stored_status"]

_CHUNK_JOBS = 200


class SharedJobs:
    """The running jobs of other agents. A job whose ledger is as before costs nothing.

    Args:
        fleet: The agents and their jobs.
    """

    def __init__(self, fleet: FleetOverview) -> None:
        self._fleet = fleet
        self._snapshots: dict[int, tuple[str, bool, JobSnapshot]] = {}

    async def snapshots(self, services: Mapping[str, str]) -> list[tuple[JobSnapshot, int | None]]:
        """Return the jobs, each with the number of its agent; None while no agent has it.

        Args:
            services: The configured names of services by their identity; jobs of other services are left out.
        """
        known, self._snapshots, found = self._snapshots, {}, []
        for count, job in enumerate(self._fleet.jobs, 1):
            if not count % _CHUNK_JOBS:
                await asyncio.sleep(0)  # let the relay work between two chunks
            if job.identity not in services:
                continue
            stale = follower_of(self._fleet, job.agent) is None
            ledger_text, was_stale, snapshot = known.get(job.number, ("", False, None))
            if snapshot is None or ledger_text != job.ledger or was_stale != stale:
                try:
                    ledger = JobLedger.from_json(job.ledger)
                except ValueError:
                    continue
                status = stored_status(services[job.identity], job.identity, job.job_id, job.name, ledger, stale=stale)
                snapshot = stored_snapshot(status, ledger)
            self._snapshots[job.number] = job.ledger, stale, snapshot
            found.append((snapshot, job.agent))
        return found


def stored_status(service: str, identity: str, job_id: str, name: str, ledger: JobLedger, *, stale: bool) -> JobStatus:
    """Return the last status of a job that the store has.

    Args:
        service: The configured name of its service.
        identity: The identity of its service.
        job_id: The job.
        name: Its name.
        ledger: What the agent has observed of it.
        stale: Whether it is not known to be the present status.
    """
    state = ledger.states[-1][1] if ledger.states else JobState.UNKNOWN
    running_ns = next((seen_ns for seen_ns, seen in ledger.states if seen is JobState.RUNNING), None)
    starts_ns = [time_ns for time_ns in (ledger.first_line_ns, running_ns) if time_ns]
    started_at = datetime.fromtimestamp(min(starts_ns) / 1e9, UTC) if starts_ns and not stale else None
    return JobStatus.from_state(
        state,
        job_id=job_id,
        job_name=name,
        service=service,
        identity=identity,
        trace_id=trace_id(identity, job_id),
        started_at=started_at,
        stale=stale,
    )


def stored_snapshot(status: JobStatus, ledger: JobLedger) -> JobSnapshot:
    """Return a snapshot of a job that another agent follows.

    Args:
        status: Its status.
        ledger: What the other agent has observed of it.
    """
    return JobSnapshot(
        service=status.service or "",
        status=status,
        first_line_unix_nano=ledger.first_line_ns,
        last_line_unix_nano=ledger.last_line_ns,
        identity=status.identity,
        lines=ledger.lines,
        last_line=ledger.last_line,
    )
