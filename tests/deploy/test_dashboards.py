"""The Grafana dashboards: they are current and complete, and query only what Tailspan sends."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tailspan.local.environment import job_environment
from tailspan.models import JobState, JobStatus, TaskRun
from tailspan_agent.job.task_spans import LineTimes, TaskScene, task_spans
from tailspan_agent.job.times import JobTimes
from tailspan_agent.otlp.span import SpanData
from tests.deploy.fleet import Fleet
from tests.deploy.queries import (
    DASHBOARDS,
    dashboard_queries,
    datasource_queries,
    logql_labels,
    promql_selectors,
    traceql_attributes,
    without_strings,
)

DEPLOY = DASHBOARDS.parents[1]
RUN = {"pipeline": "etl", "run_id": "r-1", "trace_id": "0af7651916cd43dd"}
QUERIES = [*dashboard_queries(RUN), *datasource_queries()]
# Every character that a query language, a regular expression or a URL treats in a special way; a backtick is left out.
HOSTILE = """a"b'c\\d(e)+f$g[h]{i}|j.k*l?m^n/o&p=q#r%s t~u!v,w"""
NAMES = ("agent", "job", "jobs", "pipelines")
# Labels that the stores add.
BY_PROMETHEUS = {"instance"}
BY_LOKI = {"trace_id", "span_id", "severity_text", "severity_number", "detected_level"}


