"""What type checkers see of the public API: `make test` runs mypy on this file; nothing runs it."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import assert_type

import tailspan
from tailspan import AsyncJobClient, JobService, ListedJob, Message, RunResponse, SubmitService
from tailspan.testing import FakeService


def verbs(status: RunResponse, service: JobService) -> None:
    """Each verb takes an id, a status or a row, and says what it returns."""
    for job in ("id", status, tailspan.job_list(1)[0]):
        assert_type(tailspan.job_get_status(job), RunResponse)
    assert_type(tailspan.job_get_logs("id", 1), list[Message])
    assert_type(tailspan.job_get_exec_time("id", service="fused"), timedelta)
    assert_type(tailspan.job_wait_for_job("id", 0.5, timeout=10, service=service), RunResponse)
    assert_type(tailspan.job_cancel(status), RunResponse)
    assert_type(tailspan.job_list(None, name="etl-*", state=tailspan.JobState.FAILED), list[ListedJob])
    assert_type(tailspan.job_submit(["python", "etl.py"], attributes={"team": "geo"}), RunResponse)
    assert_type(tailspan.job_submit("make all"), RunResponse)
    tailspan.job_print_logs("id", file=sys.stderr)
    tailspan.job_tail_logs("id", 1, False, None, 1, settle_seconds=0)
    assert_type(status.get_logs(), list[Message])
    tailspan.job_get_status(5)  # type: ignore[arg-type]


async def client(status: RunResponse) -> None:
    """The awaitable methods return the same."""
    async with AsyncJobClient(service=FakeService()) as one:
        assert_type(await one.job_get_status(status), RunResponse)
        assert_type(await one.job_get_logs(status), list[Message])
        async for update in one.follow_logs(status):
            assert_type(update.status, RunResponse)


def fakes() -> tuple[JobService, SubmitService]:
    """The fake is a service of both kinds."""
    return FakeService(), FakeService()
