"""`Window`: which lines near the newest one were seen, as a multiset. Pure: no clock, no I/O.

For services that know a line only by its time and text, and that may make lines visible late. Each read asks again
for the last seconds before the newest line; the window tells which lines of the reply are new:

- Two equal lines are two: of a pair (time, text), as many are dropped as were seen.
- A line that becomes visible late, but within the window, is found.
- What a line is called does not depend on where reads were cut: its uid is hashed from time, text and *occurrence*
  (its place among equal lines), its time is counted up by its *ordinal* (its place within its millisecond), and both
  come out the same from any reply that has the whole millisecond.

The window reaches `late_window_s` back from the newest line, or less: it holds about 20,000 lines, and shrinks by
whole milliseconds. The newest millisecond always stays. Of one with more lines than that only their number is kept:
its lines are told apart by their place, so a late line is found only if it comes after those that were seen.

Only in one reply that is out of order by more than the window can equal lines of a millisecond get the same uid.
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain, compress, pairwise, repeat
from typing import NamedTuple

import msgspec

from tailspan.errors import ConfigError
from tailspan.logs.page import DIGEST_BYTES, NANOS_PER_MS

__all__ = ["MAX_WINDOW_LINES", "NewLines", "Window"]

MAX_WINDOW_LINES = 20_000


class _Cursor(msgspec.Struct, array_like=True, tag="tailspan.services.fused.window/1"):
    """The serialised window.

    Attributes:
        start_ms: Lines before this are not looked at again.
        steps_ms: For each millisecond with lines: how long after the one before (the first: after ``start_ms``).
        counts: How many lines each of them has.
        digests: 8 bytes for each line, in that order; none for a millisecond with more than the window may hold.
    """

    start_ms: int
    steps_ms: list[int]
    counts: list[int]
    digests: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Cursor).decode


class NewLines(NamedTuple):
    """The lines of a reply that were not seen before, in its order.

    Attributes:
        places: Where they were in what was given to `Window.take`.
        times_unix_nano: Their times, counted up within each millisecond, in ns since the epoch.
        digests: 8 bytes for each, as `tailspan.logs.page.line_digest` makes them.
    """

    places: Sequence[int]
    times_unix_nano: list[int]
    digests: list[bytes]


class Window:
    """One read of a log: feed it the reply from start to end; take a cursor at any point.

    Attributes:
        start_ms: Lines before this are not new. The reply must have all lines at or after it; None: all there are.
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
    ) -> None:
        """Begin a read.

        Args:
            identity: The service's identity.
            job_id: The job; with the identity it goes into each digest.
            cursor: Where an earlier read stopped; None to begin.
            since_ms: Only without cursor: lines before this are left out.
            late_window_s: How far before the newest line others may still become visible, in seconds.
            max_lines: How many lines the window may hold; the same for all reads of a job.

        Raises:
            ConfigError: The cursor was made by something else.
        """
        since_ms = None if since_ms is None else max(0, since_ms)
        self._head = f"{identity}\0{job_id}\0".encode()
        self._late_window_ms = max(0, int(late_window_s * 1000))
        self._max_lines = max_lines
        # What the next read must know: times and digests of lines, how many each millisecond has, and of which only
        # that number is kept.
        self._times: list[int] = []
        self._ids: list[bytes] = []
        self._totals: dict[int, int] = {}
        self._full: set[int] = set()
        self._kept_from_ms = since_ms or 0
        self._newest_ms = -1
        self._sorted = True
        # Equal lines so far, in milliseconds that no earlier read saw.
        self._repeats: dict[bytes, int] = {}
        # What earlier reads saw: it must stay until the end of the reply, which may be in any order.
        self._seen: dict[bytes, int] = {}
        self._seen_full: dict[int, int] = {}
        self._seen_to_ms = -1
        # What of that has come again in this reply.
        self._again: dict[bytes, int] = {}
        self._again_totals: dict[int, int] = {}
        if cursor is not None:
            self._restore(cursor, job_id)
        self.start_ms = since_ms if cursor is None else self._kept_from_ms

    @property
    def since_ms(self) -> int | None:
        """What to ask the service for, whether it takes ``since_ms`` as inclusive or not."""
        return self.start_ms - 1 if self.start_ms else None

    def take(self, times_ms: Sequence[int], messages: Sequence[bytes]) -> NewLines:
        """Take in the next lines of the reply and return those that are new.

        Args:
            times_ms: Their times, in ms since the epoch, 0 or more.
            messages: Their text as read, without line ending.
        """
        fresh = self._take_fresh(times_ms, messages)
        if fresh is not None:
            return fresh
        places: list[int] = []
        times_unix_nano: list[int] = []
        digests: list[bytes] = []
        add_place, add_time, add_digest = places.append, times_unix_nano.append, digests.append
        add_ms, add_id = self._times.append, self._ids.append
        # Looked up once: the loop is hot while the end of a log is read again and again.
        blake2b, size, head = hashlib.blake2b, DIGEST_BYTES, self._head
        totals, repeats, max_lines, start_ms = self._totals, self._repeats, self._max_lines, self.start_ms or 0
        last_ms = -1
        ordinal = nano = 0
        known = False
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
                prefix = b"%b%d\x000\x00" % (head, nano)
                known = ms <= self._seen_to_ms
                if ms >= self._newest_ms:
                    self._newest_ms = ms
                elif not known:
                    self._sorted = False
            digest = blake2b(prefix + message, digest_size=size).digest()
            if known or ordinal >= max_lines:
                taken = self._take_slowly(ms, digest, message, ordinal)
                if taken is None:
                    continue
                digest = taken
            else:
                add_ms(ms)
                add_id(digest)
                occurrence = repeats.get(digest, 0)
                repeats[digest] = occurrence + 1
                if occurrence:
                    digest = self._digest(ms, occurrence, message)
            add_place(place)
            # One line more than there are ns in a ms must not slip into the next.
            add_time(nano + (ordinal if ordinal < NANOS_PER_MS else NANOS_PER_MS - 1))
            add_digest(digest)
            ordinal += 1
        if ordinal:
            totals[last_ms] = ordinal
        self._prune()
        return NewLines(places, times_unix_nano, digests)

    def _take_fresh(self, times_ms: Sequence[int], messages: Sequence[bytes]) -> NewLines | None:
        """Do what `take` does, without steps for each line, where all are new, in order and different; else nothing."""
        if not times_ms:
            return None
        first_ms, last_ms = times_ms[0], times_ms[-1]
        if first_ms < max(self._newest_ms, self.start_ms or 0, self._seen_to_ms + 1):
            return None
        changes = list(compress(range(1, len(times_ms)), map(operator.ne, times_ms[1:], times_ms)))
        starts = [0, *changes]
        instants = [times_ms[place] for place in starts]
        counts = list(map(operator.sub, [*changes, len(times_ms)], starts))
        before = self._totals.get(first_ms, 0)
        if max(counts) + before > self._max_lines or any(ms > after for ms, after in pairwise(instants)):
            return None
        head, size, blake2b = self._head, DIGEST_BYTES, hashlib.blake2b
        prefixes = (b"%b%d\x000\x00" % (head, ms * NANOS_PER_MS) for ms in instants)
        texts = map(operator.add, chain.from_iterable(map(repeat, prefixes, counts)), messages)
        digests = [blake2b(text, digest_size=size).digest() for text in texts]
        once = dict.fromkeys(digests, 1)
        if len(once) != len(digests) or not self._repeats.keys().isdisjoint(once):
            return None
        self._repeats.update(once)
        self._times += times_ms
        self._ids += digests
        self._totals.update(zip(instants, counts, strict=True))
        self._totals[first_ms] = before + counts[0]
        self._newest_ms = last_ms
        times_unix_nano: list[int] = []
        ordinal = before
        for ms, count in zip(instants, counts, strict=True):
            nano = ms * NANOS_PER_MS + ordinal
            times_unix_nano += range(nano, nano + count)
            ordinal = 0
        self._prune()
        return NewLines(range(len(digests)), times_unix_nano, digests)

    def cursor(self) -> bytes:
        """Return where to go on after all lines so far: about 10 bytes for each line that the window holds."""
        instants = sorted(self._totals)
        steps = list(map(operator.sub, instants, [self._kept_from_ms, *instants]))
        counts = list(map(self._totals.__getitem__, instants))
        ids = self._ids
        if self._full:
            ids = [digest for ms, digest in zip(self._times, ids, strict=True) if ms not in self._full]
        return _encode(_Cursor(self._kept_from_ms, steps, counts, b"".join(ids)))

    def _take_slowly(self, ms: int, digest: bytes, message: bytes, ordinal: int) -> bytes | None:
        """Return the digest of a line in a millisecond that was seen before or is very full; None if it was seen."""
        place = ordinal
        if ms <= self._seen_to_ms:
            place = self._again_totals.get(ms, 0)
            self._again_totals[ms] = place + 1
        seen_full = self._seen_full.get(ms, 0)
        if ordinal >= self._max_lines:
            self._full.add(ms)
        if place >= self._max_lines or seen_full:
            return None if place < seen_full else self._digest(ms, place, message)
        occurrence = self._again.get(digest, 0)
        self._again[digest] = occurrence + 1
        if occurrence < self._seen.get(digest, 0):
            return None
        self._sorted = False
        self._times.append(ms)
        self._ids.append(digest)
        return self._digest(ms, occurrence, message) if occurrence else digest

    def _digest(self, ms: int, occurrence: int, message: bytes) -> bytes:
        key = b"%b%d\x00%d\x00" % (self._head, ms * NANOS_PER_MS, occurrence)
        return hashlib.blake2b(key + message, digest_size=DIGEST_BYTES).digest()

    def _prune(self) -> None:
        """Forget what is too old, and the oldest milliseconds while there is too much."""
        if not self._sorted:
            order = sorted(range(len(self._times)), key=self._times.__getitem__)
            self._times = [self._times[at] for at in order]
            self._ids = [self._ids[at] for at in order]
            self._sorted = True
        keep_ms = max(self._kept_from_ms, self._newest_ms - self._late_window_ms)
        if len(self._times) > self._max_lines:
            keep_ms = max(keep_ms, self._times[-self._max_lines - 1] + 1)
        keep_ms = max(keep_ms, *(ms + 1 for ms in self._full), 0)
        self._kept_from_ms = keep_ms = max(self._kept_from_ms, min(keep_ms, self._newest_ms))
        cut = bisect_left(self._times, keep_ms)
        for ms in {*self._times[:cut], *self._full}:
            if ms < keep_ms:
                self._totals.pop(ms, None)
                self._full.discard(ms)
        for digest in self._ids[:cut]:
            self._repeats.pop(digest, None)
        del self._times[:cut]
        del self._ids[:cut]

    def _restore(self, cursor: bytes, job_id: str) -> None:
        try:
            saved = _decode(cursor)
            listed = sum(count for count in saved.counts if count <= self._max_lines)
            fits = len(saved.steps_ms) == len(saved.counts) and len(saved.digests) == listed * DIGEST_BYTES
            if not fits or min(saved.steps_ms[1:], default=1) < 1:
                raise msgspec.DecodeError
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ConfigError("the cursor is not one of a service that knows lines by time", job_id=job_id) from None
        self._kept_from_ms = saved.start_ms
        instants = list(accumulate(saved.steps_ms, initial=saved.start_ms))[1:]
        self._totals = dict(zip(instants, saved.counts, strict=True))
        for ms, count in self._totals.items():
            if count > self._max_lines:
                self._seen_full[ms] = count
            else:
                self._times += [ms] * count
        self._full = set(self._seen_full)
        self._ids = [saved.digests[at : at + DIGEST_BYTES] for at in range(0, len(saved.digests), DIGEST_BYTES)]
        self._seen = dict(Counter(self._ids))
        self._newest_ms = self._seen_to_ms = instants[-1] if instants else -1