def load(path: Path) -> ModuleType:
    """Load a program that is not in a package."""
    spec = importlib.util.spec_from_file_location("dashboards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_dashboards_are_current() -> None:
    """The committed files are those that deploy/grafana/dashboards.py writes; if not, run it."""
    code = load(DEPLOY / "grafana" / "dashboards.py")
    assert {path.stem: path.read_text() for path in DASHBOARDS.glob("*.json")} == {
        name: code.as_json(name) for name in code.DASHBOARDS
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_whole(name: str) -> None:
    """Ids are unique, panels do not overlap, and every data source is a variable of the dashboard."""
    board = json.loads((DASHBOARDS / f"{name}.json").read_text())
    assert board["uid"] == f"tailspan-{name}"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert variables[source["uid"].strip("${}")]["query"] == source["type"]
    used = set(
        re.findall(r"\$\{?(\w+)", " ".join(t.get("expr") or t["query"] for p in board["panels"] for t in p["targets"]))
    )
    assert {word for word in used if not word.startswith("__")} <= set(variables)


def test_links_between_dashboards_lead_somewhere() -> None:
    """A run id opens One job with all its variables and the time range; values with special characters arrive whole."""
    boards = {name: json.loads((DASHBOARDS / f"{name}.json").read_text()) for name in NAMES}
    variables = {variable["name"] for variable in boards["job"]["templating"]["list"]}
    for name in ("jobs", "job"):
        settings = [panel.get("fieldConfig", {}) for panel in boards[name]["panels"]]
        overrides = [override for each in settings for override in each.get("overrides", [])]
        properties = [each for override in overrides for each in override["properties"] if each["id"] == "links"]
        links = [link["url"] for each in properties for link in each["value"]]
        assert links
        for url in links:
            path, _, arguments = url.partition("?")
            assert path == "/d/tailspan-job"
            given = set(re.findall(r"var-(\w+)=", arguments))
            assert {"pipeline", "run_id", "trace_id"} == given - {"task"} <= variables
            assert "${__url_time_range}" in arguments
            assert all(value.endswith(":percentencode}") for value in re.findall(r"=(\$\{[^}]*\})", arguments))


def test_special_characters_stay_within_strings() -> None:
    """A name of any characters changes no query but its own string, chosen alone or with others."""
    hostile = dict.fromkeys(RUN, HOSTILE)
    for plain, one, several in zip(
        dashboard_queries(RUN, ["etl"]),
        dashboard_queries(hostile, [HOSTILE]),
        dashboard_queries(hostile, [HOSTILE, "etl"]),
        strict=True,
    ):
        if plain.text != RUN["trace_id"]:
            assert without_strings(one.text) == without_strings(several.text) == without_strings(plain.text), one.panel
            for pattern in re.findall(r"=~\s*`([^`]*)`", several.text):
                assert re.fullmatch(pattern, HOSTILE) or pattern in (".+", "events.*"), several.panel


def test_one_job_queries_exactly_its_job() -> None:
    """No name or id of One job is a regular expression, except the id where the label may be absent."""
    board = json.loads((DASHBOARDS / "job.json").read_text())
    asked = [target.get("expr") or target["query"] for panel in board["panels"] for target in panel["targets"]]
    for query in asked:
        assert set(re.findall(r"=~\s*(`[^`]*\$[^`]*`)", query)) <= {"`${run_id:regex}|`", "`${task:regex}`"}, query
        assert set(re.findall(r"\$\{\w+:?(\w*)\}", query)) <= {"raw", "regex"}
    assert all("`${run_id:raw}`" in query for query in asked if "service_name" in query or "resource." in query)


def test_one_job_without_an_id_shows_no_job() -> None:
    """Opened without an id, One job shows nothing instead of the lines of every other program."""
    for query in dashboard_queries({}):
        if query.panel.startswith("job: ") and query.source == "loki":
            assert re.search(r"\{service_name=``, service_name=~`\.\+`[,}]", query.text)
            assert "| cicd_pipeline_run_id = `` | cicd_pipeline_run_id != ``" in query.text


def test_the_number_of_newest_spans_is_that_of_the_newest() -> None:
    """Without the hint, Tempo returns any spans up to the limit."""
    searches = [query.text for query in QUERIES if query.source == "tempo" and "{" in query.text]
    assert searches
    assert all(search.endswith(" with (most_recent=true)") for search in searches)


def test_trace_to_logs_works_from_the_spans_of_an_instrumented_program() -> None:
    """Its spans may have a service name of its own, but the run's attributes: the job's environment sets them."""
    environment = job_environment(
        {"OTEL_SERVICE_NAME": "own"}, job_id="r-1", name="etl", trace_id="0a" * 16, span_id="0b" * 8, otlp={}
    )
    attributes = dict(pair.split("=") for pair in environment["OTEL_RESOURCE_ATTRIBUTES"].split(","))
    sources = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources.yaml").read_text())["datasources"]
    (to_logs,) = (source["jsonData"]["tracesToLogsV2"] for source in sources if "tracesToLogsV2" in source["jsonData"])
    assert {tag["value"]: attributes.get(tag["key"]) for tag in to_logs["tags"]} == {"service_name": "etl"}


def test_dashboards_and_rules_query_only_what_is_sent(tmp_path: Path) -> None:
    """Metrics, labels and attributes of all queries are among those that a real agent sent."""
    with Fleet(tmp_path) as fleet:
        fleet.start_agent()
        fleet.trouble()
        for name in ("tailspan_agent_export_errors_total", "tailspan_agent_records_rejected_total{"):
            fleet.wait_for(lambda name=name: name in fleet.metrics())  # type: ignore[misc]
        fleet.wait_for(lambda: sum(span.name == "RUN broken" for span in fleet.collector.spans()) == 2)
        fleet.wait_for(lambda: any("tailspan.alert" in record.attributes for record in fleet.collector.log_records()))
        text = fleet.metrics()
        records, spans = fleet.collector.log_records(), fleet.collector.spans()
    sent: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sent.setdefault(sample.name, set()).update(sample.labels)
            if family.type == "histogram":
                sent.setdefault(family.name, set()).update(sample.labels)  # as a native histogram
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    promql = [query.text for query in QUERIES if query.source == "prometheus"]
    promql += [rule["expr"] for group in rules for rule in group["rules"]]
    asked = [selector for expr in promql for selector in promql_selectors(expr) if selector[0] != "ALERTS"]
    assert len(asked) > 80
    unknown = {
        (name, label) for name, labels in asked for label in labels - sent.get(name, set()) - BY_PROMETHEUS - {"le"}
    }
    assert unknown == set()
    # The metrics of an agent that shares jobs through a database; tests/prove/fleet_world.py has such agents.
    of_a_fleet = {f"tailspan_fleet_{name}" for name in ("agents", "shards", "takeovers_total")}
    of_a_fleet |= {f"tailspan_fleet_{name}_seconds" for name in ("lease_age", "handover_duration")}
    assert {name for name, _ in asked} <= set(sent) | of_a_fleet

    keys = {key for record in records for key in (*record.attributes, *record.resource)}
    known = {re.sub(r"\W", "_", key) for key in keys} | BY_LOKI
    logql = {label for query in QUERIES if query.source == "loki" for label in logql_labels(query.text)}
    assert logql >= {"service_name", "cicd_pipeline_run_id", "detected_level", "exception_type"}
    assert logql <= known | {"cicd_pipeline_task_name"}

    scoped = {f"span.{key}" for span in spans for key in span.attributes}
    scoped |= {f"resource.{key}" for span in spans for key in span.resource}
    traceql = {name for query in QUERIES if query.source == "tempo" for name in traceql_attributes(query.text)}
    assert traceql >= {"resource.cicd.pipeline.run.id", "span.cicd.pipeline.result"}
    assert traceql <= scoped | {f"span.{key}" for key in task_span().attributes}
    assert {span.name for span in spans if span.kind == "SERVER"} >= {"RUN broken", "RUN noisy"}
    assert "submitted" in {span.name for span in spans}


def task_span() -> SpanData:
    """A span of a task; the jobs of the fleet have none."""
    now = datetime.now(UTC)
    task = TaskRun(task_id="e", name="extract", result="success", submitted_at=now, started_at=now, finished_at=now)
    job = JobStatus.from_state(JobState.RUNNING, job_id="r-1", job_name="etl", identity="", trace_id="0a" * 16)
    (span,) = task_spans(job, [task], TaskScene(JobTimes(0, 0, 1), LineTimes()))
    return span


def test_loki_finds_failures_by_its_index() -> None:
    """A query for events selects their streams: behind the selector alone, Loki would read every line."""
    asked = [
        query for query in QUERIES if query.source == "loki" and re.search("exception_type|tailspan_alert", query.text)
    ]
    assert {query.panel for query in asked} == {"jobs: Failures", "job: Why it failed", "job: Anomalies"}
    for query in asked:
        selector = query.text.partition("}")[0]
        assert "service_instance_id=~`events.*`" in selector
