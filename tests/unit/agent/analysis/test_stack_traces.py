"""Stack traces of real programs, exit reasons, and fingerprints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.failure import Failure, exit_reason, failure_of, fingerprint_of
from tailspan_agent.job.mapping import failure_text
from tests.fakes.agents import Bench

RECORDED = Path(__file__).parents[3] / "data" / "failures"


def printed(name: str) -> list[str]:
    return (RECORDED / f"{name}.txt").read_text().splitlines()


def failure(lines: list[str]) -> Failure:
    found = failure_of(lines)
    assert found is not None
    return found


def failed(state: JobState = JobState.FAILED, **fields: Any) -> JobStatus:
    return JobStatus.from_state(state, job_id="j", job_name="etl", identity="id", trace_id="ab" * 16, **fields)


@pytest.mark.parametrize(
    ("name", "kind", "message", "first", "last"),
    [
        ("python-multi", "RuntimeError", "the run is lost", "Traceback", "RuntimeError: the run is lost"),
        ("python-group", "ExceptionGroup", "2 tiles failed (2 sub-exceptions)", "  + Exception Group", "    +------"),
        (
            "python-notes",
            "ValueError",
            "invalid literal for int() with base 10: 'x'\nwhile reading tile 7\nof the year 2024\nsecond line of",
            "Traceback",
            "second line of the note",
        ),
        (
            "python-pydantic",
            "pydantic_core._pydantic_core.ValidationError",
            "1 validation error for Row\nprice\n  Input should be a valid integer",
            "Traceback",
            "    For further information",
        ),
        ("python-syntax", "SyntaxError", "'(' was never closed", '  File "/srv/job/syntax.py", line 1', "SyntaxError:"),
        ("python-thread", "KeyError", "'tile'", "Traceback", "KeyError: 'tile'"),
        ("python-ignored", "ValueError", "the real one", "Traceback", "ValueError: the real one"),
        ("python-logged", "KeyError", "'price'", "Traceback", "KeyError: 'price'"),
        ("python-workers", "KeyError", "'price'", "Traceback", "KeyError: 'price'"),
        ("python-recursion", "RecursionError", "maximum recursion depth exceeded", "Traceback", "RecursionError:"),
        ("java", "Boom$TileException", "tile 7 is broken", 'Exception in thread "main"', "\tat jdk.compiler/com"),
        ("java-oom", "java.lang.OutOfMemoryError", "Java heap space", "Exception in thread", "\tat Oom.main"),
        ("node", "TileError", "tile 7 is broken", "TileError: tile 7", "}"),
        ("node-rejection", "TypeError", "no such column: price", "TypeError: no such", "    at node:internal/main"),
        ("rust-backtrace", "panic", "index out of bounds: the len is 1", "thread 'main' (", "note: Some details"),
    ],
)
def test_recorded_failures(name: str, kind: str, message: str, first: str, last: str) -> None:
    """Recorded output of failed Python, Java, Node.js and Rust programs: type, message and stack."""
    found = failure(printed(name))
    assert found.stacktrace is not None
    lines = found.stacktrace.split("\n")
    assert found.exception_type == kind
    assert found.message.startswith(message)
    assert lines[0].startswith(first)
    assert lines[-1].startswith(last)


def test_a_chain_is_joined_whole() -> None:
    """Three exceptions, both kinds of chain and a message with an empty line are one stack."""
    assert failure(printed("python-multi")).stacktrace == "\n".join(printed("python-multi"))
    java = failure(printed("java")).stacktrace
    assert java is not None
    assert 'Caused by: java.lang.NumberFormatException: For input string: "x7"' in java
    node = failure(printed("node")).stacktrace
    assert node is not None
    assert "[cause]: SyntaxError: Expected property name" in node


def test_workers_that_print_between_each_other() -> None:
    """Lines have their worker's name: the traceback has only the lines of one worker, without the name."""
    found = failure(printed("python-workers"))
    assert found.stacktrace is not None
    assert "step" not in found.stacktrace
    assert found.stacktrace.split("\n")[1] == '  File "/srv/job/workers.py", line 5, in work'


@pytest.mark.parametrize(
    "lines",
    [
        ["we met at noon", "  at the bridge"],
        ["Error: printed by hand", "and then it went on"],
        ["panicked at the disco:", "they said"],
        ["thread 'main' panicked at x:", ""],
        ['  File "x.py", line 1', "SyntaxErrors are rare"],
        ["Caused by: java.lang.Error: without a first line"],
    ],
)
def test_text_that_looks_like_a_stack(lines: list[str]) -> None:
    """Prose with the words of a stack is not a stack."""
    assert failure(lines).stacktrace is None


