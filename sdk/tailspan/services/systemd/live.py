"""`LiveJournal`: one journalctl that follows the journal for all jobs, and the change feed that comes of it.

It keeps the entries of jobs that run, or ended a short time ago, until they are read. These are only a copy: what does
not fit into the memory is read from the journal again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing

from tailspan._backoff import backoff_s
from tailspan.errors import ServiceError, ServiceUnavailableError
from tailspan.services import ChangeFeed
from tailspan.services._noticed_changes import NoticedChanges
from tailspan.services.systemd.commands import Commands
from tailspan.services.systemd.entries import JournalEntry, Scope, is_after
from tailspan.services.systemd.invocations import Invocations
from tailspan.services.systemd.lines import JournalPosition, LineJoiner

__all__ = ["LiveJournal", "Tail"]

_MAX_BYTES = 32 << 20
_ENTRY_BYTES = 600
_KEPT_AFTER_END_S = 120.0
_GRACE_S = 5.0
_JOBS_A_COMMAND = 500
_MOST_FILLED = 20_000

_log = logging.getLogger(__name__)


class Tail:
    """The entries of one invocation that were not read yet.

    Attributes:
        base: All entries after this cursor are here; empty: all entries; None: some are not.
        lines: Number of lines up to the last entry; None if it is not known.
    """

    def __init__(self, *, complete: bool) -> None:
        self.base: str | None = "" if complete else None
        self.lines: int | None = 0 if complete else None
        self.size = 0
        self.begun = complete
        self._entries: deque[JournalEntry] = deque()
        self._counter = LineJoiner(JournalPosition())

    def add(self, entry: JournalEntry) -> int:
        """Add an entry; return by how much memory that is more, in bytes."""
        if not self.begun or (self.base and not is_after(entry.cursor, self.base)):
            return 0
        if self.lines is not None:
            self.lines += len(self._counter.add(entry))
        size = _ENTRY_BYTES + (
            len(entry.message) * (9 if isinstance(entry.message, list) else 1) if entry.message else 0
        )
        self._entries.append(entry)
        self.size += size
        return size

    def begin(self) -> None:
        """Keep all entries from now on; those before are read from the journal."""
        self.drop()
        self.begun = True

    def attach(self, position: JournalPosition) -> None:
        """Note that the journal was read up to a position, after `begin`."""
        if not self.begun:
            return
        self._entries = deque(one for one in self._entries if is_after(one.cursor, position.cursor))
        self._counter = LineJoiner(JournalPosition())
        self.base, self.lines = position.cursor, None
        if position.lines is not None and not position.parts_from:
            self.lines = position.lines + sum(len(self._counter.add(entry)) for entry in self._entries)

    def take(self, position: JournalPosition) -> list[JournalEntry] | None:
        """Return the entries after a position, and drop those before it; None if some of them are not here."""
        if self.base is None or position.parts_from or position.is_gone:
            return None
        if position.cursor != self.base:
            if not position.cursor or (self.base and not is_after(position.cursor, self.base)):
                return None
            if not self.base and all(one.cursor != position.cursor for one in self._entries):
                # The journal has dropped it: the reader has to be informed of a gap.
                return None
            while self._entries and not is_after(self._entries[0].cursor, position.cursor):
                self._entries.popleft()
            self.base = position.cursor
            self.size = sum(_ENTRY_BYTES + len(one.message or "") for one in self._entries)
        return list(self._entries)

    def drop(self) -> None:
        """Keep nothing."""
        self._entries.clear()
        self.base = self.lines = None
        self.size, self.begun = 0, False


class LiveJournal(ChangeFeed):
    """Follows the journal and reports changed jobs.

    Args:
        commands: Runs journalctl.
        scope: Whose units are jobs.
        load: Reads what happened before and returns the invocations, and the cursor after which to follow.
        selects: Whether an invocation of a unit is a job; called for each new unit.

    Attributes:
        invocations: All that is known.
        tails: By job, what was not read.
    """

    def __init__(
        self,
        service: str,
        commands: Commands,
        scope: Scope,
        load: Callable[[], Awaitable[tuple[Invocations, str]]],
        selects: Callable[[Collection[str]], Awaitable[Collection[str]]],
    ) -> None:
        self.invocations = Invocations(scope)
        self.tails: dict[str, Tail] = {}
        self._service = service
        self._commands = commands
        self._scope = scope
        self._load = load
        self._selects = selects
        self._jobs: dict[str, bool] = {}
        self._followed: set[str] = set()
        self._changes = NoticedChanges()
        self._loaded = asyncio.Event()
        self._cursor = ""
        self._size = 0
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def is_live(self) -> bool:
        """Whether the journal is followed now."""
        return self._loaded.is_set() and not self._task.done()

    async def ready(self) -> None:
        """Wait until what happened before is known.

        Raises:
            ServiceError: It cannot be read.
        """
        loaded = asyncio.ensure_future(self._loaded.wait())
        try:
            await asyncio.wait({loaded, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loaded.cancel()
        if self._changes.failure is not None:
            raise self._changes.failure

    def is_job(self, unit: str) -> bool:
        """Return whether the invocations of a unit are jobs."""
        return self._jobs.get(unit, False)

    def tail(self, job_id: str) -> Tail | None:
        """Return what was not read of a job; None if the journal is not followed."""
        return self.tails.setdefault(job_id, Tail(complete=False)) if self.is_live else None

    def follow(self, job_id: str) -> bool:
        """Begin to report changes of a job."""
        self._followed.add(job_id)
        return self._changes.failure is None

    def leave(self, job_id: str) -> None:
        """Stop reporting changes of a job, and forget what was not read of it."""
        self._followed.discard(job_id)
        tail = self.tails.pop(job_id, None)
        if tail is not None:
            self._size -= tail.size

    async def wait(self) -> Collection[str] | None:
        """Wait for changed and new jobs.

        Raises:
            ServiceError: The journal cannot be followed.
        """
        return await self._changes.take()

    def close(self) -> None:
        """End the program that follows the journal."""
        self._task.cancel()
        self.tails.clear()
        self._size = 0

    async def aclose(self) -> None:
        """End the program that follows the journal, and wait for its end."""
        self.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def probe(self) -> None:
        """Follow the journal again if the program that does has missed entries, as it does when it hangs."""
        async with aclosing(self._commands.entries("--lines=1")) as found:
            newest = [entry.cursor async for entries in found for entry in entries]
        if newest and newest[0] != self._cursor and is_after(newest[0], self._cursor):
            await asyncio.sleep(_GRACE_S)
            if is_after(newest[0], self._cursor):
                _log.warning("service %s: journalctl reports no new entries; starting it again", self._service)
                self._restart.set()

    async def _run(self) -> None:
        try:
            self._restart = asyncio.Event()
            self.invocations, self._cursor = await self._load()
            await self._learn({one.unit for one in self.invocations.found.values()})
            await self._fill_tails()
            self._loaded.set()
            failures = 0
            while True:
                before = self._cursor
                try:
                    await self._follow()
                except ServiceError as error:
                    failures = failures + 1 if self._cursor == before else 1
                    if failures > 3:
                        raise
                    _log.warning("service %s: journalctl failed (%s); starting it again", self._service, error)
                await asyncio.sleep(backoff_s(max(0, failures - 1), 0.5))
        except ServiceError as error:
            self._changes.fail(error)
        except Exception as error:
            _log.exception("service %s: unexpected error while the journal is followed", self._service)
            text = f"the journal cannot be followed: {error!r}"
            self._changes.fail(ServiceUnavailableError(text, service=self._service))

    async def _fill_tails(self) -> None:
        """Read the logs of running jobs, of many with one program each, where they are short."""
        found = self.invocations.found.values()
        running = [one.invocation_id for one in found if not one.state.is_terminal and self.is_job(one.unit)]
        for start in range(0, len(running), _JOBS_A_COMMAND):
            chunk = running[start : start + _JOBS_A_COMMAND]
            matches = (f"_SYSTEMD_INVOCATION_ID={one}" for one in chunk)
            entries: list[JournalEntry] = []
            async with aclosing(self._commands.entries(f"--lines={_MOST_FILLED}", *matches)) as pieces:
                async for piece in pieces:
                    entries += piece
            if len(entries) >= _MOST_FILLED:
                # Longer logs are read one by one, from where their readers are.
                continue
            self.tails |= {one: Tail(complete=True) for one in chunk}
            for entry in entries:
                written = self._scope.written(entry)
                if written is not None and written[1] in self.tails and not is_after(entry.cursor, self._cursor):
                    self._size += self.tails[written[1]].add(entry)
        self._limit()

    async def _follow(self) -> None:
        """Apply entries until journalctl ends, or is to be started again."""
        self._restart.clear()
        reading = asyncio.ensure_future(self._read())
        restart = asyncio.ensure_future(self._restart.wait())
        try:
            await asyncio.wait({reading, restart}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            restart.cancel()
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServiceError):
                await reading

    async def _read(self) -> None:
        # Inclusive, to see whether the entry is still there: after a vacuum, journalctl would skip the next one.
        where = (f"--cursor={self._cursor}",) if self._cursor else ()
        known = self._cursor
        async with aclosing(self._commands.entries("--follow", "--no-tail", *where)) as found:
            async for entries in found:
                if known:
                    await self._apply(self._after(known, entries))
                    known = ""
                else:
                    await self._apply(entries)

    def _after(self, known: str, entries: list[JournalEntry]) -> list[JournalEntry]:
        """Return the entries after the last known one; if it is gone, what is kept of jobs is not complete."""
        if entries[0].cursor == known:
            return entries[1:]
        _log.warning("service %s: the journal has dropped entries that were not read", self._service)
        for tail in self.tails.values():
            tail.drop()
        self._size = 0
        self._changes.add_all()
        return entries

    async def _apply(self, entries: list[JournalEntry]) -> None:
        new_units: set[str] = set()
        changed: set[str] = set()
        for entry in entries:
            self._cursor = entry.cursor
            before = len(self.invocations.found)
            invocation = self.invocations.add(entry)
            if invocation is None:
                continue
            job_id = invocation.invocation_id
            if len(self.invocations.found) > before:
                if invocation.unit not in self._jobs:
                    new_units.add(invocation.unit)
                if self._jobs.get(invocation.unit, True):
                    self.tails[job_id] = Tail(complete=True)
            tail = self.tails.get(job_id)
            written = invocation.take_log(entry, self._scope)
            if tail is not None:
                self._size += sum(tail.add(one) for one in written)
            changed.add(job_id)
        if new_units:
            await self._learn(new_units)
        self._limit()
        found = self.invocations.found
        self._changes.add({one for one in changed if one in found and self.is_job(found[one].unit)})

    async def _learn(self, units: Collection[str]) -> None:
        """Find which units have jobs; drop what was kept of the others."""
        chosen = await self._selects(units)
        self._jobs |= {unit: unit in chosen for unit in units}
        for job_id in list(self.tails):
            found = self.invocations.found.get(job_id)
            if found is not None and not self.is_job(found.unit):
                self.leave(job_id)

    def _limit(self) -> None:
        """Drop what was kept of units without jobs, of jobs that nothing follows, and the most if it is too much."""
        if self._size > _MAX_BYTES // 2:
            ended_us = int((time.time() - _KEPT_AFTER_END_S) * 1e6)
            for job_id in [one for one in self.tails if one not in self._followed]:
                found = self.invocations.found.get(job_id)
                if found is None or not self.is_job(found.unit) or 0 < found.ended_us < ended_us:
                    self.leave(job_id)
        while self._size > _MAX_BYTES:
            largest = max(self.tails.values(), key=lambda tail: tail.size)
            self._size -= largest.size
            largest.drop()
