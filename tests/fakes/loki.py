"""A double of Loki with its default limits: what it counts, copies, rejects and stores.

    loki = Loki()
    with Collector() as collector:
        collector.always("logs", loki)
        ...                                   # point the agent at f"{collector.http_url}/otlp"
    assert loki.lines(service_name="etl") == [...]

Measured on Loki 3.7.6 and 3.7.8: each line carries a copy of its resource, its scope and its ids as structured
metadata. The distributor drops invalid lines (too old, too new, too long, too much metadata), and sends the others to
the ingester in one gRPC message of at most 4 MiB. The ingestion rate counts lines with their copies. A stream accepts
lines up to an hour behind its newest one. Whatever was dropped, the other lines are stored, and the answer is 400. But
the ingester reports an error only for the last stream of a request: what it drops of the others, it drops in silence.
Error bodies are google.rpc.Status without a code, of the type ``application/octet-stream``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from google.rpc.status_pb2 import Status

from tests.fakes.collector import Reply, Request
from tests.fakes.otlp_rows import plain_attributes, plain_value

MIB = 1 << 20
_LEVEL = "detected_level"
_LONG = 127
_MAX_REASONS = 10
SECOND_NS = 1_000_000_000
# Resource attributes that become index labels by default; all others are copied to every line.
INDEX_LABELS = (
    "service.name",
    "service.namespace",
    "service.instance.id",
    "deployment.environment",
    "deployment.environment.name",
    "cloud.region",
    "cloud.availability_zone",
    "k8s.cluster.name",
    "k8s.namespace.name",
    "k8s.pod.name",
    "k8s.container.name",
    "container.name",
    "k8s.replicaset.name",
    "k8s.deployment.name",
    "k8s.statefulset.name",
    "k8s.daemonset.name",
    "k8s.cronjob.name",
    "k8s.job.name",
)


@dataclass(frozen=True)
class Limits:
    """Loki's defaults.

    Attributes:
        message_bytes: ``server.grpc_server_max_recv_msg_size``: the largest message from distributor to ingester.
        rate_bytes_s: ``ingestion_rate_mb``.
        burst_bytes: ``ingestion_burst_size_mb``; a larger request never passes.
        behind_s: Half of ``ingester.max_chunk_age``: how far a line may lie behind its stream's newest.
        age_s: ``reject_old_samples_max_age``.
        streams: ``max_global_streams_per_user``.
        ahead_s: ``creation_grace_period``: how far a line may lie in the future.
        line_bytes: ``max_line_size``.
        label_bytes: ``max_label_value_length``.
        metadata_bytes: ``max_structured_metadata_size``.
        metadata_entries: ``max_structured_metadata_entries_count``.
        time_sharding: ``shard_streams.time_sharding_enabled``: each stream is cut by time, none is too far behind.
    """

    message_bytes: int = 4 * MIB
    rate_bytes_s: float = 4.0 * MIB
    burst_bytes: int = 6 * MIB
    behind_s: float = 3600.0
    age_s: float = 168 * 3600.0
    streams: int = 5000
    ahead_s: float = 600.0
    line_bytes: int = 256 * 1024
    label_bytes: int = 2048
    metadata_bytes: int = 64 * 1024
    metadata_entries: int = 128
    time_sharding: bool = False


@dataclass(frozen=True)
class Entry:
    """One stored line."""

    time_unix_nano: int
    line: str
    metadata: tuple[tuple[str, str], ...] = field(repr=False)

    @cached_property
    def metadata_size(self) -> int:
        """Bytes of the structured metadata, without the level, which Loki adds after it has checked its limits."""
        return sum(len(key) + len(value.encode()) for key, value in self.metadata if key != _LEVEL)

    @cached_property
    def size(self) -> int:
        """Bytes that count against the ingestion rate."""
        return len(self.line.encode()) + self.metadata_size

    @property
    def message_size(self) -> int:
        """Bytes in the distributor's message to the ingester, with the tags and lengths of its fields."""
        level, long = 0, len(self.line) > _LONG
        for key, value in self.metadata:
            long += len(value) > _LONG
            level += len(key) + len(value) if key == _LEVEL else 0
        return self.size + level + 18 + 6 * len(self.metadata) + long


Labels = tuple[tuple[str, str], ...]


