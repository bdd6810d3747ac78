"""What a row of the table is: a fault by name, and the function that does it and returns what was found."""

from __future__ import annotations

import fnmatch
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.prove.table import Row

_MESSAGE_CHARS = 300


@dataclass(frozen=True)
class Scenario:
    """One row.

    Attributes:
        name: The fault.
        run: Does it, with a seed, and returns the row.
        alone: Whether nothing else should run at the same time: it measures, or it aims.
    """

    name: str
    run: Callable[[str], Row]
    alone: bool = False

    def row_of(self, seed: str) -> Row:
        """Run it; an error is a failed row."""
        try:
            return self.run(seed)
        except Exception as error:
            text = str(error)
            shown = text if len(text) <= 2 * _MESSAGE_CHARS else f"{text[:_MESSAGE_CHARS]} ... {text[-_MESSAGE_CHARS:]}"
            return Row(self.name, problems=[f"{type(error).__name__}: {shown}", traceback.format_exc(limit=-3)])

    def row(self, seed: int) -> Row:
        """Run it and say how to run it again."""
        started_s = time.monotonic()
        row = self.row_of(f"{seed}/{self.name}")
        row.fault = self.name
        row.seconds = time.monotonic() - started_s
        row.reproduce = f"make prove PROVE_SEED={seed} PROVE_ONLY='{self.name}'"
        return row


def select(scenarios: list[Scenario], only: str) -> Iterator[Scenario]:
    """Yield the scenarios whose name matches one of the globs, which have ``|`` between them; all without globs."""
    patterns = [pattern.strip() for pattern in only.split("|") if pattern.strip()] or ["*"]
    for scenario in scenarios:
        if any(fnmatch.fnmatchcase(scenario.name, pattern) for pattern in patterns):
            yield scenario
