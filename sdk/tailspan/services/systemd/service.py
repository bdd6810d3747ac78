"""`SystemdService`: runs of systemd units as jobs, read from the journal.

A job is one invocation of a unit. Its lines are what its processes wrote to the journal; its start, end and result are
what the manager wrote there, so that also a transient unit, which the manager forgets at once, is known.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from fnmatch import fnmatchcase
from typing import Literal

import anyio
from pydantic import Field

from tailspan._identity import trace_id
from tailspan._plural import plural
from tailspan.config import Options, PositiveDuration
from tailspan.config.fields import StrList
from tailspan.errors import CursorExpiredError, JobNotFoundError, RequestRejectedError
from tailspan.logs.page import MAX_PAGE_BYTES, MAX_PAGE_LINES, Line, LogPage
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services import LATE_WINDOW_S, ChangeFeed, ChangeFeedService, Problem
from tailspan.services.systemd.commands import Commands
from tailspan.services.systemd.entries import JournalEntry, MessageId, Scope, is_after, number_of
from tailspan.services.systemd.invocations import EARLY_US, LIFE_IDS, Invocation, Invocations, is_random, job_name
from tailspan.services.systemd.lines import JournalPosition, LineJoiner
from tailspan.services.systemd.live import LiveJournal, Tail

__all__ = ["SystemdOptions", "SystemdService"]

_EXCLUDED = ("systemd-*", "user-runtime-dir@*", "modprobe@*", "initrd-*", "dracut-*", "plymouth-*")
_PROPERTIES = ("Type", "TriggeredBy", "Transient", "LoadState", "ActiveState", "InvocationID")
_STARTED = ("ExecMainStartTimestamp", "InactiveExitTimestamp")
_RUNNING = ("active", "activating", "deactivating", "reloading")
_LIST_PAGE = 500
_MOST_KNOWN = 20_000
_SETTLE_S = 5.0
# Around start and end of an invocation, lines may be stored before and after what the manager reports.
_LATE_S = 60
_UNITS_A_COMMAND = 200
_CANCEL_WAIT_S = 5.0
_CHECK_EVERY_S = 300.0
_LOST_END = "the journal has no report of its end, and the unit does not run any more"


class SystemdOptions(Options):
    """The table ``services.NAME`` of type ``systemd``.

    Attributes:
        scope: Whose units: the system's, or those of the user that runs Tailspan.
        units: Globs of the units whose runs are jobs; empty: units with a timer, oneshot and transient ones.
        exclude: Globs of units that have no jobs.
        history: How far back runs are listed, in seconds.
        command_prefix: Words before journalctl and systemctl.
    """

    scope: Literal["system", "user"] = "system"
    units: StrList = Field(default_factory=list)
    exclude: StrList = Field(default_factory=lambda: list(_EXCLUDED))
    history: PositiveDuration = 86_400.0
    command_prefix: StrList = Field(default_factory=list)


class SystemdService(ChangeFeedService):
    """The units of one manager; see the module."""

    Options = SystemdOptions
    has_offsets = True

    def __init__(self, name: str, options: SystemdOptions, commands: Commands | None = None) -> None:
        """Start no program yet.

        Args:
            name: The configured name.
            options: The section's keys.
            commands: Runs the programs; by default those of this machine.
        """
        self.name = name
        self.options = options
        self._commands = commands or Commands(name, options.command_prefix, user=options.scope == "user")
        self._ids: tuple[str, str] | None = None
        self._live: LiveJournal | None = None
        self._checked_at_s = float("-inf")
        self._suspects: set[str] = set()

    @property
    def identity(self) -> str:  # type: ignore[override]  # read at first use
        """The machine's id, and the user's for a user's units."""
        machine, uid = self._machine_and_user()
        return f"systemd:{machine}:user:{uid}" if uid else f"systemd:{machine}"

    def _machine_and_user(self) -> tuple[str, str]:
        if self._ids is None:
            self._ids = self._commands.identity()
        return self._ids

    @property
    def _scope(self) -> Scope:
        return Scope(self._machine_and_user()[1])

    def open_changes(self) -> ChangeFeed:
        """Follow the journal; all jobs share one journalctl."""
        if self._live is not None:
            self._live.close()
        self._live = LiveJournal(self.name, self._commands, self._scope, self._load, self._job_units)
        return self._live

    async def find_problems(self) -> Sequence[Problem]:
        """Return a warning for a journal that is kept in memory only."""
        if await self._commands.is_volatile():
            text = "the journal is kept in memory and lost at a restart: set Storage=persistent in journald.conf"
            return (Problem(text, is_fatal=False),)
        return ()

    async def aclose(self) -> None:
        """End the program that follows the journal."""
        live, self._live = self._live, None
        if live is not None:
            await live.aclose()

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the status of an invocation."""
        return self._status(await self._invocation(job_id))

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Yield the invocations of the last time, newest first."""
        live = await self._current_live()
        if live is not None:
            await live.probe()
            invocations, jobs = live.invocations, None
            await self._check_running(invocations)
            self._forget(invocations, live)
        else:
            await self._commands.check()
            invocations, _ = await self._load()
            jobs = await self._job_units({one.unit for one in invocations.found.values()})
        found = [
            one
            for one in invocations.found.values()
            if (one.unit in jobs if jobs is not None else live is not None and live.is_job(one.unit))
        ]
        found.sort(key=lambda one: one.started_us, reverse=True)
        for start in range(0, len(found), _LIST_PAGE):
            yield [self._row(one, live) for one in found[start : start + _LIST_PAGE]]

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of an invocation."""
        position = JournalPosition.unpack(cursor, service=self.name, job_id=job_id)
        if cursor is None and since_ms is not None:
            position = position._replace(lines=None)
        live = await self._current_live()
        tail = live.tail(job_id) if live is not None and since_ms is None else None
        kept = None if tail is None else tail.take(position)
        if kept is not None:
            pages = _UnitPages(self, job_id, LineJoiner(position))
            for entry in kept:
                for page in pages.add(entry, raises=cursor is not None):
                    yield page
            for page in pages.rest(ended=self._is_settled(job_id)):
                yield page
            return
        if tail is not None and tail.base is None:
            tail.begin()
        else:
            tail = None
        stored = self._stored(job_id, position, since_ms, tail, raises=cursor is not None)
        async with aclosing(stored):
            async for page in stored:
                yield page

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        """Return the times of the oldest and the newest line in ms since the epoch, or None without lines."""
        match = f"_SYSTEMD_INVOCATION_ID={job_id}"
        oldest = await self._first(match)
        newest = await self._first("--lines=1", match)
        if oldest is None or newest is None:
            await self._invocation(job_id)
            return None
        return oldest.time_us // 1000, newest.time_us // 1000

    async def cancel(self, job_id: str) -> JobStatus:
        """Stop the unit; an invocation that has ended stays as it is.

        Raises:
            RequestRejectedError: This user may not stop units.
        """
        status = await self.get_job(job_id)
        if status.state.is_terminal:
            return status
        unit = status.details["systemd.unit"]
        shown = await self._commands.show([unit], ("InvocationID",))
        if not any(one.get("InvocationID") == job_id for one in shown):
            text = f"{unit} does not run this invocation any more"
            raise RequestRejectedError(text, service=self.name, job_id=job_id)
        await self._commands.stop(unit, job_id=job_id)
        with anyio.move_on_after(_CANCEL_WAIT_S):
            while not status.state.is_terminal:
                await anyio.sleep(0.1)
                status = await self.get_job(job_id)
        return status

    async def _current_live(self) -> LiveJournal | None:
        """Return the journal that is followed, once it is ready; None if it is not followed."""
        live = self._live
        if live is None:
            return None
        await live.ready()
        return live if live.is_live else None

    async def _stored(
        self, job_id: str, position: JournalPosition, since_ms: int | None, tail: Tail | None, *, raises: bool
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines that the journal has, by a program of its own."""
        joiner = LineJoiner(position)
        pages = _UnitPages(self, job_id, joiner)
        ended = self._is_settled(job_id)
        async with aclosing(self._entries_after(job_id, position, since_ms, joiner)) as found:
            async for entry in found:
                for page in pages.add(entry, raises=raises):
                    yield page
        if not joiner.position.cursor:
            # Without an entry, the job may have no line, or there is no such job.
            await self._invocation(job_id)
        for page in pages.rest(ended=ended):
            yield page
        if tail is not None:
            tail.attach(joiner.position)

    async def _entries_after(
        self, job_id: str, position: JournalPosition, since_ms: int | None, joiner: LineJoiner
    ) -> AsyncGenerator[JournalEntry, None]:
        """Yield the entries of an invocation after a position; replay those before it that its parts come from.

        Raises:
            CursorExpiredError: The journal has dropped the entry of the position.
        """
        invocation = await self._invocation(job_id)
        of_unit = Invocations(self._scope)
        if position.cursor:
            of_unit.start_with(invocation.unit, job_id)
        since_us = max(invocation.started_us - EARLY_US, (since_ms or 0) * 1000)
        options = [f"--cursor={position.first_cursor}"] if position.cursor else [f"--since=@{since_us // 1_000_000}"]
        if invocation.ended_us:
            options.append(f"--until=@{invocation.ended_us // 1_000_000 + _LATE_S}")
        # Inclusive: after a vacuum, journalctl would take the next entry for the one that is gone.
        expected = "" if position.is_gone else position.first_cursor
        async with aclosing(self._commands.entries(*options, *self._scope.matches(invocation.unit))) as found:
            async for entries in found:
                for entry in entries:
                    if expected and entry.cursor != expected:
                        raise self._expired(job_id, position)
                    expected = ""
                    found_in = of_unit.add(entry)
                    if found_in is None or found_in.invocation_id != job_id:
                        continue
                    for one in found_in.take_log(entry, self._scope):
                        if position.cursor and not is_after(one.cursor, position.cursor):
                            joiner.replay(one)
                        elif since_ms is None or one.time_us >= since_ms * 1000:
                            yield one
        if expected:
            raise self._expired(job_id, position)

    def _expired(self, job_id: str, position: JournalPosition) -> CursorExpiredError:
        resume = position._replace(is_gone=True, parts_from="")
        text = f"the journal has dropped entries of invocation {job_id}"
        return CursorExpiredError(text, resume_cursor=resume.pack(), service=self.name, job_id=job_id)

    async def _first(self, *options: str) -> JournalEntry | None:
        """Return the first entry that journalctl prints; None without one."""
        async with aclosing(self._commands.entries(*options)) as found:
            async for entries in found:
                return entries[0]
        return None

    def _is_settled(self, job_id: str) -> bool:
        """Return whether an invocation is known to have ended so long ago that the journal has all of its lines."""
        live = self._live
        found = None if live is None else live.invocations.found.get(job_id)
        return found is not None and _is_settled(found)

    async def _invocation(self, job_id: str) -> Invocation:
        """Return an invocation, from what is followed or from the journal.

        Raises:
            JobNotFoundError: The journal has nothing of it.
        """
        live = await self._current_live()
        if live is not None and job_id in live.invocations.found:
            return live.invocations.found[job_id]
        unknown = JobNotFoundError(f"the journal has no invocation {job_id}", service=self.name, job_id=job_id)
        if not job_id.isalnum():
            raise unknown
        invocations = Invocations(self._scope)
        scope = self._scope
        life = (*scope.manager_matches, f"{scope.invocation_field}={job_id}")
        for matches in (life, ("--lines=1", f"_SYSTEMD_INVOCATION_ID={job_id}")):
            async with aclosing(self._commands.entries(*matches)) as found:
                async for entries in found:
                    for entry in entries:
                        invocations.add(entry)
            if job_id in invocations.found:
                break
        else:
            raise unknown
        invocation = invocations.found[job_id]
        await self._find_restart(invocation)
        newest = await self._first("--lines=1") if not invocation.state.is_terminal else None
        if newest is not None:
            invocations.add(newest)
        return invocation

    async def _find_restart(self, invocation: Invocation) -> None:
        """Find whether an invocation is an automatic restart of another one."""
        ids = (MessageId.STARTING, MessageId.STARTED, MessageId.RESTART)
        until = f"--until=@{invocation.started_us / 1e6 + 1:.6f}"
        matches = (*self._scope.manager_matches, f"{self._scope.unit_field}={invocation.unit}")
        last: JournalEntry | None = None
        async with aclosing(
            self._commands.entries("--lines=6", until, *matches, *(f"MESSAGE_ID={one}" for one in ids))
        ) as found:
            async for entries in found:
                for entry in entries:
                    about = self._scope.reported(entry)
                    if about is not None and about[1] == invocation.invocation_id and entry.message_id != ids[2]:
                        break
                    last = entry
        if last is not None and last.message_id == MessageId.RESTART:
            about = self._scope.reported(last)
            if about is not None and about[1] != invocation.invocation_id:
                invocation.attempt = int(last.restarts or 0) + 1
                invocation.before = about[1]

    async def _load(self) -> tuple[Invocations, str]:
        """Return the invocations of the last time, and the cursor of the newest entry."""
        await self._commands.check()
        scope = self._scope
        newest = await self._first("--lines=1")
        end = "" if newest is None else newest.cursor
        invocations = Invocations(scope)
        since = f"--since=@{time.time() - self.options.history:.0f}"
        matches = (*scope.manager_matches, *(f"MESSAGE_ID={one}" for one in LIFE_IDS))
        async with aclosing(self._commands.entries(since, *matches)) as found:
            async for entries in found:
                for entry in entries:
                    if end and not is_after(entry.cursor, end):
                        invocations.add(entry)
        if newest is not None:
            invocations.add(newest)
        await self._add_running(invocations)
        return invocations, end

    async def _add_running(self, invocations: Invocations) -> None:
        """Add the invocations that run and began before the journal's part that was read."""
        for shown in await self._commands.show(["*.service"], (*_PROPERTIES, *_STARTED)):
            job_id = shown.get("InvocationID", "")
            started = next((at for key in _STARTED if (at := _unix_us(shown.get(key, "")))), 0)
            if shown.get("ActiveState") in _RUNNING and job_id and started and _is_candidate(shown):
                invocations.known(shown["Id"], job_id, started)

    async def _job_units(self, units: Collection[str]) -> set[str]:
        """Return those units whose invocations are jobs."""
        left = {unit for unit in units if not any(fnmatchcase(unit, one) for one in self.options.exclude)}
        if self.options.units:
            return {unit for unit in left if any(fnmatchcase(unit, one) for one in self.options.units)}
        chosen = {unit for unit in left if is_random(unit)}
        rest = sorted(left - chosen)
        for start in range(0, len(rest), _UNITS_A_COMMAND):
            for shown in await self._commands.show(rest[start : start + _UNITS_A_COMMAND], _PROPERTIES):
                if _is_candidate(shown):
                    chosen.add(shown["Id"])
        return chosen

    async def _check_running(self, invocations: Invocations) -> None:
        """Find invocations whose end the journal does not report: it drops lines of the manager, too."""
        now_s = time.monotonic()
        if now_s - self._checked_at_s < _CHECK_EVERY_S:
            return
        self._checked_at_s = now_s
        running = {one.unit for one in invocations.found.values() if not one.state.is_terminal}
        current: dict[str, Mapping[str, str]] = {}
        units = sorted(running)
        for start in range(0, len(units), _UNITS_A_COMMAND):
            for shown in await self._commands.show(units[start : start + _UNITS_A_COMMAND], _PROPERTIES):
                current[shown.get("InvocationID", "")] = shown
        missing = set()
        for one in invocations.found.values():
            shown = current.get(one.invocation_id, {})
            if not one.state.is_terminal and shown.get("ActiveState") not in _RUNNING:
                missing.add(one.invocation_id)
                if one.invocation_id in self._suspects:
                    one.end(JobState.LOST, one.last_us, reason=_LOST_END)
        self._suspects = missing

    def _forget(self, invocations: Invocations, live: LiveJournal) -> None:
        before_us = int((time.time() - self.options.history) * 1e6)
        for job_id in invocations.forget(before_us, _MOST_KNOWN):
            live.leave(job_id)

    def _row(self, invocation: Invocation, live: LiveJournal | None) -> ListedJob:
        tail = None if live is None else live.tails.get(invocation.invocation_id)
        return ListedJob(
            job_id=invocation.invocation_id,
            job_name=job_name(invocation),
            state=invocation.state,
            created_at=invocation.started_at,
            state_since=invocation.finished_at or invocation.started_at,
            instance_id=invocation.host or None,
            service=self.name,
            lines=None if tail is None else tail.lines,
        )

    def _status(self, one: Invocation) -> JobStatus:
        details = {"systemd.unit": one.unit, "systemd.result": one.result, "host.name": one.host}
        details |= {"systemd.description": one.description}
        if one.suppressed:
            details["systemd.suppressed_lines"] = str(one.suppressed)
        return self.make_status(
            one.invocation_id,
            one.state,
            job_name=job_name(one),
            instance_id=one.host or None,
            submitted_at=one.started_at,
            started_at=one.started_at,
            finished_at=one.finished_at,
            job_status=one.result or None,
            exit_code=one.exit_code if one.state.is_terminal else None,
            error=one.error,
            details={key: value for key, value in details.items() if value},
            attempt=one.attempt,
            retry_of=one.before or None,
            trace_id=trace_id(self.identity, one.invocation_id, one.attempt),
            logs_complete=True if _is_settled(one) else None,
        )


