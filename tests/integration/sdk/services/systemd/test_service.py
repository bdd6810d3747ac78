"""Units as jobs, from a journal in a file that a fake journalctl reads, and from entries of a real systemd 252."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tailspan import load_settings
from tailspan._identity import trace_id
from tailspan.errors import (
    AuthError,
    ConfigError,
    CursorExpiredError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceError,
    ServiceUnavailableError,
)
from tailspan.models import JobState, ListedJob
from tailspan.services.registry import open_service
from tailspan.services.systemd import SystemdOptions, SystemdService
from tailspan.services.systemd import live as live_module
from tailspan.services.systemd.entries import MessageId
from tailspan.services.systemd.invocations import is_random
from tailspan.testing import ServiceConformance
from tests.fakes.journal import DirectCommands, FakeJournal
from tests.fakes.json_api import pages_of

RECORDED = Path(__file__).parents[4] / "data" / "systemd" / "journal.jsonl"
LONG_AGO_US = int((time.time() - 600) * 1e6)
UNIT = "etl.service"


@pytest.fixture
def journal(tmp_path: Path) -> FakeJournal:
    """An empty journal."""
    return FakeJournal(tmp_path / "journal")


def service_of(journal: FakeJournal, **options: object) -> SystemdService:
    """A service that reads it without processes."""
    found = SystemdOptions.model_validate(options)
    return SystemdService("systemd", found, DirectCommands(journal.directory, user=found.scope == "user"))


def with_programs(journal: FakeJournal, **options: object) -> SystemdService:
    """A service that reads it by programs."""
    return SystemdService("systemd", SystemdOptions.model_validate({"command_prefix": journal.prefix, **options}))


def listed(service: SystemdService) -> list[ListedJob]:
    """Return all rows of the list."""

    async def read() -> list[ListedJob]:
        async with aclosing(service), aclosing(service.list_jobs()) as rows:
            return [row async for page in rows for row in page]

    return asyncio.run(read())


def texts(service: SystemdService, job_id: str, cursor: bytes | None = None) -> list[str]:
    """Return the lines of a job."""
    return [line.decode("utf-8", "replace") for page in pages_of(service, job_id, cursor) for line in page.lines]


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, journal: FakeJournal) -> None:
        """An ended invocation with two pages of lines, several of one time, and a line in parts."""
        journal.now_us = LONG_AGO_US
        job_id = journal.start(UNIT)
        entries = [journal.line_of(UNIT, job_id, f"line {number} {'x' * 40_000}") for number in range(30)]
        entries.append(journal.line_of(UNIT, job_id, "long ", _LINE_BREAK="line-max"))
        entries.append(journal.line_of(UNIT, job_id, "other output", _STREAM_ID="2"))
        entries.append(journal.line_of(UNIT, job_id, "line"))
        journal.add_all(entries)
        journal.finish(UNIT, job_id)
        self.journal = journal

    def make_service(self) -> SystemdService:
        """A new service."""
        return service_of(self.journal)


def test_recorded_units_have_their_states(journal):
    """Exit code, signal, time limits, stop, an ignored stop, a skip, a transient unit, restarts: as a real one had."""
    lines = RECORDED.read_text().splitlines()
    journal.add_recorded(lines)
    service = service_of(journal, units=["*"], history=10**9)
    found: dict[str, list[tuple[str, int | None, int]]] = {}
    for row in reversed(listed(service)):
        status = asyncio.run(service.get_job(row.job_id))
        assert status.state is row.state
        found.setdefault(row.job_name or "", []).append((str(status.state), status.exit_code, status.attempt))
    assert found == {
        "bad.service": [("FAILED", 3, 1), ("FAILED", 3, 2), ("FAILED", 3, 3)],
        "burst.service": [("SUCCEEDED", 0, 1)] * 2,
        "execcond.service": [("SUCCEEDED", 0, 1)],
        "long.service": [("CANCELED", None, 1)],
        "named.service": [("SUCCEEDED", 0, 1)],
        "noexec.service": [("FAILED", 203, 1)],
        "notexit.service": [("FAILED", 134, 1)],
        "remain.service": [("SUCCEEDED", 0, 1)],
        "runtime.service": [("TIMED_OUT", None, 1)],
        "sh": [("FAILED", 4, 1)],
        "sig.service": [("FAILED", 137, 1)],
        "starttimeout.service": [("TIMED_OUT", 143, 1)],
        "stubborn.service": [("CANCELED", 137, 1)],
    }


def test_restarts_are_linked(journal):
    """Each restart is a job of its own, with a number, a trace and the job before; a later start by hand is not."""
    journal.now_us = LONG_AGO_US
    first = journal.start(UNIT)
    journal.fail(UNIT, first, "exit-code", code="exited", status=3)
    journal.restart(UNIT, first, 1)
    second = journal.start(UNIT)
    journal.fail(UNIT, second, "exit-code", code="exited", status=3)
    journal.restart(UNIT, second, 2)
    journal.fail(UNIT, second, "start-limit-hit")  # the second report of an end, as a refused restart makes it
    journal.now_us = LONG_AGO_US + 10_000_000
    third = journal.start(UNIT)
    service = service_of(journal)
    statuses = [asyncio.run(service.get_job(one)) for one in (first, second, third)]
    assert [(one.attempt, one.retry_of) for one in statuses[:2]] == [(1, None), (2, first)]
    assert statuses[1].trace_id == trace_id(service.identity, second, 2)
    assert statuses[1].error == "Main process exited, code=exited, status=3; result: exit-code"
    rows = {row.job_id: row.state for row in listed(service)}
    assert rows == {first: JobState.FAILED, second: JobState.FAILED, third: JobState.RUNNING}


def test_texts_and_severities(journal):
    """Bytes, numbers instead of text, parts of two outputs, several lines of one message, no text, and severities."""
    job_id = journal.start(UNIT)
    journal.add_all(
        [
            journal.line_of(UNIT, job_id, [98, 105, 110, 32, 255, 254]),
            journal.line_of(UNIT, job_id, "a" * 49_152, _LINE_BREAK="line-max"),
            journal.line_of(UNIT, job_id, "b" * 49_152, _LINE_BREAK="line-max", _STREAM_ID="2"),
            journal.line_of(UNIT, job_id, "a" * 10),
            journal.line_of(UNIT, job_id, "b" * 10, _STREAM_ID="2", _LINE_BREAK="eof"),
            journal.line_of(UNIT, job_id, "one\ntwo", _TRANSPORT="journal", PRIORITY="3"),
            journal.line_of(UNIT, job_id, None),
            journal.line_of(UNIT, job_id, ["first", [255, 10]], _TRANSPORT="syslog", PRIORITY="4"),
            journal.line_of(UNIT, job_id, "<4>warned", PRIORITY="4"),
            journal.line_of(UNIT, job_id, "kernel", _TRANSPORT="kernel"),
        ]
    )
    (page,) = pages_of(service_of(journal), job_id)
    assert page.lines[0] == b"bin \xff\xfe"
    assert [len(line) for line in page.lines[1:3]] == [49_162, 49_162]
    assert page.lines[3:5] == [b"one", b"two"]
    assert page.lines[-1] == b"<4>warned"
    assert [run.severity for run in page.runs if run.severity] == [17, 13, 13]
    assert len(set(page.uids())) == len(page.lines)


def test_a_line_in_parts_is_read_once_across_reads(journal):
    """A read ends between two parts, beside lines of another output: the next one has the whole line once."""
    job_id = journal.start(UNIT)
    service = service_of(journal)
    journal.line(UNIT, job_id, "start ", _LINE_BREAK="line-max")
    journal.line(UNIT, job_id, "other", _STREAM_ID="2")
    (page,) = pages_of(service, job_id)
    assert page.lines == [b"other"]
    assert texts(service, job_id, page.cursor) == []
    journal.line(UNIT, job_id, "end")
    (rest,) = pages_of(service, job_id, page.cursor)
    assert rest.lines == [b"start end"]
    (whole,) = pages_of(service, job_id)
    assert whole.uids() == [*page.uids(), *rest.uids()]
    assert whole.times_unix_nano() == [*page.times_unix_nano(), *rest.times_unix_nano()]


def test_lines_without_invocation_belong_to_the_last_one(journal):
    """The journal does not find the invocation of a unit that has ended: such lines are not lost, nor moved."""
    journal.now_us = LONG_AGO_US
    service = service_of(journal)
    journal.line(UNIT, "", "of a run that is not known")
    journal.now_us += 10_000_000
    ids = []
    for number in range(2):
        ids.append(journal.start(UNIT))
        journal.line(UNIT, ids[-1], f"known {number}")
        journal.finish(UNIT, ids[-1])
        journal.line(UNIT, "", f"orphan {number}")
    assert [texts(service, one) for one in ids] == [["known 0", "orphan 0"], ["known 1", "orphan 1"]]


def test_lines_without_invocation_before_the_start(journal):
    """The line of a short command may be stored first, without its invocation: it belongs to the next one."""
    journal.now_us = LONG_AGO_US - 60_000_000
    first = journal.start(UNIT)
    journal.finish(UNIT, first)
    journal.now_us = LONG_AGO_US
    journal.line(UNIT, "", "early 0")
    journal.line(UNIT, "", "early 1")
    second = journal.start(UNIT)
    journal.line(UNIT, second, "known")
    journal.finish(UNIT, second)
    service = service_of(journal)
    assert [texts(service, one) for one in (first, second)] == [[], ["early 0", "early 1", "known"]]
    pages = pages_of(service, second)
    assert texts(service, second, pages[-1].cursor) == []


def test_lines_before_start_and_after_end(journal):
    """Lines may be stored before "Starting" and after "Deactivated"."""
    journal.now_us = LONG_AGO_US
    job_id = "f" * 32
    journal.line(UNIT, job_id, "early")
    journal.now_us += 1000
    journal.report(UNIT, job_id, MessageId.STARTING, f"Starting {UNIT} - Work...")
    journal.finish(UNIT, job_id)
    journal.line(UNIT, job_id, "late")
    service = service_of(journal)
    assert texts(service, job_id) == ["early", "late"]
    status = asyncio.run(service.get_job(job_id))
    assert status.started_at is not None
    assert status.started_at.timestamp() * 1e6 == pytest.approx(LONG_AGO_US, abs=1000)
    assert status.logs_complete is True


def test_suppressed_lines_are_a_gap(journal):
    """A reader that follows gets a gap at the place, once; the number is in the details."""
    job_id = journal.start(UNIT)
    service = service_of(journal)
    journal.line(UNIT, job_id, "before")
    (first,) = pages_of(service, job_id)
    journal.line(UNIT, job_id, "more")
    journal.add(
        _SYSTEMD_UNIT="systemd-journald.service",
        MESSAGE_ID=MessageId.SUPPRESSED,
        MESSAGE=f"Suppressed 1125 messages from {UNIT}",
        N_DROPPED="1125",
        OBJECT_SYSTEMD_UNIT=UNIT,
        OBJECT_SYSTEMD_INVOCATION_ID=job_id,
        _TRANSPORT="driver",
    )
    journal.line(UNIT, job_id, "after")

    async def read(cursor: bytes | None) -> tuple[list[bytes], CursorExpiredError | None]:
        lines: list[bytes] = []
        try:
            async for page in service.read_logs(job_id, cursor):
                lines += page.lines
        except CursorExpiredError as error:
            return lines, error
        return lines, None

    lines, gap = asyncio.run(read(first.cursor))
    assert lines == [b"more"]
    assert gap is not None
    assert "dropped 1125 lines" in str(gap)
    assert asyncio.run(read(gap.resume_cursor)) == ([b"after"], None)
    assert texts(service, job_id) == ["before", "more", "after"]
    details = asyncio.run(service.get_job(job_id)).details
    assert details["systemd.unit"] == UNIT


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_vacuumed_journal_is_a_gap(journal, keep):
    """The entry of the cursor is gone: the reader is informed once, and loses none of the lines that are left."""
    job_id = journal.start(UNIT)
    service = service_of(journal)
    for number in range(3):
        journal.line(UNIT, job_id, f"line {number}")
    (page,) = pages_of(service, job_id)
    for number in range(3, 5):
        journal.line(UNIT, job_id, f"line {number}")
    journal.vacuum(keep=keep)
    if not keep:
        journal.report(UNIT, job_id, MessageId.STARTING, f"Starting {UNIT} - Work...")
    with pytest.raises(CursorExpiredError) as caught:
        pages_of(service, job_id, page.cursor)
    assert texts(service, job_id, caught.value.resume_cursor) == [f"line {number}" for number in range(5 - keep, 5)]


def test_a_restarted_machine_and_forgotten_units(journal):
    """What ran before a restart of the machine is lost; a transient unit that nothing knows any more is a job."""
    lost = journal.start(UNIT)
    journal.boot = "c" * 32
    gone = journal.start("named.service", kind="exec")
    journal.unit("named.service", Type="", LoadState="not-found")
    journal.start("nginx.service", kind="notify")
    random_ = journal.start("run-r495b709437d5463383e3c43efbc88f7c.service", kind="simple")
    found = {row.job_id: (row.job_name, row.state) for row in listed(service_of(journal))}
    assert found == {
        lost: (UNIT, JobState.LOST),
        gone: ("named.service", JobState.RUNNING),
        random_: ("Some", JobState.RUNNING),
    }
    assert asyncio.run(service_of(journal).get_job(lost)).state is JobState.LOST


def test_which_units_are_jobs(journal):
    """By kind: oneshot, with a timer, transient; by globs; never those that are excluded."""
    journal.start("a.service")
    journal.start("b.service", kind="simple", TriggeredBy="b.timer")
    journal.start("c.service", kind="simple", TriggeredBy="c.socket")
    journal.start("systemd-tmpfiles-clean.service")
    journal.start("d.scope")
    names = [row.job_name for row in listed(service_of(journal))]
    assert sorted(map(str, names)) == ["a.service", "b.service"]
    chosen = [row.job_name for row in listed(service_of(journal, units=["[bc].*", "d*"], exclude=["b*"]))]
    assert chosen == ["c.service"]


def test_names_of_transient_units():
    """systemd-run makes a random name where none is given."""
    names = ["run-r495b709437d5463383e3c43efbc88f7c.service", "run-u42.service", "run-p3-i7.service", "run-etl.service"]
    assert [is_random(name) for name in names] == [True, True, True, False]


def test_user_units(journal):
    """A user's manager names units and invocations by other fields, and has jobs of its own."""
    fields = {"_SYSTEMD_UNIT": "user@1000.service", "_UID": "1000", "_SYSTEMD_OWNER_UID": "1000"}
    about = {"USER_UNIT": UNIT, "USER_INVOCATION_ID": "a" * 32, "_SYSTEMD_USER_UNIT": "init.scope"}
    journal.unit(UNIT)
    journal.add(**fields, **about, MESSAGE_ID=MessageId.STARTING, MESSAGE=f"Starting {UNIT} - Work...")
    journal.add(**fields, _SYSTEMD_USER_UNIT=UNIT, _SYSTEMD_INVOCATION_ID="a" * 32, _TRANSPORT="stdout", MESSAGE="hi")
    forged = {**about, "_SYSTEMD_USER_UNIT": UNIT}
    journal.add(**fields, **forged, MESSAGE_ID=MessageId.FAILED, UNIT_RESULT="signal", _TRANSPORT="journal")
    service = service_of(journal, scope="user")
    assert service.identity.endswith(":user:1000")
    assert [(row.job_id, row.state) for row in listed(service)] == [("a" * 32, JobState.RUNNING)]
    assert texts(service, "a" * 32)[0] == "hi"
    assert listed(service_of(journal)) == []


