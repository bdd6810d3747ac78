"""`FleetMember`: this agent's part in the fleet: which shards it reads, from when, and until when.

    free lease -> taken -> rows read -> read by this agent -> handed over: reading stopped, requests on their way
                                                              acknowledged, writes committed -> lease released

Reading stops before the leases end, by a clock that also counts while the machine sleeps, from the moment at which the
last acknowledged renewal was sent. So no two agents read a job at one time, whatever happens to the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from tailspan._plural import plural
from tailspan_agent.errors import CheckpointError
from tailspan_agent.fleet.batch import DivergedError
from tailspan_agent.fleet.counts import Changes
from tailspan_agent.fleet.database import SCHEMA_VERSION, Connection, DatabaseThread, Tables, newer_schema
from tailspan_agent.fleet.leases import AgentInfo, FleetAgent, Standing, join, leave, read_agents, release, renew
from tailspan_agent.fleet.shard_rows import ShardRows, read_shards
from tailspan_agent.fleet.shards import METRICS_LEASE, SHARDS, shard_of, surplus
from tailspan_agent.fleet.store import PostgresStore
from tailspan_agent.tasks import cancelled

__all__ = ["FleetMember", "ShardReader"]

_RENEWALS_PER_LEASE = 3
_READ_UNTIL = 0.8
"""The part of a lease after which an agent that could not renew it stops reading: what it has sent needs time, too."""
_RETRY_PER_LEASE = 15
_LOAD_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


def _clock_s() -> float:
    """Return the seconds of a clock that no one sets and that also counts while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class ShardReader(Protocol):
    """What reads the jobs of the shards."""

    def on_gained(self) -> None:
        """Find the jobs of new shards."""

    def use_share(self, share: float) -> None:
        """Send to services only this part of their ``requests_per_second``, which is the fleet's."""

    async def stop_reading(self, is_kept: Callable[[str, str], bool]) -> None:
        """Stop the tailers of all jobs that are not kept.

        Args:
            is_kept: Returns whether the job with this service identity and id is still read.
        """

    async def flush(self, shards: Collection[int]) -> None:
        """Wait until what is on its way of the jobs of some shards, and their spans, is acknowledged."""

    async def abandon(self, *, cut: bool) -> None:
        """Drop what is queued of jobs that are not read any more: their next owner reads it again.

        Args:
            cut: Whether to cut the requests on their way, too.
        """


