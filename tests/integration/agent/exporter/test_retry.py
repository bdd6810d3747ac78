"""The retrying exporter: its reaction to each outcome, its waits, and its counters."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from tailspan.config.signals import SIGNALS
from tailspan.testing import FakeClock
from tailspan_agent.errors import AgentError, ExportRejectedError
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry, TooLarge
from tailspan_agent.exporter.retry import SHORTENED, DeliveryResult, Outage, RetryingExporter
from tailspan_agent.otlp.log_record import LogRecordData, encode_log_record
from tailspan_agent.otlp.messages import count_records, parse_request, split_request
from tailspan_agent.otlp.requests import encode_resource, logs_request
from tests.fakes.collector import Collector, Reply, Request
from tests.fakes.otlp_rows import REQUESTS, log_rows, span_rows
from tests.fakes.otlp_samples import exporter_to, logs_payload, metrics_payload, payload_of, traces_payload
from tests.ports import free_port


class FakeExporter:
    """An exporter with scripted outcomes, then success; it records the payloads."""

    endpoint = "fake://endpoint"

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)
        self.payloads: list[bytes] = []
        self.closed = False
        self.limit: int | None = None
        self.answer: Callable[[bytes, int], Outcome] | None = None
        self.block: asyncio.Event | None = None

    async def export(self, payload: bytes, count: int) -> Outcome:
        self.payloads.append(payload)
        if self.block is not None:
            await self.block.wait()
        if self.answer is not None:
            return self.answer(payload, count)
        if self.outcomes:
            return self.outcomes.pop(0)
        if self.limit is not None and count > self.limit:
            return TooLarge("HTTP 413")
        return Delivered()

    async def aclose(self) -> None:
        self.closed = True


class FakeDeadLetter:
    """A dead letter that fails a number of times first."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.kept: list[dict[str, Any]] = []

    async def add(self, signal: str, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise AgentError("the dead letter is full")
        self.kept.append(
            {"signal": signal, "payload": payload, "kind": kind, "reason": reason, "rejected": rejected, "count": count}
        )


class Bench:
    """A retrying exporter with fakes around it."""

    def __init__(self, *outcomes: Outcome, refusals: int = 0, **options: Any) -> None:
        self.exporter = FakeExporter(*outcomes)
        self.dead_letter = FakeDeadLetter(refusals)
        self.clock = FakeClock(1000.0)
        self.retrying = RetryingExporter(
            "logs", self.exporter, self.dead_letter, clock=self.clock, jitter=lambda: 0.5, **options
        )

    def send(self, payload: bytes = b"", count: int = 3) -> DeliveryResult:
        return asyncio.run(self.retrying.deliver(payload or logs_payload(count), count))


def test_delivered() -> None:
    """The normal case, with its counters."""
    bench = Bench()
    assert bench.send() == DeliveryResult(3)
    sender = bench.retrying
    assert (sender.state, sender.last_error, sender.in_flight) == ("ok", None, 0)
    assert (sender.requests, sender.delivered, sender.rejected, sender.retries) == (1, 3, Counter(), 0)
    assert sender.last_delivered == 1000.0
    assert sender.endpoint == "fake://endpoint"


def test_nothing_is_not_sent() -> None:
    """An empty request would only cost time."""
    bench = Bench()
    assert asyncio.run(bench.retrying.deliver(b"", 0)) == DeliveryResult(0)
    assert bench.exporter.payloads == []


def test_each_failed_export_is_reported_with_its_reason() -> None:
    """The agent's metrics count each failed attempt by its reason."""
    told: list[str] = []
    outcomes = [Retry("HTTP 503"), EndpointFault("HTTP 401"), Retry("HTTP 503"), Rejected(None, "HTTP 400")]
    bench = Bench(*outcomes, on_failure=told.append)
    assert bench.send(count=1) == DeliveryResult(0, 1, "HTTP 400")
    assert bench.send() == DeliveryResult(3)
    assert told == ["unavailable", "endpoint_fault", "unavailable", "invalid"]


def test_retries_send_the_same_bytes_and_back_off() -> None:
    """Equal bytes let a store drop a repeat; the wait grows to half a minute."""
    bench = Bench(*[Retry("HTTP 503")] * 60)
    assert bench.send() == DeliveryResult(3)
    assert len(bench.exporter.payloads) == 61
    assert set(bench.exporter.payloads) == {logs_payload(3)}
    sleeps = bench.clock.sleeps
    assert sleeps == sorted(sleeps)
    assert sleeps[0] < 1
    assert 15 <= sleeps[-1] <= 30
    assert bench.retrying.retries == 60
    assert bench.dead_letter.kept == []


def test_waits_are_jittered() -> None:
    """Agents that lost the same collector must not return at the same moment."""
    sleeps = set()
    for _ in range(5):
        bench = Bench(Retry("HTTP 503"))
        bench.retrying = RetryingExporter("logs", bench.exporter, bench.dead_letter, clock=bench.clock)
        bench.send()
        sleeps.add(bench.clock.sleeps[0])
    assert len(sleeps) == 5


@pytest.mark.parametrize("after_s", [7.0, 3600.0])
def test_retry_after_is_obeyed(after_s: float) -> None:
    """Never sooner than the endpoint asks, and not much later."""
    bench = Bench(Retry("HTTP 429", after_s=after_s))
    bench.send()
    assert after_s <= bench.clock.sleeps[0] <= after_s * 1.1


def test_server_errors_are_tried_ten_times() -> None:
    """Gateways return 500 now and then; a batch that always breaks the server must not block the queue for ever."""
    bench = Bench(*[Retry("HTTP 500: oops", server_error=True)] * 50)
    result = bench.send(count=1)
    assert (result.delivered, result.rejected) == (0, 1)
    assert len(bench.exporter.payloads) == 10
    (kept,) = bench.dead_letter.kept
    assert (kept["kind"], kept["rejected"], kept["count"], kept["payload"]) == ("server_error", 1, 1, logs_payload(1))
    assert "HTTP 500: oops" in kept["reason"]
    assert bench.retrying.rejected == Counter(server_error=1)


def test_server_errors_cost_only_the_record_that_causes_them() -> None:
    """After ten in a row, the parts of the batch are tried once each."""
    bench = Bench(*[Retry("HTTP 500: oops", server_error=True)] * 12)
    result = bench.send(count=4)
    assert (result.delivered, result.rejected) == (3, 1)
    assert len(bench.exporter.payloads) == 10 + 2 + 3 - 1


@pytest.mark.parametrize(
    "answer",
    [
        Retry("HTTP 500: oops", server_error=True, refused=True),
        Retry("HTTP 503: busy", refused=True),
        Retry("HTTP 429", refused=True),
        Rejected(None, "HTTP 400: no"),
        TooLarge("HTTP 413"),
    ],
    ids=lambda answer: str(answer.reason),
)
@pytest.mark.parametrize("most", [1, 7, 100, 900])
def test_an_endpoint_with_a_limit_that_it_does_not_name(answer: Outcome, most: int) -> None:
    """Halves reach the limit, and the other parts of the request do not search for it again."""
    bench = Bench()
    bench.exporter.answer = lambda payload, count: answer if count > most else Delivered()
    result = bench.send(count=1000)
    assert (result.delivered, result.rejected) == (1000, 0)
    assert len(bench.exporter.payloads) < 40 + 2.2 * 1000 / most
    assert sum(bench.clock.sleeps) < 300


@pytest.mark.parametrize(("tries", "requests"), [(0, 1), (1, 1), (3, 3)])
def test_server_error_tries_are_a_setting(tries: int, requests: int) -> None:
    """It is ``otlp.retry_server_errors``."""
    bench = Bench(*[Retry("HTTP 500", server_error=True)] * 50, retry_server_errors=tries)
    assert bench.send(count=1).rejected == 1
    assert len(bench.exporter.payloads) == requests


def test_server_errors_count_only_in_a_row() -> None:
    """An outage with mostly 503 is not caused by the batch."""
    bench = Bench(*[Retry("HTTP 500", server_error=True), Retry("HTTP 503")] * 30)
    assert bench.send() == DeliveryResult(3)


def test_endpoint_fault_pauses_until_it_is_corrected() -> None:
    """A wrong token costs time, but no record; /readyz fails meanwhile."""
    bench = Bench(*[EndpointFault("HTTP 401")] * 3)
    seen: list[tuple[str, str | None, float]] = []
    for seconds in (1, 100):
        bench.clock.at(
            seconds, lambda: seen.append((bench.retrying.state, bench.retrying.last_error, bench.retrying.since))
        )
    assert bench.send() == DeliveryResult(3)
    assert seen == [("paused", "HTTP 401", 1000.0)] * 2
    assert len(bench.clock.sleeps) == 3
    assert all(30 <= seconds <= 60 for seconds in bench.clock.sleeps)
    assert (bench.retrying.state, bench.retrying.last_error) == ("ok", None)
    assert bench.retrying.since == pytest.approx(1000.0 + sum(bench.clock.sleeps))
    assert bench.dead_letter.kept == []


def test_rejected_batch_is_kept_and_counted() -> None:
    """400: the same bytes would be rejected again."""
    bench = Bench(Rejected(None, "HTTP 400: bad"))
    assert bench.send(count=1) == DeliveryResult(0, 1, "HTTP 400: bad")
    assert bench.dead_letter.kept == [
        {
            "signal": "logs",
            "payload": logs_payload(1),
            "kind": "invalid",
            "reason": "HTTP 400: bad",
            "rejected": 1,
            "count": 1,
        }
    ]
    assert bench.retrying.rejected == Counter(invalid=1)
    assert bench.retrying.delivered == 0
    assert bench.retrying.state == "ok"


def bodies(payload: bytes) -> list[str]:
    return [row.body for row in log_rows(REQUESTS["logs"].FromString(payload))]


def test_an_outage_is_known_until_the_endpoint_answers() -> None:
    """Since when, how many tries, and why: for the page and for /readyz."""
    seen: list[Outage | None] = []
    bench = Bench()

    def answer(payload: bytes, count: int) -> Outcome:
        seen.append(bench.retrying.outage)
        return Retry("HTTP 503: private words") if len(seen) < 4 else Delivered()

    bench.exporter.answer = answer
    bench.send()
    assert seen == [None, *(Outage(1000.0, tries, "HTTP 503: private words") for tries in (1, 2, 3))]
    for reason in ("http://store:4318/v1/logs: All connection attempts failed", "http://store/: HTTP private words"):
        assert str(Outage(1000.0, 2, reason)) == "since 1970-01-01T00:16:40Z, 2 tries: no connection"
    assert str(Outage(1000.0, 2, "http://store/: Connection refused")).endswith(", 2 tries: connection refused")
    assert str(Outage(1000.0, 2, "gRPC UNAVAILABLE: x")).endswith(", 2 tries: gRPC UNAVAILABLE")
    assert str(seen[1]) == "since 1970-01-01T00:16:40Z, 1 try: HTTP 503"
    assert str(seen[3]) == "since 1970-01-01T00:16:40Z, 3 tries: HTTP 503"
    assert bench.retrying.outage is None


@pytest.mark.parametrize("bad", [{0}, {6}, {3, 4}, {0, 2, 5}])
def test_a_rejected_record_is_isolated(bad: set[int]) -> None:
    """A batch that is rejected for some of its records loses only those; the others are delivered."""
    bench = Bench()
    texts = bodies(logs_payload(7))
    bench.exporter.answer = lambda payload, count: (
        Rejected(None, "HTTP 400") if {texts[number] for number in bad} & set(bodies(payload)) else Delivered()
    )
    result = bench.send(count=7)
    assert (result.delivered, result.rejected) == (7 - len(bad), len(bad))
    assert {position for part in result.rejections for position in range(part.start, part.start + part.count)} == bad
    assert [bodies(kept["payload"]) for kept in bench.dead_letter.kept] == [[texts[number]] for number in sorted(bad)]


def test_an_endpoint_that_rejects_everything_is_not_asked_for_each_record() -> None:
    """Isolating has a limit; what is left is rejected in larger parts, and nothing is counted twice."""
    bench = Bench()
    bench.exporter.answer = lambda payload, count: Rejected(None, "HTTP 400")
    assert bench.send(count=5_000) == DeliveryResult(0, 5_000, "HTTP 400")
    assert len(bench.exporter.payloads) < 100
    assert sum(kept["rejected"] for kept in bench.dead_letter.kept) == 5_000


def test_an_endpoint_that_says_how_many_it_ignored_is_believed() -> None:
    """Loki stores the valid entries of a request that it answers with 400, and names the number of the others."""
    bench = Bench(Rejected(None, "HTTP 400: entry too far behind", "too_old", ignored=2))
    assert bench.send(count=5) == DeliveryResult(3, 2, "HTTP 400: entry too far behind")
    assert len(bench.exporter.payloads) == 1


@pytest.mark.parametrize("status", ["HTTP 503: busy 1", "HTTP 429: 17 of 12 tokens", "HTTP 500: 7"])
def test_the_same_answer_again_and_again_halves_the_batch(status: str) -> None:
    """The endpoint may never accept it as a whole, whatever its status: numbers in the text do not count."""
    bench = Bench(retry_server_errors=100)
    bench.exporter.answer = lambda payload, count: (
        Retry(f"{status}{len(bench.exporter.payloads)}", refused=True) if count > 2 else Delivered()
    )
    assert bench.send(count=9) == DeliveryResult(9)
    assert bench.dead_letter.kept == []


def test_an_endpoint_that_is_away_gets_the_whole_batch_again() -> None:
    """No answer says nothing about the size."""
    bench = Bench(*[Retry("connection refused")] * 20)
    assert bench.send(count=9) == DeliveryResult(9)
    assert set(bench.exporter.payloads) == {logs_payload(9)}


def test_a_long_outage_loses_nothing_and_costs_few_requests_afterwards() -> None:
    """A gateway that answers 503 for an hour: the batch is delivered in order, in parts that grow again."""
    bench = Bench(*[Retry("HTTP 503", refused=True)] * 120)
    assert bench.send(count=4_000) == DeliveryResult(4_000)
    assert [body for payload in bench.exporter.payloads[120:] for body in bodies(payload)] == bodies(
        logs_payload(4_000)
    )
    assert len(bench.exporter.payloads) <= 120 + 15


@pytest.mark.parametrize("outcome", [Retry("connection refused"), EndpointFault("HTTP 401")])
def test_a_long_outage_is_logged_at_its_start_and_then_ever_more_rarely(
    outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    """Attempts 1, 4, 16, 64 and 256 have a line, each with the start of the outage; several requests share them."""
    bench = Bench(*[outcome] * 300)
    bench.send()
    lines = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    tries = [
        re.search(r"since 1970-01-01T00:16:40Z, (\d+) (?:try|tries): .*(?:refused|401)", line)[1] for line in lines
    ]
    assert tries == ["1", "4", "16", "64", "256"]


def test_a_record_that_is_too_large_is_sent_shortened_and_kept_whole() -> None:
    """Its middle is left out and it is marked; the dead letter has all of it."""
    bench = Bench()
    text = "a" * 50_000 + "b" * 50_000
    payload = logs_request([(encode_resource({"service.name": "etl"}), [encode_log_record(record(text))])])
    bench.exporter.answer = lambda payload, count: Delivered() if len(payload) < 70_000 else TooLarge("HTTP 413")
    result = bench.send(payload, 1)
    assert (result.delivered, result.rejected, result.kind) == (1, 0, None)
    assert [(part.start, part.count, part.rejected, part.kind) for part in result.rejections] == [(0, 1, 0, SHORTENED)]
    assert (bench.retrying.delivered, bench.retrying.rejected) == (1, Counter())
    (row,) = log_rows(REQUESTS["logs"].FromString(bench.exporter.payloads[-1]))
    assert row.body.startswith("a" * 30_000)
    assert row.body.endswith("b" * 30_000)
    assert row.attributes == {"tailspan.shortened_bytes": 100_000 - 65_536}
    assert bench.dead_letter.kept[0]["payload"] == payload


def record(body: str) -> LogRecordData:
    return LogRecordData(time_unix_nano=1, body=body)


def test_partial_success_keeps_the_whole_batch_and_is_not_retried() -> None:
    """The response has the number of rejected records, but not which."""
    bench = Bench(Rejected(2, "too old", kind="partial"))
    assert bench.send() == DeliveryResult(1, 2, "too old")
    (kept,) = bench.dead_letter.kept
    assert (kept["rejected"], kept["count"], kept["payload"]) == (2, 3, logs_payload(3))
    assert len(bench.exporter.payloads) == 1
    assert (bench.retrying.delivered, bench.retrying.rejected) == (1, Counter(partial=2))


def test_full_dead_letter_pauses_without_a_retry() -> None:
    """After a partial success, a retry would send the accepted records again."""
    bench = Bench(Rejected(2, "too old", kind="partial"), refusals=3)
    seen: list[tuple[str, str | None]] = []
    bench.clock.at(1, lambda: seen.append((bench.retrying.state, bench.retrying.last_error)))
    assert bench.send() == DeliveryResult(1, 2, "too old")
    assert seen == [("paused", "the dead letter is full")]
    assert all(30 <= seconds <= 60 for seconds in bench.clock.sleeps)
    assert len(bench.clock.sleeps) == 3
    assert len(bench.exporter.payloads) == 1
    assert (bench.retrying.state, bench.retrying.last_error) == ("ok", None)


def test_warning_is_counted() -> None:
    """A success with a message is a success."""
    bench = Bench(Delivered("slow down"))
    assert bench.send() == DeliveryResult(3)
    assert bench.retrying.warnings == 1


@pytest.mark.parametrize(("count", "limit"), [(10, 3), (7, 1), (2, 1)])
def test_too_large_is_halved_in_order(count: int, limit: int) -> None:
    """Every record arrives once and in order, in requests below the limit."""
    bench = Bench()
    bench.exporter.limit = limit
    assert bench.send(count=count) == DeliveryResult(count)
    sizes = [count_records("logs", parse_request("logs", payload)) for payload in bench.exporter.payloads]
    taken = [payload for payload, size in zip(bench.exporter.payloads, sizes, strict=True) if size <= limit]
    rows = [row.body for payload in taken for row in log_rows(parse_request("logs", payload))]
    assert rows == [f"job {index}" for index in range(count)]


def test_single_record_that_is_too_large_is_kept() -> None:
    """Its neighbors are delivered."""
    bench = Bench(TooLarge("HTTP 413"), TooLarge("HTTP 413"))
    assert bench.send(count=2) == DeliveryResult(1, 1, "HTTP 413")
    (kept,) = bench.dead_letter.kept
    assert (kept["kind"], kept["count"]) == ("too_large", 1)
    (row,) = log_rows(parse_request("logs", kept["payload"]))
    assert row.body == "job 0"


def test_rejections_of_halves_add_up() -> None:
    """One half may be rejected and the other accepted."""
    bench = Bench(TooLarge("HTTP 413"), Rejected(2, "HTTP 400"), Delivered())
    assert bench.send(count=5) == DeliveryResult(3, 2, "HTTP 400")


def test_cancelled_delivery_is_not_an_ack() -> None:
    """The caller keeps the records; the counters agree."""
    bench = Bench()

    async def run() -> None:
        bench.exporter.block = asyncio.Event()
        task = asyncio.ensure_future(bench.retrying.deliver(logs_payload(3), 3))
        await asyncio.sleep(0)
        assert bench.retrying.in_flight == 3
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert (bench.retrying.in_flight, bench.retrying.delivered, bench.retrying.rejected) == (0, 0, Counter())


def test_in_flight_adds_up_over_requests() -> None:
    """All requests in flight share one exporter."""
    bench = Bench()

    async def run() -> None:
        bench.exporter.block = asyncio.Event()
        tasks = [asyncio.ensure_future(bench.retrying.deliver(logs_payload(3), 3)) for _ in range(8)]
        await asyncio.sleep(0)
        assert bench.retrying.in_flight == 24
        bench.exporter.block.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert (bench.retrying.in_flight, bench.retrying.delivered) == (0, 24)


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [([EndpointFault("HTTP 404")], "HTTP 404"), ([Retry("HTTP 503")] * 50, "HTTP 503")],
)
def test_a_command_does_not_wait_for_ever(outcomes: list[Outcome], word: str) -> None:
    """Replay stops with the endpoint's message."""
    bench = Bench(*outcomes, patience_s=60)
    with pytest.raises(ExportRejectedError, match=word):
        bench.send()
    assert sum(bench.clock.sleeps) <= 60
    assert bench.retrying.in_flight == 0


def test_a_command_retries_during_a_short_outage() -> None:
    """A command retries for its `patience_s`."""
    bench = Bench(*[Retry("HTTP 503")] * 5, patience_s=60)
    assert bench.send() == DeliveryResult(3)


def test_aclose_closes_the_exporter() -> None:
    """Connections and files are closed with the retrying exporter."""
    bench = Bench()
    asyncio.run(bench.retrying.aclose())
    assert bench.exporter.closed


@pytest.mark.parametrize("signal", SIGNALS)
@given(sizes=st.lists(st.integers(0, 5), max_size=5))
def test_split_keeps_records_order_and_context(signal: str, sizes: list[int]) -> None:
    """Both halves together are the request, for any number of groups, also empty ones."""
    request_type = type(parse_request(signal, b""))
    request = request_type()
    for index, size in enumerate(sizes):
        part = parse_request(signal, {"logs": logs_payload(size, job=f"j{index}")}.get(signal, payload_of(signal)))
        request.MergeFrom(part)
    payload = request.SerializeToString()
    total = count_records(signal, request)
    parts = split_request(signal, payload)
    if total < 2:
        assert parts == [(payload, total)]
        return
    assert [count for _, count in parts] == [total // 2, total - total // 2]
    assert [count_records(signal, parse_request(signal, part)) for part, _ in parts] == [c for _, c in parts]
    if signal == "logs":
        rows = [row for part, _ in parts for row in log_rows(parse_request(signal, part))]
        assert rows == list(log_rows(request))


def test_split_of_spans_and_metrics() -> None:
    """The other signals are halved by span and by metric."""
    first, second = split_request("traces", traces_payload("a", "b", "c"))
    names = [[span.name for span in span_rows(parse_request("traces", part))] for part, _ in (first, second)]
    assert names == [["a"], ["b", "c"]]
    assert split_request("metrics", metrics_payload()) == [(metrics_payload(), 1)]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_that_comes_back_gets_everything(protocol: str) -> None:
    """The same exporter reconnects, in real time, after the connection was lost and refused."""
    grpc = protocol == "grpc"
    with Collector(http_port=free_port(), grpc_port=free_port()) as before:
        url = before.grpc_url if grpc else before.http_url
        port = int(url.rpartition(":")[2])

        async def run() -> RetryingExporter:
            exporter = exporter_to(url, protocol=protocol)
            sender = RetryingExporter("logs", exporter, FakeDeadLetter())
            await sender.deliver(logs_payload(1, job="before"), 1)
            await asyncio.to_thread(before.stop)
            task = asyncio.ensure_future(sender.deliver(logs_payload(1, job="after"), 1))
            while not sender.last_error:
                await asyncio.sleep(0.01)
            with Collector(**{"grpc_port" if grpc else "http_port": port}) as after:
                assert not grpc or after.grpc_url == url
                await task
                assert [row.body for row in after.log_records()] == ["after 0"]
            await sender.aclose()
            return sender

        sender = asyncio.run(run())
        assert (sender.delivered, sender.last_error) == (2, None)
        assert sender.retries > 0


def rejecting(share: Iterable[bool]) -> Callable[[Request], Reply]:
    """Reject requests as the booleans say."""
    refuse = iter(share)
    return lambda request: Reply(503) if next(refuse, False) else Reply()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_sent_is_received_while_most_requests_are_rejected(protocol: str) -> None:
    """The collector's own test: 70% of requests rejected, nothing lost, nothing repeated, each series in order."""
    with Collector() as collector:
        collector.always("logs", rejecting((number * 7) % 10 < 7 for number in range(1000)))
        url = collector.http_url if protocol == "http/protobuf" else collector.grpc_url

        async def queue(sender: RetryingExporter, name: int) -> None:
            for batch in range(10):
                await sender.deliver(logs_payload(5, job=f"lane {name} batch {batch}"), 5)

        async def run() -> RetryingExporter:
            exporter = exporter_to(url, protocol=protocol)
            sender = RetryingExporter("logs", exporter, FakeDeadLetter(), clock=FakeClock())
            await asyncio.gather(*(queue(sender, name) for name in range(4)))
            await sender.aclose()
            return sender

        sender = asyncio.run(run())
        bodies = [row.body for row in collector.log_records()]
        for name in range(4):
            mine = [body for body in bodies if body.startswith(f"lane {name} ")]
            assert mine == [f"lane {name} batch {batch} {index}" for batch in range(10) for index in range(5)]
        assert len(bodies) == sender.delivered == 200
        assert sender.retries > 80


TOO_LARGE = (
    "rpc error: code = ResourceExhausted desc = grpc: received message larger than max (7000000 vs. 4194304)",
    "ingestion rate limit exceeded for user fake (limit: 4194304 bytes/sec) while attempting to ingest '9' lines "
    "totaling '6864005' bytes",
)
BODIES: dict[str, Callable[[str], Reply]] = {
    "text": lambda text: Reply(body=text.encode(), headers={"Content-Type": "text/plain"}),
    "json": lambda text: Reply(
        body=json.dumps({"code": 8, "message": text}).encode(), headers={"Content-Type": "application/json"}
    ),
    "status": lambda text: Reply(body=Status(code=8, message=text).SerializeToString()),
    "status without code": lambda text: Reply(
        body=Status(message=text).SerializeToString(), headers={"Content-Type": "application/octet-stream"}
    ),
    "html": lambda text: Reply(
        body=f"<html><body>{html.escape(text, quote=False)}</body></html>".encode(),
        headers={"Content-Type": "text/html"},
    ),
}


@pytest.mark.parametrize("text", TOO_LARGE, ids=["message", "burst"])
def test_a_limit_is_understood_in_each_form_of_answer(collector: Collector, text: str) -> None:
    """Status, body and encoding of a gateway or a store: the batch is halved at once, without a wait."""
    clock = FakeClock()

    async def run() -> None:
        for status, (name, form), packed in itertools.product((400, 429, 500, 503), BODIES.items(), (False, True)):
            reply = form(text)
            if packed:
                headers = {**reply.headers, "Content-Encoding": "gzip"}
                reply = dataclasses.replace(reply, body=gzip.compress(reply.body or b""), headers=headers)
            reply = dataclasses.replace(reply, status=status)
            collector.always("logs", lambda request, reply=reply: reply if request.count > 3 else Reply())
            retrying = RetryingExporter("logs", exporter_to(collector.http_url), FakeDeadLetter(), clock=clock)
            result = await retrying.deliver(logs_payload(10), 10)
            await retrying.aclose()
            assert (result.delivered, clock.sleeps) == (10, []), (status, name, packed, retrying.last_error)

    asyncio.run(run())


def test_a_limit_is_understood_over_grpc(collector: Collector) -> None:
    """As a code of its own, or in the text of another one."""
    clock, texts = FakeClock(), (*TOO_LARGE, "")
    codes = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL", "UNKNOWN", "INVALID_ARGUMENT", "OUT_OF_RANGE")

    async def run() -> None:
        for code, text in itertools.product(codes, texts):
            reply = Reply(grpc=code, message=text)
            collector.always("logs", lambda request, reply=reply: reply if request.count > 3 else Reply())
            exporter = exporter_to(collector.grpc_url, protocol="grpc")
            retrying = RetryingExporter("logs", exporter, FakeDeadLetter(), clock=clock)
            result = await retrying.deliver(logs_payload(10), 10)
            await retrying.aclose()
            # A code of an outage without a text only has to wait: half of the batch would have to, too.
            waits = code in ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "OUT_OF_RANGE") and not text
            assert result.delivered == 10, (code, text)
            assert bool(clock.sleeps) == waits, (code, text, clock.sleeps)
            clock.sleeps.clear()

    asyncio.run(run())
