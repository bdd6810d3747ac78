"""`RetryingExporter`: sends one signal's requests until they need no more work, however long that takes.

    Delivered       done
    Retry           again, with jittered exponential backoff, never before Retry-After; for ever
      server_error  the same, but after `retry_server_errors` in a row dead-lettered
    TooLarge        halved, in order; a single record is dead-lettered
    Rejected        dead-lettered, then counted
    EndpointFault   the signal pauses 30-60 s and tries again; /readyz fails meanwhile

A send that is cancelled was not acked: its records are sent again after a restart. While the dead letter has no room
the send waits: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tailspan._backoff import backoff_s
from tailspan._clock import Clock
from tailspan_agent.errors import AgentError, ExportRejectedError
from tailspan_agent.exporter.http import Exporter
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Rejected, Retry, TooLarge
from tailspan_agent.otlp.signals import DecodeError, split_request

__all__ = ["FAULT_PAUSE_S", "RejectSink", "RetryingExporter", "SendResult"]

FAULT_PAUSE_S = (30.0, 60.0)
"""Shortest and longest pause after an endpoint fault, and between tries of a dead letter without room."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SendResult:
    """What became of a request whose records need no more work.

    Attributes:
        delivered: Records that the endpoint has.
        rejected: Records that it refused; their batch is in the dead letter.
        reason: Why, in the endpoint's words; None when nothing was refused.
        kind: Why, as one of a few words, for counting; see `tailspan_agent.exporter.outcome.Rejected`.
        retries: How often the whole request was sent again.
    """

    delivered: int
    rejected: int = 0
    reason: str | None = None
    kind: str | None = field(default=None, compare=False)
    retries: int = field(default=0, compare=False)

    def __add__(self, other: SendResult) -> SendResult:
        """Return both parts of a halved request together."""
        return SendResult(
            self.delivered + other.delivered,
            self.rejected + other.rejected,
            self.reason or other.reason,
            self.kind or other.kind,
            self.retries + other.retries,
        )


class RejectSink(Protocol):
    """Takes refused batches: `tailspan_agent.exporter.dead_letter.DeadLetter`, or a report for replay."""

    async def add(self, signal: str, payload: bytes, *, kind: str, reason: str, rejected: int, count: int) -> None:
        """Keep it, or raise AgentError when there is no room; see `DeadLetter.add`."""
        ...


