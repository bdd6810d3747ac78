"""The proof of the proof, in short: each wrong build can still be made, and one of them is found out."""

from __future__ import annotations

import ast

import pytest

from tests.prove import faults_fleet
from tests.prove.mutant import CHECKPOINT_BEFORE_ACK
from tests.prove.rows import run
from tests.prove.wrong_builds import BUILDS

pytestmark = pytest.mark.timeout(600)  # a proof takes minutes on a loaded machine

MUTANTS = [CHECKPOINT_BEFORE_ACK, *(build.mutant for build in (*BUILDS, *faults_fleet.BUILDS))]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_build_can_still_be_made(mutant) -> None:
    """Who changes the code that it changes adapts it: else the proof of the proof would fail only in the long run."""
    ast.parse(mutant.changed())


def test_a_wrong_build_is_found_out() -> None:
    """A part that is taken for all: the row that is about that fails, and so this one is ok."""
    assert run("wrong build: takes a part for all", kills=0, seed=1).verdict == "ok"
