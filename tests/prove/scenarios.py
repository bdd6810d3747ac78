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

    def row(self, seed: int) -> Row:
        """Run it; an error is a failed row."""
        started_s = time.monotonic()
        try:
            row = self.run(f"{seed}/{self.name}")
        except Exception as error:
            traceback.print_exc()
            row = Row(self.name, problems=[f"{type(error).__name__}: {str(error)[-_MESSAGE_CHARS:]}"])
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
