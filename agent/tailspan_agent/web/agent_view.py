"""`AgentView`: read-only access to the agent for the page, on demand only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from tailspan.config import Settings
from tailspan.models import JobStatus, TaskRun
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.baseline import Histories, PipelineHistory
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.protocol import CheckpointStore
from tailspan_agent.checkpoint.rows import Checkpoint
from tailspan_agent.errors import CheckpointError
from tailspan_agent.exporter.endpoints import Endpoints
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.receiver.receiver import Receiver
from tailspan_agent.web.troubles import Trouble, troubles_of

if TYPE_CHECKING:
    from tailspan_agent.fleet.overview import FleetOverview

__all__ = ["AgentView"]


class AgentView(msgspec.Struct, frozen=True, kw_only=True):
    """The data of the page.

    Attributes:
        context: The store, the statistics of pipelines, the agent's own metrics, and the redactor.
        receiver: The services and the followed jobs.
        settings: Returns the configuration in force.
        problems: Returns codes of what keeps the agent from relaying.
        endpoints: The endpoint of each signal.
        shared: What the pipelines of the fleet's jobs share; None for an agent that is alone.
        fleet: The other agents and their jobs; None for an agent that is alone.
    """

    context: PipelineContext
    receiver: Receiver
    settings: Callable[[], Settings]
    problems: Callable[[], Sequence[str]]
    endpoints: Endpoints
    shared: PipelineContext | None = None
    fleet: FleetOverview | None = None

    @property
    def store(self) -> CheckpointStore:
        """The checkpoint store."""
        return self.context.store

    @property
    def services(self) -> Mapping[str, JobService]:
        """The watched services by their configured name."""
        return self.receiver.services

    @property
    def service_names(self) -> Mapping[str, str]:
        """The configured names of the watched services by their identity."""
        return {service.identity: name for name, service in self.services.items()}

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
        """The run totals of all ended runs, those of the whole fleet included."""
        contexts = [self.context] if self.shared is None else [self.context, self.shared]
        return [totals for context in contexts for totals in context.store.totals.values()]

    async def find_job(self, identity: str, job_id: str) -> tuple[Checkpoint | None, int | None]:
        """Return a job's checkpoint, whichever agent follows the job, and the number of that agent.

        Args:
            identity: The identity of its service.
            job_id: The job.

        Returns:
            No checkpoint for an unknown job, or while the fleet's database does not answer; no number for a job of
            this machine, and while no agent has the job.
        """
        found = self.store.job(identity, job_id)
        if found is not None or self.fleet is None or self.shared is None:
            return found, None
        own = self.shared.store.job(identity, job_id)
        if own is not None:
            return own, self.fleet.agent
        with contextlib.suppress(CheckpointError):
            stored = await self.fleet.find(identity, job_id)
            if stored is not None:
                return stored.checkpoint, stored.agent
        return None, None

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
