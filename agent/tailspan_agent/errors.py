"""The errors of the agent, below `tailspan.errors.TailspanError`.

TailspanError
  AgentError                the agent or a command cannot continue
    CheckpointError         the checkpoint store cannot be opened, read or written
      LeaseLostError        another agent of the fleet follows the job by now
    ValueRefusedError       the checkpoint store cannot hold a value of one job; the store itself works
    ExportRejectedError     the endpoint rejects a request, or is unavailable for too long

A batch that the endpoint rejects while the agent runs is an outcome (`exporter.outcome`), not an exception; these
errors end a command.
"""

from __future__ import annotations

from tailspan.errors import TailspanError

__all__ = ["AgentError", "CheckpointError", "ExportRejectedError", "LeaseLostError", "ValueRefusedError"]


class AgentError(TailspanError):
    """The agent or a command cannot continue; the message has the remedy.

    Attributes:
        exit_code: The exit code of the command.
    """

    exit_code = 2


class CheckpointError(AgentError):
    """The checkpoint store cannot be opened, read or written."""


class LeaseLostError(CheckpointError):
    """Another agent of the fleet follows the job by now; it continues from the last checkpoint."""


class ValueRefusedError(AgentError):
    """The checkpoint store cannot hold a value of one job. The store works: only this job cannot be stored."""


class ExportRejectedError(AgentError):
    """The endpoint rejects a request, or was unavailable for as long as the caller waits."""

    exit_code = 3
