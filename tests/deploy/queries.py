"""The queries of the dashboards, with Grafana's variables filled in, and the names that queries use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

__all__ = [
    "DASHBOARDS",
    "Query",
    "dashboard_queries",
    "datasource_queries",
    "logql_labels",
    "promql_selectors",
    "traceql_attributes",
]

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"

FILLED = {
    "pipeline": ".+",
    "agent": ".+",
    "__rate_interval": "10s",
    "__interval": "15s",
    "__range": "3600s",
    "__auto": "1m",
}


class Query(NamedTuple):
    """One query of one panel: its data source's type is ``prometheus``, ``loki`` or ``tempo``."""

    panel: str
    ref: str
    source: str
    text: str


def dashboard_queries(variables: Mapping[str, str]) -> Iterator[Query]:
    """Yield every query of every dashboard.

    Args:
        variables: Values of ``run_id`` and ``trace_id``.
    """
    values = {**FILLED, **variables}
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                written = target.get("expr") or target.get("query")
                text = re.sub(r"\$(\w+)", lambda found: values[found[1]], written)
                yield Query(f"{path.stem}: {panel['title']}", target["refId"], target["datasource"]["type"], text)


def datasource_queries() -> Iterator[Query]:
    """Yield the queries that lead from a trace to lines and numbers, as Grafana fills them in for one job."""
    for source in yaml.safe_load((DASHBOARDS.parent / "provisioning" / "datasources.yaml").read_text())["datasources"]:
        to_logs = source["jsonData"].get("tracesToLogsV2")
        if to_logs:
            tags = ", ".join(f'{tag["value"]}="etl"' for tag in to_logs["tags"])
            text = to_logs["query"].replace("$${__tags}", tags).replace("$${__trace.traceId}", "0af7651916cd43dd")
            yield Query("trace to logs", "A", to_logs["datasourceUid"], text)
        to_metrics = source["jsonData"].get("tracesToMetrics", {"queries": []})
        for query in to_metrics["queries"]:
            tags = ", ".join(f'{tag["value"]}="etl"' for tag in to_metrics["tags"])
            yield Query(query["name"], "A", to_metrics["datasourceUid"], query["query"].replace("$$__tags", tags))


def promql_selectors(expr: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield each metric of a PromQL expression with the labels that are matched or grouped by somewhere in it."""
    grouped = {
        label.strip()
        for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expr)
        for label in group.split(",")
        if label.strip()
    }
    bare = re.sub(r"\b(?:by|on)\s*\([^)]*\)", "", expr)
    for name, matchers in re.findall(
        r"\b((?:cicd|tailspan)_\w+|ALERTS)\b(?:\{([^}]*)\})?(?!\s*(?:=|!))", re.sub(r'"[^"]*"', '""', bare)
    ):
        yield name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) | grouped


def logql_labels(expr: str) -> set[str]:
    """Return the stream labels and structured metadata that a LogQL expression names."""
    bare = re.sub(r'"[^"]*"', '""', expr)
    grouped = re.findall(r"by \((\w+)\)", bare)
    return {*re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", bare), *grouped}


def traceql_attributes(query: str) -> set[str]:
    """Return the scoped attributes that a TraceQL query names, such as ``resource.service.name``."""
    return set(re.findall(r"\b(?:resource|span)\.[\w.]+", re.sub(r'"[^"]*"', '""', query)))
