"""The short form of the faults of the agent's disk."""

from __future__ import annotations

from functools import partial

import pytest

from tests.prove.faults_disk import (
    SizeLimit,
    dead_letter_full,
    files_full,
    full_at_start,
    full_while_relaying,
    store_truncated,
)

pytestmark = pytest.mark.timeout(600)  # a proof takes minutes on a loaded machine

LIMIT = SizeLimit()
CUTS = 2


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(partial(full_while_relaying, disk=LIMIT, ending=False), id="full"),
        pytest.param(partial(full_at_start, disk=LIMIT), id="full at start"),
        pytest.param(partial(dead_letter_full, disk=LIMIT, patient=False), id="dead letter full"),
        pytest.param(partial(files_full, disk=LIMIT), id="OTLP files full"),
        pytest.param(partial(store_truncated, cuts=CUTS), id="cut off"),
    ],
)
def test_no_line_is_lost_whatever_the_disk_does(fault) -> None:
    """Full or damaged: the agent waits, heals or refuses, and every line arrives in the end.

    A store that another agent holds, or of a newer version, is the subject of `tests.integration.agent.test_cli`.
    """
    row = fault("short")
    assert row.verdict == "ok"
    assert row.found[0].lines.expected > 0
