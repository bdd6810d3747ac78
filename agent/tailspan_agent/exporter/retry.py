"""`RetryingExporter`: send the requests of one signal until each is delivered or in the dead letter.

    Delivered       done
    Retry           retry with jittered exponential backoff, never before Retry-After, without limit
      server_error  the same, but after `retry_server_errors` in a row: as for Rejected
      refused       the same, but after `_SAME_ANSWERS` equal answers in a row: halve, and each part after one answer
    TooLarge        halve and send the parts in order; a single record: send it shortened, keep the whole one in the
                    dead letter
    Rejected        several resources: send them apart, so that only the rejected job's records count as rejected;
                    one resource: halve until the rejected records stand alone, unless the endpoint says how many
                    they are; then dead letter
    EndpointFault   pause the signal for 30-60 s, then retry; /readyz fails meanwhile

A cancelled request was not acknowledged: its records are sent again after a restart. While the dead letter is full,
the request waits: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import random
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, Protocol

import msgspec

from tailspan._backoff import backoff_s
from tailspan._clock import Clock
from tailspan._plural import plural
from tailspan.config.signals import Signal
from tailspan_agent.errors import AgentError, ExportRejectedError
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Rejected, Retry, TooLarge
from tailspan_agent.exporter.protocol import Exporter

__all__ = [
    "FAULT_PAUSE_S",
    "SHORTENED",
    "DeliveryResult",
    "Outage",
    "RejectSink",
    "Rejection",
    "RetryingExporter",
    "is_rare",
]

FAULT_PAUSE_S = (30.0, 60.0)
"""Shortest and longest pause after an endpoint fault, or while the dead letter is full."""

_SAME_ANSWERS = 4
"""Equal answers in a row after which a request is halved: the endpoint may never accept it as a whole."""
_ISOLATING_REQUESTS = 40
"""Most requests that isolate the rejected records of one batch; twelve find one record among 4,000."""
_SHORTENED_BYTES = (65_536, 8_192)
"""Lengths to which the texts of a record that is too large are shortened, one after the other."""
SHORTENED = "shortened"
"""The kind of a record that was delivered shortened; the whole one is in the dead letter."""
_NUMBER = re.compile(r"\d+")
_ANSWER = re.compile(r"HTTP \d+|gRPC [A-Z_]+|no answer within [\d.]+ s")
_BROKEN = re.compile(
    "connection refused|connection reset by peer|connection timed out|no route to host|network is unreachable"
    "|name or service not known|temporary failure in name resolution|certificate verify failed",
    re.IGNORECASE,
)

_log = logging.getLogger(__name__)


class Outage(msgspec.Struct, frozen=True):
    """Failed attempts of one signal in a row.

    Attributes:
        since_s: When the first of them failed, in seconds since the epoch.
        tries: Number of failed attempts.
        reason: The reason of the last one.
    """

    since_s: float
    tries: int
    reason: str

    @classmethod
    def extend(cls, known: Outage | None, reason: str, now_s: float) -> Outage:
        """Return an outage with one more failed attempt.

        Args:
            known: The outage so far; None if this attempt is the first.
            reason: Why the attempt failed.
            now_s: The present time, in seconds since the epoch.
        """
        return cls(known.since_s, known.tries + 1, reason) if known is not None else cls(now_s, 1, reason)

    @property
    def is_to_be_logged(self) -> bool:
        """Whether the last attempt deserves a line: the first one, then attempts 4, 16, 64, and ever more rarely."""
        return is_rare(self.tries)

    @property
    def extent(self) -> str:
        """Since when, and how many attempts: ``since 2026-11-29T00:38:10Z, 11 tries``."""
        since = datetime.fromtimestamp(self.since_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"since {since}, {self.tries} {plural(self.tries, 'try', 'tries')}"

    def __str__(self) -> str:
        """Return it for a probe, without addresses and the endpoint's own text, which may be private."""
        if answer := _ANSWER.search(self.reason):
            return f"{self.extent}: {answer[0]}"
        broken = _BROKEN.search(self.reason)
        return f"{self.extent}: {broken[0].lower() if broken else 'no connection'}"


