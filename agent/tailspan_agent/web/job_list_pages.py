"""The start page: what is wrong now, when jobs ran, and a table of the jobs that match a filter; with live updates."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tailspan_agent.analysis.assessment import JobSnapshot, assess, is_unassessable
from tailspan_agent.errors import CheckpointError
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.ended_jobs import EndedJobs
from tailspan_agent.web.event_stream import KEEP_ALIVE, REFRESH_S, EventStreams, format_event
from tailspan_agent.web.fleet_members import page_of
from tailspan_agent.web.job_counts import StartCounts, job_counts
from tailspan_agent.web.job_filter import (
    PAGE_ROWS,
    RANGES,
    STATE_GROUPS,
    JobEntry,
    JobFilter,
    JobListing,
    list_jobs,
    matching_jobs,
)
from tailspan_agent.web.job_rows import JobRow, ended_entry, followed_entry, job_row
from tailspan_agent.web.rendering import PAGE_HEADERS, PageRenderer
from tailspan_agent.web.run_timeline import run_timeline
from tailspan_agent.web.shared_jobs import SharedJobs

__all__ = ["JobListPages"]

_LISTING_S = 0.8
_CHUNK_JOBS = 500
_TIMELINE_S = 10.0
_REASON_CHARS = 300
# Transactions of several agents end in any order, so a job may become visible behind newer ones.
_LATE_KEYS = 100


class JobListPages:
    """The start page and its live updates. All browsers share one reading of the jobs.

    Args:
        view: The data of the agent.
        pages: Renders templates.
        streams: Limits the live updates.
    """

    def __init__(self, view: AgentView, pages: PageRenderer, streams: EventStreams) -> None:
        self._view = view
        self._pages = pages
        self._streams = streams
        self._ended = [EndedJobs(view.store.ledgers)]
        if view.shared is not None:
            self._ended.append(EndedJobs(view.shared.store.ledgers, late_keys=_LATE_KEYS))
        self._shared = SharedJobs(view.fleet) if view.fleet is not None else None
        self._entries: list[JobEntry] = []
        self._entries_at_s = float("-inf")
        self._refreshing = asyncio.Lock()

    async def show(self, request: Request) -> Response:
        """Answer with the page."""
        job_filter = JobFilter.from_query(request.query_params)
        await self._refresh()
        listing, matching, now_ns = self._listing(job_filter)
        return self._pages.page(
            "jobs.html",
            tab="jobs",
            rows=self._rows(listing),
            services=sorted(self._view.services),
            pipelines=sorted(set(self._view.histories) | {entry.name for entry in self._entries[:_CHUNK_JOBS]}),
            timeline=run_timeline(matching, job_filter.range, now_ns),
            **self._head(job_filter, listing, now_ns),
        )

    async def stream(self, request: Request) -> Response:
        """Answer with the changes of the page as they occur."""
        job_filter = JobFilter.from_query(request.query_params)

        async def events() -> AsyncGenerator[str, None]:
            sent: dict[str, str] = {}
            order: list[str] = []
            head = banner = timeline = ""
            timeline_s = time.monotonic()
            while True:
                await self._refresh()
                listing, matching, now_ns = self._listing(job_filter)
                rendered = {row.key: self._pages.render("_row.html", row=row) for row in self._rows(listing)}
                changed = {key: html for key, html in rendered.items() if sent.get(key) != html}
                values = self._head(job_filter, listing, now_ns)
                new_head = self._pages.render("_jobs_head.html", **values)
                if changed or list(rendered) != order or new_head != head:
                    data: dict[str, Any] = {"order": list(rendered), "rows": changed}
                    if new_head != head:
                        data |= {"head": new_head, "foot": self._pages.render("_job_pages.html", **values)}
                    yield format_event("jobs", data)
                    sent, order, head = rendered, list(rendered), new_head
                else:
                    yield KEEP_ALIVE
                if (new_banner := self._pages.banner()) != banner:
                    yield format_event("banner", {"html": new_banner})
                    banner = new_banner
                if time.monotonic() - timeline_s > _TIMELINE_S:
                    timeline_s = time.monotonic()
                    lanes = run_timeline(matching, job_filter.range, now_ns)
                    new_timeline = self._pages.render("_timeline.html", timeline=lanes, job_filter=job_filter)
                    if new_timeline != timeline:
                        yield format_event("timeline", {"html": new_timeline})
                        timeline = new_timeline
                await asyncio.sleep(REFRESH_S)

        return self._streams.respond(events, PAGE_HEADERS)

    def _head(self, job_filter: JobFilter, listing: JobListing, now_ns: int) -> dict[str, Any]:
        return {
            "job_filter": job_filter,
            "listing": listing,
            "counts": self._counts(now_ns),
            "groups": list(STATE_GROUPS),
            "ranges": RANGES,
            "page_rows": PAGE_ROWS,
        }

    def _counts(self, now_ns: int) -> StartCounts:
        missing = self._view.context.pipeline_stats.missing
        return job_counts(
            self._entries,
            missing=[name for name, is_missing in missing.items() if is_missing],
            troubles=len(self._view.troubles),
            now_ns=now_ns,
        )

    async def _refresh(self) -> None:
        async with self._refreshing:
            if time.monotonic() - self._entries_at_s > _LISTING_S:
                self._entries = await self._read_entries()
                self._entries_at_s = time.monotonic()

    def _listing(self, job_filter: JobFilter) -> tuple[JobListing, list[JobEntry], int]:
        now_ns = time.time_ns()
        matching = matching_jobs(self._entries, job_filter, now_ns, self._attributes_of)
        return list_jobs(matching, job_filter, now_ns), matching, now_ns

    def _attributes_of(self, entry: JobEntry) -> Mapping[str, str]:
        # A filter must not find secrets.
        job = entry.job
        return self._view.redact_job(job.status).attributes if isinstance(job, JobSnapshot) else job.attributes

    async def _read_entries(self) -> list[JobEntry]:
        names = self._view.service_names
        elsewhere = await self.followed_elsewhere(names)
        # Afterwards, so that a job that has just come from another agent is shown once, as followed by this one.
        followed = self._view.followed
        known = {(job.identity, job.status.job_id) for job in followed}
        entries, now_ns = [], time.time_ns()
        for count, job in enumerate(followed, 1):
            entries.append(self._followed_entry(job, self._follower(job), now_ns))
            if not count % _CHUNK_JOBS:
                await asyncio.sleep(0)  # let the relay work between two chunks
        for job, agent in elsewhere:
            if (job.identity, job.status.job_id) not in known:
                known.add((job.identity, job.status.job_id))
                entries.append(self._followed_entry(job, agent, now_ns))
        for ended in self._ended:
            with contextlib.suppress(CheckpointError):
                await ended.refresh(known)
            entries += [
                ended_entry(job, names[job.identity])
                for job in ended.newest
                if job.identity in names and (job.identity, job.job_id) not in known
            ]
        return entries

    def _followed_entry(self, job: JobSnapshot, agent: int | None, now_ns: int) -> JobEntry:
        entry, history = followed_entry(job, agent), self._view.history(job.status.job_name)
        if is_unassessable(job, history):
            return entry
        assessment = assess(job, history, now_ns)
        holds = (("silent", assessment.silent), ("slow", assessment.slow))
        return entry._replace(alerts=tuple(kind for kind, is_so in holds if is_so))

    async def followed_elsewhere(self, names: Mapping[str, str]) -> list[tuple[JobSnapshot, int | None]]:
        """Return the jobs that other agents of the fleet follow, each with the number of its agent.

        Args:
            names: The configured names of services by their identity.
        """
        if self._view.fleet is None or self._shared is None:
            return []
        await self._view.fleet.refresh()
        return await self._shared.snapshots(names)

    def _follower(self, job: JobSnapshot) -> int | None:
        """Return the number of this agent, for a job of its fleet."""
        fleet, service = self._view.fleet, self._view.services.get(job.service)
        return None if fleet is None or service is None or service.polls_are_free else fleet.agent

    def _rows(self, listing: JobListing) -> list[JobRow]:
        now_ns = time.time_ns()
        return [
            self._with_agent(self._redacted(job_row(entry, self._view.history(entry.name), now_ns)), entry.agent)
            for entry in listing.entries
        ]

    def _redacted(self, row: JobRow) -> JobRow:
        # The status of a followed job is as its service has it.
        return replace(row, reason=self._view.redact(row.reason).split("\n")[0][:_REASON_CHARS]) if row.reason else row

    def _with_agent(self, row: JobRow, number: int | None) -> JobRow:
        fleet = self._view.fleet
        agent = fleet.agents.get(number) if fleet is not None and number is not None else None
        if fleet is None or agent is None:
            return row
        page = page_of(agent) if agent.id != fleet.agent else ""
        return replace(row, agent=agent.info.host, agent_path=f"{page}{row.path}" if page else "")
