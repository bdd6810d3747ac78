"""Which jobs the page shows: filtered, in order, and cut into pages. Pure.

Thousands of jobs are looked through each second while somebody looks, so an `Entry` has only what a filter needs;
what a row says beyond that is asked for the rows of one page alone.
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

__all__ = ["PAGE_ROWS", "STATE_GROUPS", "Entry", "Filter", "JobFilter", "select"]

PAGE_ROWS = 50

STATE_GROUPS: Mapping[str, frozenset[JobState]] = {
    "running": frozenset({JobState.RUNNING, JobState.UNKNOWN}),
    "pending": frozenset({JobState.PENDING}),
    "succeeded": frozenset({JobState.SUCCEEDED}),
    "failed": frozenset({JobState.FAILED, JobState.TIMED_OUT, JobState.LOST}),
    "canceled": frozenset({JobState.CANCELED}),
}
_GROUP_OF = {state: group for group, states in STATE_GROUPS.items() for state in states}


class Entry(NamedTuple):
    """A job as far as filters and order need it.

    Attributes:
        service: The configured name of its service.
        job_id: The job.
        name: Its pipeline.
        state: Its state.
        when_ns: When it ended, or started, or else was seen, in ns since the epoch.
        job: Where the rest is found.
    """

    service: str
    job_id: str
    name: str
    state: JobState
    when_ns: int
    job: JobSnapshot | EndedJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What a user asked for; empty words ask for everything.

    Attributes:
        text: Part of a name or an id, in any case.
        state: One of `STATE_GROUPS`.
        service: The configured name of a service.
        page: The number of the page, from 1.
    """

    text: str = ""
    state: str = ""
    service: str = ""
    page: int = 1

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Filter:
        """Make it from a URL's query; what is no filter filters nothing."""
        page = query.get("page", "")
        state = query.get("state", "")
        return cls(
            text=query.get("q", "").strip()[:200],
            state=state if state in STATE_GROUPS else "",
            service=query.get("service", "")[:200],
            page=max(1, int(page)) if page.isascii() and page.isdigit() and len(page) < 9 else 1,
        )

    def query(self, **changed: object) -> str:
        """Return it as a URL's query, changed; going over to another filter begins at the first page."""
        page = changed.pop("page", 1 if changed else self.page)
        fields: dict[str, object] = {"q": self.text, "state": self.state, "service": self.service, **changed}
        return urlencode({key: value for key, value in {**fields, "page": page if page != 1 else ""}.items() if value})

    def matches(self, entry: Entry) -> bool:
        """Return whether a job is asked for, whatever its state."""
        if self.service and entry.service != self.service:
            return False
        text = self.text.lower()
        return not text or text in entry.name.lower() or text in entry.job_id.lower()


@dataclass(frozen=True, slots=True)
class JobFilter:
    """One page of jobs.

    Attributes:
        entries: Its jobs: those that have not ended first, then the newest first.
        total: How many jobs the filter lets through.
        counts: How many there are by group of states, whatever state the filter asks for.
        page: The number of this page; the last one where the filter asked for one behind it.
        pages: How many pages there are, at least 1.
    """

    entries: Sequence[Entry]
    total: int
    counts: Mapping[str, int]
    page: int
    pages: int


def select(entries: Iterable[Entry], wanted: Filter) -> JobFilter:
    """Return the page of jobs that a user asked for."""
    matching = [entry for entry in entries if wanted.matches(entry)]
    counts = Counter(_GROUP_OF[entry.state] for entry in matching)
    if wanted.state:
        states = STATE_GROUPS[wanted.state]
        matching = [entry for entry in matching if entry.state in states]
    matching.sort(key=lambda entry: (entry.state.is_terminal, -entry.when_ns, entry.job_id))
    pages = max(1, -(-len(matching) // PAGE_ROWS))
    page = min(wanted.page, pages)
    start = (page - 1) * PAGE_ROWS
    return JobFilter(matching[start : start + PAGE_ROWS], len(matching), counts, page, pages)