class RetryingExporter:
    """Sends for one signal. Several sends may be in flight at once (one per lane); their order is the lanes' business.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        exporter: Tries once.
        dead_letter: Keeps what the endpoint refuses.
        retry_server_errors: Tries of a batch that meets a 5xx which OTLP does not call retryable; then dead-lettered.
        patience_s: How long to retry before ExportRejectedError, in seconds; a fault of the endpoint raises at once.
            None: for ever.
        clock: Waits; None: the real one.
        jitter: A random number in [0, 1).
        on_failure: Told of each export that was not taken, with the reason as one of a few words: ``unavailable``,
            ``endpoint_fault``, or the kind of a rejection.

    Attributes:
        state: ``paused`` while the endpoint faults or the dead letter has no room, else ``ok``. For /readyz.
        since: When that state began, in seconds since the epoch.
        last_error: What failed last; None after a success.
        in_flight: Records handed to `send` and not done.
        requests: Requests made, failed ones included.
        delivered: Records delivered.
        rejected: Records refused, by a bounded kind: ``invalid``, ``partial``, ``too_large``, ``server_error``.
        retries: Requests repeated.
        warnings: Successes with a message.
        last_delivered: When records were last delivered, in seconds since the epoch; None: never.
    """

    def __init__(
        self,
        signal: str,
        exporter: Exporter,
        dead_letter: RejectSink,
        *,
        retry_server_errors: int = 10,
        patience_s: float | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] = random.random,
        on_failure: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self.signal = signal
        self.exporter = exporter
        self._clock = clock or Clock()
        self.since = self._clock.wall_s()
        self.last_error: str | None = None
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
        self._endpoint_faults = False
        self._dead_letter_full = False

    @property
    def state(self) -> Literal["ok", "paused"]:
        """See the class."""
        return "paused" if self._endpoint_faults or self._dead_letter_full else "ok"

    @property
    def endpoint(self) -> str:
        """Where it sends to, without credentials."""
        return self.exporter.endpoint

    async def send(self, payload: bytes, count: int) -> SendResult:
        """Send a request and return when its records need no more work.

        Args:
            payload: A serialized Export*ServiceRequest; sent again byte for byte the same.
            count: Records in it; with none, nothing is sent.

        Raises:
            ExportRejectedError: Only with `patience_s`: the endpoint faults, or did not answer for so long.
        """
        if not count:
            return SendResult(0)
        self.in_flight += count
        try:
            return await self._send(payload, count)
        finally:
            self.in_flight -= count

    async def aclose(self) -> None:
        """Close the exporter."""
        await self.exporter.aclose()

    async def _send(self, payload: bytes, count: int) -> SendResult:
        again = SendResult(0)
        failures = server_errors = 0
        started_s = self._clock.monotonic_s()
        while True:
            self.requests += 1
            outcome = await self.exporter.export(payload, count)
            match outcome:
                case Delivered(warning):
                    self._answered(warning)
                    self._count_delivered(count)
                    return again + SendResult(count)
                case Rejected(rejected, reason, kind):
                    self._answered(None)
                    refused = count if rejected is None else rejected
                    return again + await self._reject(payload, count, refused, kind, reason)
                case TooLarge(reason):
                    self._answered(None)
                    return again + await self._halve(payload, count, reason)
                case EndpointFault(reason):
                    self._fault(reason)
                    await self._pause()
                case Retry(reason, after_s, server_error):
                    server_errors = server_errors + 1 if server_error else 0
                    if server_errors and server_errors >= self._retry_server_errors:
                        reason = f"{reason} ({server_errors} times in a row)"
                        return again + await self._reject(payload, count, count, "server_error", reason)
                    self._retrying(reason, failures)
                    delay_s = backoff_s(failures, self._jitter(), retry_after_s=after_s)
                    waited_s = self._clock.monotonic_s() + delay_s - started_s
                    if self._patience_s is not None and waited_s > self._patience_s:
                        raise ExportRejectedError(f"{self.endpoint} does not take {self.signal}: {reason}")
                    await self._clock.sleep(delay_s)
                    failures += 1
            self.retries += 1
            again += SendResult(0, retries=1)

    async def _halve(self, payload: bytes, count: int, reason: str) -> SendResult:
        try:
            parts = await asyncio.to_thread(split_request, self.signal, payload)
        except DecodeError:
            parts = []
        if len(parts) < 2:
            return await self._reject(payload, count, count, "too_large", reason)
        result = SendResult(0)
        for part, part_count in parts:
            result += await self._send(part, part_count)
        return result

    async def _reject(self, payload: bytes, count: int, rejected: int, kind: str, reason: str) -> SendResult:
        self._on_failure(kind)
        # The endpoint is not asked again: after a partial success that would repeat what it took.
        while True:
            try:
                await self._dead_letter.add(
                    self.signal, payload, kind=kind, reason=reason, rejected=rejected, count=count
                )
                break
            except AgentError as error:
                if not self._dead_letter_full:
                    self._set_state(dead_letter_full=True)
                _log.error("%s are paused: %s", self.signal, error)
                self.last_error = str(error)
                await self._pause()
        if self._dead_letter_full:
            self._set_state(dead_letter_full=False)
            self.last_error = None
        self.rejected[kind] += rejected
        self._count_delivered(count - rejected)
        _log.warning(
            "%s: %d of %d records rejected, the batch is in the dead letter: %s", self.signal, rejected, count, reason
        )
        return SendResult(count - rejected, rejected, reason, kind)

    def _answered(self, warning: str | None) -> None:
        if self._endpoint_faults:
            self._set_state(endpoint_faults=False)
        if self.last_error is not None and not self._dead_letter_full:
            _log.info("%s: %s answers again", self.signal, self.endpoint)
            self.last_error = None
        if warning:
            self.warnings += 1
            _log.warning("%s: %s warns: %s", self.signal, self.endpoint, warning)

    def _count_delivered(self, count: int) -> None:
        if count:
            self.delivered += count
            self.last_delivered = self._clock.wall_s()

    def _fault(self, reason: str) -> None:
        self._on_failure("endpoint_fault")
        if self._patience_s is not None:
            raise ExportRejectedError(f"{self.endpoint} does not take {self.signal}: {reason}")
        self.last_error = reason
        if not self._endpoint_faults:
            self._set_state(endpoint_faults=True)
        _log.error(
            "%s are paused, the endpoint %s has to be mended (address, credentials, or otlp.signals): %s",
            self.signal,
            self.endpoint,
            reason,
        )

    def _retrying(self, reason: str, failures: int) -> None:
        self._on_failure("unavailable")
        if not self._endpoint_faults and not self._dead_letter_full:
            self.last_error = reason
        # One line at the first failure, and one about every five minutes of an outage.
        if failures % 10 == 0:
            _log.warning("%s: trying again (%d failed): %s", self.signal, failures + 1, reason)

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
