"""The outcome of one export request, and the rules for it: pure functions of status, headers and body.

A response is about the *batch* (invalid, too large, partly rejected) or about the *endpoint* (wrong address, wrong
credentials, signal not supported). Only the former can cost records; the latter pauses the signal until an operator
corrects the configuration or the endpoint:

    2xx, OK                                                  Delivered, or Rejected by partial_success
    429 502 503 504, connection failures; CANCELLED ...      Retry, without limit
    408 425, other 5xx; INTERNAL UNKNOWN                     Retry with `server_error`: a limited number of times
    400 422; INVALID_ARGUMENT and the like                   Rejected
    413; a message above the receiver's limit                 TooLarge
    3xx, all other 4xx, TLS errors; UNIMPLEMENTED ...        EndpointFault

Source: OpenTelemetry protocol specification 1.9, "OTLP/HTTP Response", "OTLP/gRPC Throttling".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias

from tailspan._backoff import parse_retry_after_s
from tailspan.config.signals import Signal

__all__ = [
    "MAX_RETRY_AFTER_S",
    "Delivered",
    "EndpointFault",
    "Outcome",
    "Rejected",
    "Retry",
    "TooLarge",
    "classify_grpc",
    "classify_http",
    "classify_success",
]

MAX_RETRY_AFTER_S = 3600.0
"""Longest Retry-After that the agent respects: a wrong value must not stop exports for days."""

_REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Delivered:
    """The endpoint accepted all records.

    Attributes:
        warning: The endpoint's message, or what is wrong with its response; None without either.
    """

    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The request failed for now: send the same bytes again later.

    Attributes:
        reason: Why, to be shown.
        after_s: Seconds to wait, from the endpoint (Retry-After).
        server_error: Whether OTLP does not list the failure as retryable: limit the retries.
    """

    reason: str
    after_s: float | None = None
    server_error: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """The endpoint rejected records, and would reject them again.

    Attributes:
        rejected: Number of rejected records; None: the whole batch.
        reason: Why, to be shown.
        kind: The reason for metrics, of low cardinality: ``invalid``, ``partial``, ``too_large``, ``server_error``.
    """

    rejected: int | None
    reason: str
    kind: str = "invalid"


@dataclass(frozen=True, slots=True)
class EndpointFault:
    """The endpoint, as configured, accepts nothing of this signal; the batch may be valid."""

    reason: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The request is above the endpoint's size limit; parts of it may be below."""

    reason: str


Outcome: TypeAlias = Delivered | Retry | Rejected | EndpointFault | TooLarge

_RETRYABLE_HTTP: Final = frozenset({429, 502, 503, 504})
_TRANSIENT_CLIENT_HTTP: Final = frozenset({408, 425})
_BATCH_HTTP: Final = frozenset({400, 422})

_RETRYABLE_GRPC: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)
_SERVER_ERROR_GRPC: Final = frozenset({"INTERNAL", "UNKNOWN"})
_FAULT_GRPC: Final = frozenset({"UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"})
# grpc-go, -core, -java and -dotnet answer RESOURCE_EXHAUSTED, tonic OUT_OF_RANGE; only the text differs from a quota's.
_TOO_LARGE_TEXTS: Final = (
    "larger than max",
    "message length too large",
    "message exceeds maximum size",
    "exceeds the maximum configured message size",
)
_TLS_TEXTS: Final = ("ssl handshake", "tls handshake", "ssl_error", "certificate_verify_failed")

_REJECTED_FIELDS: Final = ("rejected_log_records", "rejected_spans", "rejected_data_points")


def classify_http(
    signal: Signal, status: int, headers: Mapping[str, str], body: bytes, count: int, now: datetime
) -> Outcome:
    """Return the outcome of an HTTP response.

    Args:
        signal: The signal.
        status: The HTTP status.
        headers: The response headers by lower-case name.
        body: The decompressed response body; its beginning is enough.
        count: Number of records in the request.
        now: The time (aware) that a Retry-After date is relative to.
    """
    content_type = headers.get("content-type", "")
    if 200 <= status < 300:
        # 204 (Loki) and an empty 200 are full successes without a message to parse.
        return classify_success(signal, body, count, content_type)
    reason = f"HTTP {status}" + _explain(body, content_type)
    if status in _RETRYABLE_HTTP:
        return Retry(reason, after_s=_retry_after_s(headers, now))
    if status >= 500 or status in _TRANSIENT_CLIENT_HTTP:
        return Retry(reason, after_s=_retry_after_s(headers, now), server_error=True)
    if status in _BATCH_HTTP:
        return Rejected(None, reason)
    if status == 413:
        return TooLarge(reason)
    if 300 <= status < 400 and "location" in headers:
        reason = f"HTTP {status} redirects, and exports do not follow redirects: configure the final address"
    return EndpointFault(reason)


