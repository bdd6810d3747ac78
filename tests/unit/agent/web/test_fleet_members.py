"""The agents of the fleet as rows of the page, and a store whose keys become visible in any order."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tailspan_agent.checkpoint.rows import LedgerRow
from tailspan_agent.fleet.leases import AgentInfo, FleetAgent
from tailspan_agent.web.ended_jobs import EndedJobs
from tailspan_agent.web.fleet_members import follower_of, members_of, page_of


def agent(number: int = 1, *, left_s: float = 10.0, page: str = "", **health: object) -> FleetAgent:
    """Return an agent as the database has it."""
    return FleetAgent(number, AgentInfo("i", "node", 7, "0.1.0", page), False, left_s, 128, health, number == 1)


def test_a_member_shows_what_it_reports() -> None:
    """Its heartbeat is the age of its last renewal; problems and last errors stand together."""
    one = agent(1, left_s=12.0, jobs=3, lag_s=1.5, problems=["endpoint_logs_paused"], errors=["fake: 503"])
    silent = agent(2, left_s=-4.0, jobs="many", lag_s=None, problems=None)
    first, second = members_of(SimpleNamespace(agents={1: one, 2: silent}, agent=1, lease_s=15.0))
    assert (first.is_this, first.renewed_s, first.is_silent, first.jobs, first.lag_s) == (True, 3.0, False, 3, 1.5)
    assert first.problems == ["endpoint_logs_paused", "fake: 503"]
    assert (second.is_this, second.renewed_s, second.is_silent, second.jobs) == (False, 19.0, True, None)
    assert second.problems == []


@pytest.mark.parametrize(
    ("page", "link"),
    [("", ""), ("https://a.example/tailspan/", "https://a.example/tailspan"), ("javascript:alert(1)", "")],
)
def test_a_page_is_a_link_only_with_a_safe_url(page: str, link: str) -> None:
    """Another agent writes it into the database."""
    assert page_of(agent(page=page)) == link


def test_an_agent_that_is_silent_follows_no_job() -> None:
    """Its jobs are shown as last known."""
    fleet = SimpleNamespace(agents={1: agent(1), 2: agent(2, left_s=-1.0)})
    assert [follower_of(fleet, number) and number for number in (1, 2, 3, None)] == [1, None, None, None]
    assert follower_of(None, 1) is None


class Stored:
    """Ended jobs by key, as a database of several agents has them."""

    def __init__(self) -> None:
        self.keys: list[int] = []

    async def newest_key(self) -> int:
        return max(self.keys, default=0)

    async def after(self, key: int, limit: int) -> list[LedgerRow]:
        ledger = '{"first_seen_ns": 1}'
        return [LedgerRow(each, "i", f"j{each}", "etl", ledger, True) for each in sorted(self.keys) if each > key]

    async def by_key(self, keys: list[int]) -> list[LedgerRow]:
        return []


def test_a_job_that_becomes_visible_late_is_listed() -> None:
    """Its transaction ended after one with a larger key."""
    stored = Stored()
    ended = EndedJobs(stored, late_keys=10)
    for keys in ([1, 3], [1, 2, 3], [1, 2, 3, 4]):
        stored.keys = keys
        asyncio.run(ended.refresh(set()))
        assert {job.job_id for job in ended.newest} == {f"j{key}" for key in keys}
