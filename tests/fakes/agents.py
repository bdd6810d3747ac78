"""Agents with fake services and a fake collector: `Bench` makes them, `looped` runs an async test.

    def test_x(bench):
        bench.fake.add_job("j1", state="SUCCEEDED")
        bench.fake.add_lines("j1", "a", "b")
        assert bench.once().acked == 2
        assert bench.bodies() == ["a", "b"]

A bench has one state directory, so the agents that a test makes are restarts of one agent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from tailspan.config import Settings, load_settings
from tailspan.logs.page import NANOS_PER_MS, Line, LogPage
from tailspan.models import ListedJob
from tailspan.services import JobService
from tailspan.testing import FakeService
from tailspan_agent.agent import Agent, OnceResult
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import LogRow, SpanRow

PATIENCE_S = 90.0


def looped(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in its own loop; it must leave no task and no unhandled error."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        unseen: list[dict[str, Any]] = []

        async def in_loop() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
            async with asyncio.timeout(PATIENCE_S):
                await test(*args, **kwargs)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        asyncio.run(in_loop())
        assert not unseen, unseen

    return run


async def until(holds: Callable[[], Any]) -> None:
    """Wait until a condition without an event holds; `looped` limits the time."""
    while not holds():
        await asyncio.sleep(0.005)


class Bench:
    """One state directory, one collector, and the fake services that agents follow.

    Attributes:
        directory: Where everything is.
        collector: What receives.
        services: The fake services by configured name; ``fake`` is there from the start.
    """

    def __init__(self, directory: Path, collector: Collector) -> None:
        self.directory = directory
        self.collector = collector
        self.services: dict[str, FakeService] = {"fake": FakeService("fake")}

    @property
    def fake(self) -> FakeService:
        """The service ``fake``."""
        return self.services["fake"]

    @property
    def state_dir(self) -> Path:
        """The agent's state directory."""
        return self.directory / "agent"

    def config(
        self, *watches: dict[str, Any], otlp: dict[str, Any] | None = None, more: str = "", **agent: Any
    ) -> Path:
        """Write a configuration file and return its path.

        Args:
            *watches: Tables of ``[[agent.watch]]``; without any, one that discovers all jobs of ``fake``.
                otlp: Keys of ``[otlp]``; None takes the endpoint away.
            more: Further TOML.
            **agent: Keys of ``[agent]``.
        """
        lines = ['default_service = "fake"']
        for name in self.services:
            lines += [f"[services.{name}]", 'type = "fused"']
        agent = {"state_dir": str(self.state_dir), "listen": "", "drain_timeout": 1, **agent}
        lines += ["[agent]", *_keys(agent)]
        for watch in watches or ({"discover": True},):
            lines += ["[[agent.watch]]", *_keys({"service": "fake", "settle": 0, **watch})]
        keys = {"endpoint": self.collector.http_url, **(otlp or {})}
        lines += ["[otlp]", *_keys({key: value for key, value in keys.items() if value is not None}), more]
        path = self.directory / "config.toml"
        path.write_text("\n".join(lines))
        return path

    def settings(self, *watches: dict[str, Any], **keys: Any) -> Settings:
        """Return the settings of such a file; see `config`."""
        return load_settings(self.config(*watches, **keys))

    def open(self, name: str, settings: Settings) -> JobService:
        """Return the fake service of that name; the seam of the agent, of check and of verify."""
        return self.services[name]

    def agent(self, *watches: dict[str, Any], **keys: Any) -> Agent:
        """Make an agent; see `config`."""
        needs_page_token = keys.pop("needs_page_token", False)
        return Agent(self.settings(*watches, **keys), self.open, needs_page_token=needs_page_token)

    def once(self, *watches: dict[str, Any], timeout_s: float = PATIENCE_S, **keys: Any) -> OnceResult:
        """Relay once what is readable now."""
        return asyncio.run(self.agent(*watches, **keys).run_once(timeout_s))

    def once_until(self, holds: Callable[[], Any], *watches: dict[str, Any], **keys: Any) -> OnceResult:
        """Relay once, and interrupt the pass as soon as this is true: a timeout would depend on the machine."""

        async def run() -> OnceResult:
            agent = self.agent(*watches, **keys)
            once = asyncio.create_task(agent.run_once(PATIENCE_S))
            while not (holds() or once.done()):
                await asyncio.sleep(0.005)
            agent.stop()
            return await once

        return asyncio.run(run())

    def refused(self, signal: str = "logs") -> bool:
        """Return whether the collector has received a request with this signal."""
        return any(request.signal == signal for request in self.collector.requests)

    @asynccontextmanager
    async def running(self, *watches: dict[str, Any], **keys: Any) -> AsyncIterator[Agent]:
        """Run an agent until the block ends, then stop it with its drain."""
        agent = self.agent(*watches, **keys)
        ready = asyncio.Event()
        task = asyncio.create_task(agent.run(on_ready=ready.set))
        task.add_done_callback(lambda _: ready.set())
        try:
            await ready.wait()
            yield agent
        finally:
            agent.stop()
            await task

    async def received(self, condition: Callable[[], Any]) -> None:
        """Wait until the collector has received what makes this true."""
        await asyncio.to_thread(self.collector.wait_until, lambda: bool(condition()))

    def bodies(self, job_id: str | None = None) -> list[str]:
        """Return the text of all lines received, in order."""
        return [row.body for row in self.lines(job_id)]

    def lines(self, job_id: str | None = None) -> list[LogRow]:
        """Return the records of all lines received, in order; without events such as failures and receipts."""
        return [
            row
            for row in self.collector.log_records()
            if not row.event_name and job_id in (None, row.resource["cicd.pipeline.run.id"])
        ]

    def receipts(self) -> dict[str, LogRow]:
        """Return the delivery receipts received, by job id."""
        return {
            row.resource["cicd.pipeline.run.id"]: row
            for row in self.collector.log_records()
            if row.event_name == "tailspan.receipt"
        }

    def spans(self, job_id: str | None = None) -> dict[str, SpanRow]:
        """Return the spans received by name; the run span as ``run``."""
        return {
            "run" if span.name.startswith("RUN ") else span.name: span
            for span in self.collector.spans()
            if job_id in (None, span.resource["cicd.pipeline.run.id"])
        }

    def metric(self, name: str, **attributes: Any) -> Any:
        """Return the newest value of a metric's point with these attributes; None if there is no such point."""
        found = [
            row.value
            for row in self.collector.metrics()
            if row.name == name and attributes.items() <= row.attributes.items()
        ]
        return found[-1] if found else None


