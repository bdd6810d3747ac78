"""`FileFinder`: the files below a directory that match globs; directories that did not change are not listed again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path
from typing import NamedTuple, TypeAlias

__all__ = ["FileFinder"]

_ANY_DEPTH = "**"
# A directory that changed this short ago may change again without another modification time.
_RECENT_NS = 5_000_000_000
_MAX_DEPTH = 64


_States: TypeAlias = list[frozenset[int]]


class _Listing(NamedTuple):
    """What of a directory matches.

    Attributes:
        modified_ns: When the directory was changed last.
        listed_ns: When it was listed.
        directories: The relative paths of directories to enter, and where in the globs they lead.
        files: The relative paths of files that match.
    """

    modified_ns: int
    listed_ns: int
    directories: list[tuple[str, _States]]
    files: list[str]


class _Glob:
    """A pattern of relative paths: ``**`` stands for any number of directories, ``*`` for any part of a name."""

    def __init__(self, pattern: str) -> None:
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        self._parts = [None if part == _ANY_DEPTH else re.compile(translate(part)) for part in parts]
        self.start = self._closure({0})

    def enter(self, positions: frozenset[int], name: str) -> frozenset[int]:
        """Return where in the pattern a directory or file leads, from where its parent is; empty: it does not match."""
        found = set()
        for position in positions:
            if position < len(self._parts):
                part = self._parts[position]
                if part is None:
                    found.add(position)
                elif part.match(name):
                    found.add(position + 1)
        return self._closure(found)

    def is_end(self, positions: frozenset[int]) -> bool:
        """Return whether the whole pattern is matched."""
        return len(self._parts) in positions

    def _closure(self, positions: set[int]) -> frozenset[int]:
        for position in sorted(positions):
            while position < len(self._parts) and self._parts[position] is None:
                position += 1
                positions.add(position)
        return frozenset(positions)


class FileFinder:
    """Finds files below a directory. Links are neither files nor entered.

    Attributes:
        unreadable: Directories that this user may not list, found by the last search.
    """

    def __init__(self, root: Path, globs: Sequence[str]) -> None:
        """Search nothing yet."""
        self._root = str(root)
        self._globs = [_Glob(glob) for glob in globs]
        self._listings: dict[str, _Listing] = {}
        self.unreadable: list[str] = []

    def matches(self, path: str) -> bool:
        """Return whether a relative path may be one of the files."""
        names = path.split("/")
        if path.startswith("/") or not {"", ".", ".."}.isdisjoint(names):
            return False
        states = [glob.start for glob in self._globs]
        for name in names:
            states = self._enter(states, name)
        return self._is_end(states)

    def find(self) -> Iterator[str]:
        """Yield the relative paths of the files.

        Raises:
            OSError: The root is not a directory that this user may list.
        """
        self.unreadable = []
        known, self._listings = self._listings, {}
        pending: list[tuple[str, _States]] = [("", [glob.start for glob in self._globs])]
        while pending:
            directory, states = pending.pop()
            try:
                listing = self._list(directory, states, known.get(directory))
            except OSError as error:
                if not directory:
                    raise
                if isinstance(error, PermissionError):
                    self.unreadable.append(directory)
                continue  # it is gone
            self._listings[directory] = listing
            yield from listing.files
            pending += listing.directories

    def _enter(self, states: _States, name: str) -> _States:
        return [glob.enter(state, name) for glob, state in zip(self._globs, states, strict=True)]

    def _is_end(self, states: _States) -> bool:
        return any(glob.is_end(state) for glob, state in zip(self._globs, states, strict=True))

    def _list(self, directory: str, states: _States, known: _Listing | None) -> _Listing:
        path = f"{self._root}/{directory}" if directory else self._root
        modified_ns = os.stat(path, follow_symlinks=not directory).st_mtime_ns
        if known is not None and known.modified_ns == modified_ns and known.listed_ns - modified_ns > _RECENT_NS:
            return known
        listing = _Listing(modified_ns, time.time_ns(), [], [])
        prefix = f"{directory}/" if directory else ""
        with os.scandir(path) as entries:
            for entry in entries:
                inner = self._enter(states, entry.name)
                if not any(inner):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if prefix.count("/") < _MAX_DEPTH:
                        listing.directories.append((prefix + entry.name, inner))
                elif self._is_end(inner) and entry.is_file(follow_symlinks=False):
                    listing.files.append(prefix + entry.name)
        return listing
