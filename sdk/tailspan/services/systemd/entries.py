"""Entries of the journal: their fields, who wrote them, and the text of their message.

Source: systemd.journal-fields(7), sd-messages.h, and what was measured of systemd 252.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

__all__ = [
    "FIELDS",
    "JournalEntry",
    "MessageId",
    "Scope",
    "decode",
    "is_after",
    "message_of",
    "number_of",
    "severity_of",
]


class MessageId:
    """``MESSAGE_ID`` of what a service manager reports of a unit."""

    STARTING = "7d4958e842da4a758f6c1cdc7b36dcc5"
    STARTED = "39f53479d3a045ac8e11786248231fbf"
    START_FAILED = "be02cf6855d2428ba40df7e9d022f03d"
    EXITED = "98e322203f7a4ed290d09fe03c09fe15"
    FAILED = "d9b373ed55a64feb8242e02dbe79a49c"
    DEACTIVATED = "7ad2d189f7e94e70a38c781354912448"
    SKIPPED = "0e4284a0caca4bfc81c0bb6786972673"
    STOPPING = "de5b426a63be47a7b6ac3eaac82e2f6f"
    STOPPED = "9d1aaa27d60140bd96365438aad20286"
    RESTART = "5eb03494b6584870a536b337290809b3"
    SUPPRESSED = "a596d6fe7bfa4994828e72309e95d61e"


_NAMES = {
    "cursor": "__CURSOR",
    "time": "__REALTIME_TIMESTAMP",
    "source_time": "_SOURCE_REALTIME_TIMESTAMP",
    "boot": "_BOOT_ID",
    "message": "MESSAGE",
    "message_id": "MESSAGE_ID",
    "priority": "PRIORITY",
    "transport": "_TRANSPORT",
    "line_break": "_LINE_BREAK",
    "stream_id": "_STREAM_ID",
    "host": "_HOSTNAME",
    "unit": "_SYSTEMD_UNIT",
    "user_unit": "_SYSTEMD_USER_UNIT",
    "owner": "_SYSTEMD_OWNER_UID",
    "uid": "_UID",
    "invocation": "_SYSTEMD_INVOCATION_ID",
    "of_unit": "UNIT",
    "of_user_unit": "USER_UNIT",
    "of_invocation": "INVOCATION_ID",
    "of_user_invocation": "USER_INVOCATION_ID",
    "job_type": "JOB_TYPE",
    "unit_result": "UNIT_RESULT",
    "exit_code": "EXIT_CODE",
    "exit_status": "EXIT_STATUS",
    "restarts": "N_RESTARTS",
    "dropped": "N_DROPPED",
    "object_invocation": "OBJECT_SYSTEMD_INVOCATION_ID",
    "object_user_unit": "OBJECT_SYSTEMD_USER_UNIT",
    "object_unit": "OBJECT_SYSTEMD_UNIT",
}


class JournalEntry(msgspec.Struct, rename=_NAMES, gc=False):
    """An entry as ``journalctl -o json`` prints it; a field that has several values is a list."""

    cursor: Any = ""
    time: Any = None
    source_time: Any = None
    boot: Any = None
    message: Any = None
    message_id: Any = None
    priority: Any = None
    transport: Any = None
    line_break: Any = None
    stream_id: Any = None
    host: Any = None
    unit: Any = None
    user_unit: Any = None
    owner: Any = None
    uid: Any = None
    invocation: Any = None
    of_unit: Any = None
    of_user_unit: Any = None
    of_invocation: Any = None
    of_user_invocation: Any = None
    job_type: Any = None
    unit_result: Any = None
    exit_code: Any = None
    exit_status: Any = None
    restarts: Any = None
    dropped: Any = None
    object_invocation: Any = None
    object_user_unit: Any = None
    object_unit: Any = None

    @property
    def time_us(self) -> int:
        """When the journal received it, in µs since the epoch."""
        return number_of(self.time) or 0

    @property
    def reported_us(self) -> int:
        """When its writer wrote it, in µs since the epoch."""
        return number_of(self.source_time) or self.time_us


FIELDS = ",".join(name for name in _NAMES.values() if not name.startswith("__"))
"""What ``--output-fields`` has; cursor and times are always printed."""

_decoder = msgspec.json.Decoder(JournalEntry)


def decode(line: bytes) -> JournalEntry | None:
    """Return the entry of a line of output; None for a line that has none."""
    try:
        entry = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return entry if isinstance(entry.cursor, str) and entry.cursor else None


class Scope(NamedTuple):
    """The service manager whose units are jobs, and how its entries are recognized.

    Fields that begin with an underscore are set by the journal, so that no program can claim to be the manager.

    Attributes:
        uid: The user of the manager, for the units of a user; empty: the system's.
    """

    uid: str = ""

    @property
    def manager_matches(self) -> tuple[str, ...]:
        """The matches of journalctl for the manager's own entries."""
        return ("_SYSTEMD_USER_UNIT=init.scope", f"_UID={self.uid}") if self.uid else ("_SYSTEMD_UNIT=init.scope",)

    def matches(self, unit: str) -> tuple[str, ...]:
        """Return the matches of journalctl for all entries of a unit and about it."""
        written = "_SYSTEMD_USER_UNIT" if self.uid else "_SYSTEMD_UNIT"
        dropped = "OBJECT_SYSTEMD_USER_UNIT" if self.uid else "OBJECT_SYSTEMD_UNIT"
        suppressed = f"MESSAGE_ID={MessageId.SUPPRESSED}"
        reported = *self.manager_matches, f"{self.unit_field}={unit}"
        return f"{written}={unit}", "+", *reported, "+", suppressed, f"{dropped}={unit}"

    @property
    def unit_field(self) -> str:
        """The field by which the manager names a unit."""
        return "USER_UNIT" if self.uid else "UNIT"

    @property
    def invocation_field(self) -> str:
        """The field by which the manager names an invocation."""
        return "USER_INVOCATION_ID" if self.uid else "INVOCATION_ID"

    def reported(self, entry: JournalEntry) -> tuple[str, str] | None:
        """Return unit and invocation that an entry of the manager is about; None for any other entry."""
        if self.uid:
            from_manager = entry.user_unit == "init.scope" and entry.uid == self.uid
            unit, invocation = entry.of_user_unit, entry.of_user_invocation
        else:
            from_manager = entry.unit == "init.scope"
            unit, invocation = entry.of_unit, entry.of_invocation
        if from_manager and isinstance(unit, str) and isinstance(invocation, str):
            return unit, invocation
        return None

    def written(self, entry: JournalEntry) -> tuple[str, str] | None:
        """Return unit and invocation of the process that wrote an entry; None for what is not a line of a unit.

        The invocation is empty where the unit had ended before the journal looked for it.
        """
        if entry.transport not in ("stdout", "journal", "syslog"):
            return None
        if self.uid:
            unit = entry.user_unit if entry.owner == self.uid else None
        else:
            unit = entry.unit if entry.user_unit is None else None
        if not isinstance(unit, str) or unit == "init.scope":
            return None
        return unit, entry.invocation if isinstance(entry.invocation, str) else ""

    def is_log(self, entry: JournalEntry) -> bool:
        """Return whether an entry is part of a log: a line, or the report that lines were dropped."""
        return self.written(entry) is not None or self.suppressed(entry) is not None

    def suppressed(self, entry: JournalEntry) -> tuple[str, str] | None:
        """Return unit and invocation whose lines the journal reports to have dropped; None for any other entry."""
        if entry.message_id != MessageId.SUPPRESSED or entry.unit != "systemd-journald.service":
            return None
        unit = entry.object_user_unit if self.uid else entry.object_unit
        invocation = entry.object_invocation
        return (unit, invocation) if isinstance(unit, str) and isinstance(invocation, str) else None


