"""Filters, sorts and paginates the jobs on the page. Pure.

While a browser shows the list, thousands of jobs are filtered every second. So a `JobEntry` has only what a filter
needs, and the other columns are made for the rows of one page only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from tailspan.models import JobState
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.web.ended_jobs import EndedJob

__all__ = [
    "PAGE_ROWS",
    "RANGES",
    "SORTS",
    "STATE_GROUPS",
    "Chip",
    "JobEntry",
    "JobFilter",
    "JobListing",
    "list_jobs",
    "matching_jobs",
]

PAGE_ROWS = 50

STATE_GROUPS: Mapping[str, frozenset[JobState]] = {
    "running": frozenset({JobState.RUNNING, JobState.UNKNOWN}),
    "pending": frozenset({JobState.PENDING}),
    "succeeded": frozenset({JobState.SUCCEEDED}),
    "failed": frozenset({JobState.FAILED, JobState.TIMED_OUT, JobState.LOST}),
    "canceled": frozenset({JobState.CANCELED}),
}
_GROUP_OF = {state: group for group, states in STATE_GROUPS.items() for state in states}

ALERTS = {"silent": "silent", "late": "slow"}
"""What else can be chosen as a state: the anomaly of a running job."""

RANGES: Mapping[str, tuple[str, int]] = {
    "1h": ("Last hour", 3600),
    "24h": ("24 hours", 86_400),
    "7d": ("7 days", 7 * 86_400),
    "30d": ("30 days", 30 * 86_400),
}
"""The time ranges by their value in a URL: label, and seconds."""

SORTS = ("name", "-name", "duration", "-duration", "state", "-state", "when")
"""The orders in a URL, descending with a minus sign; without one: what runs first, then the newest."""

_MAX_TEXT, _MAX_ATTRIBUTES = 200, 8


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
        alerts: The anomalies that a running job has now.
    """

    service: str
    job_id: str
    name: str
    state: JobState
    when_ns: int
    job: JobSnapshot | EndedJob
    agent: int | None = None
    alerts: tuple[str, ...] = ()

    @property
    def started_ns(self) -> int | None:
        """Its start, in ns since the epoch; None before it started."""
        return self.job.started_unix_nano if isinstance(self.job, JobSnapshot) else self.job.started_ns

    def duration_ns(self, now_ns: int) -> int:
        """Return how long it ran or has been running, in ns; 0 before it started."""
        started_ns = self.started_ns
        return 0 if started_ns is None else max(0, (self.when_ns if self.state.is_terminal else now_ns) - started_ns)


