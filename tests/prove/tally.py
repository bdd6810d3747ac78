"""The counting of the proof: what arrived, held against what the jobs wrote. Pure, and compact enough for millions.

Each line is numbered within its job, from 0, and says so: ``job-1 #0000042 ...``. The order of the numbers is the order
in which the service returns the lines. What is counted for a job is in `JobCount`; for spans in `SpanCount`.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields

LINE = re.compile(r"(?P<job>[\w.-]+) #(?P<number>\d{7})(?: .*)?", re.DOTALL)
LATEST_NS = (1 << 63) - 1


def line_text(job: str, number: int, rest: str = "") -> str:
    """Return the text of a numbered line."""
    return f"{job} #{number:07d}{rest and ' '}{rest}"


@dataclass
class JobCount:
    """What was found of one job, or of several together.

    Attributes:
        expected: Lines that the job wrote and the service returned.
        records: Records that arrived.
        missing: Lines that never arrived.
        repeated: Records that carry a uid which had come before: the price of "at least once".
        needless: Of those, records of lines that were acked before, so that nothing excuses the repeat.
        out_of_order: Lines whose first arrival came after that of a later line.
        wrong_time: Records whose time is not the source's, or not the one that the same line had before.
        uid_unstable: Lines that came with more uids than there are such lines, and uids that two lines share.
        foreign: Records that nobody wrote, or whose text is not what was written.
    """

    expected: int = 0
    records: int = 0
    missing: int = 0
    repeated: int = 0
    needless: int = 0
    out_of_order: int = 0
    wrong_time: int = 0
    uid_unstable: int = 0
    foreign: int = 0

    def __add__(self, other: JobCount) -> JobCount:
        """Return both counts together."""
        return JobCount(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def faults(self) -> int:
        """How many findings break the guarantee."""
        return self.missing + self.needless + self.out_of_order + self.wrong_time + self.uid_unstable + self.foreign


class JobTally:
    """Takes in the records of one job.

    Args:
        job: What its lines begin with.
        written: Returns the earliest and the latest time in ns that a record with this number and text may carry; None
            where the job wrote no such line.
        copies: Numbers of lines that the job wrote more than once, with text and time the same, and how often.
        late: Numbers of lines that became visible late: they have no place in the order.

    Attributes:
        cut: A last line that ends before its number does, and its number; None if there is no such line.
        has_stable_times: Whether a line that comes again must have the same time.
    """

    def __init__(
        self,
        job: str,
        written: Callable[[int, str], tuple[int, int] | None] = lambda number, text: (0, LATEST_NS),
        *,
        copies: Mapping[int, int] | None = None,
        late: Collection[int] = (),
    ) -> None:
        self.job = job
        self.cut: tuple[str, int] | None = None
        self.has_stable_times = True
        self.records = 0
        self._written = written
        self._copies = {} if copies is None else copies
        self._late = late
        self._uids = array("Q")
        self._nanos = array("Q")
        self._more: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._newest = -1
        self._found = JobCount()
        self._acked = 0
        self._since_start: set[int] | None = None

    def restarted(self, acked: int, *, strict: bool = True) -> None:
        """Note that the agent is restarted with a number of lines acknowledged: those must not come again.

        Args:
            acked: How many lines of the job are acked; they are the ones with the lowest numbers.
            strict: Whether a line may not come twice before the next restart either.
        """
        self._acked = acked
        self._since_start = set() if strict else None

    @property
    def distinct(self) -> int:
        """How many different lines arrived."""
        return sum(1 for uid in self._uids if uid) + sum(map(len, self._more.values()))

    def take(self, text: str, time_unix_nano: int, uid: str, *, in_order: bool = True) -> None:
        """Take in a record.

        Args:
            text: Its body.
            time_unix_nano: Its time in ns since the epoch.
            uid: Its ``log.record.uid``.
            in_order: Whether it has a place in the order; what is kept in a dead letter has none.
        """
        self.records += 1
        match = LINE.fullmatch(text)
        number = int(match["number"]) if match is not None and match["job"] == self.job else -1
        if self.cut is not None and text == self.cut[0]:
            number = self.cut[1]
        times = self._written(number, text) if number >= 0 else None
        if times is None or not uid:
            self._found.foreign += 1
            return
        wrong_time = not times[0] <= time_unix_nano <= times[1]
        uid_hash = hash(uid) % ((1 << 64) - 1) + 1
        is_new = self._take_uid(number, uid_hash, time_unix_nano, wrong_time)
        self._found.needless += self._is_needless(number, uid_hash) and not is_new
        if in_order and number not in self._late:
            self._found.out_of_order += is_new and number < self._newest
            self._newest = max(self._newest, number)

    def _take_uid(self, number: int, uid: int, nanos: int, wrong_time: bool) -> bool:
        if number >= len(self._uids):
            grow = max(1024, number + 1 - len(self._uids))
            self._uids.extend([0] * grow)
            self._nanos.extend([0] * grow)
        known = self._nanos[number] if self._uids[number] == uid else self._more.get(number, {}).get(uid)
        if known is not None:
            self._found.repeated += 1
            self._found.wrong_time += wrong_time or (self.has_stable_times and known != nanos)
            return False
        self._found.wrong_time += wrong_time
        if not self._uids[number]:
            self._uids[number], self._nanos[number] = uid, nanos
        else:
            self._more[number][uid] = nanos
        return True

    def _is_needless(self, number: int, uid: int) -> bool:
        again = self._since_start is not None and uid in self._since_start
        if self._since_start is not None:
            self._since_start.add(uid)
        return again or number < self._acked

    def count(self, expected: int) -> JobCount:
        """Return what was found for a job that wrote `written` differently numbered lines (copies not counted)."""
        found = self._found + JobCount(records=self.records)
        owners: dict[int, int] = {}
        for number in range(max(expected, len(self._uids))):
            first = self._uids[number] if number < len(self._uids) else 0
            uids = [*([first] if first else []), *self._more.get(number, ())]
            copies = self._copies.get(number, 1) if number < expected else 0
            found.expected += copies
            found.missing += max(0, copies - len(uids))
            if number < expected:
                found.uid_unstable += max(0, len(uids) - copies)
            else:
                found.foreign += len(uids)
            found.uid_unstable += sum(owners.setdefault(uid, number) != number for uid in uids)
        return found


@dataclass
class SpanCount:
    """What was found of the jobs' spans.

    Attributes:
        missing: Spans that each job must have and that never came.
        repeated: Spans that came again, byte for byte the same.
        other_id: Spans that came under more than one id.
        other_bytes: Spans that came again with the same id and other bytes.
    """

    missing: int = 0
    repeated: int = 0
    other_id: int = 0
    other_bytes: int = 0

    def __add__(self, other: SpanCount) -> SpanCount:
        """Return both counts together."""
        return SpanCount(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def faults(self) -> int:
        """How many findings break the guarantee."""
        return self.missing + self.other_id + self.other_bytes


@dataclass(frozen=True)
class Span:
    """A span as it came: its run id, its name (``RUN`` for the run span), its id and all of its bytes."""

    run_id: str
    name: str
    span_id: str
    data: bytes


def count_spans(spans: Iterable[Span], expected: Mapping[str, Collection[str]]) -> SpanCount:
    """Count what arrived of the jobs' spans.

    Args:
        spans: Those that arrived, in any order.
        expected: By run id the names of the spans that the job must have.
    """
    found = SpanCount()
    versions: defaultdict[tuple[str, str], dict[str, set[bytes]]] = defaultdict(dict)
    for span in spans:
        seen = versions[span.run_id, span.name].setdefault(span.span_id, set())
        if span.data in seen:
            found.repeated += 1
        seen.add(span.data)
    for ids in versions.values():
        found.other_id += len(ids) - 1
        found.other_bytes += sum(len(data) - 1 for data in ids.values())
    found.missing = sum((run_id, name) not in versions for run_id, names in expected.items() for name in names)
    return found