def number_of(value: Any) -> int | None:
    """Return a field that is a number; None for anything else."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else None


def message_of(value: Any) -> str | bytes | None:
    """Return the text of a ``MESSAGE``: bytes where it is not UTF-8 or has control characters; None without one.

    journalctl prints such a text as an array of numbers, and several messages as an array of these and of texts.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    try:
        return bytes(value)
    except (TypeError, ValueError):
        parts = [message_of(one) for one in value]
        return b"\n".join(one.encode() if isinstance(one, str) else one for one in parts if one is not None)


_SEVERITIES = (21, 19, 18, 17, 13, 10, 9, 5)


def severity_of(entry: JournalEntry) -> int:
    """Return the OTLP severity number of a line; 0 if its writer gave none.

    Source: OpenTelemetry logs data model, appendix B, "Syslog". The journal gives 6 to each line of a plain output, so
    that number says nothing of it.
    """
    priority = number_of(entry.priority)
    if priority is None or priority > 7 or (entry.transport == "stdout" and priority == 6):
        return 0
    return _SEVERITIES[priority]


def is_after(cursor: str, other: str) -> bool:
    """Return whether an entry was stored after another one, by their cursors.

    Source: a cursor has the number of the entry (``i``) in the sequence ``s``, and the time in µs (``t``), hexadecimal.
    """
    mine, its = _parts(cursor), _parts(other)
    key = "i" if mine.get("s") == its.get("s") else "t"
    try:
        return int(mine.get(key, "0"), 16) > int(its.get(key, "0"), 16)
    except ValueError:
        return False


def _parts(cursor: str) -> dict[str, str]:
    return {name: value for name, _, value in (part.partition("=") for part in cursor.split(";"))}
