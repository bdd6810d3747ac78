"""`Shown`: what the page may see of the agent. Nothing here writes, and nothing is asked before somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tailspan.config import Settings
from tailspan.models import RunResponse
from tailspan.services import JobService
from tailspan_agent.checkpoint import Store
from tailspan_agent.following import Following
from tailspan_agent.history import Histories, PipelineHistory
from tailspan_agent.insight import FollowedJob
from tailspan_agent.outlets import Outlets
from tailspan_agent.relay import Relay
from tailspan_agent.runs import RunTotals

__all__ = ["Shown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the page reads.

    Attributes:
        relay: The store, what is known of pipelines, the agent's own health, and what takes secrets out.
        following: The services and the jobs that are followed now.
        settings: Returns the configuration in force.
        problems: Returns short words for what keeps the agent from relaying.
        outlets: Where each signal goes.
    """

    relay: Relay
    following: Following
    settings: Callable[[], Settings]
    problems: Callable[[], Sequence[str]]
    outlets: Outlets

    @property
    def store(self) -> Store:
        """The checkpoint store."""
        return self.relay.store

    @property
    def services(self) -> Mapping[str, JobService]:
        """The watched services by their configured name."""
        return self.following.services

    @property
    def followed(self) -> Sequence[FollowedJob]:
        """The jobs that are followed now."""
        return self.following.followed

    @property
    def histories(self) -> Histories:
        """The last ended runs of pipelines."""
        return self.relay.insights.histories

    @property
    def totals(self) -> Sequence[RunTotals]:
        """The totals of all ended runs."""
        return list(self.relay.totals.values())

    def label(self, job_name: str) -> str:
        """Return the pipeline that jobs of this name are counted under, or would be."""
        return self.relay.names.find(job_name)

    def history(self, job_name: str) -> PipelineHistory:
        """Return the past of a job's pipeline."""
        return self.histories.of(self.label(job_name))

    def redact(self, text: str) -> str:
        """Return a text of a job without the configured secrets."""
        return self.relay.redactor.redact(text)[0] if self.relay.redactor is not None else text

    def redact_job(self, job: RunResponse) -> RunResponse:
        """Return a status without the configured secrets."""
        return self.relay.redactor.redact_job(job) if self.relay.redactor is not None else job
