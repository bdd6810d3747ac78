"""`JobLedger`: what the agent has observed of a job, stored together with the job's cursor. Pure."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence

import msgspec

from tailspan.logs.clean import clean
from tailspan.logs.page import LogPage
from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.failure import Failure
from tailspan_agent.fast_zlib import crc32
from tailspan_agent.job.line_sums import sum_digests
from tailspan_agent.otlp.wire import UINT64_MAX
from tailspan_agent.records.redact import CUT_WINDOW_CHARS

__all__ = ["ChunkResult", "Delivery", "Ending", "JobLedger"]

_SHORT_NS = 1_000_000_000
_MAX_STATES = 100
_SHOWN_BYTES, _SHOWN_CHARS = 8192, 200
_MAX_ATTRIBUTES, _ATTRIBUTE_CHARS = 32, 200

_log = logging.getLogger(__name__)


class ChunkResult(msgspec.Struct, frozen=True):
    """The result of delivering one chunk of a job's records.

    Attributes:
        rejected: Number of records that were rejected and are in the dead letter.
        kind: The kind of the rejection, as `tailspan_agent.exporter.outcome.Rejected` has it; empty without one.
        identified: Whether the rejected records are known to be this job's: for a batch of several jobs, an endpoint
            reports only a number.
        resent: Number of records that were sent again because an earlier attempt failed.
        shortened: Number of records that were delivered shortened, because they were too large.
        reason: The endpoint's reason for the rejection; empty without one.
    """

    rejected: int = 0
    kind: str = ""
    identified: bool = True
    resent: int = 0
    shortened: int = 0
    reason: str = ""

    def __add__(self, other: ChunkResult) -> ChunkResult:
        """Return the result of both parts of a chunk."""
        return ChunkResult(
            self.rejected + other.rejected,
            self.kind or other.kind,
            self.identified and other.identified,
            self.resent + other.resent,
            self.shortened + other.shortened,
            self.reason or other.reason,
        )


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """The result of delivering a job's records so far.

    Attributes:
        acked: Number of records that the endpoint accepted.
        rejected: Number of records that it rejected, by kind.
        identified: False after a rejection in a batch of several jobs: the counts may be those of another job.
        resent: How many times records were sent again.
        shortened: Number of accepted records that were sent shortened, because they were too large.
    """

    acked: int = 0
    rejected: Mapping[str, int] = msgspec.field(default_factory=dict)
    identified: bool = True
    resent: int = 0
    shortened: int = 0

    def after(self, records: int, result: ChunkResult) -> Delivery:
        """Return the delivery with one more chunk.

        Args:
            records: Number of records in the chunk.
            result: Its result.
        """
        rejected = dict(self.rejected)
        if result.rejected:
            rejected[result.kind] = rejected.get(result.kind, 0) + result.rejected
        return Delivery(
            acked=self.acked + records - result.rejected,
            rejected=rejected,
            identified=self.identified and result.identified,
            resent=self.resent + result.resent,
            shortened=self.shortened + result.shortened,
        )


class Ending(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a list of ended jobs shows besides state and lines, in short and without secrets.

    Attributes:
        exit_code: The exit code of its main process.
        error: Why it did not succeed, by its service.
        attributes: Its attributes.
        started_ns: When it started by its service, in ns since the epoch; None if that is not known.
        finished_ns: When it ended by its service, in ns since the epoch; None if that is not known.
    """

    exit_code: int | None = None
    error: str = ""
    attributes: dict[str, str] = {}
    started_ns: int | None = None
    finished_ns: int | None = None

    @classmethod
    def of(cls, status: JobStatus) -> Ending:
        """Return it from the last status of a job, without secrets."""
        attributes = list(status.attributes.items())[:_MAX_ATTRIBUTES]
        return cls(
            status.exit_code,
            _cut(status.error or "", _SHOWN_CHARS),
            {_cut(key, _ATTRIBUTE_CHARS): _cut(value, _ATTRIBUTE_CHARS) for key, value in attributes},
            None if status.started_at is None else int(status.started_at.timestamp() * 1e9),
            None if status.finished_at is None else int(status.finished_at.timestamp() * 1e9),
        )


