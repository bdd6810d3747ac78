"""What type checkers see of the public API: `make test` runs mypy on this file; no program runs it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

import tailspan
from tailspan import AsyncJobClient, Client, JobService, JobStatus, ListedJob, Message, Rows, RunResponse, SubmitService
from tailspan.testing import FakeService


def verbs(status: RunResponse, service: JobService) -> None:
    """Each verb takes an id, a status or a row, and declares what it returns."""
    for job in ("id", status, tailspan.job_list(1)[0]):
        assert_type(tailspan.job_get_status(job), RunResponse)
    assert_type(tailspan.job_get_logs("id", 1), Rows[Message])
    assert_type(tailspan.job_get_exec_time("id", service="fused"), timedelta)
    assert_type(tailspan.job_wait_for_job("id", 0.5, timeout=10, service=service), RunResponse)
    assert_type(tailspan.job_cancel(status), RunResponse)
    assert_type(tailspan.job_list(None, name="etl-*", state=tailspan.JobState.FAILED), Rows[ListedJob])
    assert_type(tailspan.job_submit(["python", "etl.py"], attributes={"team": "geo"}), RunResponse)
    assert_type(tailspan.job_submit("make all"), RunResponse)
    lines: list[Message] = tailspan.job_get_logs("id")
    assert_type(tailspan.job_get_logs(status)[:2].to_dicts(), list[dict[str, Any]])
    assert lines
    tailspan.job_print_logs("id", file=sys.stderr)
    tailspan.job_tail_logs("id", 1, False, None, 1, settle_seconds=0)
    assert_type(status.get_logs(), Rows[Message])
    tailspan.job_get_status(5)  # type: ignore[arg-type]


def handle(status: RunResponse) -> None:
    """The methods of a status take the options of the functions; times may be given as objects."""
    assert_type(status.wait_for_job(timeout=timedelta(minutes=5), delivered=True), RunResponse)
    assert_type(status.get_exec_time(service="fused"), timedelta)
    status.tail_logs(1, False, None, 3, file=sys.stderr, settle_seconds=0)
    status.print_logs(datetime.now(UTC) - timedelta(hours=1), sys.stderr)
    assert_type({status: 1}, dict[RunResponse, int])


def synchronous() -> None:
    """The client and what it returns."""
    with Client(service=FakeService()) as one:
        job = one.jobs.get("j")
        assert_type(job, RunResponse)
        assert_type(one.jobs.list(name="etl-*"), Rows[ListedJob])
        assert_type(one.jobs.submit("make all"), RunResponse)
        for line in one.iter_logs(job, timedelta(minutes=5)):
            assert_type(line, Message)
            assert_type(line["message"], str)
        for update in job.follow_logs():
            assert_type(update.complete, bool)


async def client(status: RunResponse) -> None:
    """The awaitable methods return the same."""
    async with AsyncJobClient(service=FakeService()) as one:
        assert_type(await one.job_get_status(status), RunResponse)
        assert_type(await one.job_get_logs(status), Rows[Message])
        assert_type(await one.wait_for_job(status), RunResponse)
        async for update in one.follow_logs(status):
            assert_type(update.status, JobStatus)


def fakes() -> tuple[JobService, SubmitService]:
    """The fake is a service of both kinds."""
    return FakeService(), FakeService()
