"""The environment of a job: that of its submitter, and what ties an instrumented program to the job's trace. Pure.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PYTHON_CONTEXT", "job_environment", "parent_of", "quoted"]

_NAME = "cicd.pipeline.name"
_RUN_ID = "cicd.pipeline.run.id"
_ENDPOINTS = tuple(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT" for signal in ("", "LOGS_", "TRACES_", "METRICS_"))
_HEX = frozenset("0123456789abcdef")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~")
PYTHON_CONTEXT = "tailspan"
"""The value of ``OTEL_PYTHON_CONTEXT`` with which the Python SDK starts below ``TRACEPARENT``."""


def parent_of(environment: Mapping[str, str]) -> str | None:
    """Return the valid traceparent that an environment has, if any.

    Source: W3C Trace Context, level 1, section 3.2.
    """
    given = environment.get("TRACEPARENT", "").strip().lower()
    parts = given.split("-")
    if [len(part) for part in parts] != [2, 32, 16, 2] or not _HEX.issuperset("".join(parts)):
        return None
    return given if parts[0] != "ff" and parts[1].strip("0") and parts[2].strip("0") else None


def job_environment(
    inherited: Mapping[str, str],
    *,
    job_id: str,
    name: str,
    trace_id: str,
    span_id: str,
    otlp: Mapping[str, str],
    attributes: Mapping[str, str] | None = None,
    unbuffered: bool = False,
    python_context: bool = False,
) -> dict[str, str]:
    """Return the environment to run a job's command in.

    Args:
        inherited: What it would have without us.
        job_id: The job.
        name: Its name; ``OTEL_SERVICE_NAME`` unless the environment names a service.
        trace_id: Of the job's trace.
        span_id: Of its ``executing`` span, below which the program's own spans belong.
        otlp: ``OTEL_EXPORTER_OTLP_*`` variables for a program that was given no endpoint, and in
            ``OTEL_RESOURCE_ATTRIBUTES`` attributes of all telemetry.
        attributes: The job's own attributes.
        unbuffered: Whether a Python program must not keep its output back: it goes to a pipe.
        python_context: Whether the program's Python has `tailspan.otel` and the API of OpenTelemetry.
    """
    environment = dict(inherited)
    # The state of another trace must not travel on with this one.
    environment.pop("TRACESTATE", None)
    environment["TRACEPARENT"] = f"00-{trace_id}-{span_id}-01"
    if not any(environment.get(variable) for variable in _ENDPOINTS):
        exporter = {key: value for key, value in otlp.items() if key != "OTEL_RESOURCE_ATTRIBUTES"}
        environment.update({**exporter, **environment})
    given = _pairs(environment.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    outer = given.get(_NAME)
    names_service = given.get("service.name") not in (None, outer)
    if environment.get("OTEL_SERVICE_NAME") in {None, "", outer and _unquoted(outer)} and not names_service:
        # Not set, or set by the job that this one was started in.
        environment["OTEL_SERVICE_NAME"] = name
    resource = _pairs(otlp.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    resource.update(given)
    resource.update({quoted(key): quoted(value) for key, value in (attributes or {}).items()})
    resource.update({_NAME: quoted(name), _RUN_ID: job_id})
    environment["OTEL_RESOURCE_ATTRIBUTES"] = ",".join([f"{key}={value}" for key, value in resource.items()])
    if python_context:
        environment.setdefault("OTEL_PYTHON_CONTEXT", PYTHON_CONTEXT)
    if unbuffered:
        environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in text.split(",") if "=" in pair]
    return {key.strip(): value.strip() for key, value in pairs}


def quoted(text: str) -> str:
    """Return text percent-encoded, as ``urllib.parse.quote(text, safe="")`` does, whose import costs 5 ms."""
    return "".join(
        [chr(byte) if byte in _UNRESERVED else f"%{byte:02X}" for byte in text.encode("utf-8", "surrogateescape")]
    )


def _unquoted(text: str) -> str:
    first, *rest = text.encode("utf-8", "surrogateescape").split(b"%")
    parts = [first]
    for part in rest:
        try:
            parts.append(bytes([int(part[:2], 16)]) + part[2:])
        except ValueError:
            parts.append(b"%" + part)
    return b"".join(parts).decode("utf-8", "replace")