def is_rare(number: int) -> bool:
    """Return whether a number is a power of four: what repeats is logged at these numbers only."""
    return number > 0 and number & (number - 1) == 0 and number.bit_length() % 2 == 1


class Rejection(msgspec.Struct, frozen=True):
    """Records of a request that the endpoint did not accept as they were.

    Attributes:
        start: Position in the request of the first record of the part that was answered.
        count: Number of records of that part.
        rejected: Number of rejected records in it.
        kind: See `tailspan_agent.exporter.outcome.Rejected`; or `SHORTENED`, and then none is rejected.
        reason: The endpoint's reason.
    """

    start: int
    count: int
    rejected: int
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The result of a request that is done: delivered, or in the dead letter.

    Attributes:
        delivered: Number of records that the endpoint accepted.
        rejected: Number of records that it rejected; they are in the dead letter.
        reason: The endpoint's first reason; None if it rejected nothing.
        kind: The reason for metrics; see `tailspan_agent.exporter.outcome.Rejected`.
        retries: How often the whole request was sent again.
        rejections: What was rejected or shortened, by position in the request.
    """

    delivered: int
    rejected: int = 0
    reason: str | None = None
    kind: str | None = dataclasses.field(default=None, compare=False)
    retries: int = dataclasses.field(default=0, compare=False)
    rejections: tuple[Rejection, ...] = dataclasses.field(default=(), compare=False)

    def __add__(self, other: DeliveryResult) -> DeliveryResult:
        """Return the result of both parts of a halved request."""
        return DeliveryResult(
            self.delivered + other.delivered,
            self.rejected + other.rejected,
            self.reason or other.reason,
            self.kind or other.kind,
            self.retries + other.retries,
            self.rejections + other.rejections,
        )


class _Batch(msgspec.Struct):
    """What the parts of one halved or split request share.

    Attributes:
        isolating: How many more requests may isolate rejected records.
        server_errors: Consecutive server errors, counted over the parts.
        is_halved: Whether the request was halved because it got the same answer again and again.
        passed: Most records of a part that was delivered.
        refused: Fewest records of a part that was refused after a smaller one had passed; None: no such part.
    """

    isolating: int = _ISOLATING_REQUESTS
    server_errors: int = 0
    is_halved: bool = False
    passed: int = 0
    refused: int | None = None

    def is_known_refused(self, count: int) -> bool:
        """Return whether a part of this size need not be sent: one was refused."""
        return self.refused is not None and count >= self.refused

    def is_to_be_halved(self, count: int, same_answers: int) -> bool:
        """Return whether to halve a part that was refused, and note that.

        Args:
            count: Number of records of the part.
            same_answers: How often it got this answer in a row.
        """
        if count < 2 or same_answers < (1 if self.is_halved else _SAME_ANSWERS):
            return False
        self.is_halved = True
        return True

    def note_refused(self, count: int) -> None:
        """Note that a part was refused. Until one has passed, the endpoint may be down for requests of any size."""
        if 0 < self.passed < count:
            self.refused = min(count, self.refused or count)


class RejectSink(Protocol):
    """Receives rejected batches: `tailspan_agent.exporter.dead_letter.DeadLetter`, or the report of a replay."""

    async def add(self, signal: Signal, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        """Store a batch, or raise AgentError if there is no room; see `DeadLetter.add`."""
        ...


class RetryingExporter:
    """The exporter of one signal with retries. Several requests may be in flight; it does not order them.

    Args:
        signal: The signal.
        exporter: Makes each attempt.
        dead_letter: Receives rejected batches.
        retry_server_errors: Maximum attempts of a batch that fails with a 5xx which OTLP does not list as retryable.
        patience_s: How long to retry before ExportRejectedError, in seconds; an endpoint fault raises it at once.
            None: without limit.
        clock: Waits; None is the real clock.
        jitter: Returns a random number in [0, 1).
        on_failure: Called for each failed attempt with its reason: ``unavailable``, ``endpoint_fault``, or the kind of
            a rejection.
        on_unsupported: Called if the endpoint does not have the signal; returns advice if it is logged elsewhere.

    Attributes:
        state: ``paused`` while the endpoint is at fault or the dead letter is full, else ``ok``; for /readyz.
        since: When that state began, in seconds since the epoch.
        last_error: The last failure; None after a success.
        outage: The failed attempts since the endpoint last answered; None if it answered.
        in_flight: Number of records in requests that are not done.
        requests: Number of requests, including failed ones.
        delivered: Number of records delivered.
        rejected: Number of records rejected, by kind: ``invalid``, ``partial``, ``too_large``, ``server_error``.
        retries: Number of repeated requests.
        warnings: Number of successes with a message.
        last_delivered: When records were last delivered, in seconds since the epoch; None: never.
    """

    def __init__(
        self,
        signal: Signal,
        exporter: Exporter,
        dead_letter: RejectSink,
        *,
        retry_server_errors: int = 10,
        patience_s: float | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] = random.random,
        on_failure: Callable[[str], object] = lambda reason: None,
        on_unsupported: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.signal = signal
        self.exporter = exporter
        self._clock = clock or Clock()
        self.since = self._clock.wall_s()
        self.last_error: str | None = None
        self.outage: Outage | None = None
        self.in_flight = 0
        self.requests = 0
        self.delivered = 0
        self.rejected: Counter[str] = Counter()
        self.retries = 0
        self.warnings = 0
        self.last_delivered: float | None = None
        self._dead_letter = dead_letter
        self._retry_server_errors = retry_server_errors
        self._patience_s = patience_s
        self._jitter = jitter
        self._on_failure = on_failure
        self._on_unsupported = on_unsupported
        self._endpoint_faults = False
        self._dead_letter_full = False

    @property
    def state(self) -> Literal["ok", "paused"]:
        """See the class."""
        return "paused" if self._endpoint_faults or self._dead_letter_full else "ok"

    @property
    def endpoint(self) -> str:
        """The destination, without credentials."""
        return self.exporter.endpoint

    async def deliver(self, payload: bytes, count: int) -> DeliveryResult:
        """Send a request until its records are delivered or in the dead letter.

        Args:
            payload: A serialized Export*ServiceRequest; a retry sends the same bytes.
            count: Number of records in it; if 0, nothing is sent.

        Raises:
            ExportRejectedError: Only with `patience_s`: the endpoint is at fault, or unavailable for that long.
        """
        if not count:
            return DeliveryResult(0)
        self.in_flight += count
        try:
            return await self._deliver(payload, count, _Batch())
        finally:
            self.in_flight -= count

    async def aclose(self) -> None:
        """Close the exporter."""
        await self.exporter.aclose()

    async def _deliver(
        self, payload: bytes, count: int, batch: _Batch, *, start: int = 0, failures: int = 0
    ) -> DeliveryResult:
        """Deliver a request or a part of one.

        Args:
            payload: The request.
            count: Number of records in it.
            batch: What the parts of one request share.
            start: Position of its first record in the whole request.
            failures: Failed attempts so far, for the backoff.
        """
        result = DeliveryResult(0)
        if batch.is_known_refused(count):
            parts = await asyncio.to_thread(_split, self.signal, payload)
            if len(parts) > 1:
                return await self._deliver_parts(parts, batch, start)
        answer, same_answers = "", 0
        started_s = self._clock.monotonic_s()
        while True:
            self.requests += 1
            outcome = await self.exporter.export(payload, count)
            match outcome:
                case Delivered(warning):
                    self._record_response(warning)
                    self._count_delivered(count)
                    batch.passed = max(batch.passed, count)
                    return result + DeliveryResult(count)
                case Rejected():
                    self._record_response(None)
                    return result + await self._isolate(payload, count, outcome, batch, start)
                case TooLarge(reason):
                    self._record_response(None)
                    return result + await self._halve(payload, count, reason, batch, start, failures=0)
                case EndpointFault(reason, unsupported):
                    self._record_fault(reason, self._on_unsupported() if unsupported else None)
                    await self._pause()
                case Retry(reason, after_s, server_error, refused):
                    batch.server_errors = batch.server_errors + 1 if server_error else 0
                    if server_error and batch.server_errors >= self._retry_server_errors:
                        times = f"{batch.server_errors} {plural(batch.server_errors, 'time')} in a row"
                        rejected = Rejected(None, f"{reason} ({times})", "server_error")
                        return result + await self._isolate(payload, count, rejected, batch, start)
                    self._record_failure(reason)
                    delay_s = backoff_s(failures, self._jitter(), retry_after_s=after_s)
                    waited_s = self._clock.monotonic_s() + delay_s - started_s
                    if self._patience_s is not None and waited_s > self._patience_s:
                        raise ExportRejectedError(f"{self.endpoint} does not accept {self.signal}: {reason}")
                    await self._clock.sleep(delay_s)
                    failures += 1
                    same_answers = same_answers + 1 if refused and _NUMBER.sub("", reason) == answer else 1
                    answer = _NUMBER.sub("", reason) if refused else ""
                    if refused and batch.is_to_be_halved(count, same_answers):
                        return result + await self._halve(payload, count, reason, batch, start, failures=failures)
            self.retries += 1
            result += DeliveryResult(0, retries=1)

    async def _halve(
        self, payload: bytes, count: int, reason: str, batch: _Batch, start: int, *, failures: int
    ) -> DeliveryResult:
        batch.note_refused(count)
        parts = await asyncio.to_thread(_split, self.signal, payload)
        if len(parts) < 2:
            return await self._shorten(payload, count, Rejected(None, reason, "too_large"), start)
        return await self._deliver_parts(parts, batch, start, failures=failures)

    async def _deliver_parts(
        self, parts: list[tuple[bytes, int]], batch: _Batch, start: int, *, failures: int = 0
    ) -> DeliveryResult:
        result = DeliveryResult(0)
        for part, part_count in parts:
            result += await self._deliver(part, part_count, batch, start=start, failures=failures)
            start += part_count
        return result

    async def _isolate(
        self, payload: bytes, count: int, rejected: Rejected, batch: _Batch, start: int
    ) -> DeliveryResult:
        """Reject only the records that the endpoint rejects: it may have stored the others.

        Sending those again is harmless: they are equal, byte for byte.
        """
        batch.note_refused(count)
        # After a partial success, nothing is sent again: OTLP forbids it.
        if count > 1 and rejected.rejected is None and batch.isolating > 0:
            parts = await asyncio.to_thread(_split, self.signal, payload, by_resource=True)
            if len(parts) < 2 and rejected.ignored is not None:
                known = dataclasses.replace(rejected, rejected=min(rejected.ignored, count))
                return await self._reject(payload, count, known, start)
            if len(parts) < 2:
                parts = await asyncio.to_thread(_split, self.signal, payload)
                batch.isolating -= len(parts)
            if len(parts) > 1:
                return await self._deliver_parts(parts, batch, start)
        return await self._reject(payload, count, rejected, start)

    async def _shorten(self, payload: bytes, count: int, rejected: Rejected, start: int) -> DeliveryResult:
        """Send a record that is too large with its texts shortened, and keep the whole one in the dead letter."""
        for max_bytes in _SHORTENED_BYTES:
            shortened = await asyncio.to_thread(_shorten_texts, self.signal, payload, max_bytes)
            if shortened is None:
                continue
            self.requests += 1
            outcome = await self.exporter.export(shortened, count)
            if isinstance(outcome, Delivered):
                reason = f"{rejected.reason}; sent shortened to {max_bytes} bytes"
                await self._keep(payload, count, dataclasses.replace(rejected, rejected=count, reason=reason))
                self._count_delivered(count)
                _log.warning("%s: a record is too large, the whole one is in the dead letter: %s", self.signal, reason)
                return DeliveryResult(count, rejections=(Rejection(start, count, 0, SHORTENED, reason),))
        return await self._reject(payload, count, rejected, start)

    async def _reject(self, payload: bytes, count: int, outcome: Rejected, start: int) -> DeliveryResult:
        kind, reason = outcome.kind, outcome.reason
        rejected = count if outcome.rejected is None else outcome.rejected
        await self._keep(payload, count, dataclasses.replace(outcome, rejected=rejected))
        self.rejected[kind] += rejected
        self._count_delivered(count - rejected)
        _log.warning(
            "%s: %d of %d %s rejected, the batch is in the dead letter: %s",
            self.signal,
            rejected,
            count,
            plural(count, "record"),
            reason,
        )
        rejections = (Rejection(start, count, rejected, kind, reason),)
        return DeliveryResult(count - rejected, rejected, reason, kind, rejections=rejections)

    async def _keep(self, payload: bytes, count: int, outcome: Rejected) -> None:
        """Store a batch in the dead letter; wait while that is full."""
        self._on_failure(outcome.kind)
        # No retry: after a partial success, a retry would send the accepted records again.
        for attempt in itertools.count(1):
            try:
                await self._dead_letter.add(
                    self.signal,
                    payload,
                    kind=outcome.kind,
                    reason=outcome.reason,
                    rejected=outcome.rejected or 0,
                    count=count,
                )
                break
            except AgentError as error:
                if not self._dead_letter_full:
                    self._set_state(dead_letter_full=True)
                if is_rare(attempt):
                    _log.error("export of %s paused: %s", self.signal, error)
                self.last_error = str(error)
                await self._pause()
        if self._dead_letter_full:
            self._set_state(dead_letter_full=False)
            self.last_error = None

    def _record_response(self, warning: str | None) -> None:
        self.outage = None
        if self._endpoint_faults:
            self._set_state(endpoint_faults=False)
        if self.last_error is not None and not self._dead_letter_full:
            _log.info("%s: %s is available again", self.signal, self.endpoint)
            self.last_error = None
        if warning:
            self.warnings += 1
            _log.warning("%s: warning of %s: %s", self.signal, self.endpoint, warning)

    def _count_delivered(self, count: int) -> None:
        if count:
            self.delivered += count
            self.last_delivered = self._clock.wall_s()

    def _record_fault(self, reason: str, advice: str | None) -> None:
        self._on_failure("endpoint_fault")
        outage = self._extend_outage(reason)
        if self._patience_s is not None:
            raise ExportRejectedError(f"{self.endpoint} does not accept {self.signal}: {reason}")
        self.last_error = f"{reason}; {advice}" if advice else reason
        if not self._endpoint_faults:
            self._set_state(endpoint_faults=True)
        if advice is not None or not outage.is_to_be_logged:
            return
        _log.error(
            "export of %s paused %s: endpoint %s rejects it; check otlp.endpoint, credentials or otlp.signals: %s",
            self.signal,
            outage.extent,
            self.endpoint,
            reason,
        )

    def _record_failure(self, reason: str) -> None:
        self._on_failure("unavailable")
        outage = self._extend_outage(reason)
        if not self._endpoint_faults and not self._dead_letter_full:
            self.last_error = reason
        if outage.is_to_be_logged:
            _log.warning("%s: retrying %s: %s", self.signal, outage.extent, reason)

    def _extend_outage(self, reason: str) -> Outage:
        self.outage = Outage.extend(self.outage, reason, self._clock.wall_s())
        return self.outage

    def _set_state(self, *, endpoint_faults: bool | None = None, dead_letter_full: bool | None = None) -> None:
        before = self.state
        if endpoint_faults is not None:
            self._endpoint_faults = endpoint_faults
        if dead_letter_full is not None:
            self._dead_letter_full = dead_letter_full
        if self.state != before:
            self.since = self._clock.wall_s()

    async def _pause(self) -> None:
        shortest_s, longest_s = FAULT_PAUSE_S
        await self._clock.sleep(shortest_s + (longest_s - shortest_s) * self._jitter())


def _split(signal: Signal, payload: bytes, *, by_resource: bool = False) -> list[tuple[bytes, int]]:
    """Return the halves of a request, or its resources; fewer than two if it cannot be split."""
    # Imports protobuf: only an endpoint that rejects or has a size limit needs it.
    from tailspan_agent.otlp.messages import DecodeError, split_by_resource, split_request

    try:
        return split_by_resource(payload) if by_resource else split_request(signal, payload)
    except DecodeError:
        return []


def _shorten_texts(signal: Signal, payload: bytes, max_bytes: int) -> bytes | None:
    from tailspan_agent.otlp.messages import DecodeError, shorten_request

    try:
        return shorten_request(signal, payload, max_bytes)
    except DecodeError:
        return None
