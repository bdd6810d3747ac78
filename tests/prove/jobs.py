"""Jobs that write numbered lines: of the fake job API, and real ones of this machine."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from array import array
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from tailspan._identity import trace_id
from tailspan.services.fused import FusedService
from tests.fakes.job_api import FakeJob, FakeJobApi
from tests.fakes.local_jobs import LocalJobs, until
from tests.prove.tally import JobTally, line_text

NANOS_PER_MS = 1_000_000
SPANS = ("RUN", "executing")
_UNTIL_READ_S = 0.015


class Job(Protocol):
    """What a world does with a job of whatever service.

    Attributes:
        name: Its name, and what its lines begin with.
        job_id: Its id.
        tally: What arrived of it.
        spans: The spans that it must have once it has ended.
        ended: Whether it has ended.
    """

    name: str
    job_id: str
    tally: JobTally
    spans: Collection[str]
    ended: bool

    @property
    def identity(self) -> str:
        """The identity of its service."""
        ...

    @property
    def trace_id(self) -> str:
        """The trace that it must have."""
        ...

    @property
    def written(self) -> int:
        """How many lines it wrote."""
        ...

    def end(self) -> None:
        """End now."""
        ...

    def restarted(self, acked: int, *, strict: bool) -> None:
        """Note that the agent is restarted with a number of lines acknowledged."""
        ...


class NumberedJob:
    """A job of the fake job API.

    Attributes:
        name: Its id and its name, and what its lines begin with.
        fake: The job in the fake.
        tally: What arrived of it.
        written: How many lines it wrote, copies not counted.
        handed: How many lines the service has handed out since the agent's start.
        after_reply: Called when a reply with more lines than before was written.
        spans: The spans that it must have once it has ended.
    """

    spans = SPANS

    def __init__(self, api: FakeJobApi, name: str, *, start_ms: int | None = None, fill: str = "x") -> None:
        self.name = self.job_id = name
        self._fill = fill
        self.handed = 0
        self.ended = False
        self.after_reply: Callable[[], object] = lambda: None
        self._api = api
        self._times = array("Q")
        self._pads = array("I")
        self._copies: dict[int, int] = {}
        self._late: set[int] = set()
        self._next_ms = start_ms or int(time.time() * 1000) - 60_000
        self._asked = 0
        self.fake: FakeJob = api.add_job(name, name=name)
        self.fake.row["creation_date"] = datetime.now(UTC).isoformat()
        self.fake.on_read = self._on_read
        self.fake.on_answered = self._on_answered
        self.tally = JobTally(name, self._find, copies=self._copies, late=self._late)

    @property
    def written(self) -> int:
        """How many lines it wrote."""
        return len(self._times)

    @property
    def identity(self) -> str:
        """The identity of its service."""
        return FusedService(base_url=self._api.base_url).identity

    @property
    def trace_id(self) -> str:
        """The trace that it must have."""
        return trace_id(self.identity, self.name)

    def write(self, count: int, random_: random.Random, *, max_step_ms: int = 3, pad: int = 0) -> None:
        """Write a number of lines, 0 to `max_step_ms` apart."""
        for _ in range(count):
            self._next_ms += random_.randint(0, max_step_ms)
            self.line(self._next_ms, pad=pad)

    def line(self, timestamp_ms: int, *, pad: int = 0, copies: int = 1, visible_after_s: float = 0.0) -> None:
        """Write one line with this time and a number of copies, visible only after some seconds."""
        number = self.written
        self._next_ms = timestamp_ms
        if copies > 1:
            self._copies[number] = copies
        if visible_after_s:
            self._late.add(number)
        self._pads.append(pad)
        self._times.append(timestamp_ms)
        text = self._text(number)
        for _ in range(copies):
            self.fake.line(text, timestamp_ms, after_s=visible_after_s)

    def end(self, state: str = "Done") -> None:
        """End now."""
        self.becomes(state)
        self.ended = True

    def becomes(self, state: str) -> None:
        """Have this state from now on, in the list too."""
        self.fake.becomes(state, from_status=0)
        self.fake._status()

    def cut_next_reply(self, then: Callable[[], object]) -> None:
        """Hand out all lines in the next reply, call something, and only then end the reply."""

        def body(since_ms: int | None) -> Iterator[bytes]:
            self.fake.body = None
            rows = [
                {"message": self._text(number), "timestamp": ms}
                for number, ms in enumerate(self._times)
                if since_ms is None or ms >= since_ms
            ]
            reply = json.dumps(rows).encode()
            yield reply[:-1]
            self.handed = self.written
            time.sleep(_UNTIL_READ_S)
            then()
            yield reply[-1:]

        self.fake.body = body

    def restarted(self, acked: int, *, strict: bool) -> None:
        """Note that the agent is restarted with a number of lines acknowledged."""
        self.handed = 0
        # With late lines among them, the acked ones are not those with the lowest numbers.
        self.tally.restarted(0 if self._late else acked, strict=strict)

    def _find(self, number: int, text: str) -> tuple[int, int] | None:
        if number >= len(self._times) or text != self._text(number):
            return None
        earliest = self._times[number] * NANOS_PER_MS
        return earliest, earliest + NANOS_PER_MS - 1

    def _text(self, number: int) -> str:
        return line_text(self.name, number, self._fill * self._pads[number])

    def _on_read(self, number: int) -> None:
        self._asked = self.written

    def _on_answered(self, number: int) -> None:
        news = self._asked > self.handed
        self.handed = max(self.handed, self._asked)
        if news:
            self.after_reply()


PROGRAM = """
import os, sys, time
name, stop, burst, pause_s, paced = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
number, due = 0, time.monotonic()
write = sys.stdout.write
while not os.path.exists(stop):
    for number in range(number, number + burst):
        write(f"{name} #{number:07d} {time.time_ns()}\\n")
    number += 1
    sys.stdout.flush()
    due += pause_s
    time.sleep(max(0.0, due - time.monotonic()) if paced else pause_s)