class FleetMember:
    """Renews this agent's leases, takes shards, and hands them over.

    Args:
        dsn: The connection string.
        store: The store, whose copy follows the shards.
        info: What others see of this agent.
        lease_s: ``fleet.lease``.
        reader: What reads the jobs.
        health: Returns what others are to see of this agent's state.
        clock_s: Returns seconds that never go back.

    Attributes:
        problem: The code of what keeps this agent from reading its shards; None if nothing does.
        draining: Whether the agent takes no more shards, and hands over all it has.
        taken_over: The number of shards that it took from agents that did not renew them.
        agents: The number of agents at the last renewal.
        hand_over_s: How long the last hand-over took, in seconds; None before the first.
    """

    def __init__(
        self,
        dsn: str,
        store: PostgresStore,
        info: AgentInfo,
        *,
        lease_s: float,
        reader: ShardReader,
        health: Callable[[], Mapping[str, Any]] = dict,
        clock_s: Callable[[], float] = _clock_s,
    ) -> None:
        self.problem: str | None = "fleet_has_no_lease"
        self.draining = False
        self.taken_over = 0
        self.agents = 0
        self.hand_over_s: float | None = None
        self.lease_s = lease_s
        self._store = store
        self._tables: Tables = store.tables
        self._info = info
        self._reader = reader
        self._health = health
        self._clock_s = clock_s
        self._leases = DatabaseThread(dsn, f"{store.tables.fleet} leases")
        self._agent = 0
        self._held: dict[int, int] = {}
        self._readable: set[int] = set()
        self._handing_over: set[int] = set()
        self._read_until_s = float("-inf")
        self._suspended = True
        self._suspending = asyncio.Lock()
        self._wake = asyncio.Event()
        self._renewed = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        store.writer.on_trouble = self._wake.set
        store.may_send = lambda shard: shard in self._readable and self._may_read

    @property
    def agent(self) -> int:
        """The number of this agent; 0 before it has joined."""
        return self._agent

    @property
    def shards(self) -> int:
        """The number of shards that this agent reads."""
        return len(self._readable) if self._may_read else 0

    @property
    def has_metrics(self) -> bool:
        """Whether this agent exports what the whole fleet counts."""
        return METRICS_LEASE in self._held and self._may_read

    @property
    def lease_age_s(self) -> float:
        """How long ago the leases were last renewed, in seconds; 0 before the first renewal."""
        if self._read_until_s == float("-inf"):
            return 0.0
        return self._clock_s() - (self._read_until_s - _READ_UNTIL * self.lease_s)

    @property
    def _may_read(self) -> bool:
        return self._clock_s() < self._read_until_s

    def owns(self, identity: str, job_id: str) -> bool:
        """Return whether this agent reads a job now.

        Args:
            identity: The identity of the job's service.
            job_id: The job.
        """
        return shard_of(identity, job_id) in self._readable and self._may_read

    def start(self) -> None:
        """Join the fleet: renew, take and hand over until `leave` or `aclose`."""
        self._start(self._run())
        self._start(self._stop_in_time())

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._renew()
                await self._pause()
            except Exception:
                # Without this task no lease is renewed, so no error may end it.
                _log.exception("unexpected error in the fleet (a bug in the agent); the leases are renewed again")
                await asyncio.sleep(self.lease_s / _RETRY_PER_LEASE)

    async def _pause(self) -> None:
        """Wait until the next renewal is due, another agent has released shards, or a write has failed."""
        failed = self._leases.failure is not None
        pause_s = self.lease_s / (_RETRY_PER_LEASE if failed else _RENEWALS_PER_LEASE)
        fd, loop = None if failed else self._leases.copied_socket(), asyncio.get_running_loop()
        if fd is not None:
            loop.add_reader(fd, self._wake.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
        finally:
            if fd is not None:
                loop.remove_reader(fd)
                os.close(fd)

    async def _renew(self) -> None:
        """Renew the leases once, and follow what came of it."""
        if self._store.writer.diverged is not None:
            await self._start_again(self._store.writer.diverged)
        await self._lose(self._store.writer.take_lost())
        try:
            if not self._agent:
                await self._join()
            sent_s, held, writes = self._clock_s(), dict(self._held), self._store.writer.writes
            standing = await self._leases.run(
                partial(
                    renew,
                    tables=self._tables,
                    agent=self._agent,
                    held=held,
                    lease_s=self.lease_s,
                    draining=self.draining,
                    health=self._health(),
                ),
                timeout_s=self.lease_s / 2,
            )
            if standing.writes < writes:
                raise DivergedError("the fleet's database has lost the last transactions of this agent")
        except DivergedError as error:
            await self._start_again(str(error))
            self._wake.set()
            return
        except CheckpointError as error:
            if self.problem is None:
                _log.warning("leases were not renewed: %s", error)
                self.problem = "fleet_database_unreachable"
            return
        await self._on_renewed(sent_s, held, standing)

    async def _join(self) -> None:
        def enter(connection: Connection) -> int:
            connection.execute(self._tables.sql(f"LISTEN {self._tables.channel}"))
            return join(connection, self._tables, self._info, self.lease_s)

        agent = await self._leases.run(enter, timeout_s=self.lease_s)
        self._store.writer.join(agent, 0)
        self._agent = agent
        _log.info("joined the fleet %s as agent %d", self._tables.fleet, agent)

    async def _on_renewed(self, sent_s: float, held: Mapping[int, int], standing: Standing) -> None:
        self.agents = standing.agents
        async with self._suspending:
            pass  # reading starts again only when it has stopped
        if not self._may_read:
            # Renewed too late, though no other agent has noticed: what was queued meanwhile may be void already.
            await self._suspend()
        self._read_until_s = sent_s + _READ_UNTIL * self.lease_s
        self._renewed.set()
        lost = {shard for shard in held.keys() & self._held.keys() if shard not in standing.held}
        await self._lose(lost)
        if standing.draining:
            self.draining = True
        if standing.schema > SCHEMA_VERSION and not self.draining:
            _log.error("%s; its jobs are handed over", newer_schema(standing.schema, self._tables))
            self.draining = True
        gained = await self._load(standing)
        if self._suspended:
            # No other agent took them meanwhile: their epochs are the same, and so are the rows.
            self._suspended = False
            back = self._held.keys() - self._handing_over - {METRICS_LEASE} - self._readable
            gained = gained or bool(back)
            self._readable |= back
        self._reader.use_share(len(self._readable) / SHARDS)
        self.problem = "fleet_schema_newer" if standing.schema > SCHEMA_VERSION else None
        if gained:
            self._reader.on_gained()
        share = 0 if self.draining else standing.share
        spare = surplus(self._held.keys() - {METRICS_LEASE}, share)
        if self.draining and METRICS_LEASE in self._held:
            spare.append(METRICS_LEASE)
        if spare and not self._handing_over:
            self._start(self._hand_over(spare))
        async with self._changed:
            self._changed.notify_all()

    async def _load(self, standing: Standing) -> bool:
        """Read the rows of new shards; return whether there are any."""
        taken = standing.taken
        if not taken:
            return False
        shards = sorted(taken.keys() - {METRICS_LEASE})

        def read(connection: Connection) -> tuple[ShardRows, Changes | None]:
            changes = self._store.counts.read(connection) if METRICS_LEASE in taken else None
            return read_shards(connection, self._tables, shards), changes

        try:
            rows, changes = await self._leases.run(read, timeout_s=_LOAD_TIMEOUT_S)
        except CheckpointError as error:
            _log.warning("shards were not read, and are taken again: %s", error)
            return False
        if changes is not None:
            # What the last holder has exported last: a counter that goes back would be taken for a new one.
            self._store.counts.apply(changes)
        self._held.update(taken)
        self._store.adopt({shard: taken[shard] for shard in shards}, rows)
        self._readable.update(shards)
        if shards:
            self.taken_over += standing.taken_over
            origin = f", {standing.taken_over} of them from agents that stopped" if standing.taken_over else ""
            _log.info("took %d %s%s", len(shards), plural(len(shards), "shard"), origin)
        return bool(shards)

    async def _stop_in_time(self) -> None:
        """Stop reading before the leases end, if they are not renewed."""
        while True:
            await self._renewed.wait()
            self._renewed.clear()
            while self._may_read:  # noqa: ASYNC110 - a clock has no event
                await asyncio.sleep(max(0.001, self._read_until_s - self._clock_s()))
            await self._suspend()

    async def _suspend(self) -> None:
        """Stop to read all shards, unless that has been done."""
        async with self._suspending:
            if not self._readable:
                return
            self._suspended = True
            self._readable.clear()
            self.problem = "fleet_has_no_lease"
            _log.error(
                "the leases were not renewed in time: reading stops until the fleet's database answers (%s)",
                self._leases.failure or "it is slow",
            )
            await self._stop_reading()

    async def _stop_reading(self) -> None:
        """Stop to read what is not readable any more, and drop what was read of it."""
        await self._reader.stop_reading(self.owns)
        await self._reader.abandon(cut=True)

    async def _lose(self, shards: Collection[int]) -> None:
        """Drop shards that other agents have taken."""
        if not shards:
            return
        _log.warning(
            "%d %s: other agents have taken them, because they were not renewed in time",
            len(shards),
            plural(len(shards), "lost shard"),
        )
        self._readable -= set(shards)
        for shard in shards:
            self._held.pop(shard, None)
        await self._stop_reading()
        self._store.drop(shards)

    async def _start_again(self, reason: str) -> None:
        """Give everything up and join again: memory is ahead of the database."""
        _log.error("%s: all shards are read again; lines may repeat, with the same uid", reason)
        self._readable.clear()
        await self._stop_reading()
        self._store.drop(list(self._held))
        self._held.clear()
        agent, self._agent = self._agent, 0
        await self._store.writer.leave()
        self._store.writer.diverged = None
        if agent:
            with contextlib.suppress(CheckpointError):
                await self._leases.run(partial(leave, tables=self._tables, agent=agent), timeout_s=self.lease_s)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over(self, shards: Sequence[int]) -> None:
        """Hand over shards in order: stop reading, drop what is queued, await acknowledgements, commit, release."""
        self._handing_over = set(shards)
        agent, begun_s = self._agent, self._clock_s()
        try:
            self._readable -= self._handing_over
            await self._reader.stop_reading(self.owns)
            await self._reader.abandon(cut=False)
            try:
                async with asyncio.timeout(self.lease_s):
                    await self._reader.flush(self._handing_over)
            except TimeoutError:
                _log.warning(
                    "shards are handed over before all of their lines were acknowledged, which may repeat some"
                )
                await self._reader.abandon(cut=True)
            async with asyncio.timeout(self.lease_s):
                await self._store.written()
            epochs = {shard: self._held[shard] for shard in shards if shard in self._held}
            if agent != self._agent:
                return
            await self._leases.run(
                partial(release, tables=self._tables, agent=agent, epochs=epochs), timeout_s=self.lease_s / 2
            )
            for shard in epochs:
                del self._held[shard]
            self._store.drop(epochs)
            self.hand_over_s = self._clock_s() - begun_s
            _log.info("handed over %d %s", len(epochs), plural(len(epochs), "shard"))
        except (TimeoutError, CheckpointError) as error:
            # They stay with this agent until its leases end, or the next attempt.
            _log.warning("shards were not handed over: %s", error or "the database is slow")
            self._suspended = True
        finally:
            self._handing_over = set()
            self._wake.set()

    async def drained(self) -> None:
        """Take no more shards, and wait until all are handed over."""
        self.draining = True
        self._wake.set()
        async with self._changed:
            await self._changed.wait_for(lambda: not self._held and bool(self._agent))

    async def leave(self) -> None:
        """Commit what is left, and release all leases; to be called after the last line was acknowledged."""
        await cancelled(*self._tasks)
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._store.written()
                if self._agent:
                    await self._leases.run(
                        partial(leave, tables=self._tables, agent=self._agent), timeout_s=_CLOSE_TIMEOUT_S
                    )
                    _log.info("left the fleet %s", self._tables.fleet)
        except (TimeoutError, CheckpointError) as error:
            _log.warning("left the fleet without a release: others take the shards when the leases end (%s)", error)

    async def read_agents(self) -> Sequence[FleetAgent]:
        """Return all agents of the fleet.

        Raises:
            CheckpointError: The database cannot be reached.
        """
        return await self._store.reader.run(partial(read_agents, tables=self._tables), timeout_s=_CLOSE_TIMEOUT_S)

    async def aclose(self) -> None:
        """Stop, without a release of the leases, and close the connection."""
        await cancelled(*self._tasks)
        self._leases.close()

    def close(self) -> None:
        """Close the connection of a member that was not started."""
        self._leases.close()


assert METRICS_LEASE >= SHARDS
