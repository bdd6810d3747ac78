"""The agent's own log lines."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.process.logging_setup import LineFormatter, RepeatLimit, set_up_logging


def record(message: str, *args: object, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    """Make a record as a logger of the agent would."""
    made = logging.makeLogRecord(
        {
            "name": "tailspan_agent.pipeline.queue",
            "msg": message,
            "args": args,
            "levelno": level,
            "levelname": "WARNING",
        }
    )
    made.created = 1_800_000_000.0
    vars(made).update(extra)
    return made


def test_a_line_has_time_level_module_message_and_context():
    """One event is one line that a person and grep can both read."""
    line = LineFormatter().format(record("refused by %s", "loki", signal="logs", reason='HTTP "401"', empty=""))
    assert line == (
        '2027-01-15T08:00:00.000Z WARNING pipeline.queue refused by loki signal=logs reason="HTTP \\"401\\"" empty=""'
    )


@given(st.text(), st.text())
def test_foreign_text_stays_on_its_line(message, value):
    """No name or answer can forge a line, drive a terminal or break the stream's encoding."""
    line = LineFormatter().format(record("%s", message, value=value))
    assert line.isprintable()
    line.encode()


def test_a_traceback_stays_on_the_line():
    """An unexpected error is one event too."""
    try:
        raise ValueError("a\nb")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info())
    line = LineFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: a\\nb" in line


def test_equal_warnings_are_said_once_a_minute_with_their_number():
    """A dead endpoint does not fill the disk, and nothing is hidden: the number is told."""
    now = [0.0]
    limit = RepeatLimit(clock_s=lambda: now[0])
    assert limit.filter(record("down", signal="logs"))
    assert [limit.filter(record("down", signal="logs")) for _ in range(3)] == [False] * 3
    assert limit.filter(record("down", signal="traces"))
    assert limit.filter(record("other"))
    assert all(limit.filter(record("down", level=logging.ERROR)) for _ in range(3))
    now[0] = 60.0
    again = record("down", signal="logs")
    assert limit.filter(again)
    assert LineFormatter().format(again).endswith("down signal=logs repeated=3")


def test_what_is_remembered_is_bounded():
    """Warnings that differ each time do not grow the process."""
    limit = RepeatLimit(clock_s=lambda: 0.0)
    for number in range(3000):
        limit.filter(record("job %d", number))
    assert limit.filter(record("job %d", 0))
    assert not limit.filter(record("job %d", 2999))


@pytest.fixture
def _logging_as_it_was():
    """Put the process's logging back."""
    root = logging.getLogger()
    chatty = {name: logging.getLogger(name).level for name in ("httpx", "httpcore", "uvicorn", "asyncio")}
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in chatty.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.usefixtures("_logging_as_it_was")
def test_set_up_writes_lines_and_quiets_libraries():
    """The agent's words come through at the chosen level; each HTTP request of a library does not."""
    stream = io.StringIO()
    set_up_logging("info", stream)
    logging.getLogger("tailspan_agent.agent").info("started", extra={"jobs": 3})
    logging.getLogger("tailspan_agent.agent").debug("detail")
    logging.getLogger("httpx").info("HTTP Request: GET http://127.0.0.1")
    assert [line.partition(" ")[2] for line in stream.getvalue().splitlines()] == ["INFO agent started jobs=3"]
