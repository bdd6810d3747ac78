"""The command line ``tailspan``, a thin layer over the SDK.

Options, output and exit codes belong here; nothing here may do what a verb of the SDK does not.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tailspan.cli.group import main

__all__ = ["main"]


def __getattr__(name: str) -> object:
    """Import the command group when it is first used: `tailspan.cli.start` runs ``tailspan run`` without it."""
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tailspan.cli.group import main

    globals()["main"] = main
    return main
