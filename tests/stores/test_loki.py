"""A real Loki with its default limits: the cases that its double passes, and a restart. `LOKI_BIN` names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.agents import Bench
from tests.fakes.collector import Collector
from tests.integration.agent.stores.test_loki import (  # noqa: F401 - the cases of the double
    test_a_burst_passes,
    test_a_job_of_long_lines_with_wide_metadata,
    test_a_line_around_the_largest_size,
    test_lines_of_a_rejected_age_are_reported,
    test_lines_sent_again_are_equal,
    test_one_refused_line_costs_no_other_job_its_receipt,
    test_overlapping_jobs_of_one_name_after_an_absence,
    test_two_agents_do_not_share_a_stream_of_old_lines,
)
from tests.stores.jobs import LINES, add_jobs
from tests.stores.programs import Loki

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]


@pytest.fixture
def loki(tmp_path: Path, collector: Collector) -> Iterator[Loki]:
    """A Loki behind the collector's address."""
    with Loki(tmp_path / "loki") as running:
        collector.always("logs", running)
        yield running


def test_jobs_of_all_kinds(bench: Bench, loki: Loki) -> None:
    """Text and order of each line are as written, also after a restart; a failure is found by its stream."""
    add_jobs(bench)
    result = bench.once(timeout_s=60)
    assert (result.delivered, result.rejected) == (True, 0)
    for _ in range(2):
        for name, lines in LINES.items():
            stored = loki.lines(name, cicd_pipeline_run_id=name)
            events = loki.lines(name, service_instance_id="events")
            assert [line for line in stored if " read, " not in line and line not in events] == lines
            assert len(events) == (name == "failed")
        loki.restart()
