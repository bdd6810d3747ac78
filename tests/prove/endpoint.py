"""Faults of the OTLP endpoint. What was received and what is in the dead letter together must be all that was sent."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cache, partial

from tests.fakes.collector import Answer, Collector, Reply, Request
from tests.prove.load import MAX_RSS
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import Found, Settings, World

_LINES = 400
_ROUNDS = 5
_SIGNALS = ("logs", "traces")
_SOON = 'timeout = "1s"'
_TWO_TRIES = "retry_server_errors = 2"


@dataclass(frozen=True)
class EndpointFault:
    """A fault of the endpoint.

    Attributes:
        name: The row's name.
        script: Answers to the first requests of logs and of traces; then all is well.
        always: Makes the answer to every request of logs and of traces.
        traces: Makes the answer to every request of traces only.
        act: Done while the jobs write.
        settings: Of the world.
        dead: Whether something must be in the dead letter, or nothing may; None allows both: the halves of a batch
            that was rejected as a whole may be accepted.
        timeout_s: How long it may take until all is relayed.
        check: Returns what else is wrong, in words.
    """

    name: str
    script: Sequence[Answer] = ()
    always: Callable[[World], Answer] | None = None
    traces: Answer | None = None
    act: Callable[[World], object] = lambda world: None
    settings: Settings = field(default_factory=Settings)
    dead: bool | None = False
    timeout_s: float = 120.0
    check: Callable[[World, Found], list[str]] = lambda world, found: []

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        with World(seed, self.settings) as world:
            jobs = [world.fused_job(f"fused-{number}") for number in range(3)]
            world.local_job("local-0", burst=5, pause_s=0.02)
            for signal in _SIGNALS:
                world.collector.script(signal, *self.script)
                if self.always is not None:
                    world.collector.always(signal, self.always(world))
            if self.traces is not None:
                world.collector.always("traces", self.traces)
            world.configure()
            world.start()
            for _ in range(_ROUNDS):
                for job in jobs:
                    job.write(_LINES, world.random)
                time.sleep(0.5)
            self.act(world)
            found = world.finish(self.timeout_s)
            problems = self.check(world, found)
        if self.dead not in (None, bool(found.dead_lettered)):
            problems.append(f"{found.dead_lettered} records in the dead letter")
        return Row(self.name, [found], problems)


def refuse_most(world: World) -> Answer:
    """Refuse 70% of the requests at random, in the many ways that say "later"."""
    later = (429, 502, 503, 504)
    return lambda request: Reply(world.random.choice(later)) if world.random.random() < 0.7 else Reply()


def keep_none_of(world: World, each: int, **reply: object) -> Answer:
    """Reject every `each`-th request with this reply; nothing of it is kept."""
    seen: list[Request] = []

    def answer(request: Request) -> Reply:
        seen.append(request)
        return Reply() if len(seen) % each else world.refuse(request, Reply(**reply))  # type: ignore[arg-type]

    return answer


def retry_date(request: Request) -> Reply:
    """Ask to come again in two seconds, by the clock."""
    return Reply(503, headers={"Retry-After": formatdate(time.time() + 2, usegmt=True)})


@cache
def _packed() -> bytes:
    return gzip.compress(bytes(300 << 20), compresslevel=1)


def large_when_unpacked(request: Request) -> Reply:
    """Answer with little that becomes much."""
    return Reply(body=_packed(), headers=_PACKED)


def small_only(world: World) -> Answer:
    """Take requests of up to 100 records."""
    return lambda request: Reply(413) if request.count > 100 else Reply()


@contextlib.contextmanager
def listener(port: Callable[[], int], answer: bytes | None) -> Iterator[None]:
    """Something else at the receiver's address: it answers so, or (None) never accepts a connection."""
    with socket.create_server(("127.0.0.1", port()), backlog=128) as server:
        stop = threading.Event()

        def serve() -> None:
            server.settimeout(0.05)
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer or b"")

        thread = threading.Thread(target=serve) if answer is not None else None
        if thread is not None:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if thread is not None:
                thread.join()


def away(world: World, seconds: float, answer: bytes | None = None, *, listening: bool = False) -> None:
    """Take the receiver away; with `listening` something else is there."""
    port = world.collector.http_port
    other: AbstractContextManager[None] | None = listener(lambda: port, answer) if listening else None
    world.away(seconds, other)


def traces_are_dead(world: World) -> None:
    """Logs and metrics must come while no trace does; then traces are well again."""
    for job in world.jobs:
        job.end()
    expected = sum(job.written for job in world.jobs)

    def arrived() -> bool:
        world.fold()
        return sum(job.tally.distinct for job in world.jobs) == expected

    world.until(arrived, "all lines, while traces are refused")
    world.until(lambda: "metrics" in {r.signal for r in world.collector.requests}, "metrics, while traces are refused")
    world.collector.always("traces", Reply())


