"""The verbs as plain functions: read, print, tail, status, cancel, exec time, wait; and list and submit.

All of them work in a script, inside a running event loop (a notebook), from any thread, and after a fork; Ctrl-C
returns at once. They share one client with the settings of the process; `tailspan.Client` has settings of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import IO

from tailspan._caller import for_callers
from tailspan._rows import Rows
from tailspan.client import RunResponse, process_client
from tailspan.logs.follow import SETTLE_S
from tailspan.logs.page import Message
from tailspan.models import CoerceableToJobId, JobState, ListedJob, TaskRun
from tailspan.services import JobService

__all__ = [
    "job_cancel",
    "job_get_exec_time",
    "job_get_logs",
    "job_get_status",
    "job_get_tasks",
    "job_list",
    "job_print_logs",
    "job_submit",
    "job_tail_logs",
    "job_wait_for_job",
]


@for_callers
def job_get_logs(
    job: CoerceableToJobId,
    since_ms: int | None = None,
    *,
    task: str | None = None,
    service: str | JobService | None = None,
) -> Rows[Message]:
    """Return the lines of a job.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        since_ms: Only lines whose time is at or after this, in ms since the epoch. None: all lines.
        task: Only lines of the task with this name or id; for services whose jobs have tasks.
        service: A service's name from the configuration, or a `JobService`. None: the job's own, where a status or a
            row was given, else the default service.

    Returns:
        A list of messages as dicts, oldest first, each once: ``message`` (str), ``timestamp`` (int, ms since the
        epoch) and further keys of the service, for example ``task``, ``attempt`` and ``level``. Lines of one
        millisecond keep the order of the service. Its ``to_dicts()`` has the columns time, stream, severity and text.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> job_get_logs("nightly-42")
        [{'message': 'started', 'timestamp': 1000}, {'message': 'done', 'timestamp': 3500}]
    """
    return process_client().get_logs(job, since_ms, task=task, service=service)


@for_callers
def job_print_logs(
    job: CoerceableToJobId,
    since_ms: int | None = None,
    file: IO[str] | None = None,
    *,
    task: str | None = None,
    service: str | JobService | None = None,
) -> None:
    """Print the lines of a job in the order of the service; a long log is never held in memory.

    If the job has more than one task, the task's name stands before each line.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        since_ms: Only lines whose time is at or after this, in ms since the epoch. None: all lines.
        file: Text file to print to. None: ``sys.stdout``. On a terminal, control characters are removed.
        task: Only lines of the task with this name or id, without that name before them.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> job_print_logs("nightly-42", since_ms=2000)
        done
    """
    process_client().print_logs(job, since_ms, file, task=task, service=service)


@for_callers
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

    Waits while the job is pending. A failed status request does not end it as long as the service answers again
    within a minute.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        refresh_seconds: Poll interval, in seconds.
        sample_logs: Print at most one line per refresh, the newest, and the number of lines left out. False: print
            every line, once.
        timeout: Return after this many seconds, whether or not the job has ended. None: never.
        get_logs_retries: Number of retries of a failed log request before its error is raised.
        service: A service's name or a `JobService`; see `job_get_logs`.
        file: Text file to print to. None: ``sys.stdout``.
        settle_seconds: How long after the job's end lines may still become visible, in seconds. There is no wait for
            services that mark the end of a log, as the local one does.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> job_tail_logs("nightly-42", sample_logs=False)
        started
        done
    """
    process_client().tail_logs(
        job,
        refresh_seconds,
        sample_logs,
        timeout,
        get_logs_retries,
        service=service,
        file=file,
        settle_seconds=settle_seconds,
    )


