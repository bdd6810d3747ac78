"""The metrics of jobs and of the agent, as OTLP and as Prometheus text."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime

import pytest
from opentelemetry import metrics as otel_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tailspan.errors import ServiceUnavailableError
from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.run_totals import BOUNDS_S, RunTotals, bucket_index
from tailspan_agent.exporter.retry import Outage
from tailspan_agent.metrics import prometheus
from tailspan_agent.metrics.snapshot import exports_exponential_histograms
from tests.unit.agent.metrics.world import NOW_NS, NOW_S, OPENMETRICS, SPAN, START_NS, TRACE, World


def job(
    job_id: str = "j1", name: str = "etl", state: JobState = JobState.RUNNING, service: str = "local", **fields
) -> JobSnapshot:
    """Return the snapshot of a followed job."""
    lines = {key: fields.pop(key) for key in ("first_line_unix_nano", "last_line_unix_nano") if key in fields}
    status = JobStatus.from_state(state, job_id=job_id, job_name=name, identity="i", trace_id=TRACE, **fields)
    return JobSnapshot(service=service, status=status, **lines)


def failed_runs() -> RunTotals:
    """Return two failed runs, one with a trace."""
    totals = RunTotals("etl", "failure", "KeyError").add(3.0, trace_id=TRACE, span_id=SPAN, time_unix_nano=NOW_NS)
    return totals.add(20_000.0)


def test_resource_is_the_agent_itself():
    """The agent's name and its store's id identify the metrics, whatever the configuration adds."""
    (resource,) = World().request().resource_metrics
    attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert attributes.pop("service.version")
    assert attributes == {
        "service.name": "tailspan-agent",
        "service.instance.id": "c0ffee",
        "deployment.environment.name": "prod",
    }


def test_run_duration_is_the_stores_histogram():
    """Bounds, counts, sum, start time and exemplar are exported as stored, cumulative."""
    world = World()
    world.runs = [failed_runs()]
    metric = world.metric("cicd.pipeline.run.duration")
    assert metric.unit == "s"
    assert metric.histogram.aggregation_temporality == 2
    (point,) = metric.histogram.data_points
    assert {each.key: each.value.string_value for each in point.attributes} == {
        "cicd.pipeline.name": "etl",
        "cicd.pipeline.run.state": "executing",
        "cicd.pipeline.result": "failure",
        "error.type": "KeyError",
    }
    assert tuple(point.explicit_bounds) == BOUNDS_S
    counts = dict(zip([*BOUNDS_S, math.inf], point.bucket_counts, strict=True))
    assert (point.count, point.sum) == (2, 20_003.0)
    assert {bound: count for bound, count in counts.items() if count} == {4.0: 1, 32768.0: 1}
    assert (point.start_time_unix_nano, point.time_unix_nano) == (START_NS, NOW_NS)
    assert not point.HasField("min")
    (exemplar,) = point.exemplars
    assert (exemplar.trace_id.hex(), exemplar.span_id.hex(), exemplar.as_double) == (TRACE, SPAN, 3.0)


def test_run_duration_as_an_exponential_histogram():
    """The same runs by the standard variable: scale, offset, counts and exemplars; a run of 0 s is a zero."""
    world = World(exponential=True)
    world.runs = [failed_runs().add(0.0).add(3.0)]
    metric = world.metric("cicd.pipeline.run.duration")
    assert metric.exponential_histogram.aggregation_temporality == 2
    (point,) = metric.exponential_histogram.data_points
    assert (point.count, point.sum, point.scale, point.zero_count) == (4, 20_006.0, 3, 1)
    found = {point.positive.offset + place: count for place, count in enumerate(point.positive.bucket_counts) if count}
    assert found == {bucket_index(3.0): 2, bucket_index(20_000.0): 1}
    assert point.start_time_unix_nano == START_NS
    (exemplar,) = point.exemplars
    assert (exemplar.trace_id.hex(), exemplar.as_double) == (TRACE, 3.0)
    # The text for scrapes has no such form.
    samples = world.families()["cicd_pipeline_run_duration_seconds"].samples
    assert {sample.value for sample in samples if sample.labels.get("le") == "4.0"} == {3}


def test_a_pipeline_of_zeros_as_an_exponential_histogram():
    """Without a positive duration there are no buckets, and no run is lost."""
    world = World(exponential=True)
    world.runs = [RunTotals("etl", "success").add(0.0)]
    (point,) = world.metric("cicd.pipeline.run.duration").exponential_histogram.data_points
    assert (point.count, point.zero_count, list(point.positive.bucket_counts)) == (1, 1, [])


@pytest.mark.parametrize(
    ("text", "exponential", "warnings"),
    [
        ("", False, 0),
        ("explicit_bucket_histogram", False, 0),
        (" base2_exponential_bucket_histogram ", True, 0),
        ("fancy", False, 1),
    ],
)
def test_the_standard_variable_chooses_the_histogram(text, exponential, warnings, caplog):
    """An unknown value is ignored with a warning, as the specification asks."""
    variable = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
    assert exports_exponential_histograms({variable: text}) is exponential
    assert [variable in record.getMessage() for record in caplog.records] == [True] * warnings


RUNNING = {
    "total_tasks": 10,
    "finished_tasks": 4,
    "first_line_unix_nano": NOW_NS - 10**9,
    "last_line_unix_nano": NOW_NS,
}
LIVE = {
    "tailspan.job.tasks.finished",
    "tailspan.job.tasks.total",
    "tailspan.job.heartbeat.age",
    "tailspan.job.last_line.age",
    "tailspan.job.exec_time",
    "tailspan.job.progress",
    "tailspan.job.eta",
    "tailspan.job.silent",
    "tailspan.job.slow",
}


def running(job_id: str = "j1", name: str = "etl"):
    """Return a running job that has a value for each live gauge."""
    times = {
        "started_at": datetime.fromtimestamp(NOW_S - 60, UTC),
        "last_heartbeat": datetime.fromtimestamp(NOW_S, UTC),
    }
    return job(job_id, name, **RUNNING, **times)


@pytest.mark.parametrize("after", [[], [job("j1", state=JobState.SUCCEEDED, **RUNNING)]])
def test_each_live_gauge_of_an_ended_run_ends_with_one_point(after):
    """The endpoint gets one point without a value for each series: with the run's end, and never again."""
    world = World()
    world.jobs = [running()]
    assert world.ended() == {}
    assert {name for name in LIVE if world.values(name)} == LIVE
    world.reader.accepted()
    world.now_s += 1
    world.jobs = after
    ended = world.ended()
    assert {name: ended[name] for name in LIVE} == {key: {("etl",)} for key in LIVE}
    assert set(ended) - LIVE <= {"tailspan.agent.lag", "tailspan.pipeline.last_start.age"}
    world.reader.accepted()
    assert world.ended() == {}


