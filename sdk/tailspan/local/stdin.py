"""Standard input of a job in the background."""

from __future__ import annotations

import os

__all__ = ["inherited_stdin"]


def inherited_stdin() -> int | None:
    """Return standard input for a job in the background: not a terminal, which belongs to the foreground."""
    try:
        return None if os.isatty(0) or os.fstat(0) is None else 0
    except OSError:
        # Closed, as daemons do.
        return None
