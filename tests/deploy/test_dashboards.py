"""The Grafana dashboards: current, whole, and asking only for what Tailspan sends."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.fleet import Fleet
from tests.deploy.queries import (
    DASHBOARDS,
    dashboard_queries,
    datasource_queries,
    logql_labels,
    promql_selectors,
    traceql_attributes,
)

DEPLOY = DASHBOARDS.parents[1]
QUERIES = [*dashboard_queries({"run_id": "r-1", "trace_id": "0af7651916cd43dd"}), *datasource_queries()]
NAMES = ("agent", "job", "jobs", "pipelines")
# What a store adds of itself.
BY_PROMETHEUS = {"instance"}
BY_LOKI = {"trace_id", "span_id", "severity_text", "severity_number", "detected_level"}


def load(path: Path) -> ModuleType:
    """Load a program that is no module of ours."""
    spec = importlib.util.spec_from_file_location("dashboards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_dashboards_are_current() -> None:
    """What is committed is what the code makes: else run python deploy/grafana/dashboards.py."""
    code = load(DEPLOY / "grafana" / "dashboards.py")
    assert {path.stem: path.read_text() for path in DASHBOARDS.glob("*.json")} == {
        name: code.as_json(name) for name in code.DASHBOARDS
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_whole(name: str) -> None:
    """Ids are unique, panels do not overlap, and every data source is a variable of the dashboard's own."""
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
        re.findall(r"\$(\w+)", " ".join(t.get("expr") or t["query"] for p in board["panels"] for t in p["targets"]))
    )
    assert {word for word in used if not word.startswith("__")} <= set(variables)


def test_links_between_dashboards_lead_somewhere() -> None:
    """A run id opens One job and fills in variables that it has."""
    texts = {name: (DASHBOARDS / f"{name}.json").read_text() for name in NAMES}
    job = {variable["name"] for variable in json.loads(texts["job"])["templating"]["list"]}
    links = re.findall(r"/d/([\w-]+)\?([^\"]*)", texts["jobs"])
    assert links
    for uid, arguments in links:
        assert uid == "tailspan-job"
        assert set(re.findall(r"var-(\w+)=", arguments)) <= job


def test_dashboards_and_rules_ask_only_for_what_is_sent(tmp_path: Path) -> None:
    """Metrics, labels and attributes of all queries are among those of a real run with trouble of every kind."""
    with Fleet(tmp_path) as fleet:
        fleet.start_agent()
        fleet.trouble()
        fleet.wait_for(lambda: "tailspan_agent_export_errors_total" in fleet.metrics())
        fleet.wait_for(lambda: sum(span.name == "RUN broken" for span in fleet.collector.spans()) == 2)
        fleet.wait_for(lambda: any("tailspan.alert" in record.attributes for record in fleet.collector.log_records()))
        text = fleet.metrics()
        records, spans = fleet.collector.log_records(), fleet.collector.spans()
    sent: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sent.setdefault(sample.name, set()).update(sample.labels)
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    promql = [query.text for query in QUERIES if query.source == "prometheus"]
    promql += [rule["expr"] for group in rules for rule in group["rules"]]
    asked = [selector for expr in promql for selector in promql_selectors(expr) if selector[0] != "ALERTS"]
    assert len(asked) > 80
    unknown = {
        (name, label) for name, labels in asked for label in labels - sent.get(name, set()) - BY_PROMETHEUS - {"le"}
    }
    assert unknown == set()
    assert {name for name, _ in asked} <= set(sent)

    keys = {key for record in records for key in (*record.attributes, *record.resource)}
    known = {re.sub(r"\W", "_", key) for key in keys} | BY_LOKI
    logql = {label for query in QUERIES if query.source == "loki" for label in logql_labels(query.text)}
    assert logql >= {"service_name", "cicd_pipeline_run_id", "detected_level", "exception_type"}
    assert logql <= known

    scoped = {f"span.{key}" for span in spans for key in span.attributes}
    scoped |= {f"resource.{key}" for span in spans for key in span.resource}
    traceql = {name for query in QUERIES if query.source == "tempo" for name in traceql_attributes(query.text)}
    assert traceql >= {"resource.cicd.pipeline.run.id", "span.cicd.pipeline.result"}
    assert traceql <= scoped
    assert {span.name for span in spans if span.kind == "SERVER"} >= {"RUN broken", "RUN noisy"}
    assert "submitted" in {span.name for span in spans}
