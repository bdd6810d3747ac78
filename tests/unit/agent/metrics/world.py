"""A metrics reader whose values a test sets."""

from __future__ import annotations

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.metrics.agent import AgentMetrics, agent_resource
from tailspan_agent.metrics.snapshot import MetricsReader

NOW_S = 1_800_000_000
NOW_NS = NOW_S * 10**9
START_NS = 1_700_000_000 * 10**9
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


class World:
    """Values that the metrics reader reads, to be changed by a test."""

    def __init__(self, *, limit: int = 200, run_id_on_metrics: bool = False, exponential: bool = False) -> None:
        self.now_s = float(NOW_S)
        self.runs: list[RunTotals] = []
        self.jobs: list[JobSnapshot] = []
        self.agent = AgentMetrics(
            agent_resource("tailspan-agent", "c0ffee", {"deployment.environment.name": "prod", "service.name": "no"}),
            clock_s=lambda: self.now_s,
        )
        self.reader = MetricsReader(
            self.agent,
            runs=lambda: self.runs,
            jobs=lambda: self.jobs,
            names=PipelineNames(limit),
            start_unix_nano=START_NS,
            run_id_on_metrics=run_id_on_metrics,
            exponential=exponential,
            clock_ns=lambda: int(self.now_s * 10**9),
        )

    def request(self) -> ExportMetricsServiceRequest:
        """Decode the request."""
        return ExportMetricsServiceRequest.FromString(self.reader.metrics_request()[0])

    def metric(self, name: str):
        """Return one metric of the request; None without it."""
        (resource,) = self.request().resource_metrics
        found = [metric for scope in resource.scope_metrics for metric in scope.metrics if metric.name == name]
        assert len(found) <= 1
        return found[0] if found else None

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Return a metric's numbers by attribute values, these in the order of attribute names; no ended series."""
        metric = self.metric(name)
        if metric is None:
            return {}
        data = getattr(metric, metric.WhichOneof("data"))
        return {
            tuple(a.value.string_value for a in sorted(point.attributes, key=lambda each: each.key)): getattr(
                point, point.WhichOneof("value")
            )
            for point in data.data_points
            if not point.flags
        }

    def ended(self) -> dict[str, set[tuple[str, ...]]]:
        """Return the series that end with the next request, by the name of their metric."""
        (resource,) = self.request().resource_metrics
        ended: dict[str, set[tuple[str, ...]]] = {}
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in getattr(metric, metric.WhichOneof("data")).data_points:
                    if point.flags:
                        assert point.flags == 1
                        assert point.time_unix_nano == int(self.now_s * 10**9)
                        assert isinstance(metric.WhichOneof("data"), str)
                        assert not point.WhichOneof("value")
                        ended.setdefault(metric.name, set()).add(
                            tuple(each.value.string_value for each in point.attributes)
                        )
        return ended

    def families(self, accept: str = ""):
        """Parse the Prometheus text into families by name."""
        text, content_type = self.reader.prometheus_text(accept)
        parse = parse_openmetrics if "openmetrics" in content_type else parse_text
        return {family.name: family for family in parse(text.decode())}