class _UnitPages:
    """Pages of lines as they come."""

    def __init__(self, service: SystemdService, job_id: str, joiner: LineJoiner) -> None:
        self._service = service
        self._job_id = job_id
        self._joiner = joiner
        self._lines: list[Line] = []
        self._size = 0

    def add(self, entry: JournalEntry, *, raises: bool) -> Iterator[LogPage]:
        """Add an entry and yield the page that it does not fit into.

        Raises:
            CursorExpiredError: The journal reports here that it dropped lines, and ``raises`` is set.
        """
        before = self._joiner.position
        if entry.message_id == MessageId.SUPPRESSED:
            self._joiner.add(entry)
            if raises:
                yield from self._cut(before)
                raise self._suppressed(entry)
            return
        lines = self._joiner.add(entry)
        size = sum(len(line.message) + 1 for line in lines)
        if len(self._lines) + len(lines) > MAX_PAGE_LINES or self._size + size > MAX_PAGE_BYTES:
            yield from self._cut(before)
        self._lines += lines
        self._size += size

    def rest(self, *, ended: bool) -> Iterator[LogPage]:
        """Yield the last page.

        Args:
            ended: Whether no entry will follow, so that a line whose end has not come is complete.
        """
        if ended:
            self._lines += self._joiner.close()
        yield from self._cut(self._joiner.position)

    def _cut(self, position: JournalPosition) -> Iterator[LogPage]:
        if self._lines:
            identity = self._service.identity
            yield LogPage.from_lines(self._lines, cursor=position.pack(), identity=identity, job_id=self._job_id)
            self._lines, self._size = [], 0

    def _suppressed(self, entry: JournalEntry) -> CursorExpiredError:
        count = number_of(entry.dropped) or 0
        text = f"the journal dropped {count} {plural(count, 'line')} of {self._job_id}: raise LogRateLimitBurst="
        resume = self._joiner.position.pack()
        return CursorExpiredError(text, resume_cursor=resume, service=self._service.name, job_id=self._job_id)


def _is_settled(invocation: Invocation) -> bool:
    """Return whether an invocation has ended so long ago that the journal has all of its lines.

    The journal reads outputs and the reports of the manager separately, so lines may be stored after the end.
    """
    return bool(invocation.ended_us) and time.time() - invocation.ended_us / 1e6 > _SETTLE_S


def _is_candidate(shown: Mapping[str, str]) -> bool:
    """Return whether the runs of a unit are jobs by its properties: it ends by itself, or a timer starts it.

    A unit that the manager does not know any more was transient.
    """
    triggers = shown.get("TriggeredBy", "").split()
    return (
        shown.get("Type") == "oneshot"
        or shown.get("Transient") == "yes"
        or shown.get("LoadState") == "not-found"
        or any(one.endswith(".timer") for one in triggers)
    )


def _unix_us(value: str) -> int:
    """Return a time of ``systemctl show --timestamp=unix``, in µs since the epoch; 0 for none."""
    number = value.removeprefix("@")
    return int(number) * 1_000_000 if number.isdigit() else 0
