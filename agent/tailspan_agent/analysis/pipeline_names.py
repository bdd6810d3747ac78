"""The pipeline names in metrics: a limited number, so that the number of series is limited. Pure."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["OTHER_PIPELINES", "PipelineNames", "utf8_name"]

OTHER_PIPELINES = "#other#"
"""The name that all further pipelines share after the limit is reached."""


def utf8_name(name: str) -> str:
    """Return a name with ``?`` for each lone surrogate, which UTF-8 cannot encode."""
    return name.encode(errors="replace").decode()


class PipelineNames:
    """The pipelines with metrics of their own: the first ones up to a limit; all further ones share `OTHER_PIPELINES`.

    Without a limit, a pipeline with a date or an id in its name would create a new series for each run.
    """

    def __init__(self, limit: int, known: Iterable[str] = ()) -> None:
        """Start with the names of earlier runs of the agent.

        Args:
            limit: Maximum number of names, at least 1.
            known: The names, oldest first.
        """
        self._limit = limit
        self._names: dict[str, None] = {}
        for name in known:
            self.label(name)

    def label(self, name: str) -> str:
        """Register a name and return its label for metrics, which stays the same."""
        label = self.find(name)
        self._names[label] = None
        return label

    def find(self, name: str) -> str:
        """Return the label that a name has or would get, without registering it."""
        if name in self._names:
            return name
        name = utf8_name(name)
        return name if name in self._names or len(self._names) < self._limit else OTHER_PIPELINES

    @property
    def limit(self) -> int:
        """Maximum number of names."""
        return self._limit

    @property
    def used(self) -> tuple[str, ...]:
        """The labels in use, oldest first; with `OTHER_PIPELINES` after the limit was reached."""
        return tuple(self._names)
