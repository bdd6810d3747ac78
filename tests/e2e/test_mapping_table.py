"""The demo through a real collector, row by row of the mapping: resource, lines, trace tree, links, metrics, exemplars.

Each row of the table "What becomes what" has a function; the demo runs once, started under a TRACEPARENT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tailspan._identity import span_id, trace_id
from tailspan_agent.analysis.run_totals import BOUNDS_S
from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import LogRow, MetricRow, SpanRow
from tests.fakes.rotel import Rotel, rotel_binary

pytestmark = pytest.mark.skipif(rotel_binary() is None, reason="there is no rotel that runs here")

PARENT = ("ab" * 16, "cd" * 8)
RESULTS = {
    "weather-etl": "success",
    "invoice-import": "failure",
    "tile-render": "success",
    "backfill-year": "cancellation",
}


@dataclass
class Seen:
    """What came out of the collector.

    Attributes:
        logs: All records.
        spans: All spans.
        metrics: All points, oldest first.
        identity: Of the demo's local service.
    """

    logs: list[LogRow]
    spans: list[SpanRow]
    metrics: list[MetricRow]
    identity: str
    runs: dict[str, SpanRow] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = {span.name.removeprefix("RUN "): span for span in self.spans if span.name.startswith("RUN ")}

    def lines(self, name: str) -> list[LogRow]:
        """Return a pipeline's lines, without events."""
        return [row for row in self.logs if row.resource["service.name"] == name and not row.event_name]

    def tree(self, name: str) -> dict[str, SpanRow]:
        """Return the spans of a run by name."""
        return {span.name: span for span in self.spans if span.trace_id == self.runs[name].trace_id}

    def last(self, name: str) -> list[MetricRow]:
        """Return a metric's newest point for each of its sets of attributes."""
        newest = {str(sorted(row.attributes.items())): row for row in self.metrics if row.name == name}
        return list(newest.values())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """The demo's telemetry, as a real collector understood it and passed it on."""
    machine = Machine(tmp_path_factory.mktemp("mapping"))
    machine.configure()
    with Collector() as behind, Rotel(behind) as rotel:
        home = machine.home / "demo"
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": rotel.http_url,
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
            "TAILSPAN_AGENT__LISTEN": "127.0.0.1:0",
            "TRACEPARENT": f"00-{PARENT[0]}-{PARENT[1]}-01",
        }
        machine.tailspan("demo", "--dir", str(home), env=env)
        receipts = [row for row in behind.log_records() if row.event_name == "tailspan.receipt"]
        behind.wait_until(
            lambda: (
                len([row for row in behind.log_records() if row.event_name == "tailspan.receipt"]) == len(RESULTS)
                and len([span for span in behind.spans() if span.name.startswith("RUN ")]) == len(RESULTS)
                and sum(row.value.count for row in _last_durations(behind)) == len(RESULTS)
            )
        )
        assert len(receipts) <= len(RESULTS)
        identity = Path(home, "jobs", "identity").read_text().strip()
        yield Seen(behind.log_records(), behind.spans(), behind.metrics(), identity)
    machine.close()


def _last_durations(behind: Collector) -> list[MetricRow]:
    rows = [row for row in behind.metrics() if row.name == "cicd.pipeline.run.duration"]
    return list({str(sorted(row.attributes.items())): row for row in rows}.values())


def resource_of_a_job(seen: Seen) -> None:
    """Same on logs and spans; the id in one place only; what the configuration adds is there."""
    for name, run in seen.runs.items():
        own = run.resource
        assert (own["service.name"], own["cicd.pipeline.name"], own["service.namespace"]) == (name, name, "local")
        assert own["deployment.environment.name"] == "test"
        assert own["host.id"] == own["cicd.worker.id"]
        job_id = own["cicd.pipeline.run.id"]
        assert [key for key, value in own.items() if value == job_id] == ["cicd.pipeline.run.id"]
        rows = [row for row in seen.logs if row.resource["service.name"] == name]
        for row in rows:
            # Events are in streams of their own, so that Loki finds them by its index.
            stream = row.resource.get("service.instance.id")
            assert row.resource == own | ({} if stream is None else {"service.instance.id": stream})
            assert (stream or "").startswith("events") is (row.event_name not in ("", "tailspan.receipt"))
        assert all(span.resource == own for span in seen.tree(name).values())


