"""Pages of log lines: the model, cleaning, following, printing and the wire format.

What concerns lines of any job belongs here; nothing here may depend on a job service. The names in ``__all__`` are
public, for plugins; the modules are internal.
"""

from __future__ import annotations

# Not from `typing`: the supervisor imports this package.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from tailspan.logs.follow import TailUpdate
    from tailspan.logs.page import (
        MAX_PAGE_BYTES,
        MAX_PAGE_LINES,
        Line,
        LineRun,
        LogPage,
        Message,
        OpenLine,
        Stream,
        TaskRef,
    )

__all__ = [
    "MAX_PAGE_BYTES",
    "MAX_PAGE_LINES",
    "Line",
    "LineRun",
    "LogPage",
    "Message",
    "OpenLine",
    "Stream",
    "TailUpdate",
    "TaskRef",
]


def __getattr__(name: str) -> object:
    """Import a public name at its first use: the supervisor of a local job needs only the standard library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = "tailspan.logs.follow" if name == "TailUpdate" else "tailspan.logs.page"
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
