"""`JobSpans`: the spans of one job, and the count of its run.

Spans go into the store as soon as they have ended; the `SpanQueue` sends them from there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from tailspan_agent.analysis.baseline import PastRun
from tailspan_agent.analysis.failure import error_type, fingerprint_of
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.analysis.run_totals import RunTotals, bounded_error_type
from tailspan_agent.checkpoint.rows import OutboxSpan
from tailspan_agent.job.mapping import failure_text, spans_of
from tailspan_agent.otlp.span import SpanData, encode_span
from tailspan_agent.pipeline.tracked_job import TrackedJob

__all__ = ["JobSpans"]


_FEW_SPANS = 8
_NO_TASKS: frozenset[tuple[str, int]] = frozenset()


class JobSpans:
    """Writes the spans of one job to the store."""

    __slots__ = ("_context", "_job", "_written", "_written_tasks")

    def __init__(self, job: TrackedJob) -> None:
        self._job = job
        self._context = job.context
        # Few spans of most jobs are written before their end: a set would take as much memory as the job's status.
        self._written: Collection[str] = ()
        self._written_tasks = _NO_TASKS

    @property
    def has_written(self) -> bool:
        """Whether this object has written a span."""
        return bool(self._written)

    def write(self) -> None:
        """Write the spans that have ended by now; a span that was written before stays as it was."""
        self._add(self._ended())

    def start_attempt(self) -> None:
        """Write the spans of tasks again: the job runs again, and so do they."""
        self._written_tasks = _NO_TASKS

    def _add(self, spans: Sequence[SpanData]) -> None:
        outbox = self._outbox(spans)
        if not outbox:
            return
        new = self._context.store.add_spans(self._job.checkpoint.key, outbox)
        written = *self._written, *(span.span_id for span in outbox)
        self._written = written if len(written) <= _FEW_SPANS else frozenset(written)
        self._note_tasks(spans)
        if new:
            self._count_tasks(span for span in spans if span.span_id in new)
            self._wake_queue()

    def _note_tasks(self, spans: Iterable[SpanData]) -> None:
        """Note the attempts of tasks whose spans are written, and drop their lines."""
        keys = {
            (str(span.attributes["tailspan.task.id"]), int(str(span.attributes["tailspan.task.attempt"])))
            for span in spans
            if _is_of_task(span)
        }
        if keys:
            self._written_tasks |= keys
        if self._job.span_lines is not None:
            for key in keys:
                self._job.span_lines.tasks.drop(key)

    def _count_tasks(self, spans: Iterable[SpanData]) -> None:
        """Add the attempts of tasks to the totals, each once, since a span is new once."""
        context = self._context
        pipeline = context.names.label(self._job.status.job_name)
        for span in spans:
            task = span.attributes.get("cicd.pipeline.task.name")
            if task is None:
                continue
            has_own = context.task_names.label(f"{pipeline}\0{task}") != OTHER_PIPELINES
            name = str(task) if has_own else OTHER_PIPELINES
            result = str(span.attributes["cicd.pipeline.task.run.result"])
            key = pipeline, name, result
            context.task_totals[key] = context.task_totals.get(key, RunTotals(pipeline, result, task=name)).add(
                (span.end_unix_nano - span.start_unix_nano) / 1e9,
                trace_id=span.trace_id,
                span_id=span.span_id,
                time_unix_nano=span.end_unix_nano,
            )

    def end_run(self, run: PastRun, *, delivery_known: bool) -> bool:
        """Write the last spans and count the run, once, whether or not the endpoint is available.

        Args:
            run: The run, for the history of its pipeline.
            delivery_known: Whether all lines are acknowledged; else the run span says nothing of their delivery.

        Returns:
            Whether the run was counted now; False if an earlier call or process counted it.
        """
        job, name = self._job, run.pipeline
        kind = error_type(job.status, job.ledger.failure)
        if kind is not None and not job.ledger.fingerprint:
            self._recognise_failure(name, kind)
        spans = self._ended(delivery_known=delivery_known)
        self._add([span for span in spans if _is_of_task(span)])
        counted_kind = kind and bounded_error_type(kind, name, self._context.store.totals.values())
        counted_run = RunTotals(name, run.result, counted_kind).add(
            run.duration_s,
            trace_id=spans[-1].trace_id,
            span_id=spans[-1].span_id,
            time_unix_nano=run.ended_unix_nano,
        )
        fingerprint = job.ledger.fingerprint or None
        counted = self._context.store.end_job(
            job.checkpoint.key, self._outbox(spans), counted_run, run=run, fingerprint=fingerprint
        )
        if counted:
            self._context.pipeline_stats.histories.add(run)
            self._context.health.run_changes.set()
        self._wake_queue()
        return counted

    def _ended(self, *, delivery_known: bool = True) -> list[SpanData]:
        job = self._job
        return spans_of(
            job.redacted_status,
            job.ledger,
            delivery_known=delivery_known,
            lines=job.span_lines,
            tasks=job.tasks,
            task_lines=job.task_lines,
            written_tasks=self._written_tasks,
        )

    def _recognise_failure(self, pipeline: str, kind: str) -> None:
        """Note how often the pipeline failed in this way before."""
        job = self._job
        fingerprint = fingerprint_of(kind, failure_text(job.redacted_status, job.ledger.failure), job.ledger.failure)
        count, first_ns = self._context.store.history.earlier_failures(pipeline, fingerprint)
        job.update_ledger(fingerprint=fingerprint, failures_before=count, first_failed_ns=first_ns)
        # Stored before the run is counted: after a restart, the run must not count as its own predecessor.
        job.store_ledger()

    def _outbox(self, spans: Sequence[SpanData]) -> list[OutboxSpan]:
        """Return the spans that this object has not written yet, encoded."""
        job = self._job
        return [
            OutboxSpan(job.checkpoint.key, span.span_id, job.resource, encode_span(span))
            for span in spans
            if span.span_id not in self._written
        ]

    def _wake_queue(self) -> None:
        if self._context.spans is not None:
            self._context.spans.wake()


def _is_of_task(span: SpanData) -> bool:
    return "tailspan.task.id" in span.attributes
