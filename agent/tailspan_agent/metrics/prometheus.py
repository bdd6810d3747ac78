"""Metrics as text for Prometheus to scrape, with the names that Prometheus' own OTLP receiver gives them.

So dashboards and alerts work with scraped and with pushed metrics.

Source: the OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility"; prometheus/otlptranslator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tailspan_agent.otlp.metric import (
    Exemplar,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
    with_points,
)

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.samples import Exemplar as FamilyExemplar

__all__ = ["prometheus_pieces", "prometheus_text"]

_UNITS = {"s": "seconds"}
# About 50 ms of work, so that other requests are answered in between.
_POINTS_A_PIECE, _HISTOGRAMS_A_PIECE = 2500, 200
_END = b"# EOF\n"
_NO_LABEL_CHARS = re.compile(r"[^a-zA-Z0-9_]")


def prometheus_text(metrics: Iterable[Metric], resource: Mapping[str, Any], accept: str = "") -> tuple[bytes, str]:
    """Return metrics in the requested text format.

    Args:
        metrics: The metrics.
        resource: The attributes of their resource; they become ``target_info``.
        accept: The Accept header; if it names OpenMetrics, the text is OpenMetrics, the only format with exemplars.

    Returns:
        The text and its content type.
    """
    pieces, content_type = prometheus_pieces(metrics, resource, accept)
    return b"".join(pieces), content_type


def prometheus_pieces(
    metrics: Iterable[Metric], resource: Mapping[str, Any], accept: str = ""
) -> tuple[Iterator[bytes], str]:
    """Return the same text in pieces, each made when it is taken: all of it may be tens of megabytes.

    Args:
        metrics: The metrics.
        resource: The attributes of their resource.
        accept: The Accept header.

    Returns:
        The pieces and their content type.
    """
    # imports take 50 ms, and only a scraped agent needs them
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

    class OneFamily(Collector):
        def __init__(self, family: Family) -> None:
            self._family = family

        def collect(self) -> Iterator[Family]:
            yield self._family

    encode, content_type = choose_encoder(accept)

    def pieces() -> Iterator[bytes]:
        text = encode(OneFamily(_target_info(resource)))
        has_end = text.endswith(_END)
        yield text.removesuffix(_END)
        for metric in metrics:
            size = _HISTOGRAMS_A_PIECE if isinstance(metric.data, Histogram) else _POINTS_A_PIECE
            for start in range(0, len(metric.data.data_points), size):
                text = encode(
                    OneFamily(_family(with_points(metric, metric.data.data_points[start : start + size])))
                ).removesuffix(_END)
                while start and text.startswith(b"# "):  # the first piece has the help and the type
                    text = text.partition(b"\n")[2]
                yield text
        if has_end:
            yield _END

    return pieces(), content_type


def _target_info(resource: Mapping[str, Any]) -> Family:
    from prometheus_client.metrics_core import Metric as Family

    family = Family("target", "The agent and its host.", "info")
    family.add_sample("target_info", _labels(resource), 1)
    return family


def _family(metric: Metric) -> Family:
    from prometheus_client.metrics_core import Metric as Family

    unit = _UNITS.get(metric.unit, "")
    name = metric.name.replace(".", "_")
    if unit and not name.endswith(f"_{unit}"):
        name += f"_{unit}"
    data = metric.data
    if metric.unit == "1" and isinstance(data, Gauge):
        name += "_ratio"
    if isinstance(data, Histogram):
        family = Family(name, metric.description, "histogram", unit)
        for histogram in data.data_points:
            _add_histogram(family, histogram)
        return family
    counter = isinstance(data, Sum) and data.is_monotonic
    family = Family(name, metric.description, "counter" if counter else "gauge", unit)
    for point in data.data_points:
        if isinstance(point, NumberDataPoint):
            family.add_sample(f"{name}_total" if counter else name, _labels(point.attributes), point.value)
    return family


def _add_histogram(family: Family, point: HistogramDataPoint) -> None:
    labels = _labels(point.attributes)
    bounds = [*map(float, point.explicit_bounds), math.inf]
    below = 0
    lower = -math.inf
    for upper, count in zip(bounds, point.bucket_counts, strict=True):
        below += count
        exemplar = next((each for each in point.exemplars if lower < each.value <= upper), None)
        family.add_sample(
            f"{family.name}_bucket",
            {**labels, "le": "+Inf" if upper == math.inf else str(upper)},
            below,
            exemplar=_exemplar(exemplar) if exemplar else None,
        )
        lower = upper
    family.add_sample(f"{family.name}_count", labels, point.count)
    family.add_sample(f"{family.name}_sum", labels, point.sum)


def _exemplar(exemplar: Exemplar) -> FamilyExemplar:
    from prometheus_client.samples import Exemplar as FamilyExemplar

    labels = {"trace_id": f"{exemplar.trace_id:032x}", "span_id": f"{exemplar.span_id:016x}"}
    return FamilyExemplar(labels, float(exemplar.value), exemplar.time_unix_nano / 1e9)


def _labels(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return attributes as labels; if two names become one, both values are kept, as the specification requires."""
    labels: dict[str, str] = {}
    for key, value in sorted(attributes.items()):
        name = _NO_LABEL_CHARS.sub("_", key)
        if not name[:1].isalpha():
            name = f"key_{name.lstrip('_')}"
        text = str(value).encode(errors="replace").decode()
        labels[name] = f"{labels[name]};{text}" if name in labels else text
    return labels