with open(stop, "w") as file:
    file.write(str(number))
"""
_WRITTEN_AT = re.compile(r" (\d{19})$")


class LocalNumberedJob:
    """A real job of this machine, a program that writes lines until its test ends it.

    Its lines carry the time at which they were written; the record's time is when the supervisor read them.

    Attributes:
        name: Its name, and what its lines begin with.
        job_id: Its id.
        tally: What arrived of it.
        spans: The spans that it must have once it has ended.
    """

    spans = SPANS
    handed = 0

    def __init__(
        self, jobs: LocalJobs, name: str, *, burst: int = 5, pause_s: float = 0.01, paced: bool = False
    ) -> None:
        self.name = name
        self.ended = False
        self._jobs = jobs
        self._stop = Path(jobs.state_dir.parent, f"{name}.stop")
        command = [sys.executable, "-S", "-E", "-c", PROGRAM, name, str(self._stop), str(burst), str(pause_s)]
        self.job_id = jobs.start(*command, *(["paced"] if paced else []), name=name)
        self.identity = jobs.service.identity
        self.tally = JobTally(name, self._find)

    @property
    def trace_id(self) -> str:
        """The trace that it must have."""
        return trace_id(self.identity, self.job_id)

    @property
    def written(self) -> int:
        """How many lines it wrote; only after its end."""
        return int(self._stop.read_text())

    def write(self, count: int, random_: random.Random) -> None:
        """Nothing: it writes by itself."""

    def end(self) -> None:
        """Let it end, and wait until its log is complete."""
        self._stop.touch()
        until(lambda: self._jobs.service.status(self.job_id).logs_complete)
        self.ended = True

    def restarted(self, acked: int, *, strict: bool) -> None:
        """Note that the agent is restarted with a number of lines acknowledged."""
        self.tally.restarted(acked, strict=strict)

    def _find(self, number: int, text: str) -> tuple[int, int] | None:
        match = _WRITTEN_AT.search(text)
        if match is None:
            return None
        # The line was captured between its writing and now, however slow the machine is.
        return int(match[1]), time.time_ns()
