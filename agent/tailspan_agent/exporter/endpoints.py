"""The endpoint of each signal: its retrying exporter, which a reload can replace while the agent runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

from tailspan.config import OtlpSettings, Settings
from tailspan.config.signals import SIGNALS, Signal
from tailspan.errors import ConfigError
from tailspan_agent.exporter.dead_letter import DeadLetter
from tailspan_agent.exporter.factory import make_exporter
from tailspan_agent.exporter.protocol import Exporter
from tailspan_agent.exporter.retry import DeliveryResult, Outage, RetryingExporter

__all__ = ["SHORT_OUTAGE_S", "Endpoint", "Endpoints", "ExportHealth", "signals_advice"]

SHORT_OUTAGE_S = 30.0
"""An endpoint that restarts does not make the agent unready."""

_log = logging.getLogger(__name__)


class ExportHealth(Protocol):
    """Receives the health of exports; `tailspan_agent.metrics.agent.AgentMetrics` implements it."""

    metrics_fault: bool
    metrics_outage: Outage | None
    logs_outage: Outage | None

    def endpoint(self, signal: str, up: bool) -> None:
        """Report whether the endpoint of a signal accepts requests."""
        ...

    def export_failed(self, signal: str, reason: str) -> None:
        """Count a failed request."""
        ...


class Endpoint:
    """The retrying exporter of one signal, replaceable while requests are in flight.

    Attributes:
        exporter: The exporter in use.
        delivered: Number of records that the endpoint accepted.
        rejected: Number of records that went to the dead letter.
    """

    def __init__(self, exporter: RetryingExporter, on_delivered: Callable[[], object] = lambda: None) -> None:
        self.exporter = exporter
        self._on_delivered = on_delivered
        self.delivered = 0
        self.rejected = 0
        self._in_flight: set[asyncio.Future[DeliveryResult]] = set()

    async def replace_exporter(self, exporter: RetryingExporter) -> None:
        """Use another exporter. It sends the requests in flight again, with the same bytes."""
        old, self.exporter = self.exporter, exporter
        in_flight = list(self._in_flight)
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)
        await old.aclose()

    async def deliver(self, payload: bytes, count: int) -> DeliveryResult:
        """Send a request until its records are delivered or in the dead letter; see `RetryingExporter.deliver`."""
        while True:
            exporter = self.exporter
            task = asyncio.ensure_future(exporter.deliver(payload, count))
            self._in_flight.add(task)
            try:
                result = await asyncio.shield(task)
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if task.cancelled() and exporter is not self.exporter and not (current and current.cancelling()):
                    continue
                task.cancel()
                raise
            finally:
                self._in_flight.discard(task)
            self.delivered += result.delivered
            self.rejected += result.rejected
            if result.delivered:
                self._on_delivered()
            return result


class Endpoints:
    """The endpoints of all signals, and the dead letter that they share.

    Args:
        settings: The loaded configuration.
        health: Receives the health of the endpoints.

    Attributes:
        dead_letter: Stores rejected batches.
        metrics_exporter: The exporter of metrics, which are not retried; None if they are not exported.

    Raises:
        ConfigError: An endpoint or a certificate cannot be used.
    """

    def __init__(self, settings: Settings, health: ExportHealth) -> None:
        self.dead_letter = _dead_letter(settings)
        self._health = health
        self._settings = settings
        self._unsupported: set[Signal] = set()
        self._advised = ""
        self.metrics_exporter = self._make_exporter("metrics", settings)
        retried: tuple[Signal, ...] = ("logs", "traces")
        self._endpoints: dict[Signal, Endpoint] = {
            signal: Endpoint(exporter, self._advise)
            for signal in retried
            if (exporter := self._make_retrying(signal, settings)) is not None
        }

    def get(self, signal: Signal) -> Endpoint | None:
        """Return the endpoint of ``logs`` or ``traces``; None if the signal is not exported."""
        return self._endpoints.get(signal)

    def on_unsupported(self, signal: Signal) -> str | None:
        """Note that an endpoint does not have a signal; log advice once for all signals.

        Returns:
            The advice, empty while it is unknown whether traces are accepted; None if the signal's own error says all.
        """
        traces = self._endpoints.get("traces")
        if signal == "traces" or traces is None:
            return None
        is_first = signal not in self._unsupported
        self._unsupported.add(signal)
        self._advise()
        if self._advised:
            return self._advised
        return "" if is_first and traces.exporter.state == "ok" else None

    def _advise(self) -> None:
        traces = self._endpoints.get("traces")
        if not self._unsupported or self._advised or traces is None or not traces.delivered:
            return
        self._advised = signals_advice(self._settings.otlp, self._unsupported)
        _log.error(
            "%s takes traces, but not %s: %s; spans are sent, all else waits",
            traces.exporter.endpoint,
            " and ".join(sorted(self._unsupported)),
            self._advised,
        )

    def paused(self) -> list[Signal]:
        """Return the signals whose export waits for an operator: endpoint fault, or dead letter full."""
        paused = [signal for signal, endpoint in self._endpoints.items() if endpoint.exporter.state == "paused"]
        for signal, endpoint in self._endpoints.items():
            # An unavailable endpoint needs no operator, so it does not pause its signal; but it is not up.
            self._health.endpoint(signal, endpoint.exporter.last_error is None)
        self._health.logs_outage = self._endpoints["logs"].exporter.outage if "logs" in self._endpoints else None
        if self.metrics_exporter is not None and self._health.metrics_fault:
            paused.append("metrics")
        return paused

    @property
    def outages(self) -> dict[Signal, Outage]:
        """The signals whose endpoint does not accept or answer, with the failed attempts since it last did."""
        found = {signal: endpoint.exporter.outage for signal, endpoint in self._endpoints.items()}
        if self.metrics_exporter is not None:
            found["metrics"] = self._health.metrics_outage
        return {signal: outage for signal, outage in found.items() if outage is not None}

    @property
    def last_errors(self) -> dict[Signal, str | None]:
        """The last error of each signal whose records are retried; None after a success."""
        return {signal: endpoint.exporter.last_error for signal, endpoint in self._endpoints.items()}

    @property
    def logs_wait(self) -> bool:
        """Whether spans are accepted and logs are not: at once if the endpoint does not have logs, else after 30 s."""
        logs, traces = self._endpoints.get("logs"), self._endpoints.get("traces")
        if logs is None or traces is None or logs.exporter.outage is None or traces.exporter.outage is not None:
            return False
        return "logs" in self._unsupported or logs.exporter.outage.since_s <= time.time() - SHORT_OUTAGE_S

    @property
    def rejected(self) -> int:
        """Number of records that went to the dead letter since the start."""
        return sum(endpoint.rejected for endpoint in self._endpoints.values())

    @property
    def targets(self) -> dict[Signal, str]:
        """The destination of each exported signal, without credentials."""
        targets = {signal: endpoint.exporter.endpoint for signal, endpoint in self._endpoints.items()}
        if self.metrics_exporter is not None:
            targets["metrics"] = self.metrics_exporter.endpoint
        return targets

    @property
    def kept_in_files(self) -> bool:
        """Whether a signal has no endpoint, so that its telemetry waits in files for a replay."""
        return any((keys := self._settings.otlp.for_signal(signal)) and keys.url is None for signal in SIGNALS)

    async def reload(self, settings: Settings) -> None:
        """Apply changed endpoint settings. The new exporters send the requests in flight again.

        Raises:
            ConfigError: A new endpoint or certificate cannot be used; nothing was changed.
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
            exporters = {
                signal: self._make_retrying(signal, settings) for signal in self._endpoints if signal in changed
            }
            metrics_exporter = (
                self._make_exporter("metrics", settings) if "metrics" in changed else self.metrics_exporter
            )
        except ConfigError:
            self.dead_letter = old_dead_letter
            raise
        self._settings = settings
        self._unsupported.clear()
        self._advised = ""
        for signal, exporter in exporters.items():
            if exporter is not None:
                await self._endpoints[signal].replace_exporter(exporter)
        if old_dead_letter is not self.dead_letter:
            old_dead_letter.close()
        if metrics_exporter is not self.metrics_exporter:
            self._health.metrics_outage = None
            old_metrics_exporter, self.metrics_exporter = self.metrics_exporter, metrics_exporter
            if old_metrics_exporter is not None:
                await old_metrics_exporter.aclose()

    async def aclose(self) -> None:
        """Close all exporters and the dead letter."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.dead_letter.close)
            for endpoint in self._endpoints.values():
                stack.push_async_callback(endpoint.exporter.aclose)
            if self.metrics_exporter is not None:
                stack.push_async_callback(self.metrics_exporter.aclose)

    def _make_exporter(self, signal: Signal, settings: Settings) -> Exporter | None:
        keys = settings.otlp.for_signal(signal)
        if keys is None:
            return None
        return make_exporter(signal, keys, state_dir=settings.agent.state_dir, files=settings.files)

    def _make_retrying(self, signal: Signal, settings: Settings) -> RetryingExporter | None:
        exporter = self._make_exporter(signal, settings)
        if exporter is None:
            return None
        retries = settings.otlp.retry_server_errors
        failed = partial(self._health.export_failed, signal)
        return RetryingExporter(
            signal,
            exporter,
            self.dead_letter,
            retry_server_errors=retries,
            on_failure=failed,
            on_unsupported=partial(self.on_unsupported, signal),
        )


def signals_advice(otlp: OtlpSettings, unsupported: Collection[Signal]) -> str:
    """Return which `otlp.signals` fit an endpoint that does not have some of them.

    Args:
        otlp: Where signals are sent.
        unsupported: The signals that an endpoint does not have. Others at the same address that are not traces are
            left out, too: they may not have been tried yet.
    """
    places = {signal: urlsplit(keys.url or "").netloc for signal in SIGNALS if (keys := otlp.for_signal(signal))}
    lacking = {places.get(signal) for signal in unsupported}
    fitting = [signal for signal, place in places.items() if signal == "traces" or place not in lacking]
    note = " (Jaeger takes traces only)" if fitting == ["traces"] else ""
    return f"set otlp.signals = {json.dumps(fitting)}{note}"


def _dead_letter(settings: Settings) -> DeadLetter:
    return DeadLetter(
        settings.agent.state_dir / "dead-letter",
        max_bytes=settings.otlp.dead_letter_max,
        max_size=settings.files.max_size,
    )