def test_a_series_that_another_run_keeps_does_not_end():
    """Runs of one pipeline share a series, which ends with the last one; with run ids, each has its own."""
    for run_id_on_metrics, ended in ((False, set()), (True, {("etl", "a")})):
        world = World(run_id_on_metrics=run_id_on_metrics)
        world.jobs = [running("a"), running("b")]
        world.request()
        world.reader.accepted()
        world.jobs = [running("b")]
        assert world.ended().get("tailspan.job.progress", set()) == ended


def test_a_series_that_begins_again_does_not_end():
    """A run that follows at once continues the series of the one before."""
    world = World()
    for job_id in "ab":
        world.jobs = [running(job_id)]
        assert world.ended() == {}
        world.reader.accepted()


def test_the_end_of_a_series_is_exported_until_it_is_accepted():
    """An export that failed or whose reply was lost does not leave an ended run behind; after 10 minutes it is over."""
    world = World()
    world.jobs = [running()]
    world.request()
    world.jobs = []
    for _ in range(3):
        assert world.ended()["tailspan.job.eta"] == {("etl",)}
    world.now_s += 601
    assert world.ended() == {}


def test_a_scrape_leaves_an_ended_series_out():
    """Prometheus ends a series that a scrape does not have."""
    world = World()
    world.jobs = [running()]
    assert "tailspan_job_progress_ratio" in world.families()
    world.request()
    world.jobs = []
    world.request()
    assert not {
        name for name in world.families() if name.startswith("tailspan_job_") and name != "tailspan_job_too_fast"
    } - {"tailspan_job_pending_age_seconds"}
    assert b"NaN" not in world.reader.prometheus_text()[0]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_a_scrape_in_pieces_is_the_same_text(accept, monkeypatch):
    """Each family has its help and type once, and the text one end, however many pieces it has."""
    world = World()
    world.jobs = [running(f"job-{number}", name=f"etl-{number}") for number in range(5)]
    world.runs = [RunTotals(f"etl-{number}", "success").add(number) for number in range(5)]
    whole = world.reader.prometheus_text(accept)
    monkeypatch.setattr(prometheus, "_POINTS_A_PIECE", 2)
    monkeypatch.setattr(prometheus, "_HISTOGRAMS_A_PIECE", 2)
    pieces, content_type = asyncio.run(world.reader.prometheus_pieces(accept))
    parts = list(pieces)
    assert len(parts) > len(world.families())
    assert (b"".join(parts), content_type) == whole


