"""The environment of a job: that of its submitter, and what ties an instrumented program to the job's trace. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

__all__ = ["job_environment", "parent_of"]

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_NAME = "cicd.pipeline.name"
_RUN_ID = "cicd.pipeline.run.id"


def parent_of(environment: Mapping[str, str]) -> str | None:
    """Return the valid traceparent that an environment has, if any.

    Source: W3C Trace Context, level 1, section 3.2.
    """
    given = environment.get("TRACEPARENT", "").strip().lower()
    return given if _TRACEPARENT.fullmatch(given) else None


def job_environment(
    inherited: Mapping[str, str],
    *,
    job_id: str,
    name: str,
    trace_id: str,
    span_id: str,
    otlp: Mapping[str, str],
) -> dict[str, str]:
    """Return the environment to run a job's command in.

    Args:
        inherited: What it would have without us.
        job_id: The job.
        name: Its name; ``OTEL_SERVICE_NAME`` unless that is given.
        trace_id: Of the job's trace.
        span_id: Of its ``executing`` span, below which the program's own spans shall be.
        otlp: ``OTEL_EXPORTER_OTLP_*`` variables for a program that was given no endpoint.
    """
    environment = dict(inherited)
    # The state of another trace must not travel on with this one.
    environment.pop("TRACESTATE", None)
    environment["TRACEPARENT"] = f"00-{trace_id}-{span_id}-01"
    if "OTEL_EXPORTER_OTLP_ENDPOINT" not in environment:
        environment.update({**otlp, **environment})
    resource = _pairs(environment.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    outer = resource.get(_NAME)
    if environment.get("OTEL_SERVICE_NAME") in {None, outer and unquote(outer)}:
        # Not set, or set by the job that this one was started in.
        environment["OTEL_SERVICE_NAME"] = name
    resource.update({_NAME: quote(name, safe=""), _RUN_ID: job_id})
    environment["OTEL_RESOURCE_ATTRIBUTES"] = ",".join(f"{key}={value}" for key, value in resource.items())
    return environment


def _pairs(text: str) -> dict[str, str]:
    pairs = (pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    return {key.strip(): value.strip() for key, value in pairs}
