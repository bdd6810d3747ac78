"""`LiveSeries`: ends the series of gauges whose job or pipeline is gone.

A store of metrics continues a gauge for some time after its last value: Prometheus for 5 minutes, so an ended job
would look as if it still ran. A data point with the flag NO_RECORDED_VALUE ends the series at once. A scrape needs no
such point: a series ends as soon as a scrape leaves it out.

Source: OpenTelemetry specification, "Metrics Data Model", data point flags.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from tailspan_agent.otlp.metric import Gauge, Metric, NumberDataPoint, ScopeMetrics, Sum, with_points

__all__ = ["LiveSeries"]

_FORGET_NS = 600 * 10**9
"""After that long without an accepted export, every store has ended the series by itself."""

_Attributes: TypeAlias = tuple[tuple[str, str], ...]


class _Known(NamedTuple):
    """A gauge that was exported, without its points, and the attributes of its series."""

    metric: Metric
    series: set[_Attributes]


class LiveSeries:
    """Remembers which series of gauges the endpoint has, and adds a last point for each that has no value any more.

    A counter needs none: its last value stays true.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], _Known] = {}
        self._exported: dict[tuple[str, str], _Known] = {}
        self._accepted_ns = 0

    def with_ends(self, scopes: Sequence[ScopeMetrics], now_unix_nano: int) -> list[ScopeMetrics]:
        """Return the metrics with a point for each series that has ended; its value is NaN, which ends it.

        Args:
            scopes: All metrics with their current values.
            now_unix_nano: The time of the added points, in ns since the epoch.
        """
        if now_unix_nano - self._accepted_ns > _FORGET_NS:
            self._known, self._accepted_ns = {}, now_unix_nano
        self._exported = {
            (scope.name, metric.name): _Known(metric, {_key(point) for point in _points(metric)})
            for scope in scopes
            for metric in scope.metrics
            if _is_gauge(metric)
        }
        completed = []
        for scope in scopes:
            ended = {
                name: known
                for (of, name), known in self._known.items()
                if of == scope.name and known.series - self._series(of, name)
            }
            metrics = [
                self._complete(scope, metric, ended.pop(metric.name, None), now_unix_nano) for metric in scope.metrics
            ]
            metrics += [
                self._complete(scope, with_points(known.metric, []), known, now_unix_nano) for known in ended.values()
            ]
            completed.append(msgspec.structs.replace(scope, metrics=metrics))
        # Until `accepted`, the endpoint may have received this export or not.
        for key, exported in self._exported.items():
            earlier = self._known.get(key)
            self._known[key] = _Known(exported.metric, exported.series | (earlier.series if earlier else set()))
        return completed

    def accepted(self, now_unix_nano: int) -> None:
        """Note that the endpoint accepted the last export: each ended series has its last point.

        Args:
            now_unix_nano: The time, in ns since the epoch.
        """
        self._known, self._accepted_ns = dict(self._exported), now_unix_nano

    def _series(self, scope: str, name: str) -> set[_Attributes]:
        exported = self._exported.get((scope, name))
        return exported.series if exported else set()

    def _complete(self, scope: ScopeMetrics, metric: Metric, known: _Known | None, now_unix_nano: int) -> Metric:
        if known is None:
            return metric
        ended = known.series - self._series(scope.name, metric.name)
        points = [NumberDataPoint(dict(series), 0, now_unix_nano, math.nan) for series in ended]
        return with_points(metric, [*_points(metric), *points])


def _is_gauge(metric: Metric) -> bool:
    return isinstance(metric.data, Gauge) or (isinstance(metric.data, Sum) and not metric.data.is_monotonic)


def _points(metric: Metric) -> Iterator[NumberDataPoint]:
    return (point for point in metric.data.data_points if isinstance(point, NumberDataPoint))


def _key(point: NumberDataPoint) -> _Attributes:
    return tuple(point.attributes.items())