def test_cancel_stops_the_unit(journal):
    """An invocation that runs is stopped; an ended one and another invocation of the unit are left alone."""
    job_id = journal.start(UNIT)
    service = service_of(journal)

    async def cancel() -> JobState:
        stopping = asyncio.create_task(service.cancel(job_id))
        while not journal.stopped:
            await asyncio.sleep(0.01)
        journal.stop(UNIT, job_id)
        return (await stopping).state

    assert asyncio.run(cancel()) is JobState.CANCELED
    assert asyncio.run(service.cancel(job_id)).error == "the unit was stopped"
    old = journal.start(UNIT)
    journal.unit(UNIT, InvocationID="e" * 32)
    with pytest.raises(RequestRejectedError, match="does not run this invocation"):
        asyncio.run(service.cancel(old))
    assert journal.stopped == [UNIT]


@pytest.mark.parametrize(
    ("program", "text", "kind", "part"),
    [
        ("journalctl", "No journal files were opened due to insufficient permissions.", AuthError, "systemd-journal"),
        ("journalctl", "unrecognized option", ServiceUnavailableError, "unrecognized option"),
        ("systemctl", "Failed to connect to bus", ServiceUnavailableError, "connect to bus"),
    ],
)
def test_what_is_missing_is_reported(journal, program, text, kind, part):
    """Rights, and programs that fail: the list, which agent check reads, has the reason."""
    journal.start(UNIT)
    journal.set_problem(program, 1, text)
    with pytest.raises(kind, match=part):
        listed(with_programs(journal))


