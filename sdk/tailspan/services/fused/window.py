"""`LateWindow`: a multiset of the lines near the newest one, to find the new lines of a reply. Pure: no clock, no I/O.

For services that know a line only by its time and text, and that may make lines visible late. Each read asks again for
the last seconds before the newest line, and the window finds which lines of the reply are new:

- Two equal lines are two lines: of each pair (time, text) it drops as many as earlier reads had.
- It finds a line that becomes visible late, but within the window.
- The names of a line do not depend on where reads were cut. Its uid is a hash of time, text and *occurrence* (its
  number among equal lines), and its time is counted up by its *ordinal* (its number within its millisecond). Both are
  the same from any reply that has the whole millisecond.

The window reaches `late_window_s` back from the newest line, or less: it holds about 20,000 lines and shrinks by whole
milliseconds, but always keeps the newest one. Of a millisecond with more lines than that it keeps only their number:
their place distinguishes these lines, so a late line is found only if it comes after the lines that were seen.

Equal lines of one millisecond can get the same uid only in a reply that is out of order by more than the window.
"""

from __future__ import annotations

import hashlib
import operator
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise, repeat
from typing import NamedTuple

import msgspec

from tailspan._native import compiled
from tailspan.errors import ConfigError
from tailspan.logs.page import DIGEST_BYTES, NANOS_PER_MS
from tailspan.logs.text import split_text

__all__ = ["MAX_WINDOW_LINES", "LateWindow", "NewLines", "distinct_digests", "distinct_digests_in_python"]

MAX_WINDOW_LINES = 20_000


class _Cursor(msgspec.Struct, array_like=True, tag="tailspan.window/1"):
    """The serialised window.

    Attributes:
        start_ms: Lines before this time are not read again.
        steps_ms: For each millisecond with lines, the time since the one before (the first: since ``start_ms``).
        counts: Number of lines in each of them.
        digests: 8 bytes for each line, in that order; none for a millisecond with more lines than the window may hold.
    """

    start_ms: int
    steps_ms: list[int]
    counts: list[int]
    digests: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Cursor).decode


class NewLines(NamedTuple):
    """The lines of a reply that no earlier read had, in the order of the reply.

    Attributes:
        places: Their indexes among the lines that were given.
        starts: Indexes in `places` where runs begin: within a run, the time counts up by one nanosecond.
        firsts_unix_nano: The time of the first line of each run, in ns since the epoch.
        digests: 8 bytes for each line, as `tailspan.logs.page.line_digest` makes them.
    """

    places: Sequence[int]
    starts: list[int]
    firsts_unix_nano: list[int]
    digests: bytes


def distinct_digests_in_python(
    key: bytes, lines: list[bytes] | bytes, instants_ms: list[int], counts: list[int], known: bytes, /
) -> bytes | None:
    """Return the digests of lines as the first of their kind; None if two of them, or of the known ones, are equal.

    Args:
        key: The part of `tailspan.logs.page.line_digest`'s key before the time.
        lines: The lines, as a list or as a text with a newline after each.
        instants_ms: The times that they have, in ms since the epoch, in the order of the lines.
        counts: The number of lines of each of these times.
        known: Digests of other lines.
    """
    bodies = split_text(lines) if isinstance(lines, bytes) else lines
    begun = hashlib.blake2b(key, digest_size=DIGEST_BYTES)
    prefixes = (b"%d\x000\x00" % (ms * NANOS_PER_MS) for ms in instants_ms)
    digests = []
    for prefix, body in zip(chain.from_iterable(map(repeat, prefixes, counts)), bodies, strict=True):
        hashed = begun.copy()
        hashed.update(prefix + body)
        digests.append(hashed.digest())
    others = _split_digests(known)
    return b"".join(digests) if len({*digests, *others}) == len(digests) + len({*others}) else None


distinct_digests = compiled("distinct_digests", distinct_digests_in_python)


def _split_digests(digests: bytes | bytearray) -> list[bytes]:
    return [bytes(digests[at : at + DIGEST_BYTES]) for at in range(0, len(digests), DIGEST_BYTES)]