def test_a_request_in_steps_lets_other_tasks_run():
    """The request has the same content, and no step has all of its work."""
    world = World()
    world.jobs = [running(f"job-{number}", name=f"etl-{number}") for number in range(5)]
    whole, turns = World(), []
    whole.jobs = world.jobs

    async def main():
        async def other():
            while True:
                turns.append(1)
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        request = await world.reader.metrics_request_in_steps()
        task.cancel()
        return request

    requests = [asyncio.run(main()), whole.reader.metrics_request()]
    of_jobs = [
        ExportMetricsServiceRequest.FromString(payload).resource_metrics[0].scope_metrics[1] for payload, _ in requests
    ]
    assert of_jobs[0] == of_jobs[1]
    assert requests[0][1] == requests[1][1]
    assert len(turns) > 10


def test_errors_count_runs_that_have_an_error_type():
    """Failures and lost jobs count as errors, by type; successes and cancellations do not."""
    world = World()
    world.runs = [
        failed_runs(),
        RunTotals("etl", "error", "lost").add(1),
        RunTotals("etl", "success").add(1),
        RunTotals("etl", "cancellation").add(1),
    ]
    assert world.values("cicd.pipeline.run.errors") == {("etl", "KeyError"): 2, ("etl", "lost"): 1}
    assert world.metric("cicd.pipeline.run.errors").sum.is_monotonic


def test_the_age_of_the_last_end_is_by_result():
    """An ended run is recent at once, whatever its counter was before; another error type does not hide it."""
    world = World()
    ended = {"trace_id": TRACE, "span_id": SPAN}
    world.runs = [
        RunTotals("etl", "failure", "KeyError").add(3, **ended, time_unix_nano=NOW_NS - 90 * 10**9),
        RunTotals("etl", "failure", "OSError").add(900, **ended, time_unix_nano=NOW_NS - 30 * 10**9),
        RunTotals("etl", "success").add(3, **ended, time_unix_nano=NOW_NS + 10**9),
        RunTotals("load", "success").add(3),
    ]
    ages = {("etl", "failure"): 30, ("etl", "success"): 0}
    assert world.values("tailspan.pipeline.last_end.age") == ages


def test_active_is_zero_for_known_names():
    """An idle pipeline is 0, not absent, also if it is only in the store."""
    world = World()
    world.runs = [failed_runs()]
    world.jobs = [job("1", "load"), job("2", "load", JobState.PENDING), job("3", "load", JobState.UNKNOWN)]
    expected = {("etl", "pending"): 0, ("etl", "executing"): 0, ("etl", "finalizing"): 0}
    busy = {("load", "pending"): 1, ("load", "executing"): 2, ("load", "finalizing"): 0}
    assert world.values("cicd.pipeline.run.active") == expected | busy
    assert not world.metric("cicd.pipeline.run.active").sum.is_monotonic
    world.jobs = [job("1", "load", JobState.SUCCEEDED)]
    assert world.values("cicd.pipeline.run.active")["load", "finalizing"] == 1
    world.jobs = []
    assert sum(world.values("cicd.pipeline.run.active").values()) == 0


def test_names_above_the_limit_add_up():
    """Runs and jobs above the limit add up in one series; none is lost."""
    world = World(limit=1)
    world.jobs = [job("1", "a"), job("2", "b")]
    world.runs = [RunTotals(name, "success").add(1) for name in "abc"]
    counts = {
        point.attributes[0].value.string_value: point.count
        for point in world.metric("cicd.pipeline.run.duration").histogram.data_points
    }
    assert counts == {"a": 1, OTHER_PIPELINES: 2}
    assert world.values("cicd.pipeline.run.active")[OTHER_PIPELINES, "executing"] == 1


