"""`AgentView`: what the page may see of the agent. Nothing here writes, and nothing is asked before somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tailspan.config import Settings
from tailspan.models import RunResponse
from tailspan.services import JobService
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.analysis.baseline import Histories, PipelineHistory
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.store import Store
from tailspan_agent.exporter.endpoints import Endpoints
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.receiver.receiver import Receiver

__all__ = ["AgentView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentView:
    """What the page reads.

    Attributes:
        context: The store, what is known of pipelines, the agent's own health, and what takes secrets out.
        receiver: The services and the jobs that are followed now.
        settings: Returns the configuration in force.
        problems: Returns short words for what keeps the agent from relaying.
        endpoints: Where each signal goes.
    """

    context: PipelineContext
    receiver: Receiver
    settings: Callable[[], Settings]
    problems: Callable[[], Sequence[str]]
    endpoints: Endpoints

    @property
    def store(self) -> Store:
        """The checkpoint store."""
        return self.context.store

    @property
    def services(self) -> Mapping[str, JobService]:
        """The watched services by their configured name."""
        return self.receiver.services

    @property
    def followed(self) -> Sequence[JobSnapshot]:
        """The jobs that are followed now."""
        return self.receiver.followed

    @property
    def histories(self) -> Histories:
        """The last ended runs of pipelines."""
        return self.context.pipeline_stats.histories

    @property
    def totals(self) -> Sequence[RunTotals]:
        """The totals of all ended runs."""
        return list(self.context.totals.values())

    def label(self, job_name: str) -> str:
        """Return the pipeline that jobs of this name are counted under, or would be."""
        return self.context.names.find(job_name)

    def history(self, job_name: str) -> PipelineHistory:
        """Return the past of a job's pipeline."""
        return self.histories.of(self.label(job_name))

    def redact(self, text: str) -> str:
        """Return a text of a job without the configured secrets."""
        return self.context.redactor.redact(text)[0] if self.context.redactor is not None else text

    def redact_job(self, job: RunResponse) -> RunResponse:
        """Return a status without the configured secrets."""
        return self.context.redactor.redact_job(job) if self.context.redactor is not None else job
