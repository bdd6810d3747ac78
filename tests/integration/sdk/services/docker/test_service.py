"""Containers as jobs, against a fake engine that has what was measured of Podman, and what Docker documents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tailspan import load_settings
from tailspan._identity import trace_id
from tailspan.errors import ConfigError, CursorExpiredError, JobNotFoundError, ProtocolError, ServiceUnavailableError
from tailspan.models import JobState, ListedJob
from tailspan.services import Problem
from tailspan.services._json_stream import ReplyError
from tailspan.services.docker import DockerOptions, DockerService
from tailspan.services.docker import streams as streams_module
from tailspan.services.docker.wire import ContainerLine, ContainerPosition, EngineLogSplitter
from tailspan.services.registry import open_service
from tailspan.testing import ServiceConformance
from tests.fakes.docker import FakeEngine
from tests.fakes.json_api import pages_of

SECOND_NS = 1_795_000_000 * 10**9


@pytest.fixture(params=[False, True], ids=["docker", "podman"])
def engine(request: pytest.FixtureRequest) -> Iterator[FakeEngine]:
    """An engine with times in ns, and one with whole seconds that reports no stops."""
    with FakeEngine(whole_seconds=request.param, sends_stops=not request.param) as fake:
        yield fake


def service_of(engine: FakeEngine, **options: object) -> DockerService:
    """The service of that engine."""
    return DockerService("docker", DockerOptions.model_validate({"host": engine.url, **options}), environ={})


def listed(service: DockerService) -> list[ListedJob]:
    """Return all rows of the list."""

    async def read() -> list[ListedJob]:
        async with aclosing(service), aclosing(service.list_jobs()) as rows:
            return [row async for page in rows for row in page]

    return asyncio.run(read())


def status_of(service: DockerService, job_id: str) -> Any:
    """Return the status of a job."""

    async def read() -> Any:
        async with aclosing(service):
            return await service.get_job(job_id)

    return asyncio.run(read())


def problems_of(service: DockerService) -> Sequence[Problem]:
    """Return what is missing."""

    async def read() -> Sequence[Problem]:
        async with aclosing(service):
            return await service.find_problems()

    return asyncio.run(read())


def texts(service: DockerService, job_id: str, cursor: bytes | None = None) -> list[str]:
    """Return the lines of a job."""
    return [line.decode("utf-8", "replace") for page in pages_of(service, job_id, cursor) for line in page.lines]


class TestConformance(ServiceConformance):
    """The promises of every service."""

    @pytest.fixture(autouse=True)
    def job(self, engine: FakeEngine) -> None:
        """An ended container with two pages of lines, many of one second, some of one ns."""
        job_id = engine.run(started_ns=SECOND_NS)
        for number in range(40):
            text = f"line {number} {'x' * 40_000}\n"
            engine.write(job_id, text, 1 + number % 2, SECOND_NS + number // 3 * 10**8)
        engine.end(job_id)
        self.engine = engine

    def make_service(self) -> DockerService:
        """A new service."""
        return service_of(self.engine)


def test_streams_parts_and_terminals(engine):
    """Parts of a long line are joined, streams kept apart, a terminal's lines have no frames, the last no newline."""
    job_id = engine.run()
    at_ns = SECOND_NS
    for number, (stream, text) in enumerate([(1, "a" * 8192), (2, "err\n"), (1, "b" * 10 + "\n"), (1, ""), (1, "\n")]):
        engine.write(job_id, text, stream, at_ns + number)
    engine.write(job_id, "no newline", 1, at_ns + 9)
    engine.end(job_id)
    (page,) = pages_of(service_of(engine), job_id)
    assert page.lines == [b"err", b"a" * 8192 + b"b" * 10, b"", b"no newline"]
    assert [run.stream for run in page.runs][:2] == [2, 1]
    terminal = engine.run(tty=True)
    engine.write(terminal, "one\n", 1, at_ns)
    engine.write(terminal, "two", 1, at_ns)
    engine.end(terminal)
    (page,) = pages_of(service_of(engine), terminal)
    assert (page.lines, page.runs[0].stream) == ([b"one", b"two"], 0)


