"""A double of Loki with its default limits: what it counts, copies, rejects and stores.

    loki = Loki()
    with Collector() as collector:
        collector.always("logs", loki)
        ...                                   # point the agent at f"{collector.http_url}/otlp"
    assert loki.lines(service_name="etl") == [...]

Measured on Loki 3.7.6: each line carries a copy of its resource, its scope and its ids as structured metadata; the
distributor sends all of it to the ingester in one gRPC message of at most 4 MiB; the ingestion rate counts lines with
their copies; a stream accepts lines up to an hour behind its newest one; of a request with such lines the others are
stored, and the answer is 400; error bodies are google.rpc.Status without a Content-Type.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.rpc.status_pb2 import Status

from tests.fakes.collector import Reply, Request
from tests.fakes.otlp_rows import plain_attributes, plain_value

MIB = 1 << 20
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
        line_bytes: ``max_line_size``.
        metadata_bytes: ``max_structured_metadata_size``.
        time_sharding: ``shard_streams.time_sharding_enabled``: each stream is cut by time, none is too far behind.
    """

    message_bytes: int = 4 * MIB
    rate_bytes_s: float = 4.0 * MIB
    burst_bytes: int = 6 * MIB
    behind_s: float = 3600.0
    age_s: float = 168 * 3600.0
    streams: int = 5000
    line_bytes: int = 256 * 1024
    metadata_bytes: int = 64 * 1024
    time_sharding: bool = False


@dataclass(frozen=True)
class Entry:
    """One stored line."""

    time_unix_nano: int
    line: str
    metadata: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes that count against the ingestion rate."""
        return len(self.line.encode()) + sum(len(key) + len(value.encode()) for key, value in self.metadata)

    @property
    def message_size(self) -> int:
        """Bytes in the distributor's message to the ingester."""
        return self.size + 16 + 6 * len(self.metadata)


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

    def __call__(self, request: Request) -> Reply:
        """Store what the limits allow, and answer as Loki does."""
        self.requests += 1
        pushed: dict[Labels, list[Entry]] = {}
        for labels, entry in _entries(request.message):
            pushed.setdefault(labels, []).append(entry)
        limits, entries = self.limits, [entry for stream in pushed.values() for entry in stream]
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if len(entry.line.encode()) > limits.line_bytes:
                return self._error(400, "line_too_long", f"max entry size '{limits.line_bytes}' bytes exceeded")
            if entry.size - len(entry.line.encode()) > limits.metadata_bytes:
                return self._error(400, "metadata_too_large", "stream has structured metadata too large")
        if not self._take_tokens(total):
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
        if len(self.streams.keys() | pushed.keys()) > limits.streams:
            return self._error(
                429,
                "streams",
                "maximum active stream limit exceeded when trying to create stream, reduce the number of active "
                "streams (reduce labels or reduce label values), or contact your Loki administrator to see if the "
                "limit can be increased, user: 'fake'",
            )
        too_old = [text for labels, stream in pushed.items() for text in self._store(labels, stream)]
        if too_old:
            return self._error(400, "too_far_behind", "\n".join(too_old))
        return Reply(204)

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
        return True

    def _store(self, labels: Labels, entries: list[Entry]) -> Iterator[str]:
        """Store what is not too old; yield one text for the rest."""
        limits, now_ns = self.limits, int(self._clock_s() * SECOND_NS)
        stored, refused = self.streams.setdefault(labels, []), []
        of_age = now_ns - int(limits.age_s * SECOND_NS)
        for entry in entries:
            behind = self._newest.get(labels, 0) - int(limits.behind_s * SECOND_NS)
            oldest = of_age if limits.time_sharding else max(of_age, behind)
            if entry.time_unix_nano < oldest:
                refused.append((entry, oldest))
                continue
            self._newest[labels] = max(self._newest.get(labels, 0), entry.time_unix_nano)
            if (labels, entry) not in self._known:  # equal time, text and metadata: dropped
                self._known.add((labels, entry))
                stored.append(entry)
        if refused:
            entry, oldest = refused[-1]
            stream = ", ".join(f'{key}="{value}"' for key, value in labels)
            at, since = _rfc3339(entry.time_unix_nano), _rfc3339(oldest)
            if oldest == of_age:
                yield (
                    f"entry for stream '{{{stream}}}' has timestamp too old: {at}, oldest acceptable timestamp is: "
                    f"{since}"
                )
            else:
                yield (
                    f"entry too far behind, entry timestamp is: {at}, oldest acceptable timestamp is: {since}, user"
                    f" 'fake', total ignored: {len(refused)} out of {len(entries)} for stream: {{{stream}}}"
                )

    def _error(self, status: int, reason: str, message: str) -> Reply:
        self.rejected[reason] += 1
        code = {400: 3, 429: 8, 503: 14}[status]
        return Reply(status, body=Status(code=code, message=message).SerializeToString())


def _entries(message: Any) -> Iterator[tuple[Labels, Entry]]:
    """Yield each record as Loki's OTLP endpoint converts it."""
    for group in message.resource_logs:
        resource = {key: _text(value) for key, value in plain_attributes(group.resource.attributes).items()}
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
                own["detected_level"] = record.severity_text.lower() or "unknown"
                metadata = tuple(sorted((shared | own).items()))
                yield labels, Entry(record.time_unix_nano, _text(plain_value(record.body)), metadata)


def _label(key: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in key)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _rfc3339(time_unix_nano: int) -> str:
    return datetime.fromtimestamp(time_unix_nano / SECOND_NS, UTC).isoformat().replace("+00:00", "Z")