class _Kept:
    """The lines in the window: what the next read must know.

    Attributes:
        times_ms: The time of each line.
        digests: The digest of each line as the first of its kind (occurrence 0), 8 bytes each.
        totals: Number of lines by millisecond.
        overfull: Milliseconds with more lines than the window may hold.
        from_ms: Where the window begins.
        newest_ms: Time of the newest line; -1 without lines.
        is_sorted: Whether the lines are in order of time.
    """

    __slots__ = ("digests", "from_ms", "is_sorted", "newest_ms", "overfull", "times_ms", "totals")

    def __init__(self, from_ms: int) -> None:
        self.times_ms = array("q")
        self.digests = bytearray()
        self.totals: dict[int, int] = {}
        self.overfull: set[int] = set()
        self.from_ms = from_ms
        self.newest_ms = -1
        self.is_sorted = True

    @classmethod
    def decode(cls, cursor: bytes, max_lines: int) -> _Kept:
        """Return the window of a cursor.

        Raises:
            msgspec.DecodeError: The cursor is not one of a window of this size.
        """
        saved = _decode(cursor)
        listed = sum(count for count in saved.counts if count <= max_lines)
        fits = len(saved.steps_ms) == len(saved.counts) and len(saved.digests) == listed * DIGEST_BYTES
        if not fits or min(saved.steps_ms[1:], default=1) < 1:
            raise msgspec.DecodeError
        kept = cls(saved.start_ms)
        instants = list(accumulate(saved.steps_ms, initial=saved.start_ms))[1:]
        kept.totals = dict(zip(instants, saved.counts, strict=True))
        for ms, count in kept.totals.items():
            if count > max_lines:
                kept.overfull.add(ms)
            else:
                kept.times_ms.extend(array("q", [ms]) * count)
        kept.digests += saved.digests
        kept.newest_ms = instants[-1] if instants else -1
        return kept

    def encode(self) -> bytes:
        """Return the cursor of this window: about 10 bytes for each line."""
        instants = sorted(self.totals)
        steps = list(map(operator.sub, instants, [self.from_ms, *instants]))
        counts = list(map(self.totals.__getitem__, instants))
        digests = bytes(self.digests)
        if self.overfull:
            digests = self._digests_at(at for at, ms in enumerate(self.times_ms) if ms not in self.overfull)
        return _encode(_Cursor(self.from_ms, steps, counts, digests))

    def _digests_at(self, places: Iterable[int]) -> bytes:
        return b"".join([self.digests[DIGEST_BYTES * at : DIGEST_BYTES * (at + 1)] for at in places])

    def digests_since(self, ms: int) -> bytearray:
        """Return the digests of the lines at or after a time; only between two takes, when they are in order."""
        return self.digests[DIGEST_BYTES * bisect_left(self.times_ms, ms) :]

    def prune(self, late_window_ms: int, max_lines: int, latest_ms: int | None) -> None:
        """Drop lines that are too old, and the oldest milliseconds above the limit."""
        if not self.is_sorted:
            order = sorted(range(len(self.times_ms)), key=self.times_ms.__getitem__)
            self.digests = bytearray(self._digests_at(order))
            self.times_ms = array("q", sorted(self.times_ms))
            self.is_sorted = True
        newest_ms = self.newest_ms
        if latest_ms is not None and newest_ms > latest_ms:
            believed = bisect_right(self.times_ms, latest_ms)
            newest_ms = self.times_ms[believed - 1] if believed else self.from_ms
        keep_ms = max(self.from_ms, newest_ms - late_window_ms)
        if len(self.times_ms) > max_lines:
            keep_ms = max(keep_ms, self.times_ms[-max_lines - 1] + 1)
        keep_ms = max(keep_ms, *(ms + 1 for ms in self.overfull), 0)
        self.from_ms = keep_ms = max(self.from_ms, min(keep_ms, self.newest_ms))
        cut = bisect_left(self.times_ms, keep_ms)
        for ms in {*self.times_ms[:cut], *self.overfull}:
            if ms < keep_ms:
                self.totals.pop(ms, None)
                self.overfull.discard(ms)
        del self.times_ms[:cut]
        del self.digests[: DIGEST_BYTES * cut]


