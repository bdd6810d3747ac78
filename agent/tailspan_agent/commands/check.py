"""Checks of ``tailspan agent check``: can the configuration work, service by service and signal by signal?"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from tailspan._net import host_port
from tailspan._secrets import mask
from tailspan.config import Settings, Watch
from tailspan.config.signals import SIGNALS, Signal
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceError, TailspanError
from tailspan.http.client import BROKEN, HttpClient
from tailspan.logs.page import LogPage
from tailspan.models import JobStatus
from tailspan.services import JobService
from tailspan.services.registry import open_service, place_in_plugin
from tailspan_agent.checkpoint.database import lock_holder
from tailspan_agent.exporter.endpoints import signals_advice
from tailspan_agent.exporter.factory import make_exporter
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected
from tailspan_agent.records.redact import Redactor

__all__ = ["RUNNING_AGENT", "Finding", "check"]

RUNNING_AGENT = "running agent"
"""The subject of what the running agent reports of itself."""

_TIMEOUT_S = 15.0
_AGENT_TIMEOUT_S = 5.0
_AGENT_ANSWER_BYTES = 64 << 10
_NOT_READY = 503
_CONFIG, _UNREACHABLE, _NO_JOB = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: A key of the configuration, a service, a signal or a job.
        text: The result for people, without the tokens of this process: a server may quote them anywhere.
        exit_code: 0 without a problem; otherwise the exit code of the problem.
        warning: True if it works, but probably not as intended.
    """

    subject: str
    text: str
    exit_code: int = 0
    warning: bool = False

    def __post_init__(self) -> None:
        """Mask tokens."""
        object.__setattr__(self, "text", mask(self.text))


async def check(
    settings: Settings, opener: Callable[[str, Settings], JobService] = open_service
) -> AsyncIterator[Finding]:
    """Check everything that the agent would use, and yield each finding at once.

    Args:
        settings: The loaded configuration (loading it is the first check).
        opener: Opens the configured service of a name.

    Yields:
        A finding for each watched service, configured job and signal, and for each watch with a problem.
    """
    for finding in _check_settings(settings):
        yield finding
    identities: dict[str, str] = {}
    for name in dict.fromkeys(watch.service for watch in settings.agent.watch):
        subject = f"services.{name}"
        try:
            service = opener(name, settings)
            service.identity  # noqa: B018 - a plugin may read it from somewhere
        except TailspanError as error:
            yield Finding(subject, str(error), _CONFIG if isinstance(error, ConfigError) else _UNREACHABLE)
            continue
        except Exception as error:
            yield Finding(subject, f"identity: {_unexpected(error)}", _CONFIG)
            continue
        other = identities.setdefault(service.identity, name)
        if other != name:
            yield Finding(subject, f"is the same service as services.{other}: watch only one of them", _CONFIG)
        async with aclosing(service):
            watches = [watch for watch in settings.agent.watch if watch.service == name]
            async for finding in _check_service(service, watches):
                yield finding
    async for finding in _check_signals(settings):
        yield finding
    for finding in _check_listen(settings):
        yield finding
    async for finding in _check_running_agent(settings):
        yield finding


async def _check_running_agent(settings: Settings) -> AsyncIterator[Finding]:
    """Yield what keeps the running agent from relaying, from its ``/readyz``; nothing if no agent answers."""
    address, socket = settings.agent.listen_address, settings.agent.listen_socket
    is_known = socket is not None or (address is not None and address[1] != 0)  # port 0 is any free one
    if not is_known or lock_holder(settings.agent.state_dir) is None:
        return
    url = f"http://{host_port(*address) if address else 'localhost'}/readyz"
    client = HttpClient(
        url,
        key="agent.listen",
        headers={},
        timeout_s=_AGENT_TIMEOUT_S,
        keep_alive_s=0.0,
        max_idle=1,
        uses_proxy=False,
        socket=socket,
    )
    try:
        reply, body = await client.fetch("GET", max_bytes=_AGENT_ANSWER_BYTES)
    except (*BROKEN, zlib.error) as error:
        reason = str(error) or type(error).__name__
        yield Finding(RUNNING_AGENT, f"{url} does not answer: {reason}", warning=True)
        return
    finally:
        await client.aclose()
    problems = body.decode("utf-8", "replace").splitlines()
    if reply.status == _NOT_READY:
        for problem in problems:
            code, _, rest = problem.partition(" ")
            yield Finding(RUNNING_AGENT, f"{code.replace('_', ' ')} {rest}".rstrip(), warning=True)
    elif problems == ["ready"]:
        yield Finding(RUNNING_AGENT, "ready")
    else:
        yield Finding(RUNNING_AGENT, f"{url} answers HTTP {reply.status}: correct agent.listen", warning=True)


def _check_settings(settings: Settings) -> Iterator[Finding]:
    if settings.otlp.disabled:
        yield Finding("OTEL_SDK_DISABLED", "is set: the agent does not start", _CONFIG)
    try:
        Redactor.from_settings(settings.redact)
    except TailspanError as error:
        yield Finding("redact", str(error), _CONFIG)
    first_watch: dict[tuple[str, str], int] = {}
    for index, watch in enumerate(settings.agent.watch):
        for job_id in watch.jobs:
            first = first_watch.setdefault((watch.service, job_id), index)
            if first != index:
                text = f"job {job_id} is already named by agent.watch[{first}], which takes precedence"
                yield Finding(f"agent.watch[{index}]", text, warning=True)
        if not watch.discover:
            continue
        for earlier_index, earlier in enumerate(settings.agent.watch[:index]):
            same = earlier.service == watch.service and earlier.discover
            if same and earlier.name in (None, "*", watch.name) and not earlier.exclude:
                text = (
                    f"agent.watch[{earlier_index}] comes first and matches all of these jobs: this watch has no effect"
                )
                yield Finding(f"agent.watch[{index}]", text, warning=True)
                break


