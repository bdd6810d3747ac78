"""Outlets: for each signal the sender that is used now, exchangeable while the agent runs."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Literal, Protocol

from tailspan.config import Settings
from tailspan.errors import ConfigError
from tailspan_agent.exporter.dead_letter import DeadLetter
from tailspan_agent.exporter.http import Exporter, make_exporter
from tailspan_agent.exporter.retry import RetryingExporter, SendResult

__all__ = ["SIGNALS", "Endpoint", "Endpoints", "Signal"]

Signal = Literal["logs", "traces", "metrics"]
SIGNALS: tuple[Signal, ...] = ("logs", "traces", "metrics")


class ExportHealth(Protocol):
    """Where endpoints report whether they accept data; `tailspan_agent.metrics.agent.AgentMetrics` implements it."""

    metrics_fault: bool

    def endpoint(self, signal: str, up: bool) -> None:
        """Report whether the endpoint of a signal accepts requests."""
        ...

    def export_failed(self, signal: str, reason: str) -> None:
        """Count a failed request."""
        ...


class Endpoint:
    """The sender of one signal, exchangeable while the agent runs (reload).

    Attributes:
        delivered: How many records the endpoint took so far.
        rejected: How many records were dead-lettered so far.
    """

    def __init__(self, sender: RetryingExporter) -> None:
        self.sender = sender
        self.delivered = 0
        self.rejected = 0
        self._sending: set[asyncio.Future[SendResult]] = set()

    async def use(self, sender: RetryingExporter) -> None:
        """Go on with another sender; what is in flight is sent again by it, byte for byte the same."""
        old, self.sender = self.sender, sender
        sending = list(self._sending)
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        await old.aclose()

    async def send(self, payload: bytes, count: int) -> SendResult:
        """Return when the payload needs no more work: delivered, or dead-lettered."""
        while True:
            sender = self.sender
            task = asyncio.ensure_future(sender.send(payload, count))
            self._sending.add(task)
            try:
                result = await asyncio.shield(task)
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if task.cancelled() and sender is not self.sender and not (current and current.cancelling()):
                    continue
                task.cancel()
                raise
            finally:
                self._sending.discard(task)
            self.delivered += result.delivered
            self.rejected += result.rejected
            return result


class Endpoints:
    """The outlets of all signals, and the dead letter that they share.

    Args:
        settings: The loaded configuration.
        health: Where the endpoints report whether they accept data.

    Attributes:
        dead_letter: Where refused batches are kept.

    Raises:
        ConfigError: An endpoint or a certificate that cannot be used.
    """

    def __init__(self, settings: Settings, health: ExportHealth) -> None:
        self.dead_letter = _dead_letter(settings)
        self._health = health
        self._settings = settings
        self.metrics_exporter = self._exporter("metrics", settings)
        relayed: tuple[Signal, ...] = ("logs", "traces")
        self._endpoints: dict[Signal, Endpoint] = {
            signal: Endpoint(sender) for signal in relayed if (sender := self._sender(signal, settings)) is not None
        }

    def get(self, signal: Signal) -> Endpoint | None:
        """Return the outlet of ``logs`` or ``traces``; None where the signal is not sent."""
        return self._endpoints.get(signal)

    def paused(self) -> list[Signal]:
        """Return the signals that the endpoint does not take now, for a reason that somebody has to mend."""
        paused = [signal for signal, endpoint in self._endpoints.items() if endpoint.sender.state == "paused"]
        for signal, endpoint in self._endpoints.items():
            # An endpoint that is away mends itself, so that it pauses nothing; but it is not up.
            self._health.endpoint(signal, endpoint.sender.last_error is None)
        if self.metrics_exporter is not None and self._health.metrics_fault:
            paused.append("metrics")
        return paused

    @property
    def rejected(self) -> int:
        """How many records were dead-lettered since the start."""
        return sum(endpoint.rejected for endpoint in self._endpoints.values())

    @property
    def targets(self) -> dict[Signal, str]:
        """Where each signal goes, without credentials."""
        targets = {signal: endpoint.sender.endpoint for signal, endpoint in self._endpoints.items()}
        if self.metrics_exporter is not None:
            targets["metrics"] = self.metrics_exporter.endpoint
        return targets

    @property
    def kept_in_files(self) -> bool:
        """Whether there is no endpoint, so that telemetry waits in files for a replay."""
        return any((keys := self._settings.otlp.for_signal(signal)) and keys.url is None for signal in SIGNALS)

    async def reload(self, settings: Settings) -> None:
        """Go over to changed endpoints; what is in flight is sent again by the new sender.

        Raises:
            ConfigError: The new endpoint or certificate cannot be used; nothing was changed.
        """
        old = self._settings
        shared = (settings.files, settings.otlp.dead_letter_max, settings.otlp.retry_server_errors)
        all_changed = shared != (old.files, old.otlp.dead_letter_max, old.otlp.retry_server_errors)
        changed = {
            signal
            for signal in SIGNALS
            if all_changed or settings.otlp.for_signal(signal) != old.otlp.for_signal(signal)
        }
        old_dead_letter = self.dead_letter
        try:
            if all_changed:
                self.dead_letter = _dead_letter(settings)
            senders = {signal: self._sender(signal, settings) for signal in self._endpoints if signal in changed}
            exporter = self._exporter("metrics", settings) if "metrics" in changed else self.metrics_exporter
        except ConfigError:
            self.dead_letter = old_dead_letter
            raise
        self._settings = settings
        for signal, sender in senders.items():
            if sender is not None:
                await self._endpoints[signal].use(sender)
        if old_dead_letter is not self.dead_letter:
            old_dead_letter.close()
        if exporter is not self.metrics_exporter:
            old_exporter, self.metrics_exporter = self.metrics_exporter, exporter
            if old_exporter is not None:
                await old_exporter.aclose()

    async def aclose(self) -> None:
        """Close all exporters and the dead letter."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.dead_letter.close)
            for endpoint in self._endpoints.values():
                stack.push_async_callback(endpoint.sender.aclose)
            if self.metrics_exporter is not None:
                stack.push_async_callback(self.metrics_exporter.aclose)

    def _exporter(self, signal: Signal, settings: Settings) -> Exporter | None:
        keys = settings.otlp.for_signal(signal)
        if keys is None:
            return None
        return make_exporter(signal, keys, state_dir=settings.agent.state_dir, files=settings.files)

    def _sender(self, signal: Signal, settings: Settings) -> RetryingExporter | None:
        exporter = self._exporter(signal, settings)
        if exporter is None:
            return None
        retries = settings.otlp.retry_server_errors
        failed = partial(self._health.export_failed, signal)
        return RetryingExporter(signal, exporter, self.dead_letter, retry_server_errors=retries, on_failure=failed)


def _dead_letter(settings: Settings) -> DeadLetter:
    return DeadLetter(
        settings.agent.state_dir / "dead-letter",
        max_bytes=settings.otlp.dead_letter_max,
        max_size=settings.files.max_size,
    )
