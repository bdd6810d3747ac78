"""`Backlog`: found jobs that wait for their first turn.

A job that has ended can wait, and a hundred thousand of them must not be opened at one moment. So only a few are opened
at a time: the oldest of a pipeline first (stores reject old lines after newer ones), and the pipelines in turn.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

from tailspan.models import ListedJob

__all__ = ["Backlog", "WaitingJob"]


class WaitingJob(NamedTuple):
    """A job that waits.

    Attributes:
        job_id: The job.
        name: Its name; empty if it is not known.
        row: Its row of the list; None without one.
    """

    job_id: str
    name: str
    row: ListedJob | None


class Backlog:
    """Waiting jobs by pipeline."""

    def __init__(self) -> None:
        self._jobs: dict[str, WaitingJob] = {}
        # Times and ids; of a pipeline with one job only the id: a hundred thousand jobs may have as many names.
        self._pipelines: dict[str, list[tuple[float, str]] | str] = {}
        self._order: deque[str] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    @property
    def ids(self) -> list[str]:
        """The ids of all jobs that wait."""
        return list(self._jobs)

    def get(self, job_id: str) -> WaitingJob | None:
        """Return a job; None if it does not wait."""
        return self._jobs.get(job_id)

    def put(self, job: WaitingJob) -> None:
        """Add a job, or replace what is known of it: each full list does so with all that wait."""
        known = self._jobs.get(job.job_id)
        self._jobs[job.job_id] = job
        if known is not None and known.name == job.name and (known.row is not None or job.row is None):
            return
        waiting = self._pipelines.get(job.name)
        if waiting is None:
            self._pipelines[job.name] = job.job_id
            self._order.append(job.name)
        elif isinstance(waiting, list):
            heapq.heappush(waiting, (_time_s(job.row), job.job_id))
        elif waiting != job.job_id:
            other = self._jobs.get(waiting)
            self._pipelines[job.name] = sorted(
                [(_time_s(other and other.row), waiting), (_time_s(job.row), job.job_id)]
            )

    def take(self) -> WaitingJob | None:
        """Remove and return the oldest job of the next pipeline; None without jobs."""
        while self._order:
            name = self._order[0]
            while (job_id := self._pop(name)) is not None:
                job = self._jobs.get(job_id)
                if job is not None and job.name == name:
                    del self._jobs[job_id]
                    self._order.rotate(-1)
                    return job
            del self._pipelines[name]
            self._order.popleft()
        return None

    def _pop(self, name: str) -> str | None:
        """Remove and return the id of a pipeline's oldest job; None without one."""
        waiting = self._pipelines[name]
        if isinstance(waiting, str):
            self._pipelines[name] = []
            return waiting
        return heapq.heappop(waiting)[1] if waiting else None

    def remove(self, job_id: str) -> WaitingJob | None:
        """Remove and return a job; None if it does not wait."""
        # Its place in the order is dropped when its turn comes.
        return self._jobs.pop(job_id, None)

    def clear(self) -> None:
        """Remove all jobs."""
        self._jobs.clear()
        self._pipelines.clear()
        self._order.clear()


def _time_s(row: ListedJob | None) -> float:
    """Return about when a job ended, in seconds since the epoch; 0 if it is unknown."""
    when = row and (row.state_since or row.created_at)
    return when.timestamp() if when else 0.0
