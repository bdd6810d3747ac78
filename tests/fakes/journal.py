"""`FakeJournal`: a journal in a file, and a journalctl and systemctl that read it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from tailspan.services.systemd.commands import Commands
from tailspan.services.systemd.entries import JournalEntry, MessageId, decode
from tests.fakes import journal_program

__all__ = ["DirectCommands", "FakeJournal"]

_BOOT = "b" * 32
_PIECE = 7


class DirectCommands(Commands):
    """The fake programs without processes."""

    def __init__(self, directory: Path, *, user: bool) -> None:
        super().__init__("systemd", (), user=user)
        self._directory = directory

    async def entries(self, *options: str) -> AsyncGenerator[list[JournalEntry], None]:
        """Yield the chosen entries, a few at a time."""
        code, output, errors = journal_program.answer(self._directory, "journalctl", list(options))
        if code:
            self._fail("journalctl", code, errors)
        found = [entry for line in output.splitlines() if (entry := decode(line))]
        for start in range(0, len(found), _PIECE):
            yield found[start : start + _PIECE]

    async def _run(self, program: str, *arguments: str) -> tuple[str, str]:
        code, output, errors = journal_program.answer(self._directory, program, list(arguments))
        if code:
            self._fail(program, code, errors)
        return output.decode(), errors

    def _output(self, *command: str) -> str:
        return journal_program.answer(self._directory, command[0], list(command[1:]))[1].decode().strip()


class FakeJournal:
    """A manager with units and its journal.

    Attributes:
        prefix: The ``command_prefix`` of a service that uses it.
        now_us: The time of the next entry, in us since the epoch; None: the present.
        boot: The id of the boot.
        directory: Where its files are.
        machine_id: The id of the machine.
    """

    machine_id = "0123456789abcdef0123456789abcdef"

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.prefix = [sys.executable, "-I", "-S", journal_program.__file__, str(directory)]
        self.now_us: int | None = None
        self.boot = _BOOT
        self.directory = directory
        self._file = directory / "journal"
        self._file.touch()
        self._number = 0
        self._invocations = 0
        self._units: dict[str, dict[str, str]] = {}
        self._write("version", "systemd 252 (252.39-1)\n+PAM")
        self._write("units.json", "{}")

    def unit(self, name: str, **properties: str) -> None:
        """Add or change a unit, by properties of ``systemctl show``."""
        self._units[name] = {"Type": "oneshot", "LoadState": "loaded", **self._units.get(name, {}), **properties}
        self._write("units.json", json.dumps(self._units))

    def add(self, **fields: Any) -> str:
        """Add an entry and return its cursor."""
        return self.add_all([fields])[-1]

    def add_all(self, entries: list[dict[str, Any]]) -> list[str]:
        """Add entries and return their cursors."""
        texts, cursors = [], []
        for fields in entries:
            self._number += 1
            at_us = int(time.time() * 1e6) if self.now_us is None else self.now_us
            cursor = f"s={'5' * 32};i={self._number:x};b={self.boot};m=1;t={at_us:x};x=1"
            own = {"__CURSOR": cursor, "__REALTIME_TIMESTAMP": str(at_us), "_BOOT_ID": self.boot, "_HOSTNAME": "vm"}
            texts.append(json.dumps({**own, **fields}) + "\n")
            cursors.append(cursor)
        with self._file.open("a") as file:
            file.write("".join(texts))
        return cursors

    def add_recorded(self, lines: list[str]) -> None:
        """Add entries as they were recorded."""
        with self._file.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def report(self, unit: str, invocation_id: str, message_id: str | None, text: str, **fields: str) -> None:
        """Add an entry of the manager."""
        known = {"MESSAGE_ID": message_id} if message_id else {}
        self.add(
            _SYSTEMD_UNIT="init.scope",
            _TRANSPORT="journal",
            UNIT=unit,
            INVOCATION_ID=invocation_id,
            MESSAGE=text,
            **known,
            **fields,
        )

    def start(self, unit: str, *, kind: str = "oneshot", **properties: str) -> str:
        """Start a unit and return the id of the invocation."""
        self._invocations += 1
        invocation_id = f"{self._invocations:032x}"
        started = {"ActiveState": "activating", "ExecMainStartTimestamp": f"@{int(time.time())}"}
        self.unit(unit, Type=kind, InvocationID=invocation_id, **{**started, **properties})
        message_id = MessageId.STARTING if kind == "oneshot" else MessageId.STARTED
        verb = "Starting" if kind == "oneshot" else "Started"
        self.report(unit, invocation_id, message_id, f"{verb} {unit} - Some work", JOB_TYPE="start")
        return invocation_id

    def start_silent(self, count: int) -> None:
        """Start oneshot units that have written one line each and run on."""
        now_s = int(time.time())
        entries = []
        for number in range(count):
            unit, invocation_id = f"unit-{number}.service", f"{number + 1:032x}"
            self._units[unit] = {
                "Type": "oneshot",
                "LoadState": "loaded",
                "ActiveState": "activating",
                "InvocationID": invocation_id,
                "ExecMainStartTimestamp": f"@{now_s}",
            }
            about = {"UNIT": unit, "INVOCATION_ID": invocation_id, "_SYSTEMD_UNIT": "init.scope"}
            entries.append({**about, "MESSAGE_ID": MessageId.STARTING, "MESSAGE": f"Starting {unit} - Work..."})
            entries.append(self.line_of(unit, invocation_id, "waiting"))
        self.add_all(entries)
        self._write("units.json", json.dumps(self._units))

    def line_of(self, unit: str, invocation_id: str, text: Any, **fields: Any) -> dict[str, Any]:
        """Return the entry of a line."""
        own = {"_SYSTEMD_INVOCATION_ID": invocation_id} if invocation_id else {}
        return {
            "_SYSTEMD_UNIT": unit,
            **own,
            "_TRANSPORT": "stdout",
            "PRIORITY": "6",
            "_STREAM_ID": "1",
            "MESSAGE": text,
            **fields,
        }

    def line(self, unit: str, invocation_id: str, text: Any, **fields: Any) -> str:
        """Add a line and return its cursor."""
        return self.add(**self.line_of(unit, invocation_id, text, **fields))

    def finish(self, unit: str, invocation_id: str) -> None:
        """End a oneshot unit with success."""
        self.unit(unit, ActiveState="inactive")
        self.report(unit, invocation_id, MessageId.DEACTIVATED, f"{unit}: Deactivated successfully.")
        self.report(unit, invocation_id, MessageId.STARTED, f"Finished {unit} - Some work.", JOB_RESULT="done")

    def fail(self, unit: str, invocation_id: str, result: str, *, code: str = "", status: int = 1) -> None:
        """End a unit without success."""
        self.unit(unit, ActiveState="failed")
        if code:
            text = f"{unit}: Main process exited, code={code}, status={status}"
            self.report(unit, invocation_id, MessageId.EXITED, text, EXIT_CODE=code, EXIT_STATUS=str(status))
        text = f"{unit}: Failed with result '{result}'."
        self.report(unit, invocation_id, MessageId.FAILED, text, UNIT_RESULT=result)

    def restart(self, unit: str, invocation_id: str, number: int) -> None:
        """Schedule a restart."""
        text = f"{unit}: Scheduled restart job, restart counter is at {number}."
        self.report(unit, invocation_id, MessageId.RESTART, text, N_RESTARTS=str(number))
        self.report(unit, invocation_id, MessageId.STOPPED, f"Stopped {unit} - Some work.", JOB_TYPE="restart")

    def stop(self, unit: str, invocation_id: str) -> None:
        """Stop a unit, as ``systemctl stop`` does."""
        self.report(unit, invocation_id, MessageId.STOPPING, f"Stopping {unit} - Some work...", JOB_TYPE="stop")
        self.report(unit, invocation_id, MessageId.DEACTIVATED, f"{unit}: Deactivated successfully.")
        self.report(unit, invocation_id, MessageId.STOPPED, f"Stopped {unit} - Some work.", JOB_TYPE="stop")
        self.unit(unit, ActiveState="inactive")

    def vacuum(self, *, keep: int) -> None:
        """Drop all entries but the last ones; a program that follows loses none that it has printed."""
        lines = self._file.read_text().splitlines(keepends=True)
        kept = "".join(lines[-keep:]) if keep else ""
        replaced = self._file.with_name("next")
        replaced.write_text(kept)
        replaced.replace(self._file)

    def set_problem(self, program: str, code: int, text: str) -> None:
        """Let a program fail from now on."""
        self._write(f"{program}.problem", f"{code} {text}")

    def set_version(self, version: int) -> None:
        """Set the version of systemd."""
        self._write("version", f"systemd {version} ({version}-1)\n")

    @property
    def stopped(self) -> list[str]:
        """The units that were to be stopped."""
        file = self.directory / "stopped"
        return file.read_text().split() if file.exists() else []

    def calls(self, program: str) -> list[list[str]]:
        """Return the arguments of each run of a program."""
        file = self.directory / "calls"
        found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [arguments for name, *arguments in found if name == program]

    def _write(self, name: str, text: str) -> None:
        replaced = self.directory / f".{name}"
        replaced.write_text(text)
        replaced.replace(self.directory / name)
