"""The short form of the fleet's proof: two agents, one killed, one that joins and one that leaves."""

from __future__ import annotations

import pytest

from tests.prove.fleet_world import FleetWorld

pytestmark = pytest.mark.timeout(600)  # a proof takes minutes on a loaded machine


def test_an_agent_dies_and_no_line_is_lost() -> None:
    """No line is missing or needlessly repeated, each span comes with one id, each run is counted once."""
    with FleetWorld("short", agents=2, lease_s=2.0) as world:
        for number in range(12):
            world.fused_job(f"job-{number}").write(20, world.random)
        world.start_all()
        world.until(lambda: len(world.all_acked()) == 12, "all jobs")
        for job in world.jobs:
            job.write(30, world.random)
        world.kill_agent(world.agents[0])
        for job in world.jobs[:6]:
            job.end()
        world.until(world.is_balanced, "the takeover")
        found = world.finish()
        assert found.complaints() == []
        assert found.lines.records >= found.lines.expected == 12 * 50
