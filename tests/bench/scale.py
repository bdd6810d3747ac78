"""How large the workloads are, and how often they run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Scale"]


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of a run.

    Attributes:
        factor: Share of the full size.
        times: How often each case runs; medians are taken.
    """

    factor: float
    times: int

    def of(self, full: int, *, least: int = 1) -> int:
        """Return the scaled count of what there is so much of at full size."""
        return max(least, round(full * self.factor))