def _keys(table: dict[str, Any]) -> list[str]:
    # JSON is TOML for text, numbers, booleans and lists of them; a table is written inline.
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


class OddService(FakeService):
    """A fake service with the ways of real ones.

    Attributes:
        cut: A job whose log breaks off: its id, after how many pages of each read, and with which error.
        lists_names: Whether rows of the list have names and line counts, as those of our own server do.
        unlisted: Jobs that the list does not show.
        list_pages: Pages of the list handed out so far.
        pages: Pages of lines handed out so far.
        open_reads: Reads of logs that were begun and neither ended nor closed.
    """

    def __init__(self, name: str, **keys: Any) -> None:
        super().__init__(name, **keys)
        self.cut: tuple[str, int, Exception] | None = None
        self.lists_names = True
        self.unlisted: set[str] = set()
        self.list_pages = 0
        self.pages = 0
        self.open_reads = 0
        self._late: dict[str, list[Line]] = {}

    def add_late(self, job_id: str, message: str, *, timestamp_ms: int) -> None:
        """Let a line become visible behind every cursor: only a read from the start shows it, in its place."""
        self._late.setdefault(job_id, []).append(Line(timestamp_ms * NANOS_PER_MS, message))

    async def read_logs(self, job_id: str, cursor: bytes | None = None, **keys: Any) -> AsyncGenerator[LogPage, None]:
        """Yield the lines; see the class."""
        self.open_reads += 1
        count = 0
        try:
            async with aclosing(super().read_logs(job_id, cursor, **keys)) as pages:
                async for page in pages:
                    if self.cut is not None and self.cut[:2] == (job_id, count):
                        raise self.cut[2]
                    count += 1
                    self.pages += 1
                    yield self._with_late(job_id, page) if cursor is None else page
                    await asyncio.sleep(0)  # as real ones do at least
        finally:
            self.open_reads -= 1

    async def list_jobs(self) -> AsyncGenerator[list[ListedJob], None]:
        """Yield the rows; see the class."""
        async with aclosing(super().list_jobs()) as pages:
            async for rows in pages:
                self.list_pages += 1
                listed = [row for row in rows if row.job_id not in self.unlisted]
                if not self.lists_names:
                    listed = [dataclasses.replace(row, job_name=None, lines=None) for row in listed]
                if listed:
                    yield listed

    def _with_late(self, job_id: str, page: LogPage) -> LogPage:
        if job_id not in self._late:
            return page
        lines = [Line(time, text) for time, text in zip(page.times_unix_nano(), page.lines, strict=True)]
        lines = sorted([*lines, *self._late[job_id]])
        return LogPage.from_lines(lines, cursor=page.cursor, identity=self.identity, job_id=job_id)
