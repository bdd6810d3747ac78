"""Shards: every job has one, and all agents together own each one once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.fleet.shards import SHARDS, fair_share, job_uuid, shard_of, surplus
from tests.property.effort import fuzz


@fuzz(200)
@given(identity=st.text(max_size=20), job_id=st.text(max_size=20))
def test_a_job_has_one_shard(identity: str, job_id: str) -> None:
    """The shard is the first byte of the job's key, whatever characters the id has."""
    assert shard_of(identity, job_id) == job_uuid(identity, job_id).bytes[0]
    assert 0 <= shard_of(identity, job_id) < SHARDS


def test_a_shard_never_changes() -> None:
    """It is part of what is stored: another value would hide all checkpoints."""
    assert shard_of("id", "j1") == 88
    assert str(job_uuid("id", "j1")) == "584f6bbc-9286-f59e-f25e-3eaae625ce10"


@fuzz(200)
@given(agents=st.sets(st.integers(1, 10_000), min_size=1, max_size=300))
def test_shares_are_fair(agents: set[int]) -> None:
    """The shares differ by one at most, and add up to all shards; an agent that is draining has none."""
    shares = [fair_share(agent, list(agents)) for agent in agents]
    assert sum(shares) == SHARDS
    assert max(shares) - min(shares) <= 1
    assert fair_share(10_001, list(agents)) == 0


@pytest.mark.parametrize(("share", "given_up"), [(0, [1, 2, 3]), (2, [3]), (3, []), (9, []), (-1, [1, 2, 3])])
def test_what_is_too_much_is_handed_over(share: int, given_up: list[int]) -> None:
    """An agent keeps as many shards as its share."""
    assert surplus({2, 3, 1}, share) == given_up