def _cut(text: str, limit: int) -> str:
    # JSON has no lone surrogates, which undecodable bytes of a command become.
    return text[:limit].encode("utf-8", "replace").decode()


# The names in the store are older than those here: a field keeps the name under which it was first stored.
class JobLedger(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent has observed of a job. Change it with `msgspec.structs.replace`.

    Attributes:
        first_seen_ns: When the agent first saw the job, in ns since the epoch.
        first_line_ns: The time of its earliest line, in ns since the epoch.
        last_line_ns: The time of its latest line, in ns since the epoch.
        lines: Number of lines read.
        states: When each state was first seen: (ns since the epoch, state).
        stream_hash: Hash of all lines as read: the sum of their uids mod 2^64 if the service has only times, else the
            crc32 of their bytes with a newline after each.
        failure: Why it failed, from its log.
        failures_before: Number of earlier runs of its pipeline with the same failure.
        first_failed_ns: When the first of them failed, in ns since the epoch; None if this run is the first.
        fingerprint: Identifies the failure across runs; empty for a job that did not fail.
        delivery: The result of delivering its records.
        logs_complete: None while its log is followed; then whether it was read to its end.
        failure_reported: Whether the log record with the failure was sent.
        quiet_ns: The longest time between two of its lines, in ns.
        heartbeat_gap_s: The longest observed time between two of its heartbeats, in seconds.
        alerts: The alerts sent for it: (ns since the epoch, alert).
        receipts: Number of receipts written; each further one amends the one before.
        last_line: Its newest line, cleaned, redacted and cut off, to be shown.
        open_line: The uid of the last open line that was sent; unset if there was none.
        attempt: The attempt of the job that its times and states are of; unset for the first.
        ending: How it ended, for lists of jobs; unset before, and for jobs that an older agent stored.
        log_streams: The newest line, in ns since the epoch, that a store may have in each further log stream of its
            pipeline; unset without one. See `tailspan_agent.pipeline.store_streams`.
    """

    first_seen_ns: int
    first_line_ns: int | None = None
    last_line_ns: int | None = None
    lines: int = 0
    states: tuple[tuple[int, JobState], ...] = ()
    stream_hash: int = 0
    failure: Failure | None = msgspec.field(default=None, name="digest")
    delivery: Delivery = Delivery()
    logs_complete: bool | None = None
    failure_reported: bool = msgspec.field(default=False, name="failure_told")
    quiet_ns: int = 0
    heartbeat_gap_s: float = 0.0
    alerts: tuple[tuple[int, str], ...] = ()
    receipts: int = 0
    failures_before: int = 0
    first_failed_ns: int | None = None
    fingerprint: str = ""
    last_line: str = ""
    open_line: str | msgspec.UnsetType = msgspec.UNSET
    attempt: int | msgspec.UnsetType = msgspec.UNSET
    log_streams: dict[int, int] | msgspec.UnsetType = msgspec.UNSET
    ending: Ending | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def from_json(cls, text: str) -> JobLedger:
        """Return the ledger that `to_json` made this text of.

        Raises:
            ValueError: The text is not a ledger in JSON.
        """
        return msgspec.json.decode(text, type=cls)

    @classmethod
    def restored(cls, text: str, job_id: str, first_seen_ns: int) -> JobLedger:
        """Return a stored ledger; if it is damaged, log a warning and return an empty one."""
        try:
            ledger = cls.from_json(text)
            if not ledger.is_possible:
                raise ValueError("it has a time that cannot be")
            return ledger
        except ValueError as error:
            _log.warning("job %s: its stored ledger is damaged and starts empty; its cursor is kept: %s", job_id, error)
            return cls(first_seen_ns=first_seen_ns)

    @property
    def is_possible(self) -> bool:
        """Whether all times fit 64 bits; an agent before `tailspan_agent.job.bounds` could store others."""
        times = [self.first_seen_ns, self.first_line_ns, self.last_line_ns, self.first_failed_ns, self.quiet_ns]
        times += [seen_ns for seen_ns, _ in (*self.states, *self.alerts)]
        return all(time_ns is None or 0 <= time_ns < 1 << 63 for time_ns in times)

    def to_json(self) -> str:
        """Return the ledger as JSON, to be stored."""
        return msgspec.json.encode(self).decode()

    def with_page(self, page: LogPage) -> JobLedger:
        """Return the ledger with the lines of one more page."""
        times_ns = [run.time_unix_nano for run in page.runs]
        first_ns = min(times_ns)
        last_ns = max([run.time_unix_nano + run.lines for run in page.runs]) - 1
        if page.digests:
            stream_hash = self.stream_hash + sum_digests(page.digests) & UINT64_MAX
        else:
            stream_hash = crc32(page.joined(), self.stream_hash)
        return msgspec.structs.replace(
            self,
            first_line_ns=first_ns if self.first_line_ns is None else min(self.first_line_ns, first_ns),
            last_line_ns=last_ns if self.last_line_ns is None else max(self.last_line_ns, last_ns),
            lines=self.lines + page.line_count,
            stream_hash=stream_hash,
            quiet_ns=self._quiet_ns(times_ns),
        )

    def with_last_line(self, line: bytes, redact: Callable[[str], str]) -> JobLedger:
        """Return the ledger with the job's newest line, cut off to be shown."""
        # A progress bar overwrites its line: the end is what it shows now.
        # More than is shown: a secret must not be divided before it is redacted.
        size = _SHOWN_BYTES + CUT_WINDOW_CHARS
        part = line[-size:] if b"\r" in line else line[:size]
        return msgspec.structs.replace(self, last_line=redact(clean(part))[:_SHOWN_CHARS])

    def _quiet_ns(self, times: Sequence[int]) -> int:
        last_ns = times[0] if self.last_line_ns is None else self.last_line_ns
        # Late lines lie between other lines: the time between them is not a pause.
        if times[0] < last_ns:
            return self.quiet_ns
        quiet_ns = max(self.quiet_ns, times[0] - last_ns)
        if times[-1] - times[0] <= max(quiet_ns, _SHORT_NS):
            return quiet_ns  # a busy job writes a page in less time than any pause that matters
        longest_ns: int = max(map(operator.sub, times[1:], times))
        return max(quiet_ns, longest_ns)

    def with_seen(self, seen: JobLedger) -> JobLedger:
        """Return this ledger of lines with everything else from another one of the same job."""
        ledger = self
        if seen.attempt != self.attempt:
            # Its lines are of an attempt that is over: none of their times is one of the present attempt.
            ledger = msgspec.structs.replace(
                self,
                attempt=seen.attempt,
                first_seen_ns=seen.first_seen_ns,
                first_line_ns=seen.first_line_ns,
                last_line_ns=seen.last_line_ns,
                logs_complete=seen.logs_complete,
            )
        return msgspec.structs.replace(
            ledger,
            states=seen.states,
            alerts=seen.alerts,
            fingerprint=seen.fingerprint,
            failures_before=seen.failures_before,
            first_failed_ns=seen.first_failed_ns,
            log_streams=seen.log_streams,
            ending=seen.ending,
        )

    def with_stream(self, stream: int, newest_ns: int) -> JobLedger:
        """Return the ledger with the newest line for a log stream, which a store may have from now on."""
        known = self.log_streams or {}
        if newest_ns <= known.get(stream, -1):
            return self
        return msgspec.structs.replace(self, log_streams={**known, stream: newest_ns})

    def with_heartbeat(self, gap_s: float) -> JobLedger:
        """Return the ledger with the time between two heartbeats, if it is the longest so far."""
        return self if gap_s <= self.heartbeat_gap_s else msgspec.structs.replace(self, heartbeat_gap_s=gap_s)

    def with_alert(self, seen_ns: int, alert: str) -> JobLedger:
        """Return the ledger with an alert that is sent."""
        return msgspec.structs.replace(self, alerts=(*self.alerts, (seen_ns, alert)))

    def with_state(self, seen_ns: int, state: JobState) -> JobLedger:
        """Return the ledger with a state, if the job was not in it before."""
        if self.states and self.states[-1][1] is state:
            return self
        # A service may report another state at each poll; the last one says whether the job has ended.
        return msgspec.structs.replace(self, states=(*self.states[: _MAX_STATES - 1], (seen_ns, state)))