class _Earlier:
    """The lines of earlier reads, and those of them that this reply has had again.

    They stay until the end of the reply, because a reply may be in any order.

    Attributes:
        counts: Number of lines by digest (of occurrence 0).
        overfull: Number of lines of each millisecond whose digests were not kept.
        to_ms: Time of the newest line; -1 without lines.
        again: Lines of this reply up to `to_ms`, by digest.
        again_totals: The same, by millisecond.
    """

    __slots__ = ("again", "again_totals", "counts", "overfull", "to_ms")

    def __init__(self, kept: _Kept) -> None:
        self.counts = dict(Counter(_split_digests(kept.digests)))
        self.overfull = {ms: kept.totals[ms] for ms in kept.overfull}
        self.to_ms = kept.newest_ms
        self.again: dict[bytes, int] = {}
        self.again_totals: dict[int, int] = {}


class LateWindow:
    """One read of a log: give it the reply from start to end; a cursor can be made at any point.

    Attributes:
        start_ms: Lines before this are not new. The reply must have all lines at or after it; None: all lines.
    """

    def __init__(
        self,
        identity: str,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float,
        max_lines: int = MAX_WINDOW_LINES,
        latest_ms: int | None = None,
    ) -> None:
        """Begin a read.

        Args:
            identity: The service's identity.
            job_id: The job; identity and job id are part of each digest.
            cursor: Where an earlier read stopped; None to begin.
            since_ms: Only without a cursor: drop lines before this time.
            late_window_s: How late a line may become visible, in seconds.
            max_lines: Number of lines that the window may hold; the same for all reads of a job.
            latest_ms: A line after this time, in ms since the epoch, does not move the window: the lines that follow
                one of the year 2200 are found all the same. None: any time is possible.

        Raises:
            ConfigError: The cursor is of another kind.
        """
        since_ms = None if since_ms is None else max(0, since_ms)
        # The hash of a line continues that of its job.
        self._key = f"{identity}\0{job_id}\0".encode()
        self._begun = hashlib.blake2b(self._key, digest_size=DIGEST_BYTES)
        self._late_window_ms = max(0, int(late_window_s * 1000))
        self._max_lines = max_lines
        self._latest_ms = latest_ms
        self._kept = _Kept(since_ms or 0)
        if cursor is not None:
            try:
                self._kept = _Kept.decode(cursor, max_lines)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise ConfigError(
                    "the cursor is not one of a service that knows lines by time", job_id=job_id
                ) from None
        self._earlier = _Earlier(self._kept)
        self.start_ms = since_ms if cursor is None else self._kept.from_ms

    @property
    def since_ms(self) -> int | None:
        """The ``since_ms`` to send to the service, whether it includes lines of that time or not."""
        return self.start_ms - 1 if self.start_ms else None

    def cursor(self) -> bytes:
        """Return the cursor after all lines so far: about 10 bytes for each line in the window."""
        return self._kept.encode()

    def take(self, times_ms: Sequence[int], messages: Sequence[bytes]) -> NewLines:
        """Add the next lines of the reply and return those that are new.

        Args:
            times_ms: Their times, in ms since the epoch, 0 or more.
            messages: Their text as read, without line ending.
        """
        new = self._take_line_by_line(times_ms, messages)
        self._kept.prune(self._late_window_ms, self._max_lines, self._latest_ms)
        return new

    def take_in_order(self, lines: list[bytes] | bytes, instants_ms: list[int], counts: list[int]) -> NewLines | None:
        """Add the next lines as `take`, without a step for each, if all are new, different and in order.

        Args:
            lines: Their text, as a list or with a newline after each.
            instants_ms: Their times, in ms since the epoch, without the repeats of one line after the other.
            counts: Number of lines of each of these times.

        Returns:
            The lines; None, and nothing is added, if they are not of this kind.
        """
        kept, first_ms = self._kept, instants_ms[0]
        if first_ms < max(kept.newest_ms, self.start_ms or 0, self._earlier.to_ms + 1):
            return None
        before = kept.totals.get(first_ms, 0)
        if max(counts) + before > self._max_lines or any(map(operator.gt, instants_ms, instants_ms[1:])):
            return None
        known = bytes(kept.digests_since(first_ms)) if before else b""
        digests = distinct_digests(self._key, lines, instants_ms, counts, known)
        if digests is None:
            return None
        kept.times_ms.extend(chain.from_iterable(map(repeat, instants_ms, counts)))
        kept.digests += digests
        kept.totals.update(zip(instants_ms, counts, strict=True))
        kept.totals[first_ms] = before + counts[0]
        kept.newest_ms = instants_ms[-1]
        kept.prune(self._late_window_ms, self._max_lines, self._latest_ms)
        firsts_unix_nano = [ms * NANOS_PER_MS for ms in instants_ms]
        firsts_unix_nano[0] += before
        starts = list(accumulate(counts, initial=0))
        return NewLines(range(starts.pop()), starts, firsts_unix_nano, digests)

    def _take_line_by_line(self, times_ms: Sequence[int], messages: Sequence[bytes]) -> NewLines:
        places: list[int] = []
        times_unix_nano: list[int] = []
        digests: list[bytes] = []
        kept = self._kept
        # Local names: this loop is hot while the end of a log is read again and again.
        add_place, add_time, add_digest = places.append, times_unix_nano.append, digests.append
        keep_ms, keep_digest, hash_of = kept.times_ms.append, kept.digests.extend, self._hash
        totals, max_lines, start_ms = kept.totals, self._max_lines, self.start_ms or 0
        # Number of lines by digest, in milliseconds that no earlier read had.
        repeats = Counter(_split_digests(kept.digests_since(max(min(times_ms, default=0), self._earlier.to_ms + 1))))
        last_ms = -1
        ordinal = nano = 0
        is_earlier = False
        prefix = b""
        for place, (ms, message) in enumerate(zip(times_ms, messages, strict=True)):
            if ms != last_ms:
                if ms < start_ms:
                    continue
                if ordinal:
                    totals[last_ms] = ordinal
                last_ms = ms
                ordinal = totals.get(ms, 0)
                nano = ms * NANOS_PER_MS
                prefix = b"%d\x000\x00" % nano
                is_earlier = ms <= self._earlier.to_ms
                if ms >= kept.newest_ms:
                    kept.newest_ms = ms
                elif not is_earlier:
                    kept.is_sorted = False
            digest = hash_of(prefix + message)
            if is_earlier or ordinal >= max_lines:
                found = self._find_new(ms, digest, message, ordinal)
                if found is None:
                    continue
                digest = found
            else:
                keep_ms(ms)
                keep_digest(digest)
                occurrence = repeats.get(digest, 0)
                repeats[digest] = occurrence + 1
                if occurrence:
                    digest = self._digest(ms, occurrence, message)
            add_place(place)
            # A millisecond with more lines than nanoseconds must not run into the next one.
            add_time(nano + (ordinal if ordinal < NANOS_PER_MS else NANOS_PER_MS - 1))
            add_digest(digest)
            ordinal += 1
        if ordinal:
            totals[last_ms] = ordinal
        jumps = (place for place, (nano, after) in enumerate(pairwise(times_unix_nano), 1) if after - nano != 1)
        starts = [0, *jumps] if places else []
        return NewLines(places, starts, list(map(times_unix_nano.__getitem__, starts)), b"".join(digests))

    def _find_new(self, ms: int, digest: bytes, message: bytes, ordinal: int) -> bytes | None:
        """Return the digest of a line in an earlier or overfull millisecond; None if an earlier read had the line."""
        earlier = self._earlier
        place = ordinal
        if ms <= earlier.to_ms:
            place = earlier.again_totals.get(ms, 0)
            earlier.again_totals[ms] = place + 1
        overfull = earlier.overfull.get(ms, 0)
        # Only a millisecond that has left the window has a smaller ordinal than place.
        if place >= self._max_lines or overfull:
            self._kept.overfull.add(ms)
            return None if place < overfull else self._digest(ms, place, message)
        occurrence = earlier.again.get(digest, 0)
        earlier.again[digest] = occurrence + 1
        if occurrence < earlier.counts.get(digest, 0):
            return None
        kept = self._kept
        if ordinal >= self._max_lines:
            kept.overfull.add(ms)
        kept.is_sorted = False
        kept.times_ms.append(ms)
        kept.digests += digest
        return self._digest(ms, occurrence, message) if occurrence else digest

    def _digest(self, ms: int, occurrence: int, message: bytes) -> bytes:
        return self._hash(b"%d\x00%d\x00%b" % (ms * NANOS_PER_MS, occurrence, message))

    def _hash(self, text: bytes) -> bytes:
        hashed = self._begun.copy()
        hashed.update(text)
        return hashed.digest()
