"""Filters, sorts and paginates the jobs on the page. Pure.

While a browser shows the list, thousands of jobs are filtered every second. So a `JobEntry` has only what a filter
needs, and the other columns are made for the rows of one page only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlencode

from tailspan.models import JobState
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.web.ended_jobs import EndedJob

__all__ = ["PAGE_ROWS", "STATE_GROUPS", "JobEntry", "JobFilter", "JobListing", "list_jobs"]

PAGE_ROWS = 50

STATE_GROUPS: Mapping[str, frozenset[JobState]] = {
    "running": frozenset({JobState.RUNNING, JobState.UNKNOWN}),
    "pending": frozenset({JobState.PENDING}),
    "succeeded": frozenset({JobState.SUCCEEDED}),
    "failed": frozenset({JobState.FAILED, JobState.TIMED_OUT, JobState.LOST}),
    "canceled": frozenset({JobState.CANCELED}),
}
_GROUP_OF = {state: group for group, states in STATE_GROUPS.items() for state in states}


class JobEntry(NamedTuple):
    """The fields of a job for filtering and sorting.

    Attributes:
        service: The configured name of its service.
        job_id: The job.
        name: Its pipeline.
        state: Its state.
        when_ns: Its end, or else its start, or else its submission, in ns since the epoch.
        job: The job with all fields.
        agent: The number of the agent of the fleet that follows it; None without one.
    """

    service: str
    job_id: str
    name: str
    state: JobState
    when_ns: int
    job: JobSnapshot | EndedJob
    agent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """The user's filter; an empty field matches everything.

    Attributes:
        text: Part of a name or an id, case-insensitive.
        state: One of `STATE_GROUPS`.
        service: The configured name of a service.
        page: The page number, from 1.
    """

    text: str = ""
    state: str = ""
    service: str = ""
    page: int = 1

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> JobFilter:
        """Parse the query of a URL; ignore invalid values."""
        page = query.get("page", "")
        state = query.get("state", "")
        return cls(
            text=query.get("q", "").strip()[:200],
            state=state if state in STATE_GROUPS else "",
            service=query.get("service", "")[:200],
            page=max(1, int(page)) if page.isascii() and page.isdigit() and len(page) < 9 else 1,
        )

    def query(self, **changed: object) -> str:
        """Return the query of a URL, with changes; a changed filter starts at the first page."""
        page = changed.pop("page", 1 if changed else self.page)
        fields: dict[str, object] = {"q": self.text, "state": self.state, "service": self.service, **changed}
        return urlencode({key: value for key, value in {**fields, "page": page if page != 1 else ""}.items() if value})

    def matches(self, entry: JobEntry) -> bool:
        """Return whether a job matches service and text; the state is not compared."""
        if self.service and entry.service != self.service:
            return False
        text = self.text.lower()
        return not text or text in entry.name.lower() or text in entry.job_id.lower()


@dataclass(frozen=True, slots=True)
class JobListing:
    """One page of jobs.

    Attributes:
        entries: Jobs that have not ended first, then newest first.
        total: Number of matching jobs on all pages.
        counts: Number of jobs by state group that match the filter without its state.
        page: The page number; the last page if the requested one is beyond it.
        pages: Number of pages, at least 1.
    """

    entries: Sequence[JobEntry]
    total: int
    counts: Mapping[str, int]
    page: int
    pages: int


def list_jobs(entries: Iterable[JobEntry], job_filter: JobFilter) -> JobListing:
    """Return one page of the jobs that match a filter."""
    matching = [entry for entry in entries if job_filter.matches(entry)]
    counts = Counter(_GROUP_OF[entry.state] for entry in matching)
    if job_filter.state:
        states = STATE_GROUPS[job_filter.state]
        matching = [entry for entry in matching if entry.state in states]
    matching.sort(key=lambda entry: (entry.state.is_terminal, -entry.when_ns, entry.job_id))
    pages = max(1, -(-len(matching) // PAGE_ROWS))
    page = min(job_filter.page, pages)
    start = (page - 1) * PAGE_ROWS
    return JobListing(matching[start : start + PAGE_ROWS], len(matching), counts, page, pages)
