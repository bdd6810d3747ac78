"""Gauge values by series while a snapshot is made: jobs of one pipeline may share a series. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from tailspan_agent.otlp.metric import Gauge, Metric, NumberDataPoint

__all__ = ["Attributes", "GaugeDefinition", "GaugeValues", "age_s"]

Attributes: TypeAlias = tuple[tuple[str, str], ...]
"""The attributes of a series, hashable."""


class GaugeDefinition(NamedTuple):
    """A gauge as it is exported."""

    name: str
    unit: str
    description: str


class GaugeValues:
    """The values of gauges at one moment.

    Args:
        definitions: The gauges, in the order in which they are exported.
        now_unix_nano: The moment, in ns since the epoch.
    """

    def __init__(self, definitions: Sequence[GaugeDefinition], now_unix_nano: int) -> None:
        self._definitions = definitions
        self._now_unix_nano = now_unix_nano
        self._values: dict[str, dict[Attributes, float]] = {definition.name: {} for definition in definitions}

    def put(
        self, name: str, attributes: Attributes, value: float, combine: Callable[[float, float], float] = max
    ) -> None:
        """Set a value.

        Args:
            name: The name of the gauge.
            attributes: The series.
            value: Its value.
            combine: Returns the value of two jobs that share the series.
        """
        values = self._values[name]
        values[attributes] = combine(values[attributes], value) if attributes in values else value

    def metrics(self) -> Iterator[Metric]:
        """Yield the gauges that have values."""
        for name, unit, description in self._definitions:
            if values := self._values[name]:
                points = [
                    NumberDataPoint(dict(attributes), 0, self._now_unix_nano, value)
                    for attributes, value in values.items()
                ]
                yield Metric(name, description, unit, Gauge(points))


def age_s(then_unix_nano: int, now_unix_nano: int) -> float:
    """Return the seconds between two times; 0 if the first is later (clocks differ)."""
    return max(0.0, (now_unix_nano - then_unix_nano) / 1e9)