def repeats(world: World, found: Found) -> list[str]:
    """An answer that was lost makes the agent send again: else the fault was none."""
    return [] if found.lines.repeated else ["nothing was sent twice, so nothing was tested"]


def little_memory(world: World, found: Found) -> list[str]:
    """The agent must not have held what the answers unpack to."""
    return [] if found.peak_rss < MAX_RSS else [f"the agent took {found.peak_rss >> 20} MiB"]


def restarts(world: World) -> None:
    """The gRPC server goes, with its connections, and comes back at once, four times."""
    port = int(world.collector.grpc_url.rpartition(":")[2])
    for _ in range(4):
        for job in world.jobs:
            job.write(_LINES, world.random)
        time.sleep(0.5)
        world.collector.stop()
        world.fold()
        world.use(Collector(grpc_port=port))
        assert world.collector.grpc_url.endswith(f":{port}")


_IN_PIECES = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\nX-Late: 1\r\n\r\n"
)
_PACKED = {"Content-Encoding": "gzip", "Content-Type": "application/x-protobuf"}

GRPC = Settings(protocol="grpc", otlp=_SOON)

FAULTS = (
    EndpointFault("endpoint down for 40 s", act=partial(away, seconds=40)),
    EndpointFault("endpoint down, then there before the jobs end", act=partial(away, seconds=3)),
    EndpointFault(
        "endpoint accepts nothing (half-open)",
        act=partial(away, seconds=6, listening=True),
        settings=Settings(otlp=_SOON),
    ),
    EndpointFault(
        "something else at the endpoint's address",
        act=partial(away, seconds=4, answer=b"SSH-2.0-OpenSSH_9.2\r\n", listening=True),
    ),
    EndpointFault("429 with Retry-After in seconds", [Reply(429, retry_after_s=1)] * 8),
    EndpointFault("503 with Retry-After as a date", [retry_date] * 6),
    EndpointFault("500, then healed", [Reply(500)] * 6),
    EndpointFault(
        "500 for some batches, again and again",
        always=lambda world: lambda request: Reply(500) if b"fused-1" in request.payload else Reply(),
        settings=Settings(otlp=_TWO_TRIES),
        dead=True,
    ),
    EndpointFault("400 for some batches", always=partial(keep_none_of, each=3, status=400), dead=True),
    EndpointFault("400, then healed", [Reply(400)] * 4, dead=None),
    EndpointFault("401, then healed", [Reply(401)] * 2),
    EndpointFault("413 over 100 records", always=small_only),
    EndpointFault(
        "partial_success, 7 rejected",
        always=partial(keep_none_of, each=3, rejected=7, message="entry too far behind"),
        dead=True,
    ),
    EndpointFault("hang", [Reply(cut="request", delay_s=5)] * 4, settings=Settings(otlp=_SOON), timeout_s=180.0),
    EndpointFault("reset before the answer", [Reply(cut="request")] * 6),
    EndpointFault("reset in mid-answer", [Reply(cut="answer")] * 6, check=repeats),
    EndpointFault("slow, 1 s for each answer", always=lambda world: Reply(delay_s=1.0)),
    EndpointFault("answers garbage", [Reply(body=b"\xff<html>")] * 8),
    EndpointFault("answers in pieces, after 100 and 103", always=lambda world: Reply(raw=_IN_PIECES)),
    EndpointFault("connection closed after each answer", always=lambda world: Reply(close=True)),
    EndpointFault(
        "answers that unpack to 300 MB",
        [large_when_unpacked] * 6,
        check=little_memory,
    ),
    EndpointFault(
        "partial_success, more rejected than were sent",
        always=partial(keep_none_of, each=3, rejected=1 << 62, message="all of it, and more"),
        dead=True,
    ),
    EndpointFault("70% refused at random", always=refuse_most, timeout_s=2400.0),
    EndpointFault("one dead signal (traces)", traces=Reply(503), act=traces_are_dead),
    EndpointFault("gRPC: UNAVAILABLE", [Reply(grpc="UNAVAILABLE")] * 6, settings=GRPC),
    EndpointFault(
        "gRPC: RESOURCE_EXHAUSTED with RetryInfo",
        [Reply(grpc="RESOURCE_EXHAUSTED", retry_after_s=0.5)] * 6,
        settings=GRPC,
    ),
    EndpointFault(
        "gRPC: RESOURCE_EXHAUSTED without RetryInfo",
        always=lambda world: (
            lambda request: Reply(grpc="RESOURCE_EXHAUSTED") if b"fused-1" in request.payload else Reply()
        ),
        settings=GRPC,
        dead=True,
    ),
    EndpointFault("gRPC: server restarted four times", act=restarts, settings=GRPC),
    EndpointFault("gRPC: DEADLINE_EXCEEDED, slow answers", [Reply(grpc="DEADLINE_EXCEEDED")] * 4, settings=GRPC),
)
