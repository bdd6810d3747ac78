"""All rows of the table, in its order."""

from __future__ import annotations

from functools import partial

from tests.prove import configuration, endpoint, faults_disk, faults_local, jobservice, load
from tests.prove.kills import sweep, sweep_of_mutant
from tests.prove.mutant import CHECKPOINT_BEFORE_ACK
from tests.prove.scenarios import Scenario
from tests.prove.table import Row

LEAST_HITS = 10
_MUTANT_KILLS = 20


def scenarios(kills: int) -> list[Scenario]:
    """Return all rows; so many kills are in the sweep."""
    return [
        Scenario("SIGKILL at every step", partial(sweep, kills=kills, least_hits=LEAST_HITS), alone=True),
        Scenario(
            "SIGKILL, a build that checkpoints before the ack",
            partial(sweep_of_mutant, mutant=CHECKPOINT_BEFORE_ACK, kills=_MUTANT_KILLS),
            alone=True,
        ),
        *(fault.scenario() for fault in endpoint.FAULTS),
        *(fault.scenario() for fault in jobservice.FAULTS),
        *faults_disk.scenarios(),
        *faults_local.scenarios(),
        *(change.scenario() for change in configuration.FAULTS),
        *(row.scenario() for row in load.FAULTS),
    ]


def run(name: str, kills: int, seed: int) -> Row:
    """Run the row of that name."""
    (scenario,) = (scenario for scenario in scenarios(kills) if scenario.name == name)
    return scenario.row(seed)