async def _check_service(service: JobService, watches: list[Watch]) -> AsyncIterator[Finding]:
    subject = f"services.{service.name}"
    jobs = [job_id for watch in watches for job_id in watch.jobs]
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            listing = service.list_jobs()
            async with aclosing(listing):
                rows = await anext(listing, None)  # an empty tuple here breaks anext of Python 3.11
            yield Finding(
                subject, f"reachable; its newest job is {rows[0].job_id}" if rows else "reachable; it has no jobs yet"
            )
            for job_id in dict.fromkeys(jobs):
                try:
                    job = await service.get_job(job_id)
                except JobNotFoundError as error:
                    yield Finding(f"job {job_id}", str(error), _NO_JOB)
                else:
                    yield Finding(f"job {job_id}", f"{job.job_name}: {job.state}")
            if rows and (problem_of_job := await _problem_of_reads(service, rows[0].job_id)) is not None:
                yield Finding(subject, problem_of_job, _CONFIG)
            for problem in await service.find_problems():
                yield Finding(subject, problem.text, _CONFIG if problem.is_fatal else 0, warning=not problem.is_fatal)
    except TimeoutError:
        yield Finding(subject, f"did not answer within {_TIMEOUT_S:g} s", _UNREACHABLE)
    except ServiceError as error:
        yield Finding(subject, str(error), _CONFIG if isinstance(error, AuthError) else _UNREACHABLE)
    except Exception as error:
        yield Finding(subject, _unexpected(error), _CONFIG)


async def _problem_of_reads(service: JobService, job_id: str) -> str | None:
    """Return why a job's status and first lines cannot be read; None if they can, or if the job is gone meanwhile."""
    method = "get_job"
    try:
        status: object = await service.get_job(job_id)
        if not isinstance(status, JobStatus):
            return f"get_job({job_id!r}) returned {type(status).__name__}, not a JobStatus"
        method = "read_logs"
        async with aclosing(service.read_logs(job_id)) as pages:
            page: object = await anext(pages, None)
        if page is not None and not isinstance(page, LogPage):
            return f"read_logs({job_id!r}) yielded {type(page).__name__}, not a LogPage"
    except JobNotFoundError:
        return None
    except TailspanError as error:
        return f"{method}({job_id!r}) of its newest job failed: {error}"
    except Exception as error:
        return f"{method}({job_id!r}) of its newest job failed: {_unexpected(error)}"
    return None


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__} in the service plugin: {error}{place_in_plugin(error)}"


def _check_listen(settings: Settings) -> Iterator[Finding]:
    """Yield why the agent cannot listen; nothing while an agent runs on this state directory."""
    address = settings.agent.listen_address
    if address is None or lock_holder(settings.agent.state_dir) is not None:
        return
    host, port = address
    try:
        with socket.create_server(address, family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return
    except OSError as error:
        # resolver errors have their own negative numbers
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such host"
        hint = ": another program listens there" if error.errno == errno.EADDRINUSE else ""
        yield Finding("agent.listen", f"cannot listen on {host_port(host, port)}: {reason}{hint}", _CONFIG)


async def _check_signals(settings: Settings) -> AsyncIterator[Finding]:
    checked = {signal: await _check_signal(signal, settings) for signal in SIGNALS}
    unsupported = {
        signal for signal, (_, outcome) in checked.items() if isinstance(outcome, EndpointFault) and outcome.unsupported
    }
    takes_traces = isinstance(checked["traces"][1], Delivered)
    for signal, (finding, _) in checked.items():
        if takes_traces and signal in unsupported:
            advice = signals_advice(settings.otlp, unsupported)
            finding = replace(finding, text=f"{finding.text}: {advice}")
        yield finding


async def _check_signal(signal: Signal, settings: Settings) -> tuple[Finding, Outcome | None]:
    keys = settings.otlp.for_signal(signal)
    subject = f"otlp {signal}"
    if keys is None:
        return Finding(subject, "not sent (otlp.signals)"), None
    try:
        exporter = make_exporter(signal, keys, state_dir=settings.agent.state_dir, files=settings.files)
    except ConfigError as error:
        return Finding(subject, str(error), _CONFIG), None
    async with aclosing(exporter):
        if keys.url is None:
            return Finding(subject, f"no endpoint: written as OTLP JSON lines to {exporter.endpoint}"), None
        # Every receiver must accept an empty request.
        outcome = await exporter.export(b"", 0)
    match outcome:
        case Delivered():
            finding = Finding(subject, f"{exporter.endpoint} accepts them")
        case Rejected(reason=reason):
            text = f"{exporter.endpoint} answers, but rejects an empty request: {reason}"
            finding = Finding(subject, text, warning=True)
        case _:
            # Some reasons already name the endpoint.
            reason = outcome.reason.removeprefix(f"{exporter.endpoint}: ")
            finding = Finding(subject, f"{exporter.endpoint}: {reason}", _UNREACHABLE)
    return finding, outcome