def test_old_and_missing_programs(journal, tmp_path):
    """A version without what is needed, and no program at all; a journal in memory is a warning."""
    (problem,) = asyncio.run(service_of(journal).find_problems())
    assert not problem.is_fatal
    journal.set_version(241)
    with pytest.raises(ServiceUnavailableError, match="241 is too old"):
        listed(service_of(journal))
    with pytest.raises(ServiceUnavailableError, match="absent: is not installed"):
        listed(with_programs(journal, command_prefix=[f"{tmp_path}/absent"]))


def test_options(tmp_path):
    """A value that does not fit is an error that names the key."""
    config = tmp_path / "config.toml"
    config.write_text('[services.units]\ntype = "systemd"\nscope = "machine"\n')
    with pytest.raises(ConfigError, match=r"services\.units\.scope"):
        open_service("units", load_settings(config))


def test_unknown_ids_and_cursors(journal):
    """An id that the journal does not have, one that is none, and a cursor of another service."""
    service = service_of(journal)
    for job_id in ("0" * 32, "UNIT=x"):
        with pytest.raises(JobNotFoundError):
            asyncio.run(service.get_job(job_id))
        with pytest.raises(JobNotFoundError):
            texts(service, job_id)
    for cursor in (b"12", b"\x81\xa1c\xa1x", b"\x81\xa1c\xab--directory"):
        with pytest.raises(ConfigError, match="is not a cursor"):
            texts(service, "0" * 32, cursor)


