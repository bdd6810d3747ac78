"""The queries of the dashboards, with Grafana's variables filled in, and the names that queries use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

__all__ = [
    "ALL",
    "DASHBOARDS",
    "Query",
    "dashboard_queries",
    "datasource_queries",
    "filled",
    "logql_labels",
    "promql_selectors",
    "traceql_attributes",
    "without_strings",
]

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"

BUILT_IN = {"__rate_interval": "10s", "__interval": "15s", "__range": "3600s", "__auto": "1m"}
ALL = ".+"
_ALL_OR_NONE = ".*"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::(\w+))?\})")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|`[^`]*`')


def filled(text: str, values: Mapping[str, str | list[str]], window: str = BUILT_IN["__range"]) -> str:
    """Return a query with its variables filled in, as Grafana formats them.

    Args:
        text: The query of a dashboard.
        values: The value of each variable; a list for one where several can be chosen. `ALL` stays as it is.
        window: The time range of the dashboard.
    """

    def value(found: re.Match[str]) -> str:
        name, form = found[1] or found[2], found[3] or "raw"
        if name in BUILT_IN:
            return window if name == "__range" else BUILT_IN[name]
        chosen = values[name]
        if chosen in ([ALL], [_ALL_OR_NONE]):
            return chosen[0]
        each = [chosen] if isinstance(chosen, str) else chosen
        escaped = [re.sub(r"[\\^$*+?.()|\[\]{}/]", r"\\\g<0>", one) if form == "regex" else one for one in each]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return _VARIABLE.sub(value, text)


def without_strings(text: str) -> str:
    """Return a query with empty strings."""
    return _STRING.sub('""', text)


class Query(NamedTuple):
    """One query of one panel: its data source's type is ``prometheus``, ``loki`` or ``tempo``."""

    panel: str
    ref: str
    source: str
    text: str


def dashboard_queries(
    run: Mapping[str, str], chosen: Sequence[str] = (ALL,), window: str = BUILT_IN["__range"]
) -> Iterator[Query]:
    """Yield every query of every dashboard.

    Args:
        run: The values of One job: ``pipeline``, ``run_id`` and ``trace_id``; empty ones by default.
        chosen: The pipelines and agents that are chosen in the other dashboards.
        window: The time range of the dashboards.
    """
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        values: dict[str, str | list[str]] = {}
        for variable in board["templating"]["list"]:
            if variable["type"] == "textbox":
                values[variable["name"]] = run.get(variable["name"], "")
            elif variable["type"] != "datasource":
                values[variable["name"]] = [variable["allValue"]] if list(chosen) == [ALL] else list(chosen)
        for panel in board["panels"]:
            for target in panel["targets"]:
                text = filled(target.get("expr") or target.get("query"), values, window)
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
        for group in re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", expr)
        for label in group.split(",")
        if label.strip()
    }
    bare = re.sub(r"\b(?:by|on|ignoring|without)\s*\([^)]*\)", "", expr)
    for name, matchers in re.findall(
        r"\b((?:cicd|tailspan)_\w+|ALERTS)\b(?:\{([^}]*)\})?(?!\s*(?:=|!))", without_strings(bare)
    ):
        yield name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) | grouped


def logql_labels(expr: str) -> set[str]:
    """Return the stream labels and structured metadata that a LogQL expression names."""
    bare = without_strings(expr)
    grouped = re.findall(r"by \((\w+)\)", bare)
    return {*re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", bare), *grouped}


def traceql_attributes(query: str) -> set[str]:
    """Return the scoped attributes that a TraceQL query names, such as ``resource.service.name``."""
    return set(re.findall(r"\b(?:resource|span)\.[\w.]+", without_strings(query)))