def ids_from_the_job(seen: Seen) -> None:
    """Any program can compute trace and span ids from identity and job id; the random bit is off."""
    for run in seen.runs.values():
        job_id = run.resource["cicd.pipeline.run.id"]
        assert run.trace_id == trace_id(seen.identity, job_id)
        assert run.span_id == span_id(seen.identity, job_id, "run")
        assert run.flags & 0xFF == 1


def line_as_log_record(seen: Seen) -> None:
    """Each line: text, the source's time inside the run span, severity found in it, stream, uid, trace and span."""
    for name, run in seen.runs.items():
        rows = seen.lines(name)
        assert rows
        uids = [row.attributes["log.record.uid"] for row in rows]
        assert len(set(uids)) == len(uids)
        for row in rows:
            assert (row.trace_id, row.span_id, row.flags) == (run.trace_id, run.span_id, 1)
            assert run.start_unix_nano <= row.time_unix_nano <= run.end_unix_nano
            assert row.observed_time_unix_nano == row.time_unix_nano // 1_000_000 * 1_000_000
            assert row.attributes["log.iostream"] in ("stdout", "stderr")
            assert not {"\r", "\0", "\x1b"} & set(row.body)


def severity(seen: Seen) -> None:
    """Words of Python's logging become numbers and texts; a line without one has none."""
    numbers = {(row.severity_text, row.severity_number) for row in seen.logs if not row.event_name}
    assert {("INFO", 9), ("WARN", 13)} <= numbers or {("INFO", 9), ("WARNING", 13)} <= numbers
    assert ("", 0) in numbers


def order_of_lines(seen: Seen) -> None:
    """Sorted by time, the lines of each stream of a job have the order of the log, which their uids number.

    Not the order of arrival: rotel sends up to ten requests at once. `tests.e2e.test_demo` has that of the agent.
    """
    for name in seen.runs:
        for stream in ("stdout", "stderr"):
            rows = [row for row in seen.lines(name) if row.attributes["log.iostream"] == stream]
            by_time = sorted(rows, key=lambda row: row.time_unix_nano)
            assert by_time == sorted(rows, key=lambda row: str(row.attributes["log.record.uid"]))
            assert len({row.time_unix_nano for row in rows}) == len(rows)


def run_span(seen: Seen) -> None:
    """SERVER, root, result and error by the conventions; status never OK, ERROR with the reason."""
    assert {name: run.attributes["cicd.pipeline.result"] for name, run in seen.runs.items()} == RESULTS
    for name, run in seen.runs.items():
        succeeded = RESULTS[name] == "success"
        assert (run.kind, run.parent_span_id, run.status) == ("SERVER", "", "UNSET" if succeeded else "ERROR")
        assert bool(run.status_message) is not succeeded
        assert ("error.type" in run.attributes) is (RESULTS[name] in ("failure", "error"))
        assert run.attributes["tailspan.logs.complete"] is True


def queued_and_executing(seen: Seen) -> None:
    """INTERNAL children that follow each other, from the run's start to its end; no span without its parent."""
    for name, run in seen.runs.items():
        tree = seen.tree(name)
        assert set(tree) == {f"RUN {name}", "submitted", "queued", "executing"}
        children = [span for span in tree.values() if span is not run]
        assert {(span.kind, span.parent_span_id) for span in children} == {("INTERNAL", run.span_id)}
        assert tree["queued"].start_unix_nano == run.start_unix_nano
        assert tree["queued"].end_unix_nano == tree["executing"].start_unix_nano
        assert tree["executing"].end_unix_nano == run.end_unix_nano
    ids = {span.span_id for span in seen.spans}
    assert len(ids) == len(seen.spans)
    assert all(span.parent_span_id in ids for span in seen.spans if span.parent_span_id)