def test_a_line_that_began_before_the_last_one_is_read_whole(engine):
    """A restart while a long line is being written: the engine must return its first part, too, seconds back."""
    job_id = engine.run(started_ns=SECOND_NS)
    engine.write(job_id, "a" * 8192, 1, 2 * SECOND_NS)
    engine.write(job_id, "err\n", 2, 7 * SECOND_NS)
    engine.write(job_id, "b\n", 1, 9 * SECOND_NS)
    engine.end(job_id)
    (page,) = pages_of(service_of(engine), job_id)
    assert page.lines == [b"err", b"a" * 8192 + b"b"]
    (first,) = EngineLogSplitter().feed(engine.reply(job_id, entries=2))
    cursor = ContainerPosition().after(first).pack()
    (rest,) = pages_of(service_of(engine), job_id, cursor)
    assert rest.lines == page.lines[1:]
    assert rest.uids() == page.uids()[1:]


def test_equal_times_are_read_once_from_each_cursor(engine):
    """Many lines of one time: each read goes on behind the last line, with the same uids and times."""
    job_id = engine.run(started_ns=SECOND_NS)
    service = service_of(engine)
    seen: list[tuple[str, int]] = []
    cursor = None
    for batch in range(6):
        for number in range(5):
            engine.write(job_id, f"{batch}.{number}\n", 1, SECOND_NS + batch // 2 * 10**8)
        for page in pages_of(service, job_id, cursor):
            seen += zip(page.uids(), page.times_unix_nano(), strict=True)
            cursor = page.cursor
    assert len(seen) == 30
    whole = [
        pair for page in pages_of(service, job_id) for pair in zip(page.uids(), page.times_unix_nano(), strict=True)
    ]
    assert whole == seen
    assert [moment for _, moment in seen] == sorted(moment for _, moment in seen)


def test_states(engine):
    """Created, running, exit codes, out of memory, a program that cannot run, stopped, dead."""
    ids = {
        name: engine.run(name, **options)
        for name, options in {
            "made": {"status": "created", "started_ns": 0},
            "paused": {"status": "paused"},
            "good": {},
            "bad": {},
            "oom": {},
            "stopped": {},
            "absent": {"status": "created", "exit_code": 127, "fields": {"Error": "exec: no such file"}},
        }.items()
    }
    engine.end(ids["good"])
    engine.end(ids["bad"], 3)
    engine.end(ids["oom"], 137, OOMKilled=True)
    engine.end(ids["stopped"], 143, stopped=True)
    found = {name: status_of(service_of(engine), job_id) for name, job_id in ids.items()}
    assert {name: str(one.state) for name, one in found.items()} == {
        "made": "PENDING",
        "paused": "RUNNING",
        "good": "SUCCEEDED",
        "bad": "FAILED",
        "oom": "FAILED",
        "stopped": "CANCELED",
        "absent": "FAILED",
    }
    assert (found["bad"].exit_code, found["bad"].error) == (3, "exit code 3")
    assert found["oom"].error == "killed because it was out of memory (exit code 137)"
    assert found["absent"].error == "exec: no such file"
    assert found["good"].details["container.image.name"] == "box:1"
    assert found["good"].logs_complete is True


def test_restarts_are_attempts(engine):
    """A restart keeps the id and the log; between two runs the job has not ended, and after the last one it has."""
    policy = {"Name": "on-failure", "MaximumRetryCount": 1}
    job_id = engine.run(policy=policy)
    service = service_of(engine)
    engine.write(job_id, "try 1\n")
    engine.end(job_id, 4)
    assert status_of(service, job_id).state is JobState.RUNNING
    engine.restart(job_id)
    engine.write(job_id, "try 2\n")
    status = status_of(service, job_id)
    assert (status.state, status.attempt) == (JobState.RUNNING, 2)
    assert status.trace_id == trace_id(service.identity, job_id, 2)
    engine.end(job_id, 4)
    status = status_of(service, job_id)
    assert (status.state, status.exit_code) == (JobState.FAILED, 4)
    assert status.started_at <= status.finished_at
    assert texts(service, job_id) == ["try 1", "try 2"]


def test_which_containers_are_jobs_and_their_names(engine):
    """By label, with or without a value, and by globs of names; a label or compose names the job."""
    engine.run("a-1", labels={"job": "x", "tailspan.name": "nightly"})
    engine.run("b-1", labels={"job": "y", "com.docker.compose.service": "report"})
    engine.run("c-1")
    assert {row.job_name for row in listed(service_of(engine))} == {"nightly", "report", "c-1"}
    assert {row.job_name for row in listed(service_of(engine, labels=["job"]))} == {"nightly", "report"}
    assert {row.job_name for row in listed(service_of(engine, labels=["job=x"]))} == {"nightly"}
    assert {row.job_name for row in listed(service_of(engine, names=["b*", "c*"]))} == {"report", "c-1"}


def test_rotation_is_a_gap(engine):
    """The line of the cursor is gone: the reader is informed once, and gets what is left."""
    job_id = engine.run(started_ns=SECOND_NS)
    service = service_of(engine)
    for number in range(3):
        engine.write(job_id, f"line {number}\n", 1, SECOND_NS + number * 10**9)
    (page,) = pages_of(service, job_id)
    for number in range(3, 6):
        engine.write(job_id, f"line {number}\n", 1, SECOND_NS + number * 10**9)
    engine.rotate(job_id, 4)
    with pytest.raises(CursorExpiredError) as caught:
        pages_of(service, job_id, page.cursor)
    assert texts(service, job_id, caught.value.resume_cursor) == ["line 4", "line 5"]


def test_cancel_stops_the_container(engine):
    """A running container is stopped, an ended one left alone."""
    job_id = engine.run()

    async def cancel() -> list[JobState]:
        async with aclosing(service_of(engine)) as service:
            return [(await service.cancel(job_id)).state for _ in range(2)]

    assert asyncio.run(cancel()) == [JobState.CANCELED] * 2
    assert engine.requests.count(f"POST /containers/{job_id}/stop") == 1


def test_what_is_missing_is_reported(engine, tmp_path):
    """No socket, a log driver without lines, an address that is none, an unknown container."""
    with pytest.raises(ServiceUnavailableError, match=r"socket .*absent: is the engine running\?"):
        listed(DockerService("docker", DockerOptions(host=f"unix://{tmp_path}/absent"), environ={}))
    engine.log_driver = "none"
    assert [problem.is_fatal for problem in problems_of(service_of(engine))] == [True]
    with pytest.raises(JobNotFoundError):
        status_of(service_of(engine), "0" * 64)
    with pytest.raises(JobNotFoundError):
        texts(service_of(engine), "0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_list", lambda query: "It works!")
        with pytest.raises(ProtocolError, match=r"should be an array of containers, .*check services\.docker\.host"):
            listed(service_of(engine))
    config = tmp_path / "config.toml"
    config.write_text('[services.docker]\nhost = "ssh://host"\n')
    with pytest.raises(ConfigError, match=r"services\.docker\.host"):
        open_service("docker", load_settings(config))


def test_a_list_of_any_size(engine):
    """Ten thousand containers with their labels are a reply of more than 8 MiB."""
    for number in range(100):
        engine.run(f"job-{number}", labels={"text": "x" * 100_000}, status="exited", exit_code=number % 2)
    rows = listed(service_of(engine))
    assert [row.state for row in rows].count(JobState.FAILED) == 50


@pytest.mark.parametrize(
    ("environ", "identity"),
    [
        ({}, "docker:/var/run/docker.sock"),
        ({"CONTAINER_HOST": "unix:///run/podman/podman.sock"}, "docker:/run/podman/podman.sock"),
        ({"DOCKER_HOST": "tcp://engine:2375"}, "docker:http://engine:2375"),
    ],
)
def test_the_address(environ, identity):
    """From the options, the environment, or Docker's own socket."""
    assert DockerService("docker", DockerOptions(), environ=environ).identity == identity
    tls = DockerOptions(host="tcp://engine:2376", ca_file=Path("ca.pem"))
    assert DockerService("docker", tls, environ=environ).identity == "docker:https://engine:2376"


def test_frames_may_be_cut_anywhere():
    """Any size of pieces gives the same lines; what is not in frames is reported."""
    body = b"".join(
        bytes((1, 0, 0, 0)) + len(text).to_bytes(4, "big") + text
        for text in (b"2026-11-29T00:00:00.5Z one\n", b"2026-11-29T00:00:01Z two\n", b"2026-11-29T00:00:01Z end")
    )
    whole = EngineLogSplitter()
    expected = [*whole.feed(body), *whole.close()]
    for size in (1, 3, 8, 50):
        splitter = EngineLogSplitter()
        found = [line for start in range(0, len(body), size) for line in splitter.feed(body[start : start + size])]
        assert [*found, *splitter.close()] == expected
    assert [(line.text, line.ordinal) for line in expected] == [(b"one", 0), (b"two", 0), (b"end", 1)]
    with pytest.raises(ReplyError):
        EngineLogSplitter().feed(bytes((2, 9, 9, 9, 0, 0, 0, 1, 65)))
    with pytest.raises(ReplyError, match="no times"):
        EngineLogSplitter().feed(b"<html>\n<h1>It works!</h1>\n")


def test_times_of_any_zone():
    """Podman gives its machine's zone: a time is the same in each, and keeps its nanoseconds."""
    stamps = (b"00:00:00.5Z", b"01:00:00.500000001+01:00", b"00:00:01Z", b"00:00:00.000000002-00:01")
    text = b"".join(b"2026-11-29T" + stamp + b" x\n" for stamp in stamps)
    times = [line.time_ns - 1_795_910_400_000_000_000 for line in EngineLogSplitter().feed(text)]
    assert times == [500_000_000, 500_000_001, 1_000_000_000, 60_000_000_002]


def following(engine: FakeEngine, steps: Callable[[DockerService, Any], Coroutine[Any, Any, None]]) -> None:
    """Run steps with a service that follows the engine, and its change feed."""

    async def run() -> None:
        service = service_of(engine)
        async with aclosing(service), asyncio.timeout(60):
            feed = service.open_changes()
            while not any("/events" in one for one in engine.requests):
                await asyncio.sleep(0.01)
            await steps(service, feed)

    asyncio.run(run())


async def read_until(service: DockerService, feed: Any, job_id: str, count: int) -> list[str]:
    """Follow a job until it has a number of lines; return them."""
    found: list[str] = []
    cursor = None
    while len(found) < count:
        async for page in service.read_logs(job_id, cursor):
            found += [line.decode() for line in page.lines]
            cursor = page.cursor
        if len(found) < count:
            await feed.wait()
    return found


def test_a_removed_container_loses_nothing(engine):
    """With --rm, lines, exit code and end are there after the container has vanished."""

    async def steps(service: DockerService, feed: Any) -> None:
        job_id = engine.run(auto_remove=True)
        feed.follow(job_id)
        while not any(one.endswith("/logs") for one in engine.requests):
            await asyncio.sleep(0.01)
        for number in range(300):
            engine.write(job_id, f"line {number}\n")
        engine.end(job_id, 3)
        assert await read_until(service, feed, job_id, 300) == [f"line {number}" for number in range(300)]
        while not (status := await service.get_job(job_id)).logs_complete:
            await feed.wait()
        assert (status.state, status.exit_code) == (JobState.FAILED, 3)
        assert status.finished_at is not None
        assert [row.job_id async for rows in service.list_jobs() for row in rows] == [job_id]
        assert (await service.get_job(job_id)).attempt == 1
        feed.leave(job_id)
        with pytest.raises(JobNotFoundError):
            await service.get_job(job_id)

    following(engine, steps)


def test_a_full_stream_notifies_whenever_it_waits(monkeypatch):
    """The reader that took what was there is called again, though the engine's answer is not read to its end."""
    monkeypatch.setattr(streams_module, "_MAX_STREAM_BYTES", 400)
    lines = [ContainerLine(time_ns=number + 1, ordinal=0, stream="stdout", text=b"a line") for number in range(20)]

    async def read_all() -> list[int]:
        stream, notified = streams_module.ContainerStream(ContainerPosition()), asyncio.Event()

        async def add_all() -> None:
            for line in lines:
                await stream.add(line, notified.set)
            notified.set()

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(add_all())
            position, times = ContainerPosition(), []
            while len(times) < len(lines):
                await notified.wait()
                notified.clear()
                for line in stream.take(position) or ():
                    position = position.after(line)
                    times.append(line.time_ns)
        return times

    assert asyncio.run(read_all()) == [line.time_ns for line in lines]


def test_memory_is_bounded_and_the_stream_waits(engine, monkeypatch):
    """A stream with too much waits for its reader, and brings the rest then."""
    monkeypatch.setattr(streams_module, "_MAX_STREAM_BYTES", 5000)

    async def steps(service: DockerService, feed: Any) -> None:
        job_id = engine.run()
        feed.follow(job_id)
        for number in range(500):
            engine.write(job_id, f"line {number}\n")
        await feed.wait()
        assert await read_until(service, feed, job_id, 500) == [f"line {number}" for number in range(500)]
        live = service._live
        assert live is not None
        assert live.streams[job_id].size <= 5000 + 200
        engine.end(job_id)
        while not (await service.get_job(job_id)).logs_complete:
            await feed.wait()

    following(engine, steps)


def test_a_stream_that_breaks_goes_on(engine):
    """The log is followed again after the last line, when its connection breaks."""

    async def steps(service: DockerService, feed: Any) -> None:
        engine.broken_logs = 2
        job_id = engine.run()
        feed.follow(job_id)
        for number in range(20):
            engine.write(job_id, f"line {number}\n")
            await asyncio.sleep(0)
        assert await read_until(service, feed, job_id, 20) == [f"line {number}" for number in range(20)]

    following(engine, steps)


def test_a_reader_with_a_cursor_continues(engine):
    """A container that ran before is followed from the reader's place on; stopped ones are canceled."""
    job_id = engine.run()
    engine.write(job_id, "one\n", 1, SECOND_NS)
    (page,) = pages_of(service_of(engine), job_id)

    async def steps(service: DockerService, feed: Any) -> None:
        feed.follow(job_id)
        engine.write(job_id, "two\n", 1, SECOND_NS)
        found: list[bytes] = []
        while not found:
            async for one in service.read_logs(job_id, page.cursor):
                found += one.lines
            await asyncio.sleep(0.01)
        assert found == [b"two"]
        engine.end(job_id, 0 if engine.sends_stops else 143, stopped=True)
        while (await service.get_job(job_id)).state is JobState.RUNNING:
            await feed.wait()
        assert (await service.get_job(job_id)).state is JobState.CANCELED

    following(engine, steps)


def test_times_are_now(engine):
    """A started container has its times."""
    before = time.time()
    job_id = engine.run()
    status = status_of(service_of(engine), job_id)
    assert before - 1 < status.started_at.timestamp() < time.time() + 1
