"""`tailspan_agent.otlp.metric`: metrics encoded by hand are what the encoder of the OpenTelemetry SDK makes of them."""

from __future__ import annotations

import math
import struct

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import Exemplar as SdkExemplar
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.metrics._internal.point import Buckets as SdkBuckets
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tailspan_agent.otlp.metric import (
    Buckets,
    DataPoint,
    Exemplar,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ScopeMetrics,
    Sum,
    encode_metric,
    encode_resource_metrics,
    encode_scope_metrics,
)
from tests.property.effort import fuzz

CUMULATIVE = sdk.AggregationTemporality.CUMULATIVE
TIMES = st.integers(0, (1 << 63) - 1)
COUNTS = st.integers(0, 1 << 40)
FLOATS = st.floats(allow_nan=False)
ATTRIBUTES = st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3)
EXEMPLARS = st.lists(
    st.builds(Exemplar, FLOATS, TIMES, st.integers(1, (1 << 64) - 1), st.integers(1, (1 << 128) - 1)), max_size=2
)
NUMBERS = st.lists(
    st.builds(NumberDataPoint, ATTRIBUTES, TIMES, TIMES, FLOATS | st.integers(-(1 << 63), 1 << 62)),
    min_size=1,
    max_size=3,
)
HISTOGRAMS = st.lists(
    st.builds(
        HistogramDataPoint, ATTRIBUTES, TIMES, TIMES, COUNTS, FLOATS, st.lists(COUNTS), st.lists(FLOATS), EXEMPLARS
    ),
    min_size=1,
    max_size=2,
)
EXPONENTIAL = st.lists(
    st.builds(
        ExponentialHistogramDataPoint,
        ATTRIBUTES,
        TIMES,
        TIMES,
        COUNTS,
        FLOATS,
        st.integers(-10, 20),
        COUNTS,
        st.builds(Buckets, st.integers(-(1 << 31), (1 << 31) - 1), st.lists(COUNTS)),
        EXEMPLARS,
    ),
    min_size=1,
    max_size=2,
)
DATA = st.one_of(
    st.builds(Gauge, NUMBERS),
    st.builds(Sum, NUMBERS, st.booleans()),
    st.builds(Histogram, HISTOGRAMS),
    st.builds(ExponentialHistogram, EXPONENTIAL),
)


def of_sdk(data: Gauge | Sum | Histogram | ExponentialHistogram) -> object:
    """Return the same data in the classes of the SDK."""
    match data:
        case Gauge():
            return sdk.Gauge(list(map(point_of_sdk, data.data_points)))
        case Sum():
            return sdk.Sum(list(map(point_of_sdk, data.data_points)), CUMULATIVE, data.is_monotonic)
        case Histogram():
            return sdk.Histogram(list(map(point_of_sdk, data.data_points)), CUMULATIVE)
        case _:
            return sdk.ExponentialHistogram(list(map(point_of_sdk, data.data_points)), CUMULATIVE)


def point_of_sdk(point: DataPoint) -> object:
    """Return the same point in a class of the SDK."""
    times = point.attributes, point.start_time_unix_nano, point.time_unix_nano
    if isinstance(point, NumberDataPoint):
        return sdk.NumberDataPoint(*times, point.value)
    none = {"min": None, "max": None}
    exemplars = [SdkExemplar({}, one.value, one.time_unix_nano, one.span_id, one.trace_id) for one in point.exemplars]
    if isinstance(point, HistogramDataPoint):
        values = point.count, point.sum, point.bucket_counts, point.explicit_bounds
        return sdk.HistogramDataPoint(*times, *values, **none, exemplars=exemplars)
    return sdk.ExponentialHistogramDataPoint(
        *times,
        point.count,
        point.sum,
        point.scale,
        point.zero_count,
        positive=SdkBuckets(point.positive.offset, point.positive.bucket_counts),
        negative=SdkBuckets(0, []),
        flags=0,
        **none,
        exemplars=exemplars,
    )


def decoded(metric: Metric, resource: dict[str, str], scope: ScopeMetrics) -> Message:
    """Return the request of one metric, decoded."""
    scopes = [encode_scope_metrics(scope, [encode_metric(metric)])]
    return ExportMetricsServiceRequest.FromString(encode_resource_metrics(resource, scopes))


@fuzz(120)
@given(DATA)
def test_a_request_is_that_of_the_sdk(data: Gauge | Sum | Histogram | ExponentialHistogram) -> None:
    """Whatever the kind of metric and its values; the start of a gauge is not sent."""
    resource = {"service.name": "agent", "service.version": "1"}
    theirs = encode_metrics(
        sdk.MetricsData(
            [
                sdk.ResourceMetrics(
                    Resource(resource),
                    [
                        sdk.ScopeMetrics(
                            InstrumentationScope("scope", "2"), [sdk.Metric("name", "text", "s", of_sdk(data))], ""
                        )
                    ],
                    "",
                )
            ]
        )
    )
    ours = decoded(Metric("name", "text", "s", data), resource, ScopeMetrics("scope", "2", ()))
    (metric,) = ours.resource_metrics[0].scope_metrics[0].metrics
    for point in metric.gauge.data_points:
        point.ClearField("start_time_unix_nano")
    assert ours == theirs


def test_nan_ends_a_series() -> None:
    """It is sent as a flag, without a value."""
    metric = Metric("name", "", "", Gauge([NumberDataPoint({}, 0, 1, math.nan)]))
    (sent,) = decoded(metric, {}, ScopeMetrics("scope", "", ())).resource_metrics[0].scope_metrics[0].metrics
    (point,) = sent.gauge.data_points
    assert (point.flags, point.WhichOneof("value"), point.time_unix_nano) == (1, None, 1)


@pytest.mark.parametrize(
    "point",
    [NumberDataPoint({}, 0, 1 << 64, 1), NumberDataPoint({}, -1, 1, 1), NumberDataPoint({}, 0, 1, 1 << 63)],
    ids=["time", "start", "value"],
)
def test_a_number_beyond_64_bits_is_an_error(point: NumberDataPoint) -> None:
    """The nearest value that fits would be a wrong one."""
    with pytest.raises(struct.error):
        encode_metric(Metric("name", "", "", Gauge([point])))
