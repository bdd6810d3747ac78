"""`CheckpointStore`: what every checkpoint store promises. `tests/fakes/store_promises.py` checks each promise.

- Acknowledged lines of one job: cursor, ledger and sums are written together, or none of them.
- Order: a crash undoes the last writes at most, never an earlier write without the later ones. A job that resumes from
  an earlier cursor repeats lines with the same uid, and skips none.
- A span is sent only after it is written (`written`), so each attempt to send it sends the same bytes.
- The end of a job, its last spans and the count of its run are written together, once.
- A value that cannot be stored affects only its own job.

The agent calls all methods from its event loop, so none may wait for a disk or a network for long; what has to wait is
a coroutine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.rows import Ack, Checkpoint, LedgerRow, OutboxSpan

__all__ = ["CheckpointStore", "RunHistory", "StoredLedgers"]


class RunHistory(Protocol):
    """The last ended runs of each pipeline, and how often each failure occurred."""

    def past_runs(self) -> list[PastRun]:
        """Return the last ended runs of all pipelines; log a warning for a damaged or impossible run and skip it."""

    def too_fast(self) -> dict[str, int]:
        """Return the number of suspiciously fast runs since the store was created, by pipeline."""

    def earlier_failures(self, pipeline: str, fingerprint: str) -> tuple[int, int | None]:
        """Return the number of earlier runs with a failure, and when the first one failed, in ns since the epoch.

        Args:
            pipeline: The label of the pipeline.
            fingerprint: The fingerprint of the failure.
        """


class StoredLedgers(Protocol):
    """The ledgers of all jobs, for the page."""

    async def newest_key(self) -> int:
        """Return the largest number of a job; 0 without jobs."""

    async def after(self, key: int, limit: int) -> list[LedgerRow]:
        """Return at most `limit` jobs with larger numbers, smallest first."""

    async def by_key(self, keys: Sequence[int]) -> list[LedgerRow]:
        """Return the jobs with these numbers; those that were deleted are missing."""


class CheckpointStore(Protocol):
    """The durable state of jobs.

    A method raises `CheckpointError` if the store cannot be used now, and `ValueRefusedError` for a value that it
    cannot hold.

    Attributes:
        instance_id: The UUID of the agent's state directory.
        start_unix_nano: When this store began to count runs, in ns since the epoch.
        recovered: The damage that was found when the store was opened; None without damage.
    """

    instance_id: str
    start_unix_nano: int
    recovered: str | None

    @property
    def write_failed(self) -> bool:
        """Whether the last write failed."""

    @property
    def acked_at_s(self) -> float:
        """When the last ack was stored, in seconds since the epoch."""

    @property
    def totals(self) -> Mapping[tuple[str, str, str], RunTotals]:
        """The totals of all ended runs by their key; they grow with `end_job`."""

    @property
    def history(self) -> RunHistory:
        """The last ended runs of each pipeline."""

    @property
    def ledgers(self) -> StoredLedgers:
        """The ledgers of all jobs."""

    def close(self) -> None:
        """Release everything. Writes that are not complete are lost; see `written`."""

    def together(self) -> AbstractContextManager[object]:
        """Return a context that makes one transaction of all writes in it."""

    async def written(self) -> None:
        """Wait until all earlier writes survive the end of this process and of its machine's power."""

    def is_writable(self) -> bool:
        """Return whether writes succeed; if the last one failed, try one."""

    def job(self, identity: str, job_id: str) -> Checkpoint | None:
        """Return the checkpoint of a job; None for an unknown job."""

    def add_job(self, identity: str, job_id: str, name: str, *, stream: int, ledger: str) -> Checkpoint:
        """Add a job that is seen for the first time, and return its checkpoint; a known job is unchanged."""

    def finished_jobs(self, identity: str) -> set[str]:
        """Return the ids of all jobs of a service that need no more work."""

    def unfinished_jobs(self, identity: str) -> Iterator[list[tuple[str, str]]]:
        """Yield id and name of all other known jobs of a service, oldest first, in parts: each takes milliseconds."""

    def ack(self, acks: Iterable[Ack]) -> None:
        """Store acknowledgements, all or none; one that cannot be stored does not affect those of other jobs."""

    async def seconds(self, key: int) -> dict[int, tuple[int, int]]:
        """Return number and uid sum (mod 2^64) of a job's acknowledged lines by second of source time."""

    def update_ledger(self, key: int, ledger: str) -> None:
        """Store a ledger that changed without a line: with a new state."""

    def update_stream(self, key: int, stream: int) -> None:
        """Store the log stream that a job's next lines go to."""

    def newest_by_stream(self, name: str) -> Mapping[int, int]:
        """Return the time of the newest line of each further log stream of a pipeline, in ns since the epoch.

        It is the newest one that was sent, acknowledged or not: ``log_streams`` of the ledgers.
        """

    def complete_logs(self, key: int, *, late: bool = False) -> None:
        """Store that all lines of an ended job are acknowledged.

        Args:
            key: The store's number for the job.
            late: Whether more lines may become visible; if not, the sums by second are deleted.
        """

    def add_spans(self, key: int, spans: Sequence[OutboxSpan]) -> set[str]:
        """Write spans; one that is stored already keeps its first bytes.

        Returns:
            The ids of the new spans.
        """

    def end_job(
        self,
        key: int,
        spans: Sequence[OutboxSpan],
        counted: RunTotals,
        *,
        run: PastRun | None = None,
        fingerprint: str | None = None,
    ) -> bool:
        """Write a job's last spans and count its run, together and once.

        A run is counted when its span is written, not when the span is acknowledged: so it is counted once whatever
        happens at the endpoint, and also if traces are not exported.

        Args:
            key: The store's number for the job.
            spans: The spans that end now.
            counted: The totals of this run alone; `totals` includes it from now on.
            run: The run for the history of its pipeline; None stores none.
            fingerprint: The fingerprint of its failure; None without a failure.

        Returns:
            Whether this was the first call for the job; if not, nothing was changed.
        """

    def unsent_spans(self, limit: int, max_bytes: int = 3 << 20) -> list[OutboxSpan]:
        """Return written spans that are not acknowledged, oldest jobs first.

        Args:
            limit: Maximum number of spans.
            max_bytes: Maximum number of bytes of all spans with their resources; one larger span is returned alone.
        """

    def ack_spans(self, spans: Iterable[OutboxSpan]) -> None:
        """Store that spans are acknowledged."""

    def names(self, identity: str) -> dict[str, str]:
        """Return the cached names of a service's jobs by id."""

    def add_name(self, identity: str, job_id: str, name: str) -> None:
        """Cache the name of a listed job."""

    async def may_forget(self, now_s: float, usual_s: float) -> bool:
        """Return whether the clock has gone right for long enough to forget what is old by it.

        Args:
            now_s: The present, in seconds since the epoch.
            usual_s: A longer time since the last call may be a step of the clock; see `settled_clock`.
        """

    async def forget(self, older_than_s: float, *, keep: Collection[str] = (), keep_unsent: bool = True) -> int:
        """Delete jobs without a change for a long time, and names that were cached as long ago.

        Args:
            older_than_s: How long, in seconds; at least the largest `lookback`: a job that its service still lists
                must not be forgotten.
            keep: Ids of jobs to keep: those that are followed, however silent, or named by a watch.
            keep_unsent: Whether to keep jobs with unsent spans; if traces are not exported, that would be for ever.

        Returns:
            Number of deleted jobs.
        """
