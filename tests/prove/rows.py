"""All rows of the table, in its order."""

from __future__ import annotations

from functools import partial

from tests.prove import (
    attacks,
    clock,
    configuration,
    endpoint,
    faults_disk,
    faults_fleet,
    faults_local,
    faults_stores,
    fuzz,
    hostile_jobs,
    jobservice,
    load,
    log_files,
    orchestrators,
    process,
    wrong_builds,
)
from tests.prove.kills import sweep, sweep_of_mutant
from tests.prove.mutant import CHECKPOINT_BEFORE_ACK
from tests.prove.scenarios import Scenario
from tests.prove.table import Row

LEAST_HITS = 10
_MUTANT_KILLS = 20


def grouped(kills: int) -> dict[str, list[Scenario]]:
    """Return all rows by group; the sweep has `kills` kills."""
    return {
        "SIGKILL": [
            Scenario("SIGKILL at every step", partial(sweep, kills=kills, least_hits=LEAST_HITS), alone=True),
            Scenario(
                "SIGKILL, a build that checkpoints before the ack",
                partial(sweep_of_mutant, mutant=CHECKPOINT_BEFORE_ACK, kills=_MUTANT_KILLS),
                alone=True,
            ),
        ],
        "OTLP endpoint": [fault.scenario() for fault in endpoint.FAULTS],
        "stores": faults_stores.scenarios(),
        "job service": [fault.scenario() for fault in (*jobservice.FAULTS, *orchestrators.FAULTS, *log_files.FAULTS)],
        "disk": faults_disk.scenarios(),
        "local jobs": faults_local.scenarios(),
        "agent process": [change.scenario() for change in process.FAULTS],
        "configuration": [change.scenario() for change in configuration.FAULTS],
        "clock": [leap.scenario() for leap in clock.FAULTS],
        "load": [row.scenario() for row in load.FAULTS],
        "hostile jobs": [row.scenario() for row in hostile_jobs.FAULTS],
        "attacks": [row.scenario() for row in attacks.ATTACKS],
        "fleet": [fault.scenario() for fault in faults_fleet.FAULTS],
        "wrong builds": [build.scenario() for build in (*wrong_builds.BUILDS, *faults_fleet.BUILDS)],
        "input (fuzzed)": fuzz.scenarios(),
    }


def scenarios(kills: int) -> list[Scenario]:
    """Return all rows, in the order of the table."""
    return [scenario for group in grouped(kills).values() for scenario in group]


def groups() -> dict[str, list[str]]:
    """Return the names of all rows by group."""
    return {title: [scenario.name for scenario in group] for title, group in grouped(0).items()}


def run(name: str, kills: int, seed: int) -> Row:
    """Run the row of that name."""
    (scenario,) = (scenario for scenario in scenarios(kills) if scenario.name == name)
    return scenario.row(seed)
