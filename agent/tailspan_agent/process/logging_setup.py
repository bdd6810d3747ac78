r"""The agent's own log: one line per event on stderr, and the last warnings in a file.

    2026-01-31T09:30:00.123Z WARNING exporter.retry endpoint rejects logs signal=logs reason="HTTP 401"

Pass context with ``logger.warning("...", extra={"signal": "logs"})``. Job names and replies of services are untrusted
text: control characters are escaped, so that they cannot forge a line or control a terminal.

The last warnings and errors are also kept in the state directory for ``tailspan doctor``, because stderr is not kept
everywhere. They take two files of bounded size; if the disk cannot be written, only these lines are lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tailspan._secrets import mask
from tailspan.errors import TailspanError

__all__ = ["LineFormatter", "RepeatLimit", "keep_last_errors", "read_last_errors", "set_up_logging"]

REPEAT_AFTER_S = 60.0
_MAX_REMEMBERED = 1000
_CHATTY = ("httpx", "uvicorn", "asyncio")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "repeated"}
_LAST_ERRORS_FILE = "last-errors.log"
_LAST_ERRORS_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


def set_up_logging(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send the log records of this process to a stream, in the agent's format.

    Args:
        level: The lowest level of the agent's own records.
        stream: None means stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    handler.addFilter(RepeatLimit())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


class LineFormatter(logging.Formatter):
    """Formats a record as one line: time, level, module, message, ``key=value`` context."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line break anywhere in it."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        context = _context(record)
        repeated = getattr(record, "repeated", 0)
        if repeated:
            context["repeated"] = repeated
        if record.exc_info:
            context["traceback"] = self.formatException(record.exc_info)
        words = [when, record.levelname, record.name.removeprefix("tailspan_agent."), record.getMessage()]
        words += [f"{key}={_quoted(str(value))}" for key, value in context.items()]
        return _escaped(mask(" ".join(words)))


class RepeatLimit(logging.Filter):
    """Passes equal warnings once a minute; the next one carries the number of suppressed repeats.

    Args:
        clock_s: Any monotonic clock, in seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._logged: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log this record now."""
        if record.levelno != logging.WARNING:
            return True
        key = (record.name, record.getMessage(), *_context(record).items())
        now_s = self._clock_s()
        logged_s, repeated = self._logged.pop(key, (-REPEAT_AFTER_S, 0))
        if now_s - logged_s < REPEAT_AFTER_S:
            self._logged[key] = (logged_s, repeated + 1)
            return False
        self._logged[key] = (now_s, 0)
        if len(self._logged) > _MAX_REMEMBERED:
            del self._logged[next(iter(self._logged))]
        record.repeated = repeated
        return True


@contextlib.contextmanager
def keep_last_errors(state_dir: Path) -> Iterator[None]:
    """Write this process's warnings, errors and fatal exception to the state directory.

    Args:
        state_dir: ``agent.state_dir``, locked by this process.
    """
    handler = _LastErrors(state_dir / _LAST_ERRORS_FILE, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(LineFormatter())
    handler.addFilter(RepeatLimit())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        # Only to the file: the caller prints it on stderr. An error that we did not foresee needs its traceback.
        trace = None if isinstance(error, TailspanError) else (type(error), error, error.__traceback__)
        record = _log.makeRecord(_log.name, logging.CRITICAL, __file__, 0, "the agent exits: %s", (error,), trace)
        handler.handle(record)
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def read_last_errors(state_dir: Path, limit: int = 50) -> list[str]:
    """Return the last lines that `keep_last_errors` wrote, oldest first; empty if there are none.

    Args:
        state_dir: ``agent.state_dir``; its agent may be running.
        limit: Maximum number of lines.

    Raises:
        OSError: A file cannot be read.
    """
    lines: list[str] = []
    for name in (f"{_LAST_ERRORS_FILE}.1", _LAST_ERRORS_FILE):
        with contextlib.suppress(FileNotFoundError):
            lines += (state_dir / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-limit:]


class _LastErrors(logging.FileHandler):
    """A private file and the one before it. The handler of `logging.handlers` loads pickle, 0.6 MiB, and much else."""

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_private)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, into a new file where this one is full."""
        try:
            if self.stream is None:
                self.stream = self._open()
            if self.stream.tell() + len(self.format(record)) >= _LAST_ERRORS_BYTES:
                self.stream.close()
                self.stream = None
                os.replace(self.baseFilename, f"{self.baseFilename}.1")
        except OSError:
            self.handleError(record)
        else:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Ignore: stderr has the record, and the agent itself reports a full disk."""


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _context(record: logging.LogRecord) -> dict[str, object]:
    return {key: str(value) for key, value in vars(record).items() if key not in _STANDARD}


def _quoted(value: str) -> str:
    if value and not any(char in ' "=\\' or not char.isprintable() for char in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
