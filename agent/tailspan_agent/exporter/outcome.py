"""The outcome of one export request, and the rules for it: pure functions of status, headers and body.

A response is about the *batch* (invalid, too large, partly rejected) or about the *endpoint* (wrong address, wrong
credentials, signal not supported). Only the former can cost records; the latter pauses the signal until an operator
corrects the configuration or the endpoint:

    2xx, OK                                                  Delivered, or Rejected by partial_success
    429 502 503 504, connection failures; CANCELLED ...      Retry, without limit
    408 425, other 5xx; INTERNAL UNKNOWN                     Retry with `server_error`: a limited number of times
    400 422; INVALID_ARGUMENT and the like                   Rejected
    413; any error that says the request is above a limit     TooLarge
    3xx, all other 4xx, TLS errors; UNIMPLEMENTED ...        EndpointFault

Source: OpenTelemetry protocol specification 1.9, "OTLP/HTTP Response", "OTLP/gRPC Throttling".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, TypeAlias

from tailspan._backoff import MAX_RETRY_AFTER_S, parse_retry_after_s
from tailspan._secrets import mask_and_cut
from tailspan.config.signals import Signal

__all__ = [
    "Delivered",
    "EndpointFault",
    "Outcome",
    "Rejected",
    "Retry",
    "TooLarge",
    "age_advice",
    "classify_grpc",
    "classify_http",
    "classify_success",
]

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
        refused: Whether the endpoint answered. If it gives the same answer again and again, a smaller request may pass.
    """

    reason: str
    after_s: float | None = None
    server_error: bool = False
    refused: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """The endpoint rejected records, and would reject them again.

    Attributes:
        rejected: Number of rejected records; None: the whole batch.
        reason: Why, to be shown.
        kind: The reason for metrics, of low cardinality: ``invalid``, ``too_old``, ``too_new``, ``partial``,
            ``too_large``, ``server_error``.
        ignored: Number of records that the endpoint says it ignored while it stored the others; None: unknown.
    """

    rejected: int | None
    reason: str
    kind: str = "invalid"
    ignored: int | None = None


@dataclass(frozen=True, slots=True)
class EndpointFault:
    """The endpoint, as configured, accepts nothing of this signal; the batch may be valid.

    Attributes:
        reason: Why, to be shown.
        unsupported: Whether the endpoint does not have this signal: Jaeger answers 404 for logs and metrics.
    """

    reason: str
    unsupported: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The request is above the endpoint's size limit; parts of it may be below."""

    reason: str


Outcome: TypeAlias = Delivered | Retry | Rejected | EndpointFault | TooLarge

_RETRYABLE_HTTP: Final = frozenset({429, 502, 503, 504})
_TRANSIENT_CLIENT_HTTP: Final = frozenset({408, 425})
_NOT_FOUND_HTTP: Final = 404
_BATCH_HTTP: Final = frozenset({400, 422})

_RETRYABLE_GRPC: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)
_SERVER_ERROR_GRPC: Final = frozenset({"INTERNAL", "UNKNOWN"})
_FAULT_GRPC: Final = frozenset({"UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"})
# grpc-go, -core, -java and -dotnet answer RESOURCE_EXHAUSTED, tonic OUT_OF_RANGE; only the text differs from a quota's.
# A gateway or Loki's distributor passes such a text on with HTTP 400, 429, 500 or 503.
_TOO_LARGE_TEXTS: Final = (
    "larger than max",
    "message length too large",
    "message exceeds maximum size",
    "exceeds the maximum configured message size",
)
# Only together with a status that is final: a busy server may talk about limits of its own.
_TOO_LARGE_TEXTS_IN_400: Final = ("too large", "too long", "max entry size", "maximum size", "size limit")
# Loki: "ingestion rate limit exceeded for user fake (limit: 4194304 bytes/sec) while attempting to ingest '17555' lines
# totaling '6864005' bytes", "Per stream rate limit exceeded (limit: 3MB/sec) while attempting to ingest for stream
# '{...}' totaling 16MB". Tempo: "ingestion rate limit (local: 15000000 bytes, ...) exceeded while adding 20000000
# bytes". Above the burst no waiting helps, and the text does not say the burst.
_SIZE: Final = r"'?(\d+(?:\.\d+)?)'? ?([kMG]?)i?(?:B|bytes)"
_RATE_AND_BYTES: Final = re.compile(rf"(?:limit|local): ?{_SIZE}.{{0,1000}}?(?:totaling|adding) {_SIZE}", re.DOTALL)
_UNITS: Final = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
# Loki: "total ignored: 3 out of 100 for stream: {...}", once for each stream.
_IGNORED: Final = re.compile(r"total ignored: (\d+) out of (\d+)")
_BEHIND_TEXTS: Final = ("too far behind", "out of order")
_TOO_OLD_TEXTS: Final = (*_BEHIND_TEXTS, "too old")
_TOO_NEW_TEXT: Final = "too new"
# The first byte of a google.rpc.Status: the tag of its code, or of its message. No text begins so.
_STATUS_TAGS: Final = b"\x08\x12"
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
    text = _error_text(body, content_type)
    reason = f"HTTP {status}" + (f": {_shorten(text)}" if text else "")
    is_final = status in _BATCH_HTTP
    if status == 413 or ((is_final or status == 429 or status >= 500) and _is_too_large(text, is_final=is_final)):
        return TooLarge(reason)
    if status in _RETRYABLE_HTTP:
        return Retry(reason, after_s=parse_retry_after_s(headers.get("retry-after"), now), refused=True)
    if status >= 500 or status in _TRANSIENT_CLIENT_HTTP:
        return Retry(
            reason, after_s=parse_retry_after_s(headers.get("retry-after"), now), server_error=True, refused=True
        )
    if status in _BATCH_HTTP:
        return _rejected(reason, text, count)
    if 300 <= status < 400 and "location" in headers:
        reason = f"HTTP {status} redirects, and exports do not follow redirects: configure the final address"
    return EndpointFault(reason, unsupported=status == _NOT_FOUND_HTTP)


