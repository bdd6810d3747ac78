"""The pipeline names that metrics may have: a bounded number of series. Pure."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["OTHER_PIPELINES", "PipelineNames", "utf8_name"]

OTHER_PIPELINES = "#other#"
"""The one name that all pipelines share that came after the cap was reached."""


def utf8_name(name: str) -> str:
    """Return a name with ``?`` for each lone surrogate: it has no UTF-8, and must not end what all jobs share."""
    return name.encode(errors="replace").decode()


class PipelineNames:
    """The names that get metrics of their own: the first ones up to a cap; all later ones share `OTHER_PIPELINES`.

    Pipelines that put a date or an id into their name would otherwise make a new series for each run.
    """

    def __init__(self, limit: int, known: Iterable[str] = ()) -> None:
        """Start with names in the order in which they were first seen.

        Args:
            limit: How many names there may be, at least one.
            known: The names of earlier runs of the agent, oldest first.
        """
        self._limit = limit
        self._names: dict[str, None] = {}
        for name in known:
            self.label(name)

    def label(self, name: str) -> str:
        """Register a name and return the one to use in metrics: the same each time, for as long as the order stays."""
        label = self.find(name)
        self._names[label] = None
        return label

    def find(self, name: str) -> str:
        """Return the label that a name has, or would get now; for those who only look, a name takes no place."""
        if name in self._names:
            return name
        name = utf8_name(name)
        return name if name in self._names or len(self._names) < self._limit else OTHER_PIPELINES

    @property
    def used(self) -> tuple[str, ...]:
        """The labels given so far, oldest first; with `OTHER_PIPELINES` once the cap was reached."""
        return tuple(self._names)
