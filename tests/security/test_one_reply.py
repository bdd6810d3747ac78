"""One job of a job API may spoil only itself: what a reply says of it does not hide the other jobs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tailspan.models import JobState
from tailspan.services.fused import FusedService
from tests.fakes.agents import looped
from tests.fakes.job_api import FakeJobApi, Fault

IMPOSSIBLE: list[Any] = [
    -1, 1 << 63, -(1 << 63), 1 << 200, float("nan"), float("inf"), 1e300, "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00+23:00", "soon", "", "\ud800", True, None, [], {"a": 1},
]  # fmt: skip
ROW = {"id": "good", "job_status": "Done", "creation_date": "2026-11-29T00:00:00"}


def service_of(api: FakeJobApi) -> FusedService:
    return FusedService("api", base_url=api.base_url, token="x", requests_per_second=1000)


@looped
async def test_impossible_rows_hide_no_job() -> None:
    """Each value in each place of a row; rows that are none, too. Python servers write NaN and Infinity."""
    keys = ("creation_date", "job_status_date", "job_status", "instance_id", "job_name", "lines", "state", "cost")
    rows: list[Any] = [
        {**ROW, "id": f"{key} {number}", key: value} for key in keys for number, value in enumerate(IMPOSSIBLE)
    ]
    known = {row["id"] for row in rows}
    rows += [{**ROW, "id": value} for value in IMPOSSIBLE if not isinstance(value, str)] + IMPOSSIBLE + [ROW]
    with FakeJobApi() as api:
        api.fault(Fault(body=json.dumps(rows).encode()), on="list")
        service = service_of(api)
        try:
            found = [row async for page in service.list_jobs() for row in page]
        finally:
            await service.aclose()
    assert {row.job_id for row in found} >= known | {"good"}
    assert all(row.created_at is None or row.created_at.tzinfo is not None for row in found)


@looped
async def test_a_list_that_is_none_is_an_error() -> None:
    """Rows without any id are something else."""
    with FakeJobApi() as api:
        api.fault(Fault(body=b'[{"name": "a"}, {"name": "b"}]'), on="list")
        service = service_of(api)
        try:
            with pytest.raises(Exception, match="no row has an id"):
                [row async for row in service.list_jobs()]
        finally:
            await service.aclose()


@looped
async def test_an_impossible_value_of_a_status_is_not_known() -> None:
    """State and name of the job are read all the same."""
    keys = ("last_heartbeat", "job_status_date", "total_tasks", "finished_tasks", "exit_code", "attempt", "attributes",
            "details", "finished_at", "trace_id", "parent", "lines", "first_line_ms", "unknown")  # fmt: skip
    with FakeJobApi() as api:
        service = service_of(api)
        try:
            for value in IMPOSSIBLE:
                job = api.add_job(f"j{len(api.requests)}", job_status="Done", terminal_status=True)
                job.status.update(dict.fromkeys(keys, value))
                status = await service.get_job(job.job_id)
                assert (status.state, status.job_name) == (JobState.SUCCEEDED, "etl")
                assert all(count >= 0 for count in (status.total_tasks, status.finished_tasks))
        finally:
            await service.aclose()