class Loki:
    """Answers ``POST /otlp/v1/logs``; see the module's docstring.

    Args:
        limits: What it accepts.
        clock_s: Returns the time in seconds since the epoch.

    Attributes:
        streams: The stored entries by index labels, in order of arrival.
        rejected: Number of requests that were not fully accepted, by reason.
        requests: Number of requests.
    """

    def __init__(self, limits: Limits | None = None, *, clock_s: Callable[[], float] = time.time) -> None:
        self.limits = limits or Limits()
        self.streams: dict[Labels, list[Entry]] = {}
        self.rejected: Counter[str] = Counter()
        self.requests = 0
        self._clock_s = clock_s
        self._newest: dict[Labels, int] = {}
        self._known: set[tuple[Labels, Entry]] = set()
        self._tokens = float(self.limits.burst_bytes)
        self._refilled_s = clock_s()
        self._taken_bytes = 0

    @property
    def allowed_s(self) -> float:
        """The least seconds in which the ingestion rate lets pass what was taken so far."""
        return max(0.0, (self._taken_bytes - self.limits.burst_bytes) / self.limits.rate_bytes_s)

    def __call__(self, request: Request) -> Reply:
        """Store what the limits allow, and answer as Loki does."""
        self.requests += 1
        limits, invalid = self.limits, Counter[str]()
        pushed: dict[Labels, list[Entry]] = {}
        for labels, entry in _entries(request.message):
            if any(len(value.encode()) > limits.label_bytes for _, value in labels):
                value = max((value for _, value in labels), key=len)
                invalid[f"stream '{_stream_text(labels)}' has label value too long: '{value}'"] = 1  # of all its lines
            elif self._is_valid(entry):
                pushed.setdefault(labels, []).append(entry)
            else:
                invalid[self._invalid(labels, entry)] += 1
        entries = [entry for stream in pushed.values() for entry in stream]
        total = sum(entry.size for entry in entries)
        if entries and not self._take_tokens(total):
            return self._error(
                429,
                "rate_limited",
                f"ingestion rate limit exceeded for user fake (limit: {limits.rate_bytes_s:.0f} bytes/sec) while "
                f"attempting to ingest '{len(entries)}' lines totaling '{total}' bytes, reduce log volume or contact "
                "your Loki administrator to see if the limit can be increased",
            )
        size = sum(entry.message_size for entry in entries)
        if size > limits.message_bytes:
            return self._error(
                503,
                "message_too_large",
                "rpc error: code = ResourceExhausted desc = grpc: received message larger than max "
                f"({size} vs. {limits.message_bytes})",
            )
        reply = Reply(204)
        for labels, stream in pushed.items():
            reply = self._ingest(labels, stream)
        if reply.status != 204 or not invalid:
            return reply
        texts = [f"{number} errors like: {text}" if invalid.total() > 1 else text for text, number in invalid.items()]
        return self._error(400, "invalid", "; ".join(texts))

    def _invalid(self, labels: Labels, entry: Entry) -> str:
        """Return why the distributor drops an entry; empty if it does not."""
        limits, now_s = self.limits, self._clock_s()
        at_s, line_bytes = entry.time_unix_nano / SECOND_NS, entry.size - entry.metadata_size
        stream, at, entries = _stream_text(labels), _rfc3339(entry.time_unix_nano), len(entry.metadata) - 1
        if at_s < now_s - limits.age_s:
            oldest = _rfc3339(int((now_s - limits.age_s) * SECOND_NS))
            return f"entry for stream '{stream}' has timestamp too old: {at}, oldest acceptable timestamp is: {oldest}"
        if at_s > now_s + limits.ahead_s:
            return f"entry for stream '{stream}' has timestamp too new: {at}"
        if line_bytes > limits.line_bytes:
            return (
                f"max entry size '{limits.line_bytes}' bytes exceeded for stream '{stream}' while adding an entry with "
                f"length '{line_bytes}' bytes"
            )
        if entry.metadata_size > limits.metadata_bytes:
            return (
                f"stream '{stream}' has structured metadata too large: '{entry.metadata_size}' bytes, limit: "
                f"'{limits.metadata_bytes}' bytes. Please see `limits_config.max_structured_metadata_size` or contact "
                "your Loki administrator to increase it"
            )
        if entries > limits.metadata_entries:
            return (
                f"stream '{stream}' has too many structured metadata labels: '{entries}', limit: "
                f"'{limits.metadata_entries}'. Please see `limits_config.max_structured_metadata_entries_count` or "
                "contact your Loki administrator to increase it"
            )
        return ""

    def _is_valid(self, entry: Entry) -> bool:
        """Return whether `_invalid` finds nothing; most entries are valid, and texts take time."""
        limits, now_s, at_s = self.limits, self._clock_s(), entry.time_unix_nano / SECOND_NS
        return (
            now_s - limits.age_s <= at_s <= now_s + limits.ahead_s
            and entry.size - entry.metadata_size <= limits.line_bytes
            and entry.metadata_size <= limits.metadata_bytes
            and len(entry.metadata) - 1 <= limits.metadata_entries
        )

    def lines(self, service_name: str = "", **labels: str) -> list[str]:
        """Return the stored lines in order of time, as a query of the streams with these labels shows them.

        Args:
            service_name: The stream's ``service_name``; empty: all streams.
            labels: Further labels or structured metadata that must match.
        """
        wanted = dict(labels) | ({"service_name": service_name} if service_name else {})
        found = [
            entry
            for stream, entries in self.streams.items()
            for entry in entries
            if all((dict(stream) | dict(entry.metadata)).get(key) == value for key, value in wanted.items())
        ]
        return [entry.line for entry in sorted(found, key=lambda entry: entry.time_unix_nano)]

    def _take_tokens(self, count: int) -> bool:
        now_s = self._clock_s()
        refilled = self._tokens + (now_s - self._refilled_s) * self.limits.rate_bytes_s
        self._tokens, self._refilled_s = min(refilled, float(self.limits.burst_bytes)), now_s
        if count > self._tokens:
            return False
        self._tokens -= count
        self._taken_bytes += count
        return True

    def _ingest(self, labels: Labels, entries: list[Entry]) -> Reply:
        """Store what is not too far behind the newest entry of its stream; return what the ingester says of it."""
        limits = self.limits
        if labels not in self.streams and len(self.streams) >= limits.streams:
            return self._error(
                429,
                "streams",
                "maximum active stream limit exceeded when trying to create stream, reduce the number of active "
                "streams (reduce labels or reduce label values), or contact your Loki administrator to see if the "
                "limit can be increased, user: 'fake'",
            )
        stored, reasons = self.streams.setdefault(labels, []), []
        for entry in entries:
            oldest = self._newest.get(labels, 0) - int(limits.behind_s * SECOND_NS)
            if entry.time_unix_nano < oldest and not limits.time_sharding:
                at, limit = _rfc3339(entry.time_unix_nano), _rfc3339(oldest)
                reasons.append(
                    f"entry with timestamp {at} ignored, reason: 'entry too far behind, entry timestamp is: {at}, "
                    f"oldest acceptable timestamp is: {limit}',\n"
                )
                continue
            self._newest[labels] = max(self._newest.get(labels, 0), entry.time_unix_nano)
            if (labels, entry) not in self._known:  # equal time, text and metadata: dropped
                self._known.add((labels, entry))
                stored.append(entry)
        if not reasons:
            return Reply(204)
        return self._error(
            400,
            "too_far_behind",
            f"{''.join(reasons[:_MAX_REASONS])}user 'fake', total ignored: {len(reasons)} out of {len(entries)} for "
            f"stream: {_stream_text(labels)}",
        )

    def _error(self, status: int, reason: str, message: str) -> Reply:
        self.rejected[reason] += 1
        body = Status(message=message).SerializeToString()
        return Reply(status, body=body, headers={"Content-Type": "application/octet-stream"})