def following(journal: FakeJournal, steps: Callable[[SystemdService, Any], Coroutine[Any, Any, None]]) -> None:
    """Run steps with a service that follows the journal, and its change feed."""

    async def run() -> None:
        service = with_programs(journal)
        async with aclosing(service), asyncio.timeout(60):
            feed = service.open_changes()
            await steps(service, feed)

    asyncio.run(run())


async def changed(feed: Any, job_id: str) -> None:
    """Wait until the feed reports a job."""
    while job_id not in (await feed.wait() or ()):
        pass


async def read_rest(service: SystemdService, job_id: str, cursor: bytes | None) -> tuple[list[str], bytes | None]:
    """Return the lines after a cursor and the next cursor."""
    found: list[str] = []
    async for page in service.read_logs(job_id, cursor):
        found += [line.decode() for line in page.lines]
        cursor = page.cursor
    return found, cursor


def test_one_program_follows_all_jobs(journal):
    """Jobs that begin later are read without a further program; their lines are counted in the list."""
    early = journal.start("early.service")
    journal.line("early.service", early, "early 0")

    async def steps(service: SystemdService, feed: Any) -> None:
        assert [row.job_id async for rows in service.list_jobs() for row in rows] == [early]
        lines, early_cursor = await read_rest(service, early, None)
        assert lines == ["early 0"]
        ids = [journal.start(f"u{number}.service") for number in range(5)]
        assert all(feed.follow(one) for one in ids)
        cursors: dict[str, bytes | None] = dict.fromkeys(ids)
        before = len(journal.calls("journalctl"))
        for turn in range(3):
            for number, job_id in enumerate(ids):
                journal.line(f"u{number}.service", job_id, f"{turn}")
            await changed(feed, ids[-1])
            for job_id in ids:
                found: list[str] = []
                while not found:
                    found, cursors[job_id] = await read_rest(service, job_id, cursors[job_id])
                assert found == [f"{turn}"]
        journal.line("early.service", early, "early 1")
        await changed(feed, early)
        assert (await read_rest(service, early, early_cursor))[0] == ["early 1"]
        journal.line("short.service", "", "short")
        short = journal.start("short.service")
        await changed(feed, short)
        assert (await read_rest(service, short, None))[0] == ["short"]
        journal.finish("u0.service", ids[0])
        await changed(feed, ids[0])
        while not (await service.get_job(ids[0])).state.is_terminal:
            await changed(feed, ids[0])
        assert len(journal.calls("journalctl")) == before
        rows = {row.job_id: row async for page in service.list_jobs() for row in page}
        assert [rows[one].lines for one in (early, *ids, short)] == [2, 3, 3, 3, 3, 3, 1]

    following(journal, steps)