def classify_grpc(code: str, message: str, status_details: bytes | None) -> Outcome:
    """Return the outcome of a gRPC error.

    Args:
        code: Name of the status code, such as ``UNAVAILABLE``.
        message: The status message.
        status_details: ``grpc-status-details-bin`` of the trailing metadata, if present.
    """
    reason = f"gRPC {code}" + (f": {_shorten(message)}" if message else "")
    if _is_too_large(message, is_final=code == "INVALID_ARGUMENT"):
        return TooLarge(reason)
    if code == "UNAVAILABLE" and any(known in message.lower() for known in _TLS_TEXTS):
        return EndpointFault(reason)
    after_s = _retry_info_s(status_details) if status_details else None
    if code in _RETRYABLE_GRPC or (code == "RESOURCE_EXHAUSTED" and after_s is not None):
        # grpcio reports a failed connection as UNAVAILABLE, too.
        answered = code not in {"CANCELLED", "DEADLINE_EXCEEDED"} and "connect" not in message.lower()
        return Retry(reason, after_s=after_s, refused=answered)
    if code in _SERVER_ERROR_GRPC:
        return Retry(reason, server_error=True, refused=True)
    if code in _FAULT_GRPC:
        return EndpointFault(reason, unsupported=code == "UNIMPLEMENTED")
    return _rejected(reason, message)


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
        return Delivered(
            f"the endpoint answered success, but not with a valid OTLP response: {_shorten(_error_text(body, ''))}"
        )
    partial = response.partial_success
    message = _shorten(partial.error_message)
    rejected = next(getattr(partial, field) for field in _REJECTED_FIELDS if hasattr(partial, field))
    if rejected > 0:
        return Rejected(min(rejected, count), message or "partial success without a message", kind="partial")
    return Delivered(message or None)


def age_advice(reason: str) -> str:
    """Return which setting of a store lets it accept lines that it rejected for their age.

    Args:
        reason: The reason of a `Rejected` whose kind is ``too_old`` or ``too_new``.
    """
    if _TOO_NEW_TEXT in reason.lower():
        return "correct the clock that the lines' times come from or raise limits_config.creation_grace_period (Loki)"
    if any(known in reason.lower() for known in _BEHIND_TEXTS):
        return "set limits_config.shard_streams.time_sharding_enabled or raise ingester.max_chunk_age (Loki)"
    return "raise limits_config.reject_old_samples_max_age (Loki)"


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


def _is_too_large(text: str, *, is_final: bool) -> bool:
    """Return whether an error says that the request is above a limit, so that it never passes as a whole."""
    named = _RATE_AND_BYTES.search(text)
    if named and float(named[3]) * _UNITS[named[4]] > float(named[1]) * _UNITS[named[2]]:
        return True
    known = (*_TOO_LARGE_TEXTS, *(_TOO_LARGE_TEXTS_IN_400 if is_final else ()))
    return any(part in text.lower() for part in known)


def _rejected(reason: str, text: str, count: int | None = None) -> Rejected:
    pairs = [(int(match[1]), int(match[2])) for match in _IGNORED.finditer(text)]
    # Loki reports the streams, or parts of one stream, that it rejected last, so the number may be too small.
    is_all = sum(total for _, total in pairs) == count
    lower = text.lower()
    kind = "too_old" if any(known in lower for known in _TOO_OLD_TEXTS) else "invalid"
    kind = "too_new" if _TOO_NEW_TEXT in lower else kind
    return Rejected(None, reason, kind, ignored=sum(ignored for ignored, _ in pairs) if is_all else None)


def _error_text(body: bytes, content_type: str) -> str:
    """Return the text of an error body: the message of a google.rpc.Status (required by OTLP), or the body itself.

    Loki sends a Status as ``application/octet-stream``, so its first byte distinguishes it from text.
    """
    if not body:
        return ""
    if "protobuf" in content_type or (body[0] in _STATUS_TAGS and "json" not in content_type):
        from google.protobuf.message import DecodeError
        from google.rpc.status_pb2 import Status

        try:
            return str(Status.FromString(body).message)
        except DecodeError:
            pass
    return body.decode("utf-8", "replace")


def _shorten(text: str) -> str:
    text = mask_and_cut(text, 4 * _REASON_CHARS)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 1] + "…"
