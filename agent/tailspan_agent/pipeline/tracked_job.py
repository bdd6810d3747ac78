"""`TrackedJob`: the status, ledger and resource of one job, which its lines, spans and alerts share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from tailspan.config import Watch
from tailspan.models import JobStatus, TaskRun
from tailspan.services import JobService
from tailspan_agent.analysis.baseline import PipelineHistory
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES
from tailspan_agent.checkpoint.rows import Checkpoint
from tailspan_agent.job.bounds import MAX_TASK_RUNS
from tailspan_agent.job.ledger import Ending, JobLedger
from tailspan_agent.job.mapping import resource_attributes
from tailspan_agent.job.task_spans import LineTimes
from tailspan_agent.otlp.requests import encode_resource
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.store_streams import MAIN_STREAM
from tailspan_agent.records.redact import Redactor
from tailspan_agent.records.span_lines import SpanLines

__all__ = ["TrackedJob"]

_BACKFILL_S = 1800.0
"""A job that had ended this long before it was first seen is backfill: in Loki a stream of its own."""
_EVENTS_OF = "events of"
"""Before a job's name: the stream of its events, which counts as a name of its own."""


class TrackedJob:
    """What the agent knows of one job.

    Args:
        context: Shared by all jobs.
        service: The service that has the job.
        watch: The watch that matched the job.
        status: The first status.
        first_seen_ns: When the agent first saw the job, in ns since the epoch.

    Attributes:
        checkpoint: What the store had when this object was made, without the text of the ledger.
        ledger: The job's lines and states as read.
        acked_ledger: The same with its lines as acknowledged: as in the store.
        resource: The encoded OTLP resource.
        is_log_name_shared: Whether its last lines have the ``service.name`` that many jobs share; see `LogNames`.
        span_lines: Lines for the span of the execution; None if spans carry no lines.
        tasks: Every attempt of the job's tasks, redacted; empty for a job without tasks.
        task_lines: The times of the tasks' lines.
    """

    __slots__ = (
        "_ended_ns",
        "_log_resource",
        "_names",
        "_redacted",
        "_status",
        "_stored_stream",
        "acked_ledger",
        "checkpoint",
        "context",
        "is_log_name_shared",
        "ledger",
        "resource",
        "service",
        "span_lines",
        "task_lines",
        "tasks",
        "watch",
    )

    def __init__(
        self, context: PipelineContext, service: JobService, watch: Watch, status: JobStatus, first_seen_ns: int
    ) -> None:
        self.context = context
        self._names = ("", "")
        self.service = service
        self.watch = watch
        self.status = status
        self.tasks: tuple[TaskRun, ...] = ()
        self.task_lines = LineTimes()
        self._redacted: tuple[JobStatus, Redactor, JobStatus] | None = None
        first = self._first_ledger(first_seen_ns)
        self.checkpoint = self._add_to_store(text := first.to_json())
        is_new = self.checkpoint.ledger == text
        restored = first if is_new else JobLedger.restored(self.checkpoint.ledger, status.job_id, first_seen_ns)
        self.ledger = self.acked_ledger = restored
        self.checkpoint = msgspec.structs.replace(self.checkpoint, ledger="")  # its text has served
        self.resource = self._encode_resource()
        context.label_values.note(status.job_name, status.attributes)
        self.is_log_name_shared = False
        self._stored_stream = self.checkpoint.stream
        self._log_resource = b""
        self.span_lines: SpanLines | None = None
        self.start_span_lines(whole=self.checkpoint.cursor is None)

    @property
    def status(self) -> JobStatus:
        """The last status, with its name redacted."""
        return self._status

    @status.setter
    def status(self, status: JobStatus) -> None:
        if self.context.redactor is not None:
            if self._names[0] != status.job_name:
                self._names = status.job_name, self.context.redactor.redact(status.job_name)[0]
            if self._names[1] != status.job_name:
                status = dataclasses.replace(status, job_name=self._names[1])
        self._status = status
        ended = status.finished_at or status.job_status_date if status.state.is_terminal else None
        self._ended_ns = None if ended is None else int(ended.timestamp() * 1e9)

    def start_span_lines(self, *, whole: bool = True) -> None:
        """Collect the lines of the span of the execution from here on.

        Args:
            whole: Whether no line of the log was read before.
        """
        self.span_lines = SpanLines(whole=whole) if self.context.lines_on_spans else None

    def _first_ledger(self, first_seen_ns: int) -> JobLedger:
        """Return the ledger of a job that the store does not have: of one that has ended, with its end."""
        ledger = JobLedger(first_seen_ns=first_seen_ns)
        return self.with_state(ledger) if self.status.state.is_terminal and self.status.attempt == 1 else ledger

    def _add_to_store(self, ledger: str) -> Checkpoint:
        """Return the job's checkpoint; a job that the store does not have is added with a ledger."""
        return self.context.store.add_job(
            self.service.identity,
            self.status.job_id,
            self.status.job_name,
            stream=MAIN_STREAM,  # until `StoreStreams` finds another one for its first lines
            ledger=ledger,
        )

    def with_state(self, ledger: JobLedger) -> JobLedger:
        """Return a ledger with the state of the last status, if that is new to it."""
        changed = ledger.with_state(time.time_ns(), self.status.state)
        if changed is ledger:
            return ledger
        ending = Ending.of(self.redacted_status) if self.status.state.is_terminal else msgspec.UNSET
        return msgspec.structs.replace(changed, ending=ending)

    def _encode_resource(self, name: str = "", *, of_events: bool = False) -> bytes:
        attributes = resource_attributes(
            self.redacted_status,
            service_name=self.service.name,
            watch_attributes=self.watch.attributes,
            otlp_resource=self.context.otlp_resource,
            stream=self.checkpoint.stream,
            agent_id=self.context.store.instance_id,
            of_events=of_events,
        )
        return encode_resource(attributes | {"service.name": name} if name else attributes)

    @property
    def log_resource(self) -> bytes:
        """The encoded resource of the job's lines: `resource`, unless they share a name with other jobs."""
        if not self.is_log_name_shared:
            return self.resource
        if not self._log_resource:
            self._log_resource = self._encode_resource(OTHER_PIPELINES)
        return self._log_resource

    @property
    def stream_key(self) -> str:
        """What a store sees as the stream of the next lines."""
        name = OTHER_PIPELINES if self.is_log_name_shared else self.status.job_name
        return f"{self.service.name}/{name}/{self.checkpoint.stream}"

    @property
    def event_resource(self) -> bytes:
        """The encoded resource of the job's events: as of its lines, in a stream of their own if there is room."""
        name, stream = f"{_EVENTS_OF} {self.status.job_name}", self.checkpoint.stream
        if not self.is_log_name_shared and self.context.log_names.take(name, stream, is_shared=True):
            return self._encode_resource(of_events=True)
        return self.log_resource if stream else self._encode_resource(OTHER_PIPELINES, of_events=True)

    def apply_settings(self, watch: Watch) -> None:
        """Apply the settings of a watch, and the present status, to what is encoded from now on."""
        self.watch = watch
        self.resource, self._log_resource = self._encode_resource(), b""

    def change_stream(self, log_name: str, stream: int) -> None:
        """Send what is encoded from now on to this log stream; see `StoreStreams`.

        Args:
            log_name: The job's name, or the one that many jobs share.
            stream: The number of the stream.
        """
        self.is_log_name_shared = log_name == OTHER_PIPELINES
        if stream == self.checkpoint.stream:
            return
        if stream == MAIN_STREAM:
            self._stored_stream = stream
            self.context.store.update_stream(self.checkpoint.key, stream)
        self.checkpoint = msgspec.structs.replace(self.checkpoint, stream=stream)
        self.resource, self._log_resource = self._encode_resource(), b""

    def note_sent(self, newest_ns: int) -> Callable[[], None] | None:
        """Note what a store may have from now on; return what must be called before it is sent, if anything.

        Args:
            newest_ns: The time of the newest line that goes to the present log stream, in ns since the epoch.
        """
        # The records of a job's end follow its lines.
        newest_ns = max(newest_ns, self.ended_ns or 0)
        ledger = self.ledger.with_stream(self.checkpoint.stream, newest_ns)
        if ledger is self.ledger and self._stored_stream == self.checkpoint.stream:
            return None
        self.ledger = ledger
        self.acked_ledger = msgspec.structs.replace(self.acked_ledger, log_streams=ledger.log_streams)
        return partial(self._store_stream, self.checkpoint.stream)

    def _store_stream(self, stream: int) -> None:
        self._stored_stream = stream
        self.context.store.update_stream(self.checkpoint.key, stream)
        self.context.store.update_ledger(self.checkpoint.key, self.acked_ledger.to_json())

    def update_tasks(self, tasks: Sequence[TaskRun]) -> None:
        """Take the tasks as they are now, without the configured secrets.

        An attempt that was running and is not listed any more stays: its lines refer to its span.
        """
        redactor = self.context.redactor
        found = list(tasks) if redactor is None else list(map(redactor.redact_task, tasks))
        listed = {task.key for task in found}
        vanished = [one for one in self.tasks if one.started_at and not one.ended and one.key not in listed]
        self.tasks = (*found, *vanished[: max(0, MAX_TASK_RUNS - len(found))])

    @property
    def redacted_status(self) -> JobStatus:
        """The status without the configured secrets, as it may leave this machine."""
        redactor = self.context.redactor
        if redactor is None:
            return self.status
        if self._redacted is None or self._redacted[0] is not self.status or self._redacted[1] is not redactor:
            self._redacted = self.status, redactor, redactor.redact_job(self.status)
        return self._redacted[2]

    def redact(self, text: str) -> str:
        """Return the text without the configured secrets."""
        return self.context.redactor.redact(text)[0] if self.context.redactor is not None else text

    def redact_open(self, text: str) -> str:
        """Return the beginning of a line without what is, or may become, a configured secret."""
        return self.context.redactor.redact_open(text) if self.context.redactor is not None else text

    @property
    def ended_ns(self) -> int | None:
        """When the job ended, in ns since the epoch: about the time of its newest line. None before its end."""
        return self._ended_ns

    @property
    def is_past(self) -> bool:
        """Whether the job has ended and its lines are not for the main log stream; see `StoreStreams`."""
        if not self.status.state.is_terminal:
            return False
        ended_ns = self.ended_ns
        late = ended_ns is not None and self.ledger.first_seen_ns - ended_ns > _BACKFILL_S * 1e9
        return late or self.checkpoint.stream != MAIN_STREAM

    @property
    def ended_ago_s(self) -> float:
        """How long ago the job ended, in seconds, by its status, its newest line, or the first terminal status."""
        now_ns = time.time_ns()
        seen_ns = self.ledger.states[-1][0] if self.ledger.states else now_ns
        return (now_ns - min(seen_ns, self.ended_ns or self.ledger.last_line_ns or seen_ns)) / 1e9

    @property
    def history(self) -> PipelineHistory:
        """The past runs of the job's pipeline."""
        return self.context.pipeline_stats.histories.of(self.context.names.find(self.status.job_name))

    def update_ledger(self, **fields: Any) -> None:
        """Change fields of the ledger as read."""
        self.ledger = msgspec.structs.replace(self.ledger, **fields)

    def store_ledger(self) -> None:
        """Store the ledger: of lines what is acknowledged, of all else what was seen."""
        acked = self.acked_ledger.with_seen(self.ledger)
        # One object for both while they are equal: as long as a job is silent.
        self.acked_ledger = self.ledger if acked == self.ledger else acked
        self.context.store.update_ledger(self.checkpoint.key, self.acked_ledger.to_json())
