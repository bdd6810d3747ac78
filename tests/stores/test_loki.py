"""A real Loki with its default limits: the cases that its double passes, and a restart. `LOKI_BIN` names it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from tailspan.logs.page import TaskRef
from tailspan.testing import FakeTaskService
from tests.deploy.queries import ALL, dashboard_queries, datasource_queries
from tests.fakes import loki as double
from tests.fakes.agents import Bench
from tests.fakes.collector import Collector, Reply, Request
from tests.integration.agent.stores.test_loki import (  # noqa: F401 - the cases of the double
    test_a_burst_passes,
    test_a_job_of_long_lines_with_wide_metadata,
    test_a_line_around_the_largest_size,
    test_lines_of_a_rejected_age_are_reported,
    test_lines_sent_again_are_equal,
    test_one_refused_line_costs_no_other_job_its_receipt,
    test_overlapping_jobs_of_one_name_after_an_absence,
    test_two_agents_do_not_share_a_stream_of_old_lines,
)
from tests.stores.jobs import LINES, add_jobs
from tests.stores.programs import Loki

HOSTILE = """a"b'c\\d(e)+f$g[h]{i}|j.k*l?m^n/o&p=q#r%s t~u!v,w"""

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


@pytest.fixture
def loki(tmp_path: Path, collector: Collector) -> Iterator[Loki]:
    """A Loki behind the collector's address."""
    with Loki(tmp_path / "loki") as running:
        collector.always("logs", running)
        yield running


def test_jobs_of_all_kinds(bench: Bench, loki: Loki) -> None:
    """Text and order of each line are as written, also after a restart; a failure is found by its stream."""
    add_jobs(bench)
    result = bench.once(timeout_s=60)
    assert (result.delivered, result.rejected) == (True, 0)
    for _ in range(2):
        for name, lines in LINES.items():
            stored = loki.lines(name, cicd_pipeline_run_id=name)
            events = loki.lines(name, service_instance_id="events")
            assert [line for line in stored if " read, " not in line and line not in events] == lines
            assert len(events) == (name == "failed")
        loki.restart()


def test_the_dashboard_shows_the_lines_of_a_task(bench: Bench, loki: Loki) -> None:
    """One job shows the lines of all tasks and of none, or of the chosen tasks, also of one with special characters."""
    service = bench.services["fake"] = FakeTaskService("fake")
    service.add_job("r-1", job_name="etl")
    tasks = ["extract", "load.one", "a (b)+|c.*"]
    service.add_lines("r-1", "of no task")
    for name in tasks:
        service.add_lines("r-1", f"of {name}", task=TaskRef(name, name))
    service.set_state("r-1", "SUCCEEDED")
    assert bench.once(timeout_s=60).delivered

    def shown(*chosen: str) -> list[str]:
        queries = dashboard_queries({"pipeline": "etl", "run_id": "r-1", "trace_id": ""}, chosen)
        (query,) = (one.text for one in queries if one.panel == "job: Lines")
        return [line for line in loki.query(query) if line.startswith("of ")]

    assert sorted(shown(ALL)) == sorted(["of no task", *(f"of {name}" for name in tasks)])
    for name in tasks:
        assert shown(name) == [f"of {name}"]
    assert sorted(shown(*tasks[1:])) == sorted(f"of {name}" for name in tasks[1:])


def test_queries_of_the_dashboards(bench: Bench, loki: Loki) -> None:
    """No query is an error, whatever the names; One job finds its lines, its failure and its receipt, and no other."""
    lines = {"failed": LINES["failed"], HOSTILE: LINES["levels"], "plain": ["a", "b"]}
    add_jobs(bench, lines)
    assert bench.once(timeout_s=60).delivered

    def numbers(run: str) -> dict[str, float]:
        queries = [one for one in dashboard_queries({"pipeline": run, "run_id": run}) if one.source == "loki"]
        return {one.panel: loki.count(one.text) for one in queries}

    for name, texts in lines.items():
        failures = int(name == "failed")
        found = numbers(name)
        assert found.pop("job: Lines by level") == found["job: Lines"] == len(texts) + 1 + failures
        assert found == {
            "job: Lines": found["job: Lines"],
            "job: Why it failed": failures,
            "job: Anomalies": 0,
            "job: Delivery receipt": 1,
            "jobs: Failures": 1,
        }
    assert {panel: number for panel, number in numbers("").items() if number} == {"jobs: Failures": 1}
    for query in datasource_queries():
        if query.source == "loki":
            loki.count(query.text)


HOUR_S, KIB = 3600.0, 1024
LINE_BYTES = 256 * KIB