@pytest.mark.parametrize(
    ("job", "lines", "reason", "text"),
    [
        (failed(exit_code=1, error="exited with code 1"), ["bye"], "exit_code", "exited with code 1"),
        (failed(exit_code=1, error="exited with code 1"), printed("python-notes"), "exception", "ValueError: invalid"),
        (failed(exit_code=139, error="killed by SIGSEGV"), ["step 3"], "signal", "killed by SIGSEGV"),
        (failed(exit_code=137, error="killed by SIGKILL, perhaps because memory ran out"), ["x"], "signal", "killed"),
        (failed(exit_code=1), printed("java-oom"), "out_of_memory", "java.lang.OutOfMemoryError: Java heap space"),
        (failed(exit_code=1), ["MemoryError"], "out_of_memory", "MemoryError"),
        (
            failed(exit_code=134, error="killed by SIGABRT"),
            printed("node-oom"),
            "out_of_memory",
            "killed by SIGABRT (FATAL ERROR: Reached heap limit Allocation failed - JavaScript heap out of memory)",
        ),
        (failed(), ["bye"], "unknown", "bye"),
        (failed(JobState.TIMED_OUT, error="ran longer than its timeout of 5 s"), ["x"], "timeout", "ran longer"),
        (failed(JobState.CANCELED, error="canceled"), ["MemoryError"], "canceled", "canceled"),
        (failed(JobState.LOST, error="its supervisor was killed"), ["x"], "lost", "its supervisor was killed"),
        (failed(JobState.SUCCEEDED), ["MemoryError"], None, ""),
        (failed(JobState.RUNNING), ["MemoryError"], None, ""),
    ],
)
def test_exit_reasons(job: JobStatus, lines: list[str], reason: str | None, text: str) -> None:
    """The exit reason and its text; a SIGKILL alone is no proof of out of memory."""
    found = failure(lines)
    assert exit_reason(job, found) == reason
    if reason is not None:
        assert failure_text(job, found).startswith(text)


def fingerprint(lines: list[str]) -> str:
    found = failure(lines)
    return fingerprint_of(found.exception_type or "exit 1", found.message, found)


@pytest.mark.parametrize("name", ["python-multi", "python-thread", "java", "node", "rust-backtrace", "python-group"])
def test_a_fingerprint_is_stable(name: str) -> None:
    """Other line numbers, folders, addresses and ids are the same failure; another function is another failure."""
    lines = printed(name)
    moved = [
        re.sub(r"\d+", lambda number: str(int(number[0]) + 11), line).replace("/srv/job/", "/opt/else/")
        for line in lines
    ]
    assert moved != lines
    assert fingerprint(moved) == fingerprint(lines)
    renamed = [re.sub(r"\b(load|one)\b", "unload", line) for line in lines]
    assert fingerprint(renamed) != fingerprint(lines)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("disk full after 12 rows", "disk full after 9999 rows", True),
        ("no run 0a1b2c3d-aaaa-bbbb-cccc-000011112222", "no run ffff0000-1234-bbbb-cccc-000011112229", True),
        ("cannot read /data/a1/b.csv", "cannot read /srv/x/b.csv", True),
        ("object at 0x7f032175d620 is gone", "object at 0x7fea10ce0150 is gone", True),
        ("disk full", "disk slow", False),
    ],
)
def test_a_fingerprint_without_a_stack(one: str, other: str, same: bool) -> None:
    """The message counts, without its numbers, ids and folders."""
    assert (fingerprint([one]) == fingerprint([other])) is same


@pytest.mark.parametrize(
    "unit", ["/", "a/", "-", "a.", "0x", "f", "0", "~+-", "  at ", "thread '", "Caused by: ", " {"]
)
def test_hostile_lines_have_a_fingerprint(unit: str) -> None:
    """Any repetition of any length is read in linear time."""
    lines = [unit * (400_000 // len(unit))] * 20
    stack = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in f',
        *(f'  File "{line}' for line in lines),
    ]
    assert len(fingerprint([*stack, "ValueError: x", *lines])) == 16


def test_a_repeated_failure_is_recognized(bench: Bench) -> None:
    """The third run with a failure has its count on the span and in the record, across restarts of the agent."""
    for number, error in enumerate(["KeyError: 'a'", "KeyError: 'b'", "ValueError: c", "KeyError: 'd'"]):
        job_id = f"j{number}"
        bench.fake.add_job(job_id, job_name="etl", state="FAILED", exit_code=1)
        traceback = ["Traceback (most recent call last):", f'  File "x.py", line {number}, in f', error]
        bench.fake.add_lines(job_id, *traceback)
        bench.once()
    records = {
        row.resource["cicd.pipeline.run.id"]: row
        for row in bench.collector.log_records()
        if row.event_name == "exception"
    }
    spans = {f"j{number}": bench.spans(f"j{number}")["run"] for number in range(4)}
    counts = [spans[f"j{number}"].attributes["tailspan.failure.count"] for number in range(4)]
    assert counts == [1, 2, 1, 3]
    assert {records[job_id].attributes["tailspan.failure.fingerprint"] for job_id in ("j0", "j1", "j3")} == {
        spans["j0"].attributes["tailspan.failure.fingerprint"]
    }
    assert "tailspan.failure.first_seen" not in spans["j0"].attributes
    assert "\nfirst seen with this run\n" in records["j0"].body
    assert f"\nseen 3 times since {spans['j3'].attributes['tailspan.failure.first_seen']}\n" in records["j3"].body
    assert {span.attributes["tailspan.exit.reason"] for span in spans.values()} == {"exception"}