def classify_grpc(code: str, message: str, status_details: bytes | None) -> Outcome:
    """Return the outcome of a gRPC error.

    Args:
        code: Name of the status code, such as ``UNAVAILABLE``.
        message: The status message.
        status_details: ``grpc-status-details-bin`` of the trailing metadata, if present.
    """
    reason = f"gRPC {code}" + (f": {_shorten(message)}" if message else "")
    text = message.lower()
    if any(known in text for known in _TOO_LARGE_TEXTS):
        return TooLarge(reason)
    if code == "UNAVAILABLE" and any(known in text for known in _TLS_TEXTS):
        return EndpointFault(reason)
    after_s = _retry_info_s(status_details) if status_details else None
    if code in _RETRYABLE_GRPC or (code == "RESOURCE_EXHAUSTED" and after_s is not None):
        return Retry(reason, after_s=after_s)
    if code in _SERVER_ERROR_GRPC:
        return Retry(reason, server_error=True)
    if code in _FAULT_GRPC:
        return EndpointFault(reason)
    return Rejected(None, reason)


def classify_success(signal: Signal, body: bytes, count: int, content_type: str = "application/x-protobuf") -> Outcome:
    """Return the outcome of a successful response: full success, partial success, or a warning.

    Args:
        signal: The signal.
        body: The ``Export*ServiceResponse``; an endpoint may send anything.
        count: Number of records in the request.
        content_type: The media type of the body, JSON or else protobuf.
    """
    if not body:
        return Delivered()
    # Most endpoints send an empty body: an agent that needs no protobuf does not import it.
    from tailspan_agent.otlp.json_lines import UnreadableLineError, decode_response
    from tailspan_agent.otlp.messages import MESSAGES, DecodeError

    try:
        if "json" in content_type:
            response = decode_response(signal, body)
        else:
            response = MESSAGES[signal].response()
            response.ParseFromString(body)
    except (DecodeError, UnreadableLineError):
        return Delivered(f"the endpoint answered success, but not with a valid OTLP response{_explain(body, '')}")
    partial = response.partial_success
    message = _shorten(partial.error_message)
    rejected = next(getattr(partial, field) for field in _REJECTED_FIELDS if hasattr(partial, field))
    if rejected > 0:
        return Rejected(min(rejected, count), message or "partial success without a message", kind="partial")
    return Delivered(message or None)


def _retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    seconds = parse_retry_after_s(headers.get("retry-after"), now)
    return None if seconds is None else min(seconds, MAX_RETRY_AFTER_S)


def _retry_info_s(status_details: bytes) -> float | None:
    from google.protobuf.message import DecodeError
    from google.rpc.error_details_pb2 import RetryInfo
    from google.rpc.status_pb2 import Status

    try:
        status = Status.FromString(status_details)
        for detail in status.details:
            info = RetryInfo()
            if detail.Unpack(info):
                seconds: float = info.retry_delay.seconds + info.retry_delay.nanos / 1e9
                return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)
    except DecodeError:
        pass
    return None


def _explain(body: bytes, content_type: str) -> str:
    """Return ``: text`` of an error body: the message of a google.rpc.Status (required by OTLP), or the body itself."""
    if not body:
        return ""
    text = ""
    if "protobuf" in content_type:
        from google.protobuf.message import DecodeError
        from google.rpc.status_pb2 import Status

        try:
            text = Status.FromString(body).message
        except DecodeError:
            pass
    text = _shorten(text or body[: 4 * _REASON_CHARS].decode("utf-8", "replace"))
    return f": {text}" if text else ""


def _shorten(text: str) -> str:
    text = "".join(char if char.isprintable() else " " for char in text[: 4 * _REASON_CHARS])
    text = " ".join(text.split())
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 1] + "…"
