"""OTLP requests for tests, built with opentelemetry-proto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tailspan.config import FilesSettings, SignalSettings
from tailspan_agent.exporter.factory import make_exporter
from tailspan_agent.exporter.protocol import Exporter

TRACE_ID = bytes(range(16))
SPAN_ID = bytes(range(8))


def logs_payload(count: int, *, job: str = "job", padding: str = "") -> bytes:
    """Return a logs request with the bodies ``{job} 0``, ``{job} 1``, ..."""
    request = ExportLogsServiceRequest()
    group = request.resource_logs.add()
    group.resource.attributes.add(key="service.name").value.string_value = job
    scope = group.scope_logs.add()
    scope.scope.name = "tailspan"
    for index in range(count):
        record = scope.log_records.add(
            time_unix_nano=1_700_000_000_000_000_000 + index, trace_id=TRACE_ID, span_id=SPAN_ID, flags=1
        )
        record.body.string_value = f"{job} {index}{padding}"
    return request.SerializeToString()


def traces_payload(*names: str) -> bytes:
    """Return a traces request with spans of these names."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    group.resource.attributes.add(key="service.name").value.string_value = "job"
    scope = group.scope_spans.add()
    for name in names:
        scope.spans.add(name=name, kind="SPAN_KIND_SERVER", trace_id=TRACE_ID, span_id=SPAN_ID, start_time_unix_nano=1)
    return request.SerializeToString()


def metrics_payload(value: int = 3) -> bytes:
    """Return a metrics request with one gauge of one point."""
    request = ExportMetricsServiceRequest()
    metric = (
        request.resource_metrics.add().scope_metrics.add().metrics.add(name="tailspan.job.tasks.total", unit="{task}")
    )
    metric.gauge.data_points.add(as_int=value, time_unix_nano=1)
    return request.SerializeToString()


def payload_of(signal: str) -> bytes:
    """Return a small request of that signal."""
    return {"logs": logs_payload(3), "traces": traces_payload("RUN job"), "metrics": metrics_payload()}[signal]


def exporter_to(url: str | None, *, signal: Any = "logs", state_dir: Path = Path("unused"), **keys: Any) -> Exporter:
    """Make an exporter as the agent does; over HTTP the signal's path is added to a base URL."""
    if url is not None and keys.get("protocol", "http/protobuf") == "http/protobuf" and "/v1/" not in url:
        url = f"{url}/v1/{signal}"
    settings = SignalSettings(signal=signal, url=url, **keys)
    return make_exporter(signal, settings, state_dir=state_dir, files=FilesSettings())
