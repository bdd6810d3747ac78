"""Jobs that claim the impossible, print what is hard to hold, or have foreign files.

Their files are written here, as any program of the same user could write them. Beside them is a good job. Asked is that
everything is relayed, that the agent answers and stops in time, and how much memory it takes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailspan.local.index import HEADER, Entry, pack_entry
from tailspan.local.state import iso_time
from tailspan.local.store import JobStore, new_job_id
from tests.patience import Patience
from tests.prove.found import Found
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import Settings, World

MOST_BYTES = 256 << 20
MOST_CROWD_BYTES = 200 << 20
MOST_HEALTH_S, MOST_DRAIN_S = 1.0, 35.0
_CROWD, _MOST_LINKS = 100_000, 50_000
_MIB = 1 << 20
_GROUP = "  + Exception Group Traceback (most recent call last):"
_FRAME = '  | File "a.py", line 1, in f'


def make_job(
    store: JobStore, lines: Iterable[bytes] = (), *, spec: Any = None, ended_ns: int | None = None, **state: Any
) -> Path:
    """Write the files of an ended job, and return its directory.

    Args:
        store: Where.
        lines: Its lines, each with an entry of its own.
        spec: More of ``job.json``.
        ended_ns: When it ended, in ns since the epoch; None: now.
        **state: More of ``state.json``.
    """
    at_ns = time.time_ns() if ended_ns is None else ended_ns
    directory = store.jobs / new_job_id(at_ns)
    directory.mkdir(parents=True)
    moment = iso_time(at_ns)
    end = count = 0
    with (directory / "log").open("wb") as log, (directory / "log.idx").open("wb") as index:
        index.write(HEADER)
        for count, line in enumerate(lines, 1):
            log.write(line + b"\n")
            end += len(line) + 1
            index.write(pack_entry(Entry(end, at_ns + count * 1000, count, 1, 1 if not line.isascii() else 0)))
    known = {"id": directory.name, "name": "hostile", "command": ["x"], "identity": store.identity, "attributes": {}}
    (directory / "job.json").write_text(json.dumps({**known, "submitted_at": moment, **(spec or {})}))
    ended = {"state": "FAILED", "name": "hostile", "started_at": moment, "finished_at": moment, "end": moment}
    (directory / "state.json").write_text(json.dumps({**ended, "exit_code": 1, "lines": count, **state}))
    (directory / "lock").touch()
    return directory


def impossible_values(store: JobStore) -> None:
    """Times of all ages, exit codes, half characters, and attributes of all kinds."""
    for when in (
        "9999-12-31T23:59:59Z",
        "2263-01-01T00:00:00Z",
        "2099-01-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "soon",
    ):
        for key in ("started_at", "finished_at", "end"):
            make_job(store, [b"a line"], **{key: when})
    make_job(store, exit_code=10**40)
    make_job(store, error="\ud83d", name="\udcff", spec={"attributes": {"\ud800": "\udfff", "": "x"}})
    attributes = {f"k{number}": "v" * 100_000 for number in range(100)} | {"service.instance.id": "x", "host.name": "y"}
    make_job(store, spec={"attributes": attributes})


def long_lines(store: JobStore) -> None:
    """The last lines of failed jobs: a MiB each, with one wide character, of escapes, of wide characters only."""
    for line in (
        b"x" * (_MIB - 4) + "\U0001f600".encode(),
        b"\x1b[1m" * (_MIB // 4),
        "\U0001f600".encode() * (_MIB // 4),
    ):
        make_job(store, [line] * 100)


def tracebacks(store: JobStore) -> None:
    """Nested and broken stack traces, and many jobs with a long one."""
    for block in ([_GROUP, _FRAME], ["p " + _GROUP, "p " + _FRAME], ["Traceback (most recent call last):"]):
        make_job(store, [line.encode() for line in block] * 2_000)
    trace = ["Traceback (most recent call last):", *(['  File "a.py", line 1, in f'] * 390), "ValueError: x"]
    for _ in range(60):
        make_job(store, [line.ljust(300).encode() for line in trace])


def foreign_files(store: JobStore) -> None:
    """Sparse, damaged and endless files, and what is no file."""
    lines = [b"line %d" % number for number in range(100)]
    for names in (["log.idx"], ["log"], ["log", "log.idx"], ["state.json"]):
        directory = make_job(store, lines)
        for name in names:
            os.truncate(directory / name, 1 << 40)
    for name in ("log", "log.idx", "state.json", "lock"):
        directory = make_job(store, lines)
        (directory / name).unlink()
        os.mkfifo(directory / name)
    directory = make_job(store, lines)
    with (directory / "log.idx").open("ab") as file:
        file.write(os.urandom(20 * _MIB))
    directory = make_job(store, lines)
    (directory / "state.json").write_text('{"a": [' + "[]," * 5_000_000 + "0]}")


def crowd(store: JobStore) -> None:
    """A hundred thousand jobs of one name that ended just now; their files are links to those of a few."""
    pattern: list[Path] = []
    for number in range(_CROWD):
        if number % _MOST_LINKS == 0:
            pattern = list(make_job(store, [b"a line"], state="SUCCEEDED", exit_code=0).iterdir())
            continue
        directory = f"{store.jobs}/{new_job_id(time.time_ns())}"
        os.mkdir(directory)
        for path in pattern:
            os.link(path, f"{directory}/{path.name}")


def crowd_of_names(store: JobStore) -> None:
    """As many jobs, each with a name and an attribute of its own; every second one failed with a stack trace."""
    trace = [b"Traceback (most recent call last):", *([b'  File "a.py", line 1, in f'] * 30), b"ValueError: x"]
    logs: list[Path] = []
    for number in range(_CROWD):
        if number % _MOST_LINKS == 0:
            logs = [make_job(store, lines, state="FAILED") for lines in ([b"a line"], trace)]
        job_id, failed = new_job_id(time.time_ns()), number % 2
        directory = f"{store.jobs}/{job_id}"
        os.mkdir(directory)
        for name in ("log", "log.idx", "lock"):
            os.link(logs[failed] / name, f"{directory}/{name}")
        moment = iso_time(time.time_ns())
        spec = {"id": job_id, "name": f"job {number}", "command": ["x"], "identity": store.identity}
        state = {"state": "FAILED" if failed else "SUCCEEDED", "exit_code": failed, "lines": 32 if failed else 1}
        for name, content in (
            ("job.json", {**spec, "submitted_at": moment, "attributes": {f"key-{number}": f"value {number}"}}),
            ("state.json", {**state, "name": spec["name"], "finished_at": moment, "end": moment}),
        ):
            with open(f"{directory}/{name}", "w") as file:
                json.dump(content, file)


@dataclass(frozen=True)
class Hostile:
    """A row.

    Attributes:
        name: The row's name.
        make: Writes the jobs.
        left_out: How many of them need not be relayed before SIGTERM: no log that can be read, or a crowd.
        most_bytes: The most memory that the agent may take.
        timeout_s: How long it may take to relay all of them.
    """

    name: str
    make: Callable[[JobStore], None]
    left_out: int = 0
    most_bytes: int = MOST_BYTES
    timeout_s: float = 300.0

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run, alone=True)

    def _run(self, seed: str) -> Row:
        row, slow = Row(self.name), 0
        with World(seed, Settings(page=True)) as world:
            # Not the store of the world's own jobs, which reads all files of its jobs at its end.
            store = JobStore(world.home / "hostile")
            self.make(store)
            jobs = len(store.job_ids())
            world.configure(lambda text: text.replace(f"{world.home}/jobs", f"{world.home}/hostile"))
            world.start()
            world.until(lambda: _is_healthy(world.page_url), "the agent's page")
            agent = world.agent
            assert agent is not None

            def pids() -> tuple[int, int]:
                return agent.pid, os.getpid()

            patience = Patience(self.timeout_s, pids)
            while (done := _done(world)) < jobs - self.left_out and not patience.is_over():
                world.collector.drain()
                answer = Patience(MOST_HEALTH_S, pids)
                slow += not _is_healthy(world.page_url) or answer.is_over()
                time.sleep(0.05)
            world.terminate()
            patience = Patience(MOST_DRAIN_S, pids)
            while agent.poll() is None and not patience.is_over():
                time.sleep(0.02)
            drains = agent.poll() is not None
            if not drains:
                world.kill()
            found = Found(jobs, exit_code=world.ended(), peak_rss=world._peak_rss)
        row.found = [found]
        for holds, problem in (
            (done >= jobs - self.left_out, f"{done} of {jobs} jobs were relayed"),
            (found.peak_rss <= self.most_bytes, f"the agent took {found.peak_rss >> 20} MiB"),
            (not slow, f"/healthz took over {MOST_HEALTH_S:g} s {slow} times"),
            (drains, f"SIGTERM took over {MOST_DRAIN_S:g} s"),
        ):
            row.problems += [] if holds else [problem]
        return row


def _done(world: World) -> int:
    """Return how many jobs the store has as relayed to their end."""
    if not world.database.exists():
        return 0
    with closing(sqlite3.connect(f"{world.database.as_uri()}?mode=ro", uri=True)) as db:
        try:
            (count,) = db.execute("SELECT count(*) FROM jobs WHERE ended = 1 AND logs_complete = 1").fetchone()
        except sqlite3.OperationalError:
            return 0
    return int(count)


def _is_healthy(url: str) -> bool:
    """Return whether ``/healthz`` answers."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
            return bool(answer.read())
    except OSError:
        return False


FAULTS = (
    Hostile("hostile jobs: impossible values", impossible_values),
    Hostile("hostile jobs: last lines of a MiB with wide characters", long_lines),
    Hostile("hostile jobs: nested, broken and many stack traces", tracebacks),
    Hostile("hostile jobs: sparse, damaged and foreign files", foreign_files, left_out=2),
    Hostile(
        "hostile jobs: 100,000 ended jobs of one name, and SIGTERM among them",
        crowd,
        left_out=_CROWD - 4_000,
        most_bytes=MOST_CROWD_BYTES,
        timeout_s=900.0,
    ),
    Hostile(
        "hostile jobs: 100,000 ended jobs of as many names, half of them failed, and SIGTERM among them",
        crowd_of_names,
        left_out=_CROWD - 4_000,
        most_bytes=MOST_CROWD_BYTES,
        timeout_s=900.0,
    ),
)
