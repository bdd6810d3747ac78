"""A fleet's membership on a real PostgreSQL: fair shares, ordered hand-over, takeover, and the stop before the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import pytest

from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.rows import Ack
from tailspan_agent.errors import CheckpointError, LeaseLostError
from tailspan_agent.fleet.database import Tables
from tailspan_agent.fleet.leases import AgentInfo
from tailspan_agent.fleet.member import FleetMember
from tailspan_agent.fleet.shards import METRICS_LEASE, SHARDS, shard_of
from tailspan_agent.fleet.store import open_store
from tailspan_agent.tasks import cancelled
from tests.fakes.agents import looped, until
from tests.fakes.postgres import Postgres

LEASE_S = 1.0


class Reader:
    """Follows no job; notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.share = 0.0
        self.may_flush = asyncio.Event()
        self.may_flush.set()

    def on_gained(self) -> None:
        self.calls.append("gained")

    def use_share(self, share: float) -> None:
        self.share = share

    async def stop_reading(self, is_kept: Callable[[str, str], bool]) -> None:
        self.calls.append("stop reading")

    async def flush(self, shards: Collection[int]) -> None:
        self.calls.append("flush")
        await self.may_flush.wait()

    async def abandon(self, *, cut: bool) -> None:
        self.calls.append("abandon" if cut else "drop")


class One:
    """One agent of a fleet."""

    def __init__(self, postgres: Postgres, fleet: str, instance: str, lease_s: float) -> None:
        self.ahead_s = 0.0
        self.reader = Reader()
        self.store = open_store(postgres.dsn, fleet, instance)
        self.store.writer._gather_s = 0.005
        info = AgentInfo(instance, "host", 1, "0", "")
        self.member = FleetMember(
            postgres.dsn, self.store, info, lease_s=lease_s, reader=self.reader, clock_s=self._clock_s
        )

    def _clock_s(self) -> float:
        return time.monotonic() + self.ahead_s

    def add(self, number: int = 0) -> int:
        """Add a job to the store and return its key."""
        return self.store.add_job("id", f"j{number}", "etl", stream=0, ledger="{}").key


@pytest.fixture
def fleet(postgres: Postgres, fleet_name: str) -> Callable[..., object]:
    """Return a function that runs one more agent until its block ends."""

    @asynccontextmanager
    async def running(instance: str, *, lease_s: float = LEASE_S, kill: bool = False) -> AsyncIterator[One]:
        one = One(postgres, fleet_name, instance, lease_s)
        writing = asyncio.create_task(one.store.run())
        one.member.start()
        try:
            yield one
            if not kill:
                await one.member.leave()
        finally:
            await one.member.aclose()
            await cancelled(writing)
            one.store.close()

    return running