def test_what_does_not_fit_into_memory_is_read_again(journal, monkeypatch):
    """Only a bounded part is kept; other readers and older cursors get the same lines from the journal."""
    monkeypatch.setattr(live_module, "_MAX_BYTES", 20_000)

    async def steps(service: SystemdService, feed: Any) -> None:
        await anext(service.list_jobs(), None)
        job_id = journal.start(UNIT)
        feed.follow(job_id)
        journal.add_all([journal.line_of(UNIT, job_id, f"line {number}") for number in range(200)])
        await changed(feed, job_id)
        while len((await read_rest(service, job_id, None))[0]) < 200:
            await changed(feed, job_id)
        lines, cursor = await read_rest(service, job_id, None)
        assert lines == [f"line {number}" for number in range(200)]
        journal.line(UNIT, job_id, "more")
        await changed(feed, job_id)
        more: list[str] = []
        while not more:
            more, _ = await read_rest(service, job_id, cursor)
        assert more == ["more"]
        assert (await read_rest(service, job_id, cursor))[0] == ["more"]

    following(journal, steps)


def test_a_program_that_hangs_is_started_again(journal, monkeypatch):
    """A journalctl that prints nothing any more is found by a second one, and replaced."""
    monkeypatch.setattr(live_module, "_GRACE_S", 0.1)

    async def steps(service: SystemdService, feed: Any) -> None:
        await anext(service.list_jobs(), None)
        job_id = journal.start(UNIT)
        feed.follow(job_id)
        await changed(feed, job_id)
        (journal.directory / "hangs").touch()
        while not (journal.directory / "hanging").exists():
            await asyncio.sleep(0.01)
        journal.line(UNIT, job_id, "unseen")
        (journal.directory / "hangs").unlink()
        await anext(service.list_jobs(), None)
        while not (await read_rest(service, job_id, None))[0]:
            await asyncio.sleep(0.05)

    following(journal, steps)


