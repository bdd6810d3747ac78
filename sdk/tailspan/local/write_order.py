"""The order in which a job wrote into two pipes, which the pipes themselves do not record.

Linux reports each write into a pipe to inotify, in order; only writes into the same pipe that follow each other
directly may be one report. So lines that a job writes alternately, each by a write of its own, keep their order,
however soon they follow each other. Where several lines come by one report, the place of the others is a guess.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

import os
import struct

from tailspan.local.capture import Piece
from tailspan.local.process_tree import system_call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WriteOrder", "in_order"]

_INOTIFY_INIT1 = {"x86_64": 294, "aarch64": 26, "riscv64": 26}
_INOTIFY_ADD_WATCH = {"x86_64": 254, "aarch64": 27, "riscv64": 27}
_IN_MODIFY = 2
_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16
_ALL = 1 << 62


class WriteOrder:
    """Reports of writes into pipes.

    Attributes:
        pending: Writes that have not been read from their pipes yet, as numbers of streams.
        later: Lines that were read and come after these, by the number of their stream.
    """

    def __init__(self, fd: int, streams: dict[int, int]) -> None:
        self.pending: list[int] = []
        self.later: dict[int, list[Piece]] = {}
        self._fd = fd
        self._streams = streams

    @classmethod
    def open(cls, pipes: dict[int, int]) -> WriteOrder | None:
        """Begin to watch pipes, before anything is written; None where the system does not report writes.

        Args:
            pipes: The number of each stream, by the end of its pipe to read from.
        """
        machine = os.uname().machine
        if os.uname().sysname != "Linux" or machine not in _INOTIFY_INIT1:
            return None
        fd = system_call(_INOTIFY_INIT1[machine], os.O_NONBLOCK | os.O_CLOEXEC, 0)
        if fd < 0:
            return None
        streams: dict[int, int] = {}
        for pipe, number in pipes.items():
            path = b"/proc/self/fd/%d\0" % pipe
            streams[system_call(_INOTIFY_ADD_WATCH[machine], fd, path, _IN_MODIFY)] = number
        if -1 in streams or len(streams) != len(pipes):
            os.close(fd)
            return None
        return cls(fd, streams)

    def take(self) -> list[int]:
        """Return the streams of the writes since the last call, in order."""
        found: list[int] = []
        try:
            while data := os.read(self._fd, _READ_BYTES):
                # A watch of -1 says that some were lost.
                found += [self._streams[watch] for watch, *_ in _EVENT.iter_unpack(data) if watch in self._streams]
                if len(data) <= _READ_BYTES - _EVENT.size:
                    break
        except OSError:
            # There are none now.
            pass
        return found

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)


def in_order(pieces: dict[int, list[Piece]], writes: list[int], known: int) -> Iterator[tuple[int, Piece]]:
    """Yield the lines of several streams in the order of their writes, each with the number of its stream.

    One line belongs to each write; what is left of a stream belongs to its last write.

    Args:
        pieces: What was read of each stream. Left in it are lines that follow a write which has not been read yet.
        writes: The streams of the writes, in order. Left in it are those from the first that has not been read yet.
        known: How many of the writes have been read for certain: one of these without a line was a part of one.
    """
    streams = {number: _HeldLines(held) for number, held in pieces.items()}
    left = {number: writes.count(number) for number in pieces}
    position = 0
    while position < len(writes):
        number, end = writes[position], _end_of_run(writes, position)
        if number in left:  # else it is of a stream that has ended
            left[number] -= end - position
            taken = 0
            for piece in streams[number].take(end - position if left[number] else _ALL):
                taken += piece.lines
                yield number, piece
            unread = max(position + taken, known)
            if unread < end:
                writes[:] = writes[unread:]
                break
        position = end
    else:
        writes.clear()
        for number, rest in streams.items():
            yield from ((number, piece) for piece in rest.take(_ALL))
    for rest in streams.values():
        rest.release()


def _end_of_run(writes: list[int], position: int) -> int:
    """Return the end of the writes of one stream that follow each other from a position on."""
    end = position + 1
    while end < len(writes) and writes[end] == writes[position]:
        end += 1
    return end


class _HeldLines:
    """The lines of one stream that are held. Taking some does not copy the others, which may be thousands."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self._index = 0
        self._offset = 0
        self._taken = 0

    def take(self, lines: int) -> Iterator[Piece]:
        """Yield the first lines, by the pieces that have them."""
        while lines and self._index < len(self._pieces):
            piece = self._pieces[self._index]
            left = piece.lines - self._taken
            if left <= lines:
                yield self._rest(piece)
                self._index += 1
                self._offset = self._taken = 0
                lines -= left
            else:
                end = self._offset
                for _ in range(lines):
                    end = piece.text.index(b"\n", end) + 1
                yield Piece(piece.text[self._offset : end], lines)
                self._offset = end
                self._taken += lines
                lines = 0

    def release(self) -> None:
        """Leave in the list of pieces what was not taken."""
        if self._taken:
            self._pieces[self._index] = self._rest(self._pieces[self._index])
        del self._pieces[: self._index]

    def _rest(self, piece: Piece) -> Piece:
        return Piece(piece.text[self._offset :], piece.lines - self._taken, piece.flags) if self._taken else piece
