"""`AgentView`: read-only access to the agent for the page, on demand only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tailspan.config import Settings
from tailspan.models import JobStatus, TaskRun
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.baseline import Histories, PipelineHistory
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.exporter.endpoints import Endpoints
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.receiver.receiver import Receiver
from tailspan_agent.web.troubles import Trouble, troubles_of

__all__ = ["AgentView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentView:
    """The data of the page.

    Attributes:
        context: The store, the statistics of pipelines, the agent's own metrics, and the redactor.
        receiver: The services and the followed jobs.
        settings: Returns the configuration in force.
        problems: Returns codes of what keeps the agent from relaying.
        endpoints: The endpoint of each signal.
    """

    context: PipelineContext
    receiver: Receiver
    settings: Callable[[], Settings]
    problems: Callable[[], Sequence[str]]
    endpoints: Endpoints

    @property
    def store(self) -> CheckpointStore:
        """The checkpoint store."""
        return self.context.store

    @property
    def services(self) -> Mapping[str, JobService]:
        """The watched services by their configured name."""
        return self.receiver.services

    @property
    def followed(self) -> Sequence[JobSnapshot]:
        """Snapshots of the followed jobs."""
        return self.receiver.followed

    @property
    def histories(self) -> Histories:
        """The last runs of each pipeline."""
        return self.context.pipeline_stats.histories

    @property
    def totals(self) -> Sequence[RunTotals]:
        """The run totals of all ended runs."""
        return list(self.store.totals.values())

    @property
    def troubles(self) -> Sequence[Trouble]:
        """What keeps the agent from relaying, without secrets."""
        found = troubles_of(self.problems(), self.endpoints.outages, self.endpoints.last_errors)
        return [replace(one, reason=self.redact(one.reason)) for one in found]

    def label(self, job_name: str) -> str:
        """Return the pipeline label of jobs with this name."""
        return self.context.names.find(job_name)

    def history(self, job_name: str) -> PipelineHistory:
        """Return the last runs of a job's pipeline."""
        return self.histories.of(self.label(job_name))

    def redact(self, text: str) -> str:
        """Return text without the configured secrets."""
        return self.context.redactor.redact(text)[0] if self.context.redactor is not None else text

    def redact_open(self, text: str) -> str:
        """Return the beginning of a line without what is, or may become, a configured secret."""
        return self.context.redactor.redact_open(text) if self.context.redactor is not None else text

    def redact_job(self, job: JobStatus) -> JobStatus:
        """Return a status without the configured secrets."""
        return self.context.redactor.redact_job(job) if self.context.redactor is not None else job

    def redact_task(self, task: TaskRun) -> TaskRun:
        """Return a task run without the configured secrets."""
        return self.context.redactor.redact_task(task) if self.context.redactor is not None else task