def submitted_anchor(seen: Seen) -> None:
    """A millisecond at the start of the run: what is there to see while the job runs."""
    for name, run in seen.runs.items():
        anchor = seen.tree(name)["submitted"]
        assert anchor.start_unix_nano == run.start_unix_nano
        assert anchor.end_unix_nano - anchor.start_unix_nano == 1_000_000


def state_changes(seen: Seen) -> None:
    """Events of the run span, in its time, the last one the job's end."""
    last = {"success": "SUCCEEDED", "failure": "FAILED", "cancellation": "CANCELED"}
    for name, run in seen.runs.items():
        states = [event for event in run.events if event.name == "tailspan.job.state"]
        assert states[-1].attributes["tailspan.job.state"] == last[RESULTS[name]]
        assert all(run.start_unix_nano <= event.time_unix_nano <= run.end_unix_nano for event in run.events)


def link_to_the_parent(seen: Seen) -> None:
    """A job that was started in a trace keeps its own and links to it."""
    for run in seen.runs.values():
        assert run.links == [PARENT]
        assert run.trace_id != PARENT[0]


def failure(seen: Seen) -> None:
    """One exception event, and one record on the run's span, with type, message and joined stack."""
    run = seen.runs["invoice-import"]
    (event,) = (event for event in run.events if event.name == "exception")
    (record,) = (row for row in seen.logs if row.event_name == "exception")
    assert (record.trace_id, record.span_id, record.severity_text) == (run.trace_id, run.span_id, "ERROR")
    for attributes in (event.attributes, record.attributes):
        assert attributes["exception.type"] == run.attributes["error.type"]
        assert "InvoiceError" in attributes["exception.type"]
        assert attributes["exception.message"]
        assert attributes["exception.stacktrace"].startswith("Traceback (most recent call last):")
    assert run.attributes["tailspan.exit.reason"] == "exception"
    assert run.attributes["tailspan.failure.count"] == 1
    assert len(run.attributes["tailspan.failure.fingerprint"]) == 16
    assert seen.runs["backfill-year"].attributes["tailspan.exit.reason"] == "canceled"


def receipt(seen: Seen) -> None:
    """What was read is what was acked is what arrived."""
    for name, run in seen.runs.items():
        (row,) = (
            row for row in seen.logs if row.event_name == "tailspan.receipt" and row.resource["service.name"] == name
        )
        assert (row.trace_id, row.span_id) == (run.trace_id, run.span_id)
        assert row.attributes["tailspan.lines.read"] == len(seen.lines(name))
        assert row.attributes["tailspan.records.rejected"] == 0


def duration(seen: Seen) -> None:
    """A cumulative histogram in seconds with bounds for jobs, one run each, by result and error type."""
    rows = seen.last("cicd.pipeline.run.duration")
    assert {row.attributes["cicd.pipeline.name"]: row.attributes["cicd.pipeline.result"] for row in rows} == RESULTS
    for row in rows:
        run = seen.runs[row.attributes["cicd.pipeline.name"]]
        assert (row.unit, row.value.count, tuple(row.value.explicit_bounds)) == ("s", 1, BOUNDS_S)
        assert row.attributes.get("error.type") == run.attributes.get("error.type")
        executing = seen.tree(row.attributes["cicd.pipeline.name"])["executing"]
        took_s = (executing.end_unix_nano - executing.start_unix_nano) / 1e9
        assert row.value.sum == pytest.approx(took_s, abs=0.5)