def _stream_text(labels: Labels) -> str:
    return "{" + ", ".join(f'{key}="{value}"' for key, value in labels) + "}"


def _entries(message: Any) -> Iterator[tuple[Labels, Entry]]:
    """Yield each record as Loki's OTLP endpoint converts it."""
    for group in message.resource_logs:
        resource = {key: _text(value) for key, value in plain_attributes(group.resource.attributes).items()}
        resource["service.name"] = resource.get("service.name") or "unknown_service"
        labels = tuple((_label(key), resource.pop(key)) for key in INDEX_LABELS if key in resource)
        for scope in group.scope_logs:
            shared = {_label(key): value for key, value in resource.items()}
            shared |= {"scope_name": scope.scope.name} if scope.scope.name else {}
            shared |= {"scope_version": scope.scope.version} if scope.scope.version else {}
            for record in scope.log_records:
                own = {_label(key): _text(value) for key, value in plain_attributes(record.attributes).items()}
                own |= {"observed_timestamp": str(record.observed_time_unix_nano)}
                if record.severity_number:
                    own |= {"severity_number": str(record.severity_number), "severity_text": record.severity_text}
                if record.trace_id:
                    own |= {"trace_id": record.trace_id.hex(), "span_id": record.span_id.hex()}
                    own |= {"flags": str(record.flags)}
                own[_LEVEL] = record.severity_text.lower() or "unknown"
                metadata = tuple(sorted((shared | own).items()))
                yield labels, Entry(record.time_unix_nano, _text(plain_value(record.body)), metadata)


def _label(key: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in key)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _rfc3339(time_unix_nano: int) -> str:
    return datetime.fromtimestamp(time_unix_nano // SECOND_NS, UTC).isoformat().replace("+00:00", "Z")
