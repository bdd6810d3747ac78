"""What ``tailspan agent check`` finds: whether the configuration can work, service by service, signal by signal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from tailspan.config import Settings, Watch
from tailspan.config.signals import SIGNALS, Signal
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceError, TailspanError
from tailspan.services import JobService
from tailspan.services.registry import open_service
from tailspan_agent.exporter.factory import make_exporter
from tailspan_agent.exporter.outcome import Delivered, Rejected
from tailspan_agent.records.redact import Redactor

__all__ = ["Finding", "check"]

_TIMEOUT_S = 15.0
_CONFIG, _UNREACHABLE, _NO_JOB = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: What: a key of the configuration, a service, a signal, a job.
        text: What was found.
        exit_code: 0 when it is well or only a warning; else the exit code that it is worth.
        warning: Whether it works, but hardly as meant.
    """

    subject: str
    text: str
    exit_code: int = 0
    warning: bool = False


async def check(
    settings: Settings, opener: Callable[[str, Settings], JobService] = open_service
) -> AsyncIterator[Finding]:
    """Look at everything that the agent would use, and yield what was found as it is found.

    Args:
        settings: The loaded configuration (loading it is the first check).
        opener: Makes the configured service of a name.

    Yields:
        A finding for each watched service, watch, named job and signal.
    """
    for finding in _static(settings):
        yield finding
    identities: dict[str, str] = {}
    for name in dict.fromkeys(watch.service for watch in settings.agent.watch):
        subject = f"services.{name}"
        try:
            service = opener(name, settings)
        except ConfigError as error:
            yield Finding(subject, str(error), _CONFIG)
            continue
        other = identities.setdefault(service.identity, name)
        if other != name:
            yield Finding(subject, f"is the same service as services.{other}: watch one of them", _CONFIG)
        async with aclosing(service):
            watches = [watch for watch in settings.agent.watch if watch.service == name]
            async for finding in _service(service, watches):
                yield finding
    for signal in SIGNALS:
        yield await _signal(signal, settings)


def _static(settings: Settings) -> Iterator[Finding]:
    if settings.otlp.disabled:
        yield Finding("OTEL_SDK_DISABLED", "is set: the agent refuses to relay", _CONFIG)
    try:
        Redactor.from_settings(settings.redact)
    except TailspanError as error:
        yield Finding("redact", str(error), _CONFIG)
    seen: dict[tuple[str, str], int] = {}
    for index, watch in enumerate(settings.agent.watch):
        for job_id in watch.jobs:
            first = seen.setdefault((watch.service, job_id), index)
            if first != index:
                text = f"job {job_id} is named by agent.watch[{first}] already, which wins"
                yield Finding(f"agent.watch[{index}]", text, warning=True)
        if not watch.discover:
            continue
        for earlier_index, earlier in enumerate(settings.agent.watch[:index]):
            same = earlier.service == watch.service and earlier.discover
            if same and earlier.name in (None, "*", watch.name) and not earlier.exclude:
                text = f"agent.watch[{earlier_index}] comes first and matches all of its jobs: this one has no effect"
                yield Finding(f"agent.watch[{index}]", text, warning=True)
                break


async def _service(service: JobService, watches: list[Watch]) -> AsyncIterator[Finding]:
    subject = f"services.{service.name}"
    jobs = [job_id for watch in watches for job_id in watch.jobs]
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            listing = service.list_jobs()
            async with aclosing(listing):
                rows = await anext(listing, None)  # an empty tuple here breaks anext of Python 3.11
            yield Finding(
                subject, f"answers; its newest job is {rows[0].job_id}" if rows else "answers; has no jobs yet"
            )
            for job_id in dict.fromkeys(jobs):
                try:
                    job = await service.get_job(job_id)
                except JobNotFoundError as error:
                    yield Finding(f"job {job_id}", str(error), _NO_JOB)
                else:
                    yield Finding(f"job {job_id}", f"{job.job_name}: {job.state}")
    except TimeoutError:
        yield Finding(subject, f"did not answer within {_TIMEOUT_S:g} s", _UNREACHABLE)
    except ServiceError as error:
        yield Finding(subject, str(error), _CONFIG if isinstance(error, AuthError) else _UNREACHABLE)


async def _signal(signal: Signal, settings: Settings) -> Finding:
    keys = settings.otlp.for_signal(signal)
    subject = f"otlp {signal}"
    if keys is None:
        return Finding(subject, "not sent (otlp.signals)")
    try:
        exporter = make_exporter(signal, keys, state_dir=settings.agent.state_dir, files=settings.files)
    except ConfigError as error:
        return Finding(subject, str(error), _CONFIG)
    async with aclosing(exporter):
        if keys.url is None:
            return Finding(subject, f"no endpoint: kept as OTLP JSON lines in {exporter.endpoint}")
        # An empty request is the smallest that every receiver must take.
        outcome = await exporter.export(b"", 0)
    match outcome:
        case Delivered():
            return Finding(subject, f"{exporter.endpoint} takes them")
        case Rejected(reason=reason):
            return Finding(
                subject, f"{exporter.endpoint} answers, but refuses an empty request: {reason}", warning=True
            )
        case _:
            # Some reasons name the endpoint themselves.
            reason = outcome.reason.removeprefix(f"{exporter.endpoint}: ")
            return Finding(subject, f"{exporter.endpoint}: {reason}", _UNREACHABLE)