def exemplars(seen: Seen) -> None:
    """The exemplar of a duration is the run: its trace, its span, its seconds."""
    for row in seen.last("cicd.pipeline.run.duration"):
        run = seen.runs[row.attributes["cicd.pipeline.name"]]
        (exemplar,) = row.value.exemplars
        assert (exemplar.trace_id.hex(), exemplar.span_id.hex()) == (run.trace_id, run.span_id)
        assert exemplar.as_double == pytest.approx(row.value.sum)


def active(seen: Seen) -> None:
    """Phases of known pipelines, back to 0; seen at work before."""
    rows = [row for row in seen.metrics if row.name == "cicd.pipeline.run.active"]
    assert {row.attributes["cicd.pipeline.run.state"] for row in rows} == {"pending", "executing", "finalizing"}
    assert {row.attributes["cicd.pipeline.name"] for row in rows} == set(RESULTS)
    assert any(row.value > 0 for row in rows if row.attributes["cicd.pipeline.run.state"] == "executing")


def errors(seen: Seen) -> None:
    """Failed runs by error type."""
    (row,) = seen.last("cicd.pipeline.run.errors")
    run = seen.runs["invoice-import"]
    assert row.attributes == {"cicd.pipeline.name": "invoice-import", "error.type": run.attributes["error.type"]}
    assert row.value == 1


def gauges_of_running_jobs(seen: Seen) -> None:
    """Ages, run time and progress by pipeline, while the job runs; then the end of their series."""
    for name in ("tailspan.job.last_line.age", "tailspan.job.heartbeat.age", "tailspan.job.exec_time"):
        assert {row.unit for row in seen.metrics if row.name == name} == {"s"}
    progress = [row for row in seen.metrics if row.name == "tailspan.job.progress"]
    values = [row.value for row in progress if row.attributes["cicd.pipeline.name"] == "backfill-year"]
    assert set(values) <= {1 / 365, None}
    assert values[0] == 1 / 365
    assert {row.value for row in seen.last("tailspan.job.exec_time")} == {None}


def pipeline_stats(seen: Seen) -> None:
    """Counts of anomalies are there and 0, since there is not enough history; usual durations are there as well."""
    for name in ("tailspan.job.silent", "tailspan.job.slow", "tailspan.job.too_fast"):
        assert {row.value for row in seen.metrics if row.name == name} - {None} == {0}
    usual = {row.attributes["cicd.pipeline.name"] for row in seen.last("tailspan.pipeline.duration.p50")}
    assert usual <= {"weather-etl", "tile-render"}


def no_run_id_on_metrics(seen: Seen) -> None:
    """Not one metric knows a job's id; their resource is the agent."""
    ids = {run.resource["cicd.pipeline.run.id"] for run in seen.runs.values()}
    assert not [row for row in seen.metrics if ids & set(map(str, row.attributes.values()))]
    assert {row.resource["service.name"] for row in seen.metrics} == {"tailspan-agent"}


def own_health(seen: Seen) -> None:
    """The agent counts what it read and what was acked; nothing was refused."""
    names = {row.name for row in seen.metrics}
    wanted = ("polls", "records.read", "records.acked", "records.in_flight", "jobs.followed", "checkpoint.age")
    assert {f"tailspan.agent.{name}" for name in wanted} <= names
    assert not [row for row in seen.metrics if row.name == "tailspan.agent.records.rejected" and row.value]


ROWS: list[Callable[[Seen], None]] = [
    resource_of_a_job, ids_from_the_job, line_as_log_record, severity, order_of_lines, run_span, queued_and_executing,
    submitted_anchor, state_changes, link_to_the_parent, failure, receipt, duration, exemplars, active, errors,
    gauges_of_running_jobs, pipeline_stats, no_run_id_on_metrics, own_health,
]  # fmt: skip


def test_the_mapping(seen: Seen) -> None:
    """The demo, sent through a real collector, is what each row says; one test, so that the demo runs once."""
    wrong = {}
    for row in ROWS:
        try:
            row(seen)
        except AssertionError as error:
            wrong[row.__name__] = str(error)
    assert wrong == {}
