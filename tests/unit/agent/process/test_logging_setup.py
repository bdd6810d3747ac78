"""The agent's own log: lines on stderr, and the last warnings in a file."""

from __future__ import annotations

import io
import logging
import stat
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.process.logging_setup import (
    LineFormatter,
    RepeatLimit,
    keep_last_errors,
    read_last_errors,
    set_up_logging,
)

LOG = logging.getLogger("tailspan_agent.pipeline.queue")


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
    """One event is one line that both people and grep can read."""
    line = LineFormatter().format(record("refused by %s", "loki", signal="logs", reason='HTTP "401"', empty=""))
    assert line == (
        '2027-01-15T08:00:00.000Z WARNING pipeline.queue refused by loki signal=logs reason="HTTP \\"401\\"" empty=""'
    )


@given(st.text(), st.text())
def test_untrusted_text_stays_on_its_line(message, value):
    """No name or reply can forge a line, control a terminal or break the stream's encoding."""
    line = LineFormatter().format(record("%s", message, value=value))
    assert line.isprintable()
    line.encode()


def test_a_traceback_stays_on_the_line():
    """An unexpected error is one event."""
    try:
        raise ValueError("a\nb")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info())
    line = LineFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: a\\nb" in line


def test_equal_warnings_are_logged_once_a_minute_with_their_number():
    """A dead endpoint does not fill the disk, and the number of repeats stays visible."""
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


def test_the_memory_of_warnings_is_bounded():
    """Warnings that differ every time do not grow the process."""
    limit = RepeatLimit(clock_s=lambda: 0.0)
    for number in range(3000):
        limit.filter(record("job %d", number))
    assert limit.filter(record("job %d", 0))
    assert not limit.filter(record("job %d", 2999))


@pytest.fixture
def _logging_as_it_was():
    """Restore the process's logging."""
    root = logging.getLogger()
    chatty = {name: logging.getLogger(name).level for name in ("httpx", "uvicorn", "asyncio")}
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in chatty.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.usefixtures("_logging_as_it_was")
def test_set_up_writes_lines_and_quiets_libraries():
    """The agent's records pass at the chosen level; the HTTP requests of libraries do not."""
    stream = io.StringIO()
    set_up_logging("info", stream)
    logging.getLogger("tailspan_agent.agent").info("started", extra={"jobs": 3})
    logging.getLogger("tailspan_agent.agent").debug("detail")
    logging.getLogger("httpx").info("HTTP Request: GET http://127.0.0.1")
    assert [line.partition(" ")[2] for line in stream.getvalue().splitlines()] == ["INFO agent started jobs=3"]


def test_last_warnings_and_the_fatal_error_are_kept(tmp_path) -> None:
    """In order, across restarts, in a file that only its owner can read; other records are not kept."""
    with keep_last_errors(tmp_path):
        LOG.info("all is well")
        LOG.warning("the endpoint rejects", extra={"signal": "logs"})
    with pytest.raises(RuntimeError), keep_last_errors(tmp_path):
        raise RuntimeError("two\nlines")
    LOG.error("not kept")
    first, second = read_last_errors(tmp_path)
    assert first.endswith("WARNING pipeline.queue the endpoint rejects signal=logs")
    assert "CRITICAL process.logging_setup the agent exits: two\\nlines" in second
    assert "test_logging_setup.py" in second
    assert stat.S_IMODE((tmp_path / "last-errors.log").stat().st_mode) == 0o600


def test_last_errors_take_at_most_two_small_files(tmp_path) -> None:
    """However many errors there are; the newest are kept."""
    with keep_last_errors(tmp_path):
        for number in range(500):
            LOG.error("fault %d %s", number, "x" * 500)
    assert read_last_errors(tmp_path, 1)[0].split()[4] == "499"
    assert len(read_last_errors(tmp_path)) == 50
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 64 * 1024


def test_last_errors_that_cannot_be_written_do_no_harm(tmp_path, capsys) -> None:
    """A symbolic link in place of the file is not followed, and logging prints no traceback on stderr."""
    (tmp_path / "last-errors.log").symlink_to(tmp_path / "elsewhere")
    with keep_last_errors(tmp_path):
        LOG.error("fault")
    assert not (tmp_path / "elsewhere").exists()
    assert "Traceback" not in capsys.readouterr().err
