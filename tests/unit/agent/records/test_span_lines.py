"""The lines that a span carries: which they are, and that memory and size stay bounded."""

from __future__ import annotations

from tailspan.config import RedactPattern, RedactSettings
from tailspan.logs.page import Line, LogPage
from tailspan_agent.records.encode import LogContext
from tailspan_agent.records.redact import Redactor
from tailspan_agent.records.severity import SEVERITIES, severity_number
from tailspan_agent.records.span_lines import MAX_BYTES, MAX_LINES, MAX_TASK_BYTES, MAX_TASKS_BYTES, SpanLine, SpanLines


def page(lines: list[str], *, first: int = 0) -> LogPage:
    """Return a page of lines, one each second; every third is from stderr."""
    made = [
        Line((first + number) * 1_000_000_000, line, "stderr" if number % 3 == 0 else "stdout")
        for number, line in enumerate(lines)
    ]
    return LogPage.from_lines(made, cursor=b"c", identity="i", job_id="j")


def context(**fields: object) -> LogContext:
    """Return the context of a job's lines."""
    return LogContext(trace_id=b"t" * 16, span_id=b"s" * 8, **fields)  # type: ignore[arg-type]


def collected(*pages: LogPage, context_: LogContext | None = None) -> SpanLines:
    """Return what these pages leave."""
    lines = SpanLines()
    for one in pages:
        lines.add(one, context_ or context())
    return lines


def test_a_short_log_is_there_completely() -> None:
    """Each line has its text, time, severity and stream, in order."""
    lines = collected(page(["start", "WARNING: low"]), page(["\x1b[1mERROR: gone\x1b[0m"], first=2))
    assert [(line.text, line.time_unix_nano // 10**9, line.severity.text, line.stream) for line in lines.chosen()] == [
        ("start", 0, "", "stderr"),
        ("WARNING: low", 1, "WARNING", "stdout"),
        ("ERROR: gone", 2, "ERROR", "stderr"),
    ]
    assert lines.count == 3


def test_warnings_of_long_ago_remain() -> None:
    """Of a long log, warnings and errors and the last lines are there; infos between them are not."""
    pages = [page([f"ERROR: {number}", *[f"INFO: {number}"] * 999], first=1000 * number) for number in range(30)]
    texts = [line.text for line in collected(*pages).chosen()]
    assert texts[:30] == [f"ERROR: {number}" for number in range(30)]
    assert texts[30:] == ["INFO: 29"] * 70


def test_many_warnings_leave_room_for_the_last_lines() -> None:
    """The last 20 lines are there however many warnings came before; then the newest warnings."""
    lines = collected(page([f"ERROR: {number}" for number in range(4000)] + [f"end {number}" for number in range(20)]))
    texts = [line.text for line in lines.chosen()]
    assert texts[-20:] == [f"end {number}" for number in range(20)]
    assert texts[:-20] == [f"ERROR: {number}" for number in range(3920, 4000)]
    assert (len(texts), lines.count) == (MAX_LINES, 4020)


def test_long_lines_lose_their_middle_and_the_sum_is_bounded() -> None:
    """No line is above 2,000 bytes, and all together are at most 64 KiB."""
    chosen = collected(page([f"{number} " + "€" * 5000 + " end" for number in range(200)])).chosen()
    assert all(len(line.text.encode()) <= 2000 and line.text.endswith(" end") for line in chosen)
    assert MAX_BYTES - 2000 < sum(line.size for line in chosen) <= MAX_BYTES
    assert chosen[-1].text.startswith("199 ")


def test_the_minimum_severity_and_the_redactor_count() -> None:
    """Dropped lines are not on the span, and secrets neither, not even those that shortening would cut."""
    redactor = Redactor.from_settings(
        RedactSettings(patterns=[RedactPattern(literal="key-", regex="key-[0-9]{3000}", slow=False)])
    )
    given = context(min_severity=severity_number("WARN"), redactor=redactor)
    lines = collected(page(["INFO: x", "plain key-" + "1" * 3000, "ERROR: y"]), context_=given)
    first, second = (line.text for line in lines.chosen())
    assert "key-" not in first
    assert "1" not in first
    assert second == "ERROR: y"


def test_the_lines_of_tasks_are_bounded() -> None:
    """By attempt and by job: of too many, the attempt that printed least recently loses its lines, not its count."""
    tasks = SpanLines().tasks
    line = SpanLine(0, 0, SEVERITIES[0], "", "x" * 2000)
    for number in range(200):
        for attempt in range(1, 11):
            tasks.add((f"t{number}", attempt), line)
            assert tasks.size <= MAX_TASKS_BYTES
    for _ in range(100):
        tasks.add(("t199", 10), line)
    assert len(tasks.of(("t199", 10))[0]) == MAX_TASK_BYTES // 2000
    assert tasks.of(("t0", 1)) == ([], 0)
    for number in range(200):
        for attempt in range(1, 11):
            tasks.drop((f"t{number}", attempt))
    assert tasks.size == 0