def test_gauges_of_running_jobs_combine_by_pipeline():
    """Without run ids, tasks add up and the largest age is exported; ended jobs leave nothing."""
    world = World()
    world.jobs = [
        job("1", total_tasks=10, finished_tasks=4, last_heartbeat=datetime.fromtimestamp(NOW_S - 5, UTC)),
        job(
            "2",
            total_tasks=5,
            finished_tasks=5,
            first_line_unix_nano=NOW_NS - 90 * 10**9,
            last_line_unix_nano=NOW_NS - 30 * 10**9,
        ),
        job("3", first_line_unix_nano=NOW_NS, last_line_unix_nano=NOW_NS),
    ]
    assert world.values("tailspan.job.tasks.finished") == {("etl",): 9}
    assert world.values("tailspan.job.tasks.total") == {("etl",): 15}
    assert world.values("tailspan.job.heartbeat.age") == {("etl",): 5.0}
    assert world.values("tailspan.job.last_line.age") == {("etl",): 30.0}
    assert world.values("tailspan.job.exec_time") == {("etl",): 60.0}
    world.jobs = [job("1", state=JobState.SUCCEEDED, total_tasks=10, last_line_unix_nano=NOW_NS)]
    assert world.values("tailspan.job.tasks.total") == {}
    assert world.values("tailspan.job.last_line.age") == {}


@pytest.mark.parametrize("run_id_on_metrics", [True, False])
def test_run_ids_are_on_gauges_only_with_the_option(run_id_on_metrics):
    """A series for each run is an option, and never for the counts of ended runs."""
    world = World(run_id_on_metrics=run_id_on_metrics)
    world.jobs = [job("run-17", total_tasks=1), job("run-18", total_tasks=1)]
    world.runs = [failed_runs()]
    assert (world.values("tailspan.job.tasks.total") == {("etl", "run-17"): 1, ("etl", "run-18"): 1}) is (
        run_id_on_metrics
    )
    assert (b"run-17" in world.reader.metrics_request()[0]) is run_id_on_metrics


def test_calls_increment_the_counters_of_their_service():
    """Each call increments the counter of its service."""
    world = World()
    agent = world.agent
    agent.add_service("local")
    agent.polled("fused", 3)
    agent.poll_failed("fused", ServiceUnavailableError("down"))
    agent.records_read("fused", 10, dropped=2, redactions=3, late=1)
    agent.records_acked("fused", 4, NOW_NS)
    agent.records_rejected("fused", 1, "invalid")
    agent.records_abandoned("fused", 2)
    agent.gap("fused")
    agent.export_failed("logs", "unavailable")
    assert world.values("tailspan.agent.polls") == {("local",): 0, ("fused",): 3}
    assert world.values("tailspan.agent.poll.errors") == {("ServiceUnavailableError", "fused"): 1}
    assert world.values("tailspan.agent.records.read") == {("local",): 0, ("fused",): 10}
    assert world.values("tailspan.agent.records.acked") == {("local",): 0, ("fused",): 4}
    assert world.values("tailspan.agent.records.rejected") == {("invalid", "fused"): 1}
    assert world.values("tailspan.agent.records.dropped") == {("min_severity", "fused"): 2}
    assert world.values("tailspan.agent.records.in_flight") == {("local",): 0, ("fused",): 3}
    assert world.values("tailspan.agent.redactions") == {("local",): 0, ("fused",): 3}
    assert world.values("tailspan.agent.lines.late") == {("local",): 0, ("fused",): 1}
    assert world.values("tailspan.agent.gaps") == {("local",): 0, ("fused",): 1}
    assert world.values("tailspan.agent.export.errors") == {("unavailable", "logs"): 1}


def test_lag_and_checkpoint_age_grow_with_the_clock():
    """Ages are computed when they are read; a service without followed jobs has no lag."""
    world = World()
    world.agent.records_acked("local", 1, NOW_NS - 10**9)
    world.agent.records_acked("local", 1, NOW_NS - 5 * 10**9)
    assert world.values("tailspan.agent.lag") == {}
    world.jobs = [job()]
    assert world.values("tailspan.agent.lag") == {("local",): 1.0}
    world.now_s += 60
    assert world.values("tailspan.agent.lag") == {("local",): 61.0}
    # In an outage the lag counts from its start, also of a service that has delivered nothing yet.
    world.agent.logs_outage = Outage(world.now_s - 20, 3, "connection refused")
    world.jobs = [job(), job(service="fused")]
    assert world.values("tailspan.agent.lag") == {("local",): 20.0, ("fused",): 20.0}
    assert world.values("tailspan.agent.checkpoint.age") == {(): 60.0}
    world.agent.checkpointed()
    assert world.values("tailspan.agent.checkpoint.age") == {(): 0.0}


