"""A pipeline with progress and many lines: render the tiles of a map, with a progress bar on stderr."""

from __future__ import annotations

import hashlib
import sys

_COLUMNS, _ROWS = 100, 50


def _render(x: int, y: int) -> str:
    return hashlib.sha256(f"{x}/{y}".encode() * 200).hexdigest()


def main() -> None:
    """Render all tiles, one line per tile, and redraw the bar after each row."""
    total = _COLUMNS * _ROWS
    for y in range(_ROWS):
        for x in range(_COLUMNS):
            sys.stdout.write(f"tile {x}/{y} rendered, checksum {_render(x, y)[:16]}\n")
        done = (y + 1) * _COLUMNS
        bar = "#" * (20 * done // total)
        sys.stderr.write(f"\rrendering: {100 * done // total:3}%|{bar:<20}| {done}/{total}")
        sys.stderr.flush()
    sys.stderr.write("\n")


if __name__ == "__main__":
    main()
