"""Printing of lines to a terminal, a file or a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import IO

from tailspan._plural import plural
from tailspan.logs.clean import printable
from tailspan.logs.follow import TailUpdate
from tailspan.logs.page import NANOS_PER_MS, Message, OpenLine
from tailspan.models import JobStatus

__all__ = ["LinePrinter", "TailPrinter", "end_text", "is_terminal", "progress_text", "result_text"]


_ERASE = "\r\x1b[K"


def is_terminal(file: IO[str] | None) -> bool:
    """Return whether the file is a terminal."""
    try:
        return file is not None and file.isatty()
    except (AttributeError, ValueError):
        return False


class LinePrinter:
    """Prints lines with their indentation, and flushes.

    An open line is printed as it grows, without newline; its rest follows when it is complete.

    On a terminal, control characters that could move the cursor or fake output are removed; colours stay unless
    ``NO_COLOR`` is set. Elsewhere the text stays as the job wrote it.

    Attributes:
        shows_tasks: Whether to print the task's name before each line that has one.
        prefix: Makes the text before a line of its time in ms since the epoch; None: nothing stands before a line.
        style: Changes the text of a complete line, for example its colour; None: nothing does.
    """

    def __init__(self, file: IO[str] | None) -> None:
        """Print to this text file; None, as sys.stdout is without a standard output, prints nowhere."""
        self.shows_tasks = False
        self.prefix: Callable[[int], str] | None = None
        self.style: Callable[[Message, str], str] | None = None
        self._file = file
        self._terminal = is_terminal(file)
        self._colours = not os.environ.get("NO_COLOR")
        self._open = ""

    def messages(self, messages: Iterable[Message]) -> None:
        """Print the text of each message."""
        texts = list(map(self._text, messages))
        while texts and texts[0].endswith("\r") and self._open.startswith(texts[0]):
            # States of a progress bar: its line goes on.
            self._open = self._open.removeprefix(texts.pop(0))
        if texts:
            self._replace_open("\n".join((*texts, "")))
            self._open = ""

    def open_line(self, line: OpenLine | None) -> None:
        """Print what is new of a line whose newline has not come."""
        text = ""
        if line is not None and line.message:
            text = self._before(line.time_unix_nano // NANOS_PER_MS) + self._shown(line.message)
        if text and text != self._open:
            self._replace_open(text)
            self._open = text

    @property
    def has_open(self) -> bool:
        """Whether the last line printed has no newline yet."""
        return bool(self._open)

    def close(self) -> None:
        """End the line that is open, so that what is printed next begins a line."""
        if self._open:
            self.write("\n")
            self._open = ""

    def _replace_open(self, text: str) -> None:
        """Print a text that begins with the open line, or else stands in its place."""
        if text.startswith(self._open):
            self.write(text[len(self._open) :])
        else:
            # A line of the other stream, or the next state of a progress bar.
            self.write((_ERASE if self._terminal else "\n") + text)

    def _text(self, message: Message) -> str:
        # Some services keep the line's own ending in the text.
        text = message.get("message", "").removesuffix("\n")
        if self.shows_tasks and "task" in message:
            text = f"{message['task']} | {text}"
        text = self._shown(text)
        if self.style is not None and not self._open:
            text = self.style(message, text)
        return self._before(message["timestamp"]) + text

    def _shown(self, text: str) -> str:
        return printable(text, colours=self._colours) if self._terminal else text

    def _before(self, time_ms: int) -> str:
        return self.prefix(time_ms) if self.prefix is not None else ""

    def note(self, text: str) -> None:
        """Print a note of ours; names and errors in it come from elsewhere."""
        self.close()
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
        self._printer.open_line(update.open_line)
        self._silent = self._silent and not update.messages
        if update.complete and self._silent:
            self._printer.note(f"{end_text(update.status)}, without a line")


def end_text(status: JobStatus) -> str:
    """Return in one line how a job ended."""
    how = status.state.lower().replace("_", " ")
    why = status.error or (f"exit code {status.exit_code}" if status.exit_code else "")
    return f"job {status.job_id} {how}" + (f": {why}" if why and why != how else "")


def progress_text(status: JobStatus) -> str:
    """Return how far a job is by its tasks, such as ``45% (9 of 20)``; nothing if it does not count them."""
    if not status.total_tasks:
        return ""
    share = 100 * status.finished_tasks // status.total_tasks
    return f"{share}% ({status.finished_tasks} of {status.total_tasks})"


def result_text(status: JobStatus) -> str:
    """Return why a job did not succeed, or its exit code; nothing before its end."""
    code = "" if status.exit_code is None else str(status.exit_code)
    return code if status.error in (None, f"exited with code {code}") else str(status.error)
