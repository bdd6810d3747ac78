"""What only the agent raises, below `tailspan.errors.TailspanError`.

TailspanError
  AgentError                the agent cannot go on with what it was doing
    CheckpointError         the checkpoint store cannot be opened, read or written
    ExportRejectedError     the endpoint does not take what it was sent, and waiting will not help

A batch that the endpoint rejects while the agent runs is not an exception but an outcome (`exporter.outcome`);
these are for commands that have to stop.
"""

from __future__ import annotations

from tailspan.errors import TailspanError

__all__ = ["AgentError", "CheckpointError", "ExportRejectedError"]


class AgentError(TailspanError):
    """The agent cannot go on with what it was doing; the message says what to do about it.

    Attributes:
        exit_code: What a command ends with that raises it.
    """

    exit_code = 2


class CheckpointError(AgentError):
    """The checkpoint store cannot be opened, read or written."""


class ExportRejectedError(AgentError):
    """The endpoint does not take what it was sent, or was not reachable for as long as the caller would wait."""

    exit_code = 3
