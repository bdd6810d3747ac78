"""What a single pass of the agent relayed."""

from __future__ import annotations

from dataclasses import dataclass

from tailspan.errors import TailspanError

__all__ = ["OnceResult"]


@dataclass(frozen=True, slots=True)
class OnceResult:
    """What one pass relayed.

    Attributes:
        jobs: How many jobs were looked at.
        acked: How many log records the endpoint took.
        rejected: How many records went to the dead letter.
        failures: Services and jobs that could not be read, and why.
        delivered: Whether all that was read is acked or dead-lettered.
    """

    jobs: int
    acked: int
    rejected: int
    failures: tuple[TailspanError, ...]
    delivered: bool
