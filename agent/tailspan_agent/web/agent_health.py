"""The agent's own health in tables, from the same metrics that Prometheus scrapes. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tailspan_agent.otlp.metric import NumberDataPoint, ScopeMetrics

__all__ = ["Health", "health_of"]

_PREFIX = "tailspan.agent."


@dataclass(frozen=True, slots=True)
class Health:
    """The agent's metrics, without their prefix.

    Attributes:
        services: Values by metric, by the configured name of a service.
        rejected: Rejected records by reason.
        totals: The sum of a metric over all services and attributes.
    """

    services: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rejected: Mapping[str, float] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)


def health_of(scope: ScopeMetrics) -> Health:
    """Return the agent's health from its collected metrics."""
    services: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    rejected: dict[str, float] = defaultdict(float)
    totals: dict[str, float] = defaultdict(float)
    for name, point in _points(scope):
        reason, service = point.attributes.get("reason"), point.attributes.get("service")
        totals[name] += point.value
        if service is not None:
            services[str(service)][name] += point.value
        if name.endswith("rejected") and reason is not None:
            rejected[str(reason)] += point.value
    return Health(dict(services), dict(rejected), dict(totals))


def _points(scope: ScopeMetrics) -> Iterator[tuple[str, NumberDataPoint]]:
    for metric in scope.metrics:
        if metric.name.startswith(_PREFIX):
            for point in metric.data.data_points:
                if isinstance(point, NumberDataPoint):
                    yield metric.name.removeprefix(_PREFIX), point