def test_uptime_identifies_the_agent():
    """An alert that the agent is down needs its name on the series itself, the same after a restart elsewhere."""
    world = World()
    world.now_s += 60
    (point,) = world.metric("tailspan.agent.uptime").gauge.data_points
    labels = {each.key: each.value.string_value for each in point.attributes}
    assert point.as_double == 60
    assert labels["tailspan.agent.id"] == "c0ffee"
    assert labels["host.name"]
    assert labels["tailspan.agent.version"]


def test_jobs_followed_falls_back_to_zero():
    """A service whose last job has ended has 0 and does not keep its last number."""
    world = World()
    world.jobs = [job("1"), job("2"), job("3", service="fused")]
    assert world.values("tailspan.agent.jobs.followed") == {("local",): 2, ("fused",): 1}
    world.jobs = [job("3", service="fused")]
    assert world.values("tailspan.agent.jobs.followed") == {("local",): 0, ("fused",): 1}


def test_the_global_meter_provider_is_left_alone():
    """A program that imports the agent keeps its own metrics."""
    before = otel_metrics.get_meter_provider()
    World().request()
    assert otel_metrics.get_meter_provider() is before


def test_data_points_are_counted():
    """The exporter receives the number of data points in the request."""
    world = World()
    world.runs = [failed_runs()]
    payload, count = world.reader.metrics_request()
    (resource,) = ExportMetricsServiceRequest.FromString(payload).resource_metrics
    metrics = [metric for scope in resource.scope_metrics for metric in scope.metrics]
    assert count == sum(len(getattr(metric, metric.WhichOneof("data")).data_points) for metric in metrics) > 0


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_prometheus_names_are_those_of_its_own_otlp_receiver(accept):
    """The text parses, and dashboards find the same names as over OTLP."""
    world = World()
    world.runs = [failed_runs()]
    world.jobs = [job(total_tasks=3, last_line_unix_nano=NOW_NS)]
    world.agent.records_read("local", 7)
    world.agent.endpoint("logs", False)
    samples = {
        (sample.name, sample.labels.get("le")): sample
        for family in world.families(accept).values()
        for sample in family.samples
    }
    assert samples["cicd_pipeline_run_duration_seconds_count", None].value == 2
    assert samples["cicd_pipeline_run_duration_seconds_sum", None].value == 20_003
    assert samples["cicd_pipeline_run_duration_seconds_bucket", "2.0"].value == 0
    assert samples["cicd_pipeline_run_duration_seconds_bucket", "4.0"].value == 1
    assert samples["cicd_pipeline_run_duration_seconds_bucket", "+Inf"].value == 2
    assert samples["cicd_pipeline_run_errors_total", None].labels == {
        "cicd_pipeline_name": "etl",
        "error_type": "KeyError",
    }
    assert samples["cicd_pipeline_run_active", None].labels["cicd_pipeline_run_state"] == "finalizing"
    assert samples["tailspan_job_tasks_total", None].value == 3
    assert samples["tailspan_job_last_line_age_seconds", None].value == 0
    assert samples["tailspan_agent_records_read_total", None].value == 7
    assert samples["tailspan_agent_endpoint_up", None].value == 0
    assert samples["target_info", None].labels["service_instance_id"] == "c0ffee"


def test_exemplars_are_in_openmetrics_only():
    """The plain format has no exemplars; in OpenMetrics each is in its own bucket."""
    world = World()
    world.runs = [failed_runs().add(600_000, trace_id=TRACE[::-1], span_id=SPAN, time_unix_nano=NOW_NS)]
    assert TRACE.encode() not in world.reader.prometheus_text()[0]
    found = {
        sample.labels["le"]: (
            sample.exemplar.labels["trace_id"],
            sample.exemplar.value,
            float(sample.exemplar.timestamp),
        )
        for sample in world.families(OPENMETRICS)["cicd_pipeline_run_duration_seconds"].samples
        if sample.exemplar
    }
    assert found == {"4.0": (TRACE, 3.0, NOW_S), "+Inf": (TRACE[::-1], 600_000.0, NOW_S)}


def test_hostile_values_break_neither_format():
    """Names with quotes, line breaks and lone surrogates, and numbers above 64 bits, do not break the metrics."""
    world = World(run_id_on_metrics=True)
    world.jobs = [job("j1", name='a"b\\c\nd\ud800', total_tasks=10**400, finished_tasks=10**30)]
    world.agent.poll_failed("s\ud800", ValueError())
    assert world.metric("tailspan.job.tasks.total") is not None
    sample = world.families()["tailspan_job_tasks_finished"].samples[0]
    assert sample.labels["cicd_pipeline_name"] == 'a"b\\c\nd?'
    assert math.isfinite(sample.value)
