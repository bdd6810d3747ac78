r"""What the agent says of itself: one line per event, on stderr.

    2026-01-31T09:30:00.123Z WARNING lanes the endpoint refuses logs signal=logs reason="HTTP 401"

Context goes in by ``logger.warning("...", extra={"signal": "logs"})``. Job names and answers of services are foreign
text: control characters are escaped, so that they cannot forge a line or drive a terminal.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

__all__ = ["LineFormatter", "RepeatLimit", "set_up_logging"]

REPEAT_AFTER_S = 60.0
_MAX_REMEMBERED = 1000
_CHATTY = ("httpx", "httpcore", "uvicorn", "asyncio")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "repeated"}


def set_up_logging(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send the log records of this process to a stream, in the agent's form.

    Args:
        level: The least level of the agent's own records.
        stream: None: stderr.
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
        return _escaped(" ".join(words))


class RepeatLimit(logging.Filter):
    """Lets a warning through once a minute; the next one says how often it was repeated in between.

    Args:
        clock_s: Any clock that only goes forward, in seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._said: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to say this record now."""
        if record.levelno != logging.WARNING:
            return True
        key = (record.name, record.getMessage(), *_context(record).items())
        now_s = self._clock_s()
        said_s, repeated = self._said.pop(key, (-REPEAT_AFTER_S, 0))
        if now_s - said_s < REPEAT_AFTER_S:
            self._said[key] = (said_s, repeated + 1)
            return False
        self._said[key] = (now_s, 0)
        if len(self._said) > _MAX_REMEMBERED:
            del self._said[next(iter(self._said))]
        record.repeated = repeated
        return True


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
