"""The agent's last warnings and errors, kept in its state directory for ``tailspan doctor``.

They survive the agent, also where nothing else keeps its stderr. Two files of bounded size; a disk that cannot be
written costs these lines and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from tailspan.errors import TailspanError
from tailspan_agent.process.logging_setup import LineFormatter, RepeatLimit

__all__ = ["keep_last_errors", "read_last_errors"]

_NAME = "last-errors.log"
_MAX_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


class _PrivateFile(RotatingFileHandler):
    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Leave it at that: stderr has the record, and a full disk is told by the agent itself."""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def keep_last_errors(state_dir: Path) -> Iterator[None]:
    """Keep warnings and errors of this process, and what ends it, until the context ends.

    Args:
        state_dir: ``agent.state_dir``, which this process holds.
    """
    handler = _PrivateFile(state_dir / _NAME, maxBytes=_MAX_BYTES, backupCount=1, delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(LineFormatter())
    handler.addFilter(RepeatLimit())
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        # To the file alone: whoever catches it says it on stderr. What we did not foresee needs its traceback.
        fault = None if isinstance(error, TailspanError) else (type(error), error, error.__traceback__)
        handler.handle(_log.makeRecord(_log.name, logging.CRITICAL, __file__, 0, "the agent ends: %s", (error,), fault))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


def read_last_errors(state_dir: Path, limit: int = 50) -> list[str]:
    """Return the last of these lines, oldest first; none where there are none.

    Args:
        state_dir: ``agent.state_dir``, of an agent that runs or not.
        limit: How many lines at most.

    Raises:
        OSError: They cannot be read.
    """
    lines: list[str] = []
    for name in (f"{_NAME}.1", _NAME):
        with contextlib.suppress(FileNotFoundError):
            lines += (state_dir / name).read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-limit:]
