"""Runs journalctl and systemctl, and turns their failures into errors of services."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import anyio
from anyio.abc import ByteReceiveStream, Process

from tailspan.errors import AuthError, RequestRejectedError, ServiceUnavailableError
from tailspan.services.systemd.entries import FIELDS, JournalEntry, decode

__all__ = ["Commands"]

_TIMEOUT_S = 30.0
_PIECE_BYTES = 64 << 10
_MAX_ENTRY_BYTES = 64 << 20
_MAX_ERROR_CHARS = 300
_JSON = ("--no-pager", "--output=json", "--all", f"--output-fields={FIELDS}")
_OLDEST = 246
_NO_RIGHTS = ("insufficient permissions", "not seeing messages from", "Permission denied")
_REFUSED = ("Access denied", "authentication required", "Permission denied", "not authorized")


class Commands:
    """The programs of systemd, on this machine or through a prefix such as ``ssh HOST`` or ``nsenter -t 1 -m``.

    Args:
        service: Name of the configured service, for messages.
        prefix: Words before each program.
        user: Whether units of this user's manager are meant.
    """

    def __init__(self, service: str, prefix: Sequence[str], *, user: bool) -> None:
        self._service = service
        self._prefix = tuple(prefix)
        self._user = user
        self._env = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
        self._is_checked = False

    async def check(self) -> None:
        """Check once that the programs are there, new enough, and may read the journal.

        Raises:
            ServiceUnavailableError: A program is missing or too old.
            AuthError: The journal cannot be read.
        """
        if self._is_checked:
            return
        text, _ = await self._run("journalctl", "--version")
        words = text.split()
        version = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        if version < _OLDEST:
            raise self._unavailable(f"systemd {version} is too old: {_OLDEST} or newer is needed")
        _, hint = await self._run("journalctl", "--no-pager", "--lines=1", "--output=cat")
        if not self._user and any(one in hint for one in _NO_RIGHTS):
            self._no_rights(hint)
        self._is_checked = True

    async def is_volatile(self) -> bool:
        """Return whether all files of the journal are in memory."""
        text, _ = await self._run("journalctl", "--no-pager", "--header")
        files = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("File path:")]
        return bool(files) and all(file.startswith("/run/") for file in files)

    def identity(self) -> tuple[str, str]:
        """Return the machine's id, and the id of the user for a user's manager; else an empty text.

        Raises:
            ServiceUnavailableError: They cannot be read.
        """
        machine = self._output("cat", "/etc/machine-id")
        return machine, (self._output("id", "-u") if self._user else "")

    def _output(self, *command: str) -> str:
        try:
            ended = subprocess.run(
                [*self._prefix, *command], capture_output=True, text=True, timeout=_TIMEOUT_S, env=self._env, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            why = str(error).rstrip(".")
            text = f"service {self._service}: {' '.join(command)} failed, so the machine is not known: {why}"
            raise self._unavailable(f"{text}; check services.{self._service}.command_prefix") from None
        return ended.stdout.strip()

    async def entries(self, *options: str) -> AsyncGenerator[list[JournalEntry], None]:
        """Yield entries of the journal as journalctl prints them, piece by piece.

        Args:
            *options: Options and matches of journalctl.

        Raises:
            ServiceUnavailableError: journalctl cannot be run, or failed.
            AuthError: The journal cannot be read.
        """
        async with self._running("journalctl", *_JSON, "--quiet", *options) as (process, output, errors):
            async for lines in _lines(output):
                found = [entry for entry in map(decode, lines) if entry is not None]
                if found:
                    yield found
            await process.wait()
            if process.returncode:
                self._fail("journalctl", process.returncode, await _rest(errors))

    async def show(self, names: Sequence[str], properties: Sequence[str]) -> list[Mapping[str, str]]:
        """Return properties of units, as ``systemctl show`` has them.

        Args:
            names: Units or globs of loaded units.
            properties: Their names.
        """
        scope = ("--user",) if self._user else ()
        command = (*scope, "show", "--timestamp=unix", f"--property={','.join(('Id', *properties))}", "--", *names)
        text, _ = await self._run("systemctl", *command)
        blocks = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in text.split("\n\n")]
        return [block for block in blocks if block.get("Id")]

    async def stop(self, unit: str, *, job_id: str) -> None:
        """Ask the manager to stop a unit.

        Raises:
            RequestRejectedError: It refuses to.
        """
        scope = ("--user",) if self._user else ()
        try:
            await self._run("systemctl", *scope, "--no-ask-password", "--no-block", "stop", "--", unit)
        except ServiceUnavailableError as error:
            if any(one in str(error) for one in _REFUSED):
                text = f"{unit} cannot be stopped by this user: a polkit rule must allow it ({error})"
                raise RequestRejectedError(text, service=self._service, job_id=job_id) from None
            raise

    async def _run(self, program: str, *arguments: str) -> tuple[str, str]:
        """Run a program and return what it printed to its outputs."""
        try:
            with anyio.fail_after(_TIMEOUT_S):
                ended = await anyio.run_process(
                    [*self._prefix, program, *arguments], check=False, stdin=subprocess.DEVNULL, env=self._env
                )
        except TimeoutError:
            raise self._unavailable(f"{program} did not end within {_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise self._not_started(program, error) from None
        errors = ended.stderr.decode("utf-8", "replace")
        if ended.returncode:
            self._fail(program, ended.returncode, errors)
        return ended.stdout.decode("utf-8", "replace"), errors

    @asynccontextmanager
    async def _running(
        self, program: str, *arguments: str
    ) -> AsyncIterator[tuple[Process, ByteReceiveStream, ByteReceiveStream]]:
        """Run a program while its output is read; end it with the block."""
        try:
            process = await anyio.open_process(
                [*self._prefix, program, *arguments],
                stdin=subprocess.DEVNULL,
                env=self._env,
                start_new_session=True,
            )
        except OSError as error:
            raise self._not_started(program, error) from None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            if process.returncode is None:
                _kill(process.pid)
            with anyio.CancelScope(shield=True):
                await process.aclose()

    def _not_started(self, program: str, error: OSError) -> ServiceUnavailableError:
        missing = self._prefix[0] if self._prefix else program
        reason = "is not installed" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        return self._unavailable(f"{missing}: {reason}")

    def _fail(self, program: str, code: int, errors: str) -> NoReturn:
        if program == "journalctl" and any(one in errors for one in _NO_RIGHTS):
            self._no_rights(errors)
        text = " ".join(errors.split())[:_MAX_ERROR_CHARS]
        raise self._unavailable(f"{program} ended with exit code {code}: {text or 'no message'}")

    def _no_rights(self, hint: str) -> NoReturn:
        first = hint.strip().splitlines()[0].strip()
        raise AuthError(
            f"the journal of the system cannot be read: add the agent's user to the group systemd-journal ({first})",
            service=self._service,
        )

    def _unavailable(self, text: str) -> ServiceUnavailableError:
        return ServiceUnavailableError(text, service=self._service)


def _kill(pid: int) -> None:
    """End a program and those that it started: a prefix such as ``nsenter`` forks.

    One that went on would hold the outputs open, and Python 3.11 waits for their end.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _lines(output: ByteReceiveStream) -> AsyncGenerator[list[bytes], None]:
    """Yield the complete lines of an output, piece by piece."""
    rest: list[bytes] = []
    size = 0
    while True:
        try:
            piece = await output.receive(_PIECE_BYTES)
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return
        head, newline, tail = piece.rpartition(b"\n")
        if not newline:
            size += len(piece)
            # An entry has one message of at most 48 KiB and a few short fields; this one would fill the memory.
            rest = [*rest, piece] if size < _MAX_ENTRY_BYTES else []
            continue
        lines = b"".join((*rest, head)).split(b"\n")
        rest, size = [tail] if tail else [], len(tail)
        yield lines


async def _rest(errors: ByteReceiveStream) -> str:
    try:
        return (await errors.receive(_PIECE_BYTES)).decode("utf-8", "replace")
    except (anyio.EndOfStream, anyio.ClosedResourceError):
        return ""
