"""The verbs as plain functions: read, print, tail, status, cancel, exec time, wait; and list and submit.

All of them work in a script, inside a running event loop (a notebook), from any thread, and after a fork; Ctrl-C
returns at once. The logic is in `tailspan.client.AsyncJobClient`, which has the same verbs to ``await``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import IO

from tailspan._portal import Portal
from tailspan.client import AsyncJobClient, in_progress_text
from tailspan.errors import InProgressWarning
from tailspan.logs.follow import SETTLE_S
from tailspan.logs.page import Message
from tailspan.logs.printing import LinePrinter, TailPrinter
from tailspan.models import CoerceableToJobId, JobState, ListedJob, RunResponse
from tailspan.services import JobService

__all__ = [
    "job_cancel",
    "job_get_exec_time",
    "job_get_logs",
    "job_get_status",
    "job_list",
    "job_print_logs",
    "job_submit",
    "job_tail_logs",
    "job_wait_for_job",
]

_PORTAL: Portal[AsyncJobClient] = Portal(AsyncJobClient)


def job_get_logs(
    job: CoerceableToJobId, since_ms: int | None = None, *, service: str | JobService | None = None
) -> list[Message]:
    """Fetch logs for a job.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        since_ms: Only lines whose time is at or after this, in ms since the epoch. None: all lines.
        service: A service's name from the configuration, or a `JobService`. None: the job's own, where a status or a
            row was given, else the default service.

    Returns:
        Messages as dicts, oldest first, each once: ``message`` (str), ``timestamp`` (int, ms since the epoch) and the
        keys that the service has besides. Lines of one millisecond keep the order of the service.

    Raises:
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer as it should.
    """
    return _PORTAL.call(AsyncJobClient.job_get_logs, job, since_ms, service=service)


def job_print_logs(
    job: CoerceableToJobId,
    since_ms: int | None = None,
    file: IO[str] | None = None,
    *,
    service: str | JobService | None = None,
) -> None:
    """Fetch and print logs for a job, as the service orders them; a long log is never held in memory.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        since_ms: Only lines whose time is at or after this, in ms since the epoch. None: all lines.
        file: Where to print to. None: ``sys.stdout``. What could garble a terminal is taken out only on a terminal.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Raises:
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer as it should.
    """
    printer = LinePrinter(file or sys.stdout)
    for messages in _PORTAL.iterate(AsyncJobClient.iter_logs, job, since_ms, service=service):
        printer.messages(messages)


def job_tail_logs(
    job: CoerceableToJobId,
    refresh_seconds: float = 1,
    sample_logs: bool = True,
    timeout: float | None = None,
    get_logs_retries: int = 1,
    *,
    service: str | JobService | None = None,
    file: IO[str] | None = None,
    settle_seconds: float = SETTLE_S,
) -> None:
    """Print a job's lines as they come, until the job has ended and its last lines are read.

    Waits through pending, whatever the lines say. A status request that fails does not end it as long as the service
    answers again within a minute.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        refresh_seconds: How often to look, in seconds.
        sample_logs: Print at most one line, the newest, a refresh, and say how many were left out. False: print every
            line, once.
        timeout: After how many seconds to return, whether or not the job has ended. None: never.
        get_logs_retries: How many more times to try a log request that failed, before its error is raised.
        service: A service's name or a `JobService`; see `job_get_logs`.
        file: Where to print to. None: ``sys.stdout``.
        settle_seconds: How long after the job's end lines may still become visible, in seconds. Services that mark
            the end of a log, as the local one does, are not waited for.

    Raises:
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer as it should.
    """
    printer = TailPrinter(file or sys.stdout)
    for update in _PORTAL.iterate(
        AsyncJobClient.follow_logs,
        job,
        refresh_seconds,
        sample_logs,
        timeout,
        get_logs_retries,
        service=service,
        settle_seconds=settle_seconds,
    ):
        printer.update(update)


def job_get_status(job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
    """Fetch the status of a job.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        The present status.

    Raises:
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer as it should.
    """
    return _PORTAL.call(AsyncJobClient.job_get_status, job, service=service)


def job_cancel(job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
    """Cancel a job. Cancelling an ended job is not an error and changes nothing.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        The new status. The job may still need a moment to end: `job_wait_for_job` waits for that.

    Raises:
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer as it should.
    """
    return _PORTAL.call(AsyncJobClient.job_cancel, job, service=service)


def job_get_exec_time(job: CoerceableToJobId, *, service: str | JobService | None = None) -> timedelta:
    """Determine the execution time of a job from its log: the time from its first to its last line.

    The log is not held in memory, and where the service allows it not even fetched.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        Zero or more; zero with fewer than two lines. While the job runs the time so far, with an `InProgressWarning`.

    Raises:
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer as it should.
    """
    exec_time, status = _PORTAL.call(AsyncJobClient.exec_time_and_status, job, service=service)
    if not status.state.is_terminal:
        warnings.warn(in_progress_text(status), InProgressWarning, stacklevel=2)
    return exec_time


def job_wait_for_job(
    job: CoerceableToJobId,
    poll_interval_seconds: float = 5,
    timeout: float | None = None,
    *,
    service: str | JobService | None = None,
    delivered: bool = False,
) -> RunResponse:
    """Block until a job has ended.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        poll_interval_seconds: How often to ask, in seconds.
        timeout: After how many seconds to give up. None: never.
        service: A service's name or a `JobService`; see `job_get_logs`.
        delivered: Wait also until the agent has acked the job's last line; the agent is asked on ``agent.listen``.

    Returns:
        The final status, whether the job succeeded or not: a failed job is a state, not an exception.

    Raises:
        WaitTimeoutError: The job had not ended in time; a `TimeoutError` with ``last_status``.
        JobNotFoundError: The service knows no such job.
        ServiceError: The service did not answer the first time, or stopped answering for a minute.
    """
    return _PORTAL.call(
        AsyncJobClient.job_wait_for_job, job, poll_interval_seconds, timeout, service=service, delivered=delivered
    )


def job_list(
    limit: int | None = 50,
    *,
    name: str | None = None,
    state: JobState | str | None = None,
    service: str | JobService | None = None,
) -> list[ListedJob]:
    """List a service's jobs, newest first.

    Args:
        limit: At most so many. None: all.
        name: Only jobs whose name matches this glob, for example ``etl-*``. Where the list has no names, as with
            Fused, each job is asked for its own.
        state: Only jobs in this state.
        service: A service's name or a `JobService`. None: the default service.

    Returns:
        Rows that every verb takes as ``job``.

    Raises:
        ServiceError: The service did not answer as it should.
        ConfigError: There is no such state.
    """
    return _PORTAL.call(AsyncJobClient.job_list, limit, name=name, state=state, service=service)


def job_submit(
    command: str | Sequence[str],
    *,
    name: str | None = None,
    attributes: Mapping[str, str] | None = None,
    timeout: float | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    service: str | JobService | None = None,
) -> RunResponse:
    """Start a command as a job, without waiting for it.

    Args:
        command: The program and its arguments; or one string, which ``/bin/sh -c`` runs.
        name: The job's name: what its runs have in common. None: made from the command.
        attributes: Texts that go onto the job's logs and spans.
        timeout: After how many seconds the service ends the job as TIMED_OUT. None: never.
        cwd: The directory to run in. None: this process's.
        env: Environment variables on top of this process's.
        service: A service's name or a `JobService` that takes jobs. None: the default service.

    Returns:
        The first status of the new job.

    Raises:
        ConfigError: There is no command, or the service does not take jobs.
        ServiceError: The service did not answer as it should.
    """
    return _PORTAL.call(
        AsyncJobClient.job_submit,
        command,
        name=name,
        attributes=attributes,
        timeout=timeout,
        cwd=cwd,
        env=env,
        service=service,
    )