@for_callers
def job_get_status(job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
    """Return the status of a job.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        The present status.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> job_get_status("nightly-42")
        RunResponse(job_id='nightly-42', job_name='nightly', state=SUCCEEDED, ...)
    """
    return process_client().get_status(job, service=service)


@for_callers
def job_get_tasks(job: CoerceableToJobId, *, service: str | JobService | None = None) -> Rows[TaskRun]:
    """Return the tasks of a job: what its service starts for it.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        Every attempt of every task, oldest first; empty if the service has jobs without tasks.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> [(task.name, task.attempt, task.result) for task in job_get_tasks("nightly-42")]
        []
    """
    return process_client().get_tasks(job, service=service)


@for_callers
def job_cancel(job: CoerceableToJobId, *, service: str | JobService | None = None) -> RunResponse:
    """Cancel a job. Cancelling an ended job is no error and changes nothing.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        The new status. The job may still need a moment to end: `job_wait_for_job` waits for that.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> job_cancel("nightly-43").state
        <JobState.CANCELED: 'CANCELED'>
    """
    return process_client().cancel(job, service=service)


@for_callers
def job_get_exec_time(job: CoerceableToJobId, *, service: str | JobService | None = None) -> timedelta:
    """Return the execution time of a job by its log: the time from its first to its last line.

    The log is never held in memory, and not even read where the service knows the two times.

    Args:
        job: A job id, a `RunResponse`, or a row of `job_list`.
        service: A service's name or a `JobService`; see `job_get_logs`.

    Returns:
        Zero or more; zero with fewer than two lines. While the job runs the time so far, with an `InProgressWarning`.

    Raises:
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed.

    Example:
        >>> print(job_get_exec_time("nightly-42"))
        0:00:02.500000
    """
    return process_client()._exec_time(job, service)


@for_callers
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
        poll_interval_seconds: Poll interval, in seconds. The end of a local job is noticed at once.
        timeout: Give up after this many seconds. None: never.
        service: A service's name or a `JobService`; see `job_get_logs`.
        delivered: Wait also until the agent, which listens on ``agent.listen``, has acknowledged the last line.

    Returns:
        The final status, whether the job succeeded or not: a failed job is a state, not an exception.

    Raises:
        WaitTimeoutError: The job had not ended in time; a `TimeoutError` with ``last_status``.
        JobNotFoundError: The service has no such job.
        ServiceError: The service failed at the first request, or for a minute.

    Example:
        >>> job_wait_for_job("nightly-42", timeout=3600).state.is_terminal
        True
    """
    return process_client().wait_for_job(job, poll_interval_seconds, timeout, service=service, delivered=delivered)


@for_callers
def job_list(
    limit: int | None = 50,
    *,
    name: str | None = None,
    state: JobState | str | None = None,
    service: str | JobService | None = None,
) -> Rows[ListedJob]:
    """List a service's jobs, newest first.

    Args:
        limit: Maximum number of jobs. None: all.
        name: Only jobs whose name matches this glob, for example ``etl-*``. Where the list has no names, as with
            Fused, this costs a status request per job.
        state: Only jobs in this state.
        service: A service's name or a `JobService`. None: the default service.

    Returns:
        A list of rows that every verb takes as ``job``. Its ``to_dicts()`` returns their fields.

    Raises:
        ServiceError: The service failed.
        ConfigError: There is no such state.

    Example:
        >>> [job.job_id for job in job_list(state="SUCCEEDED")]
        ['nightly-42']
    """
    return process_client().list_jobs(limit, name=name, state=state, service=service)


@for_callers
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
        command: The program and its arguments; or one string, a line for the shell (``/bin/sh -c``), with pipes and
            variables: ``job_submit("echo $HOME | wc -c")``.
        name: The job's name, which its runs have in common. None: its program or script; of a string the first one,
            so that ``job_submit("echo hi")`` is called ``echo``.
        attributes: Texts that go onto the job's logs and spans.
        timeout: The service ends the job as TIMED_OUT after this many seconds. None: never.
        cwd: The directory to run in. None: this process's.
        env: Environment variables on top of this process's.
        service: A service's name or a `SubmitService`. None: the default service.

    Returns:
        The first status of the new job.

    Raises:
        ConfigError: There is no command, or the service cannot run jobs.
        ServiceError: The service failed.

    Example:
        >>> job_submit(["python", "etl.py"], name="etl").state
        <JobState.PENDING: 'PENDING'>
    """
    return process_client().submit(
        command,
        name=name,
        attributes=attributes,
        timeout=timeout,
        cwd=cwd,
        env=env,
        service=service,
    )