@looped
async def test_agents_share_fairly_and_hand_over_in_order(fleet) -> None:
    """A second agent gets half: the first one stops reading, flushes, and only then releases."""
    async with fleet("a") as a:
        await until(lambda: a.member.shards == SHARDS)
        assert a.member.has_metrics
        a.reader.calls.clear()
        a.reader.may_flush.clear()
        async with fleet("b") as b:
            await until(lambda: "flush" in a.reader.calls)
            assert a.reader.calls == ["stop reading", "drop", "flush"]
            assert (a.member.shards, b.member.shards) == (SHARDS // 2, 0)
            a.reader.may_flush.set()
            await until(lambda: b.member.shards == SHARDS // 2)
            assert a.member.shards == SHARDS // 2
            await until(lambda: a.reader.share == b.reader.share == 0.5)
            owners = [sum(one.member.owns("id", f"j{number}") for one in (a, b)) for number in range(50)]
            assert owners == [1] * 50
            assert (a.member.agents, b.member.agents, b.member.has_metrics, b.member.problem) == (2, 2, False, None)
            assert [agent.shards for agent in await b.member.read_agents()] == [SHARDS // 2] * 2
        await until(lambda: a.member.shards == SHARDS)
        assert (a.member.taken_over, a.member.agents) == (0, 1)


@looped
async def test_others_take_over_from_an_agent_that_died(fleet) -> None:
    """They wait for the end of its leases, read its last checkpoints, and export the fleet's metrics."""
    async with fleet("a", kill=True) as a:
        await until(lambda: a.member.shards == SHARDS)
        a.store.ack([Ack(a.add(), b"cursor", '{"first_seen_ns":1}')])
        await a.store.written()
    async with fleet("b") as b:
        await until(lambda: b.member.shards == SHARDS)
        assert b.member.taken_over == SHARDS
        known = b.store.job("id", "j0")
        assert known is not None
        assert known.cursor == b"cursor"
        assert b.member.has_metrics


@looped
async def test_a_restarted_agent_has_its_shards_at_once(fleet) -> None:
    """The next process of a state directory does not wait for the leases of the one before."""
    async with fleet("a", lease_s=600, kill=True) as a:
        await until(lambda: a.member.shards == SHARDS)
    async with fleet("a", lease_s=600) as a:
        await until(lambda: a.member.shards == SHARDS)
        assert len(await a.member.read_agents()) == 1


@looped
async def test_reading_stops_before_the_leases_end(fleet) -> None:
    """An agent that cannot renew stops by its own clock, and goes on when it can."""
    async with fleet("a") as a:
        await until(lambda: a.member.shards == SHARDS)
        a.add()
        dsn, a.member._leases._dsn = a.member._leases._dsn, "host=/nowhere connect_timeout=1"
        a.member._leases._disconnect()
        await until(lambda: a.member.problem == "fleet_has_no_lease")
        assert a.reader.calls[-2:] == ["stop reading", "abandon"]
        assert (a.member.shards, a.member.owns("id", "j0"), a.member.has_metrics) == (0, False, False)
        assert not a.store.may_send(shard_of("id", "j0"))
        a.member._leases._dsn = dsn
        await until(lambda: a.member.owns("id", "j0"))
        assert (a.reader.calls[-1], a.member.problem) == ("gained", None)
        assert a.store.job("id", "j0") is not None
    async with fleet("a", lease_s=600) as a:
        await until(lambda: a.member.shards == SHARDS)
        a.ahead_s = 500.0  # the machine slept
        assert (a.member.shards, a.member.owns("id", "j0")) == (0, False)


@looped
async def test_a_renewal_that_comes_late_stops_the_reading_first(fleet) -> None:
    """What was queued when the time was up may be void, so its jobs are read again from their checkpoints."""
    async with fleet("a", lease_s=600) as a:
        await until(lambda: a.member.shards == SHARDS)
        a.reader.calls.clear()
        before_s, a.ahead_s = a.member._read_until_s, 500.0
        a.member._wake.set()
        await until(lambda: a.member._read_until_s > before_s)
        await until(lambda: a.member.shards == SHARDS)
        assert a.reader.calls[:2] == ["stop reading", "abandon"]
        assert a.reader.calls[-1] == "gained"


@looped
async def test_who_waits_for_writes_does_not_wait_for_void_ones(fleet) -> None:
    """A shard that is lost takes what was gathered with it."""
    async with fleet("a", lease_s=600) as a:
        await until(lambda: a.member.shards == SHARDS)
        a.store.writer._gather_s = 600.0
        a.add()
        waiting = asyncio.create_task(a.store.written())
        await asyncio.sleep(0)
        assert not waiting.done()
        a.store.drop(range(SHARDS))
        await waiting


@looped
async def test_a_connection_that_breaks_at_any_time_ends_nothing(fleet) -> None:
    """The leases are renewed over the next connection, also when the broken one was waited on."""
    async with fleet("a", lease_s=2) as a:
        await until(lambda: a.member.shards == SHARDS)
        for _ in range(3):
            connection = a.member._leases.connection
            assert connection is not None
            connection.close()
            a.member._wake.set()
            await until(lambda broken=connection: a.member._leases.connection not in (None, broken))
            await until(lambda: a.member.shards == SHARDS)


@looped
async def test_writes_of_an_earlier_owner_have_no_effect(fleet) -> None:
    """A stopped process that wakes up writes with its old epochs: nothing changes, and it drops the shards."""
    async with fleet("a", kill=True) as a:
        await until(lambda: a.member.shards == SHARDS)
        key = a.add()
        a.store.ack([Ack(key, b"1", "{}")])
        await a.store.written()
        await cancelled(*a.member._tasks)
        async with fleet("b") as b:
            await until(lambda: b.member.shards == SHARDS)
            a.store.ack([Ack(key, b"2", "{}")])
            assert a.store.end_job(key, [], RunTotals("etl", "success").add(1.0))
            a.add(1)
            await a.store.written()
            assert a.store.writer.take_lost() == {shard_of("id", "j0"), shard_of("id", "j1")}
            await b.store.counts.refresh()
            assert b.store.counts.totals == {}
            rows = b.store.reader.run_now(
                lambda connection: connection.execute(b.store.tables.sql("SELECT job_id, cursor FROM $jobs")).fetchall()
            )
            assert rows == [("j0", b"1")]


@looped
async def test_an_agent_notices_that_it_lost_its_shards(fleet) -> None:
    """It drops their rows, and a job that it goes on with is refused."""
    async with fleet("a", lease_s=2, kill=True) as a:
        await until(lambda: a.member.shards == SHARDS)
        key = a.add()
        await a.store.written()
        a.store.reader.run_now(
            lambda connection: connection.execute(
                a.store.tables.sql("UPDATE $leases SET epoch = epoch + 1, owner = 99")
            )
        )
        a.store.ack([Ack(key, b"2", "{}")])
        await until(lambda: not a.store.epochs)
        assert a.reader.calls[-2:] == ["stop reading", "abandon"]
        with pytest.raises(LeaseLostError):
            a.store.update_ledger(key, "{}")


@looped
async def test_a_database_that_lost_transactions_is_noticed(fleet) -> None:
    """After a failover to a copy that lagged, the agent reads all of its shards again."""
    async with fleet("a") as a:
        await until(lambda: a.member.shards == SHARDS)
        a.store.ack([Ack(a.add(), b"1", "{}")])
        await a.store.written()
        a.store.reader.run_now(
            lambda connection: connection.execute(
                a.store.tables.sql("UPDATE $writers SET writes = writes - 1; DELETE FROM $jobs")
            )
        )
        a.store.ack([Ack(a.store.job("id", "j0").key, b"2", "{}")])
        await until(lambda: a.store.job("id", "j0") is None)
        await until(lambda: a.member.shards == SHARDS)
        assert a.store.writer.diverged is None
        a.store.ack([Ack(a.add(), b"3", "{}")])
        await a.store.written()
        assert not a.store.write_failed


@looped
async def test_a_commit_whose_answer_was_lost_is_not_repeated(fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and counts are added once, whether the server committed before the connection broke or not."""
    from tailspan_agent.fleet import writer as module

    async with fleet("a") as a:
        await until(lambda: a.member.shards == SHARDS)
        real, broken = module.write_batch, []

        def breaking(*args: object) -> object:
            written = real(*args)
            if len(broken) < 2:
                broken.append(written)
                a.store.writer._database._disconnect()
                raise CheckpointError("the connection broke after the commit")
            return written

        monkeypatch.setattr(module, "write_batch", breaking)
        key = a.add()
        a.store.ack([Ack(key, b"1", "{}", {5: (2, 7)})])
        a.store.end_job(key, [], RunTotals("etl", "success").add(1.0))
        await a.store.written()
        assert len(broken) == 2
        assert await a.store.seconds(key) == {5: (2, 7)}
        await a.store.counts.refresh()
        assert [totals.count for totals in a.store.counts.totals.values()] == [1]


@looped
async def test_agents_stay_members_while_the_database_is_away(fleet) -> None:
    """The first one that renews after a long outage does not remove the others, which would read their shards again."""
    async with fleet("a", lease_s=2) as a, fleet("b", lease_s=2) as b:
        await until(lambda: a.member.shards == b.member.shards == SHARDS // 2)
        before = [agent.id for agent in await a.member.read_agents()]
        a.store.reader.run_now(
            lambda connection: connection.execute(
                a.store.tables.sql("UPDATE $agents SET expires_at = expires_at - interval '1 day'")
            )
        )
        renewed_s = [one.member._read_until_s for one in (a, b)]
        a.member._wake.set()
        await until(lambda: a.member._read_until_s > renewed_s[0])
        assert [agent.id for agent in await a.member.read_agents()] == before
        b.member._wake.set()
        await until(lambda: b.member._read_until_s > renewed_s[1])
        assert [agent.id for agent in await a.member.read_agents()] == before


@looped
async def test_an_agent_drains(fleet) -> None:
    """It hands over everything, the metrics too, and takes nothing again."""
    async with fleet("a") as a, fleet("b") as b:
        await until(lambda: a.member.shards == b.member.shards == SHARDS // 2)
        await (a if a.member.has_metrics else b).member.drained()
        await until(lambda: max(a.member.shards, b.member.shards) == SHARDS)
        await until(lambda: a.member.has_metrics or b.member.has_metrics)
        assert min(a.member.shards, b.member.shards) == 0


@looped
async def test_runs_of_all_agents_are_counted_together(fleet) -> None:
    """Each agent learns what the others have counted."""
    async with fleet("a") as a, fleet("b") as b:
        await until(lambda: a.member.shards == b.member.shards == SHARDS // 2)
        for one in (a, b):
            number = next(number for number in range(100) if one.member.owns("id", f"j{number}"))
            assert one.store.end_job(one.add(number), [], RunTotals("etl", "success").add(1.0))
            await one.store.written()
        for one in (a, b):
            await one.store.counts.refresh()
            assert [totals.count for totals in one.store.counts.totals.values()] == [2]


@looped
async def test_who_exports_the_totals_has_read_them(fleet) -> None:
    """An agent that goes on with the fleet's metrics exports no smaller counts than the last one did."""
    async with fleet("a") as a, fleet("b") as b:
        await until(lambda: a.member.shards == b.member.shards == SHARDS // 2)
        before, after = (a, b) if a.member.has_metrics else (b, a)
        number = next(number for number in range(100) if before.member.owns("id", f"j{number}"))
        assert before.store.end_job(before.add(number), [], RunTotals("etl", "success").add(1.0))
        await before.store.written()
        assert after.store.counts.totals == {}
        await before.member.drained()
        await until(lambda: after.member.has_metrics)
        assert [totals.count for totals in after.store.counts.totals.values()] == [1]
        assert before.member.hand_over_s is not None


def test_a_newer_schema_is_refused(postgres: Postgres, fleet_name: str) -> None:
    """An older agent beside a newer schema does not start, and says which one to upgrade."""
    open_store(postgres.dsn, fleet_name, "a").close()
    tables = Tables(fleet_name)
    postgres.execute(tables.sql("UPDATE $meta SET value = '99' WHERE key = 'schema_version'"))
    with pytest.raises(CheckpointError, match=r"schema version 99 of a newer Tailspan.*upgrade this agent"):
        open_store(postgres.dsn, fleet_name, "a")


@looped
async def test_a_running_agent_gives_way_to_a_newer_schema(fleet) -> None:
    """An upgrade may migrate beside it: it hands everything over, so that the upgrade completes."""
    async with fleet("a") as a:
        await until(lambda: a.member.shards == SHARDS)
        a.store.reader.run_now(
            lambda connection: connection.execute(
                a.store.tables.sql("UPDATE $meta SET value = '99' WHERE key = 'schema_version'")
            )
        )
        a.member._wake.set()
        await until(lambda: a.member.shards == 0)
        assert a.member.problem == "fleet_schema_newer"
        assert METRICS_LEASE >= SHARDS


def test_a_server_that_is_away_is_reported(postgres: Postgres) -> None:
    """The error names the database, and has no password."""
    with pytest.raises(CheckpointError, match=r"the fleet's database: .*") as caught:
        open_store("host=/nowhere user=x password=very-secret-word dbname=y", "x", "a")
    assert "very-secret-word" not in str(caught.value)