def test_a_failure_of_the_followed_journal_ends_the_feed(journal):
    """Without the right to read, the feed and the list both say so; later, another feed works."""

    async def steps(service: SystemdService, feed: Any) -> None:
        with pytest.raises(ServiceError):
            await feed.wait()
        with pytest.raises(AuthError):
            await anext(service.list_jobs(), None)

    journal.set_problem("journalctl", 1, "insufficient permissions")
    following(journal, steps)


def test_recorded_entries_are_valid():
    """The recording is JSON lines with a cursor each."""
    for line in RECORDED.read_text().splitlines():
        assert json.loads(line)["__CURSOR"]


def test_a_prefix_that_forks_ends_with_the_service(journal, tmp_path):
    """The program of ``nsenter`` or ``sudo`` is a child of theirs: it ends, too, and holds up nothing."""
    journal.start("early.service")
    forks = ["sh", "-c", 'echo $$ >"$0"; "$@" & wait', str(tmp_path / "pid"), *journal.prefix]
    service = SystemdService("systemd", SystemdOptions(command_prefix=forks))

    async def run() -> int:
        async with asyncio.timeout(60):
            async with aclosing(service._commands.entries("--follow", "--no-tail")) as found:
                await anext(found)
            return int((tmp_path / "pid").read_text())

    group = asyncio.run(run())
    deadline = time.monotonic() + 10
    while is_alive(group):
        assert time.monotonic() < deadline, "a program of the prefix is left"
        time.sleep(0.01)


def is_alive(group: int) -> bool:
    """Whether a process of a group is left, also one that its parent has not waited for."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
