"""`JobLedger`: what the agent itself has seen of a job, as it is stored with the job's cursor. Pure."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from tailspan.logs.clean import clean
from tailspan.logs.page import LogPage
from tailspan.models import JobState
from tailspan_agent.analysis.failure import Digest
from tailspan_agent.fast_zlib import crc32
from tailspan_agent.job.line_sums import page_uids

__all__ = ["Delivery", "Fate", "JobLedger"]

_SHORT_NS = 1_000_000_000
_MASK = (1 << 64) - 1
_SHOWN_BYTES, _SHOWN_CHARS = 8192, 200

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of the records of one chunk.

    Attributes:
        rejected: How many were refused, and are in the dead letter.
        kind: Why, in one of a few words; empty when none was.
        identified: Whether these are exactly this job's: of a batch of several jobs an endpoint says only how many
            records it refused.
        resent: How many were sent again because an earlier try was not answered well.
    """

    rejected: int = 0
    kind: str = ""
    identified: bool = True
    resent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What became of a job's records so far.

    Attributes:
        acked: Records that the endpoint took.
        rejected: Records that it refused, by kind.
        identified: False once a refusal could not be told apart from those of other jobs in the same batch.
        resent: Records that were sent more than once, each further time counted.
    """

    acked: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    identified: bool = True
    resent: int = 0

    def after(self, records: int, fate: Fate) -> Delivery:
        """Return the delivery with the records of one more chunk."""
        rejected = dict(self.rejected)
        if fate.rejected:
            rejected[fate.kind] = rejected.get(fate.kind, 0) + fate.rejected
        return Delivery(
            acked=self.acked + records - fate.rejected,
            rejected=rejected,
            identified=self.identified and fate.identified,
            resent=self.resent + fate.resent,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLedger:
    """What the agent itself has seen of a job. Plain values, for `msgspec.json` to store.

    Attributes:
        first_seen_ns: When the agent first saw it, in ns since the epoch.
        first_line_ns: The time of its earliest line, in ns since the epoch.
        last_line_ns: The time of its latest line, in ns since the epoch.
        lines: Lines read.
        states: When which state was first seen: (ns since the epoch, state).
        stream_hash: Of all lines as read: the sum of their uids mod 2^64 where the service knows only times, else the
            crc32 of their bytes, a newline after each.
        digest: Why it failed.
        failures_before: How many earlier runs of its pipeline failed in the same way.
        first_failed_ns: When the first of them did, in ns since the epoch; None when this is the first.
        fingerprint: What tells this way of failing from others; empty for a job that did not fail.
        delivery: What became of its records.
        logs_complete: None while its log is still followed; then whether it was read to its end.
        failure_told: Whether the record that says why it failed was sent.
        quiet_ns: The longest time between two of its lines, in ns.
        heartbeat_gap_s: The longest time between two of its heartbeats that were seen, in seconds.
        alerts: What was odd about it and was told: (ns since the epoch, kind).
        receipts: How many receipts were written: each further one amends the one before.
        last_line: Its newest line, cleaned, without secrets and cut off, for people to look at.
    """

    first_seen_ns: int
    first_line_ns: int | None = None
    last_line_ns: int | None = None
    lines: int = 0
    states: tuple[tuple[int, JobState], ...] = ()
    stream_hash: int = 0
    digest: Digest | None = None
    delivery: Delivery = Delivery()
    logs_complete: bool | None = None
    failure_told: bool = False
    quiet_ns: int = 0
    heartbeat_gap_s: float = 0.0
    alerts: tuple[tuple[int, str], ...] = ()
    receipts: int = 0
    failures_before: int = 0
    first_failed_ns: int | None = None
    fingerprint: str = ""
    last_line: str = ""

    @classmethod
    def from_json(cls, text: str) -> JobLedger:
        """Make the facts back from `to_json`.

        Raises:
            ValueError: The text is not such JSON.
        """
        return msgspec.json.decode(text, type=cls)

    @classmethod
    def restored(cls, text: str, job_id: str, first_seen_ns: int) -> JobLedger:
        """Make the facts back; where they are damaged, begin anew, with a warning."""
        try:
            return cls.from_json(text)
        except ValueError as error:
            _log.warning("job %s: what was stored of it is damaged, its cursor holds: %s", job_id, error)
            return cls(first_seen_ns=first_seen_ns)

    def to_json(self) -> str:
        """Return the facts as JSON."""
        return msgspec.json.encode(self).decode()

    def with_page(self, page: LogPage) -> JobLedger:
        """Return the facts with the lines of one more page."""
        first_ns = min(run.time_unix_nano for run in page.runs)
        last_ns = max(run.time_unix_nano + run.lines - 1 for run in page.runs)
        if page.digests:
            stream_hash = self.stream_hash + sum(page_uids(page)) & _MASK
        else:
            stream_hash = crc32(page.joined(), self.stream_hash)
        return dataclasses.replace(
            self,
            first_line_ns=first_ns if self.first_line_ns is None else min(self.first_line_ns, first_ns),
            last_line_ns=last_ns if self.last_line_ns is None else max(self.last_line_ns, last_ns),
            lines=self.lines + page.line_count,
            stream_hash=stream_hash,
            quiet_ns=self._quiet_ns(page),
        )

    def with_last_line(self, line: bytes, redact: Callable[[str], str]) -> JobLedger:
        """Return the facts with the job's newest line, cut off for people to look at."""
        # The end of a line that overwrote itself is what it says now.
        part = line[-_SHOWN_BYTES:] if b"\r" in line else line[:_SHOWN_BYTES]
        return dataclasses.replace(self, last_line=redact(clean(part))[:_SHOWN_CHARS])

    def _quiet_ns(self, page: LogPage) -> int:
        times = [run.time_unix_nano for run in page.runs]
        last_ns = times[0] if self.last_line_ns is None else self.last_line_ns
        # Lines that came late lie between others: what is between them is no pause.
        if times[0] < last_ns:
            return self.quiet_ns
        quiet_ns = max(self.quiet_ns, times[0] - last_ns)
        if times[-1] - times[0] <= max(quiet_ns, _SHORT_NS):
            return quiet_ns  # busy jobs write a page in less time than any pause that matters
        longest_ns: int = max(map(operator.sub, times[1:], times))
        return max(quiet_ns, longest_ns)

    def with_seen(self, seen: JobLedger) -> JobLedger:
        """Return these facts about lines with all that was seen of the job otherwise."""
        return dataclasses.replace(
            self,
            states=seen.states,
            alerts=seen.alerts,
            fingerprint=seen.fingerprint,
            failures_before=seen.failures_before,
            first_failed_ns=seen.first_failed_ns,
        )

    def with_heartbeat(self, gap_s: float) -> JobLedger:
        """Return the facts with the time between two heartbeats, if it is longer than those before."""
        return self if gap_s <= self.heartbeat_gap_s else dataclasses.replace(self, heartbeat_gap_s=gap_s)

    def with_alert(self, seen_ns: int, kind: str) -> JobLedger:
        """Return the facts with something odd that is told."""
        return dataclasses.replace(self, alerts=(*self.alerts, (seen_ns, kind)))

    def with_state(self, seen_ns: int, state: JobState) -> JobLedger:
        """Return the facts with a state that was seen, if it is not the last one seen."""
        if self.states and self.states[-1][1] is state:
            return self
        return dataclasses.replace(self, states=(*self.states, (seen_ns, state)))