def request(
    lines: dict[str, list[tuple[float, int]]], *, resource: dict[str, str] | None = None, **attributes: str
) -> Request:
    """Return a request of logs.

    Args:
        lines: By service: the time of each line, in seconds since the epoch, and its size in bytes.
        resource: Further attributes of each resource.
        **attributes: Attributes of each line.
    """
    message: Any = ExportLogsServiceRequest()
    for service, own in lines.items():
        group = message.resource_logs.add()
        for key, value in {"service.name": service, "service.namespace": "test", **(resource or {})}.items():
            group.resource.attributes.add(key=key).value.string_value = value
        scope = group.scope_logs.add()
        scope.scope.name, scope.scope.version = "tailspan", "0.1.0"
        for number, (at_s, size) in enumerate(own):
            record = scope.log_records.add(time_unix_nano=int(at_s * 1e9), observed_time_unix_nano=int(at_s * 1e9))
            record.severity_number, record.severity_text, record.flags = 9, "INFO", 1
            record.trace_id, record.span_id = b"t" * 16, b"s" * 8
            record.body.string_value = f"line {number} ".ljust(size, "x")
            for key, value in attributes.items():
                record.attributes.add(key=key).value.string_value = value
    payload = message.SerializeToString()
    count = sum(map(len, lines.values()))
    return Request("logs", "http", "/v1/logs", {}, message, payload, len(payload), count, taken=True)


def answer(reply: Reply) -> tuple[int, list[str]]:
    """Return the status and the text in parts, without its times, and with sizes of messages in units of 100 KB."""
    text = Status.FromString(reply.body or b"").message
    text = re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+(Z| \+0000 UTC)", "TIME", text)
    text = re.sub(r"\((\d+) vs", lambda size: f"({int(size[1]) // 100_000} vs", text)
    return reply.status, sorted(text.split("; "))  # the order of a real Loki's reasons is random


def test_the_double_answers_like_it(loki: Loki) -> None:
    """Status, text and stored lines of each case are equal: what the tests of the double show holds for a real Loki."""
    now = time.time()
    recent, fake = [(now - 60, 60), (now - 59, 60)], double.Loki()
    behind, old, new = (now - 3 * HOUR_S, 60), (now - 8 * 24 * HOUR_S, 60), (now + 1200, 60)
    cases = [
        request({"etl": recent}),
        request({"etl": recent}),
        request({"etl": recent}, resource={"team": "a"}),
        request({"etl": [(now - 50 + number / 1000, 60) for number in range(9_000)]}, resource={"team": "x" * 200}),
        request({"etl": [old, old, old, (now - 40, 60)]}),
        request({"etl": [old, (now - 39, 60), new, new]}),
        request({"etl": [behind, behind, (now - 38, 60)]}),
        request({"etl": [behind] * 30}),
        request({"first": [behind, (now - 37, 60)]}),
        request({"reverse": [(now - 36, 60), behind]}),
        request({"etl": [behind, old]}),
        request({"long": [(now - 3, LINE_BYTES), (now - 2, LINE_BYTES + 1), (now - 1, 60)]}),
        request({"wide": recent}, wide="y" * 65 * KIB),
        request({"keys": recent}, **{f"key{number}": "v" for number in range(140)}),
        request({"n" * 2048: recent}),
        request({"n" * 2049: recent}),
        request({"": recent}),
        request({"etl": [(now - 30 + number / 1000, 400) for number in range(12_000)]}),
        request({"a": recent, "b": [(now - 10, 60)]}),
        request({"a": [old], "b": recent}),
    ]
    for number, case in enumerate(cases):
        assert (number, answer(loki(case))) == (number, answer(fake(case)))
    for service in ("etl", "first", "reverse", "long", "wide", "keys", "n" * 2048, "n" * 2049, "unknown_service", "a"):
        assert loki.lines(service) == fake.lines(service), service


def test_it_reports_the_error_of_one_stream_only(loki: Loki) -> None:
    """Of a request with several streams it drops old lines without an error, so such lines must travel apart."""
    now = time.time()
    loki(request({f"stream{number}": [(now, 60)] for number in range(6)}))
    replies = [
        loki(request({f"stream{number}": [(now - 3 * HOUR_S + turn, 60)] for number in range(6)})) for turn in range(5)
    ]
    assert all(str(answer(reply)).count("total ignored") <= 1 for reply in replies)
    mixed = {"stream0": [(now - 3 * HOUR_S, 60)], **{f"new{number}": [(now, 60)] for number in range(20)}}
    assert 204 in {loki(request(mixed)).status for _ in range(20)}
    assert loki(request({"stream0": [(now - 3 * HOUR_S, 60)]})).status == 400