class Chip(NamedTuple):
    """A part of the filter that is in force.

    Attributes:
        label: What it selects.
        query: The query of the page without it.
    """

    label: str
    query: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """The user's filter; an empty field matches everything.

    Attributes:
        text: Part of a name or an id, case-insensitive.
        state: One of `STATE_GROUPS` or `ALERTS`.
        service: The configured name of a service.
        pipeline: The whole name of a pipeline.
        attributes: Attributes that a job has, each ``key=value``, or ``key`` for any value.
        range: One of `RANGES`: jobs that run, or ended in that time.
        sort: One of `SORTS`.
        page: The page number, from 1.
    """

    text: str = ""
    state: str = ""
    service: str = ""
    pipeline: str = ""
    attributes: tuple[str, ...] = ()
    range: str = ""
    sort: str = ""
    page: int = 1

    @classmethod
    def from_query(cls, query: QueryParams) -> JobFilter:
        """Parse the query of a URL; ignore invalid values."""
        page, state = query.get("page", ""), query.get("state", "")
        attributes = (text.strip()[: 2 * _MAX_TEXT] for text in query.getlist("attr"))
        return cls(
            text=query.get("q", "").strip()[:_MAX_TEXT],
            state=state if state in STATE_GROUPS or state in ALERTS else "",
            service=query.get("service", "")[:_MAX_TEXT],
            pipeline=query.get("pipeline", "")[:_MAX_TEXT],
            attributes=tuple(dict.fromkeys(filter(None, attributes)))[:_MAX_ATTRIBUTES],
            range=query.get("range", "") if query.get("range", "") in RANGES else "",
            sort=query.get("sort", "") if query.get("sort", "") in SORTS else "",
            page=max(1, int(page)) if page.isascii() and page.isdigit() and len(page) < 9 else 1,
        )

    def query(self, **changed: object) -> str:
        """Return the query of a URL, with changes; a changed filter starts at the first page."""
        page = changed.pop("page", 1 if changed else self.page)
        fields: dict[str, object] = {
            "q": self.text,
            "state": self.state,
            "service": self.service,
            "pipeline": self.pipeline,
            "attr": self.attributes,
            "range": self.range,
            "sort": self.sort,
            **changed,
            "page": page if page != 1 else "",
        }
        return urlencode({key: value for key, value in fields.items() if value}, doseq=True, errors="replace")

    @property
    def chips(self) -> list[Chip]:
        """The parts in force, except those that the page shows elsewhere: state, range, text and order."""
        found = [Chip(f"service: {self.service}", self.query(service=""))] if self.service else []
        if self.pipeline:
            found.append(Chip(f"pipeline: {self.pipeline}", self.query(pipeline="")))
        for one in self.attributes:
            rest = tuple(other for other in self.attributes if other != one)
            found.append(Chip(one, self.query(attr=rest)))
        return found

    @property
    def is_empty(self) -> bool:
        """Whether every job matches."""
        return replace(self, sort="", page=1) == JobFilter()

    def matches(self, entry: JobEntry, now_ns: int) -> bool:
        """Return whether a job matches service, pipeline, time range and text; state and attributes are not compared.

        Args:
            entry: The job.
            now_ns: The present time, in ns since the epoch.
        """
        if (self.service and entry.service != self.service) or (self.pipeline and entry.name != self.pipeline):
            return False
        if self.range and entry.state.is_terminal and entry.when_ns < now_ns - RANGES[self.range][1] * 1_000_000_000:
            return False
        text = self.text.lower()
        return not text or text in entry.name.lower() or text in entry.job_id.lower()

    def matches_attributes(self, attributes: Mapping[str, str]) -> bool:
        """Return whether a job with these attributes matches."""
        for wanted in self.attributes:
            key, separator, value = wanted.partition("=")
            if key not in attributes or (separator and attributes[key] != value):
                return False
        return True

    def matches_state(self, entry: JobEntry) -> bool:
        """Return whether a job is in the state."""
        if self.state in ALERTS:
            return ALERTS[self.state] in entry.alerts
        return not self.state or entry.state in STATE_GROUPS[self.state]


@dataclass(frozen=True, slots=True)
class JobListing:
    """One page of jobs.

    Attributes:
        entries: Jobs that have not ended first, then newest first, unless the filter has another order.
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


AttributesOf = Callable[[JobEntry], Mapping[str, str]]
"""Returns the attributes of a job without secrets; called only if they are compared."""


def matching_jobs(
    entries: Iterable[JobEntry], job_filter: JobFilter, now_ns: int, attributes_of: AttributesOf
) -> list[JobEntry]:
    """Return the jobs that match a filter, whatever their state."""
    matching = [entry for entry in entries if job_filter.matches(entry, now_ns)]
    if not job_filter.attributes:
        return matching
    return [entry for entry in matching if job_filter.matches_attributes(attributes_of(entry))]


def list_jobs(matching: Sequence[JobEntry], job_filter: JobFilter, now_ns: int) -> JobListing:
    """Return one page of jobs.

    Args:
        matching: The jobs that match the filter, whatever their state.
        job_filter: The filter.
        now_ns: The present time, in ns since the epoch.
    """
    counts = Counter(_GROUP_OF[entry.state] for entry in matching)
    found = [entry for entry in matching if job_filter.matches_state(entry)]
    found.sort(key=lambda entry: (entry.state.is_terminal, -entry.when_ns, entry.job_id))
    if job_filter.sort:
        # Stable: equal jobs keep the usual order.
        found.sort(key=_sort_key(job_filter.sort.lstrip("-"), now_ns), reverse=job_filter.sort.startswith("-"))
    pages = max(1, -(-len(found) // PAGE_ROWS))
    page = min(job_filter.page, pages)
    start = (page - 1) * PAGE_ROWS
    return JobListing(found[start : start + PAGE_ROWS], len(found), counts, page, pages)


def _sort_key(sort: str, now_ns: int) -> Callable[[JobEntry], str | int]:
    if sort == "name":
        return lambda entry: entry.name.lower()
    if sort == "duration":
        return lambda entry: entry.duration_ns(now_ns)
    if sort == "state":
        return lambda entry: entry.state.value
    return lambda entry: entry.when_ns
