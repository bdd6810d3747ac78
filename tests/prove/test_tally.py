"""The counting of the proof counts right: each kind of fault is found, and nothing else."""

from __future__ import annotations

import pytest

from tests.prove.tally import JobCount, JobTally, Span, count_spans, line_text


def tally(*arrivals: tuple[int, int, str], expected: int, **options: object) -> JobCount:
    """Count arrivals given as (number, time, uid); line n was written at time n * 10."""
    job = JobTally("job", lambda number, text: (number * 10, number * 10), **options)  # type: ignore[arg-type]
    for number, nanos, uid in arrivals:
        job.take(line_text("job", number), nanos, uid)
    return job.count(expected)


ALL = ((0, 0, "a"), (1, 10, "b"), (2, 20, "c"))


@pytest.mark.parametrize(
    ("arrivals", "faults"),
    [
        (ALL, {}),
        (ALL[:2], {"missing": 1}),
        ((), {"missing": 3}),
        ((*ALL, ALL[2]), {"repeated": 1}),
        ((ALL[1], ALL[0], ALL[2]), {"out_of_order": 1}),
        ((*ALL, ALL[0], ALL[1]), {"repeated": 2}),
        ((*ALL[:2], (2, 21, "c")), {"wrong_time": 1}),
        ((*ALL, (2, 21, "c")), {"repeated": 1, "wrong_time": 1}),
        ((*ALL, (2, 20, "d")), {"uid_unstable": 1}),
        ((ALL[0], (1, 10, "a"), ALL[2]), {"uid_unstable": 1}),
        ((*ALL, (3, 30, "d")), {"foreign": 1}),
        ((*ALL, (2, 20, "")), {"foreign": 1}),
    ],
)
def test_each_fault_is_counted_once(arrivals: tuple[tuple[int, int, str], ...], faults: dict[str, int]) -> None:
    """Of three lines: what arrived is counted as what it is."""
    found = tally(*arrivals, expected=3)
    records = sum(1 for *_, uid in arrivals)
    assert found == JobCount(expected=3, records=records, **faults)
    assert bool(found.faults) == bool({*faults} - {"repeated"})


def test_a_text_that_was_not_written_is_foreign() -> None:
    """A line of another job, a cut line, and a line that the job does not know."""
    job = JobTally("job", lambda number, text: None if text.endswith("cut") else (0, 9))
    for text in ("other #0000000", "job #00000", "hello", "job #0000000 cut"):
        job.take(text, 0, "a")
    assert job.count(1) == JobCount(expected=1, records=4, missing=1, foreign=4)


def test_copies_of_a_line_are_that_many_lines() -> None:
    """Two equal lines are two: one uid each, and one missing when one uid comes twice."""
    assert tally(*ALL, (2, 20, "d"), expected=3, copies={2: 2}) == JobCount(expected=4, records=4)
    found = tally(*ALL, ALL[2], expected=3, copies={2: 2})
    assert found == JobCount(expected=4, records=4, missing=1, repeated=1)


def test_late_lines_have_no_place_in_the_order() -> None:
    """A late line may come behind its successors, and does not push others out of order."""
    assert tally(ALL[0], ALL[2], ALL[1], expected=3, late={1}).out_of_order == 0
    assert tally(ALL[2], ALL[0], ALL[1], expected=3, late={2}).out_of_order == 0


def test_a_repeat_is_excused_only_by_a_restart_before_its_ack() -> None:
    """What was acked before the restart, and what comes twice after it, is needless."""
    job = JobTally("job")
    for number in range(3):
        job.take(line_text("job", number), 0, str(number))
    job.restarted(1)
    for number in (1, 2, 2):
        job.take(line_text("job", number), 0, str(number))
    assert job.count(3) == JobCount(expected=3, records=6, repeated=3, needless=1)
    job.restarted(1, strict=False)
    for number in (0, 2, 2):
        job.take(line_text("job", number), 0, str(number))
    assert job.count(3) == JobCount(expected=3, records=9, repeated=6, needless=2)


def test_spans_are_compared_by_id_and_by_bytes() -> None:
    """A span may come again only as it was."""
    one = Span("run-1", "RUN", "id-1", b"a")
    assert count_spans([one], {"run-1": ["RUN"]}).faults == 0
    assert count_spans([one, one], {"run-1": ["RUN"]}).repeated == 1
    assert count_spans([one, one], {"run-1": ["RUN"]}).faults == 0
    assert count_spans([one], {"run-1": ["RUN", "executing"], "run-2": ["RUN"]}).missing == 2
    assert count_spans([one, Span("run-1", "RUN", "id-2", b"a")], {}).other_id == 1
    assert count_spans([one, Span("run-1", "RUN", "id-1", b"b")], {}).other_bytes == 1
