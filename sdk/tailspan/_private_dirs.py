"""Making directories that only their owner may enter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["make_private"]


def _make(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)


def make_private(directory: Path, make: Callable[[Path], None] = _make) -> None:
    """Make a directory and those above it that are missing, each with the same rights, whatever the umask.

    ``Path.mkdir(parents=True)`` leaves the rights of those above to the umask; who may write there may exchange ours.

    Args:
        directory: What must exist afterwards.
        make: Makes one directory, which may exist by then.

    Raises:
        OSError: One cannot be made, or is no directory.
    """
    if not directory.is_dir():
        make_private(directory.parent, make)
        make(directory)
