"""Printing of lines to a terminal, a file or a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import IO

from tailspan._plural import plural
from tailspan.logs.clean import printable
from tailspan.logs.follow import TailUpdate
from tailspan.logs.page import Message
from tailspan.models import JobStatus

__all__ = ["LinePrinter", "TailPrinter", "end_text", "is_terminal"]


def is_terminal(file: IO[str] | None) -> bool:
    """Return whether the file is a terminal."""
    try:
        return file is not None and file.isatty()
    except (AttributeError, ValueError):
        return False


class LinePrinter:
    """Prints lines with their indentation, and flushes.

    On a terminal, control characters that could move the cursor or fake output are removed; colours stay unless
    ``NO_COLOR`` is set. Elsewhere the text stays as the job wrote it.

    Attributes:
        shows_tasks: Whether to print the task's name before each line that has one.
    """

    def __init__(self, file: IO[str] | None) -> None:
        """Print to this text file; None, as sys.stdout is without a standard output, prints nowhere."""
        self.shows_tasks = False
        self._file = file
        self._terminal = is_terminal(file)
        self._colours = not os.environ.get("NO_COLOR")

    def messages(self, messages: Iterable[Message]) -> None:
        """Print the text of each message."""
        if self._terminal:
            text = "".join(f"{printable(self._text(one), colours=self._colours)}\n" for one in messages)
        else:
            text = "".join(f"{self._text(one)}\n" for one in messages)
        if text:
            self.write(text)

    def _text(self, message: Message) -> str:
        # Some services keep the line's own ending in the text.
        text = message.get("message", "").removesuffix("\n")
        return f"{message['task']} | {text}" if self.shows_tasks and "task" in message else text

    def note(self, text: str) -> None:
        """Print a note of ours; names and errors in it come from elsewhere."""
        self.write(f"[tailspan] {printable(' '.join(text.split()), colours=False)}\n")

    def write(self, text: str) -> None:
        """Write text and flush; a character that the file's encoding lacks becomes a question mark."""
        if self._file is None:
            return
        try:
            self._file.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._file, "encoding", None) or "ascii"
            self._file.write(text.encode(encoding, "replace").decode(encoding))
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()


class TailPrinter:
    """Prints what `tailspan.AsyncJobClient.follow_logs` yields."""

    def __init__(self, file: IO[str] | None) -> None:
        """Print to this text file, or nowhere."""
        self._printer = LinePrinter(file)
        self._silent = True

    def update(self, update: TailUpdate) -> None:
        """Print its lines, and notes about gaps, lines left out and an end without lines."""
        if update.gap:
            self._printer.note("lines before these are gone at the service")
        if update.left_out:
            self._printer.note(f"{update.left_out} {plural(update.left_out, 'line')} left out")
        self._printer.shows_tasks = update.status.total_tasks > 1
        self._printer.messages(update.messages)
        self._silent = self._silent and not update.messages
        if update.complete and self._silent:
            self._printer.note(f"{end_text(update.status)}, without a line")


def end_text(status: JobStatus) -> str:
    """Return in one line how a job ended."""
    how = status.state.lower().replace("_", " ")
    why = status.error or (f"exit code {status.exit_code}" if status.exit_code else "")
    return f"job {status.job_id} {how}" + (f": {why}" if why and why != how else "")
