"""What the journal says of invocations of units: start, end, result, restarts. Pure: no clock, no process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from tailspan._times import moment_of
from tailspan.models import JobState
from tailspan.services._http_service import drop_oldest
from tailspan.services.systemd.entries import JournalEntry, MessageId, Scope, message_of, number_of

__all__ = ["EARLY_US", "LIFE_IDS", "Invocation", "Invocations", "is_random", "job_name"]

LIFE_IDS = (
    MessageId.STARTING,
    MessageId.STARTED,
    MessageId.START_FAILED,
    MessageId.EXITED,
    MessageId.FAILED,
    MessageId.DEACTIVATED,
    MessageId.SKIPPED,
    MessageId.STOPPING,
    MessageId.STOPPED,
    MessageId.RESTART,
)
# The others can be about an invocation that ended long ago.
_FIRST = (
    MessageId.STARTING,
    MessageId.STARTED,
    MessageId.EXITED,
    MessageId.FAILED,
    MessageId.DEACTIVATED,
    MessageId.SKIPPED,
)
EARLY_US = 2_000_000
"""How long before the report of its start lines of an invocation may be stored, in µs."""
_MOST_EARLY = 1000
_SERVICE = ".service"
_HEX = frozenset("0123456789abcdef")
_REBOOTED = "the machine was restarted before the unit ended"


class _Restart(NamedTuple):
    """A restart that the manager has scheduled."""

    number: int
    before: str


@dataclass(slots=True)
class Invocation:
    """One run of a unit.

    Attributes:
        unit: The unit.
        invocation_id: Its id, which is the job's.
        boot: The id of the boot that it ran in.
        host: The name of the machine.
        description: What the manager calls the unit.
        started_us: When it began, in µs since the epoch.
        ended_us: When it ended; 0 before that.
        last_us: The time of its last known entry.
        state: RUNNING, or how it ended.
        result: The manager's word for how it ended: ``success``, ``exit-code`` ...
        exit_code: Exit code of the main process; 128 + n after signal n.
        reasons: What the manager reported before the end, for the error.
        stopping: Whether the manager was asked to stop it.
        attempt: 1, or one more for each automatic restart.
        before: The invocation that was restarted; empty: none.
        suppressed: Number of lines that the journal reported to have dropped.
        early: Entries of its lines that were stored before anything that names it; the reader takes them.
    """

    unit: str
    invocation_id: str
    boot: str = ""
    host: str = ""
    description: str = ""
    started_us: int = 0
    ended_us: int = 0
    last_us: int = 0
    state: JobState = JobState.RUNNING
    result: str = ""
    exit_code: int | None = None
    reasons: list[str] = field(default_factory=list)
    stopping: bool = False
    attempt: int = 1
    before: str = ""
    suppressed: int = 0
    early: list[JournalEntry] = field(default_factory=list)

    @property
    def started_at(self) -> datetime:
        """When it began."""
        return _moment(self.started_us)

    @property
    def finished_at(self) -> datetime | None:
        """When it ended; None before that."""
        return _moment(self.ended_us) if self.ended_us else None

    @property
    def error(self) -> str | None:
        """Why it did not succeed, in one sentence."""
        if not self.state.is_terminal or self.state is JobState.SUCCEEDED:
            return None
        if self.state is JobState.CANCELED:
            return "the unit was stopped"
        return "; ".join([*self.reasons, f"result: {self.result}"] if self.result else self.reasons) or None

    def take_log(self, entry: JournalEntry, scope: Scope) -> list[JournalEntry]:
        """Return the entries of its log that an entry brings: early ones, and the entry itself if it is one."""
        early, self.early = self.early, []
        return [*early, entry] if scope.is_log(entry) else early

    def end(self, state: JobState, at_us: int, *, result: str = "", reason: str = "") -> None:
        """Note its end; a later report of an end changes nothing, for example that of a restart that was refused."""
        if self.state.is_terminal:
            return
        self.state, self.ended_us, self.result = state, max(at_us, self.started_us), result
        if reason:
            self.reasons.append(reason)
        if state is JobState.SUCCEEDED and self.exit_code is None:
            self.exit_code = 0

    def lose(self) -> None:
        """Note that it ended with the machine."""
        self.end(JobState.LOST, self.last_us, reason=_REBOOTED)


class Invocations:
    """All known invocations, by id.

    Attributes:
        boot: The id of the newest boot.
        found: The invocations by id, in the order in which they were found.
    """

    def __init__(self, scope: Scope) -> None:
        self.boot = ""
        self.found: dict[str, Invocation] = {}
        self._scope = scope
        self._restarts: dict[str, _Restart] = {}
        self._current: dict[str, str] = {}
        self._early: dict[str, list[JournalEntry]] = {}

    def add(self, entry: JournalEntry) -> Invocation | None:
        """Apply an entry; return the invocation that it is about, None for an entry without one."""
        if isinstance(entry.boot, str) and entry.boot != self.boot:
            self._reboot(entry.boot)
        about = self._scope.reported(entry)
        if about is not None:
            return self._apply(entry, *about)
        about = self._scope.suppressed(entry)
        if about is not None:
            invocation = self._of(entry, *about)
            if invocation is not None:
                invocation.suppressed += number_of(entry.dropped) or 0
            return invocation
        about = self._scope.written(entry)
        if about is None:
            return None
        unit, invocation_id = about
        return self._of(entry, unit, invocation_id or self._last_of(entry, unit))

    def _last_of(self, entry: JournalEntry, unit: str) -> str:
        """Return the invocation of a line of a unit that had ended before the journal asked for the invocation.

        It is the last one, or the next one if that ended some time before: then the line is kept for it.
        """
        current = self._current.get(unit, "")
        known = self.found.get(current)
        if not current or (known is not None and 0 < known.ended_us < entry.time_us - EARLY_US):
            if unit.endswith(_SERVICE):
                self._early.setdefault(unit, []).append(entry)
                drop_oldest(self._early, _MOST_EARLY)
                del self._early[unit][:-_MOST_EARLY]
            return ""
        return current

    def start_with(self, unit: str, invocation_id: str) -> None:
        """Note which invocation of a unit is the last one before the next entry."""
        self._current[unit] = invocation_id

    def known(self, unit: str, invocation_id: str, started_us: int) -> Invocation:
        """Return an invocation that the manager knows and the journal does not."""
        found = self.found.get(invocation_id)
        if found is None:
            found = Invocation(unit, invocation_id, self.boot, started_us=started_us, last_us=started_us)
            self.found[invocation_id] = found
            self._current[unit] = invocation_id
        return found

    def forget(self, before_us: int, most: int) -> list[str]:
        """Drop ended invocations that are old or too many, oldest first; return their ids."""
        ended = sorted((one for one in self.found.values() if one.ended_us), key=lambda one: one.ended_us)
        extra = max(0, len(self.found) - most)
        gone = [one.invocation_id for place, one in enumerate(ended) if place < extra or one.ended_us < before_us]
        for invocation_id in gone:
            del self.found[invocation_id]
        return gone

    def _reboot(self, boot: str) -> None:
        if self.boot:
            for one in self.found.values():
                if one.boot != boot:
                    one.lose()
            self._restarts.clear()
        self.boot = boot

    def _note_restart(self, entry: JournalEntry, unit: str, invocation_id: str) -> None:
        kind, known = entry.message_id, self.found.get(invocation_id)
        if kind == MessageId.RESTART:
            self._restarts[unit] = _Restart(number_of(entry.restarts) or 1, invocation_id)
        elif (kind == MessageId.STOPPED and entry.job_type == "stop") or (
            kind == MessageId.FAILED and known is not None and known.state.is_terminal
        ):
            # The restart was canceled, or refused because there were too many.
            self._restarts.pop(unit, None)

    def _of(self, entry: JournalEntry, unit: str, invocation_id: str) -> Invocation | None:
        """Return the invocation of an entry; a new one for an id that is not known. None for other kinds of units."""
        if not unit.endswith(_SERVICE) or not invocation_id:
            return None
        found = self.found.get(invocation_id)
        if found is None:
            at_us = entry.reported_us
            found = Invocation(unit, invocation_id, str(entry.boot or ""), str(entry.host or ""), started_us=at_us)
            restart = self._restarts.pop(unit, None)
            if restart is not None:
                found.attempt, found.before = restart.number + 1, restart.before
            found.early = [one for one in self._early.pop(unit, ()) if one.time_us >= entry.time_us - EARLY_US]
            self.found[invocation_id] = found
        found.last_us = max(found.last_us, entry.time_us)
        self._current[unit] = invocation_id
        return found

    def _apply(self, entry: JournalEntry, unit: str, invocation_id: str) -> Invocation | None:
        kind, known = entry.message_id, self.found.get(invocation_id)
        self._note_restart(entry, unit, invocation_id)
        if known is None and kind not in _FIRST:
            return None
        invocation = self._of(entry, unit, invocation_id)
        if invocation is None:
            return None
        text = _text(entry, unit)
        match kind:
            case MessageId.STARTING | MessageId.STARTED:
                _start(invocation, entry, text)
            case MessageId.STOPPING:
                invocation.stopping = invocation.stopping or not invocation.state.is_terminal
            case MessageId.EXITED:
                _exit(invocation, entry, text)
            case MessageId.FAILED | MessageId.SKIPPED:
                _fail(invocation, entry)
            case MessageId.DEACTIVATED | MessageId.STOPPED:
                state = JobState.CANCELED if invocation.stopping else JobState.SUCCEEDED
                invocation.end(state, entry.reported_us, result="success")
            case MessageId.START_FAILED:
                invocation.end(JobState.FAILED, entry.reported_us, reason=text)
            case None:
                # Such as "start operation timed out. Terminating."
                if number_of(entry.priority) in (0, 1, 2, 3, 4) and not invocation.state.is_terminal:
                    invocation.reasons = [*invocation.reasons[-2:], text]
        return invocation


def _start(invocation: Invocation, entry: JournalEntry, text: str) -> None:
    verb, _, rest = text.partition(" ")
    _, _, description = rest.partition(" - ")
    invocation.description = invocation.description or description.removesuffix("...")
    # A line of a process may be stored before the report of its start.
    invocation.started_us = min(invocation.started_us, entry.reported_us)
    if entry.message_id == MessageId.STARTED and verb == "Finished":
        # A oneshot unit is finished here; with RemainAfterExit= nothing else reports that.
        invocation.end(JobState.SUCCEEDED, entry.reported_us, result="success")


def _exit(invocation: Invocation, entry: JournalEntry, text: str) -> None:
    if invocation.state.is_terminal:
        return
    status = number_of(entry.exit_status)
    if status is not None:
        invocation.exit_code = status if entry.exit_code == "exited" else 128 + status
    invocation.reasons = [*invocation.reasons[-2:], text]


def _fail(invocation: Invocation, entry: JournalEntry) -> None:
    result = str(entry.unit_result or "")
    if result == "exec-condition":
        state = JobState.SUCCEEDED
    elif invocation.stopping:
        # Also if the unit ignored the signal and was killed, which the manager calls a timeout.
        state = JobState.CANCELED
    else:
        state = JobState.TIMED_OUT if result == "timeout" else JobState.FAILED
    invocation.end(state, entry.reported_us, result=result)


def _text(entry: JournalEntry, unit: str) -> str:
    message = message_of(entry.message)
    text = message.decode("utf-8", "replace") if isinstance(message, bytes) else message or ""
    return text.removeprefix(f"{unit}: ")


def _moment(time_us: int) -> datetime:
    return moment_of(time_us * 1000)


def is_random(unit: str) -> bool:
    """Return whether a unit has a name that systemd-run made: ``run-r``, ``run-p`` or ``run-u`` and digits."""
    name = unit.removesuffix(_SERVICE)
    return name.startswith("run-") and _HEX.issuperset(name[4:].lstrip("rpu").replace("-i", "")) and len(name) > 5


def job_name(invocation: Invocation) -> str:
    """Return the name of a job: its unit; of a unit with a random name, the program that it runs."""
    if not is_random(invocation.unit):
        return invocation.unit
    words: Iterable[str] = invocation.description.removeprefix("[systemd-run] ").split()
    program = next(iter(words), "").rpartition("/")[2]
    return program or "systemd-run"
