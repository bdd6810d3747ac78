"""Private directories: only their owner may enter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["make_private"]


def _make(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)


def make_private(directory: Path, make: Callable[[Path], None] = _make) -> None:
    """Make a directory and its missing parents, all with the same mode, whatever the umask.

    ``Path.mkdir(parents=True)`` leaves the mode of the parents to the umask; others might write there.

    Args:
        directory: The directory that must exist.
        make: Makes one directory, which may exist by then.

    Raises:
        OSError: A directory cannot be made, or the path is something else.
    """
    if not directory.is_dir():
        make_private(directory.parent, make)
        make(directory)
