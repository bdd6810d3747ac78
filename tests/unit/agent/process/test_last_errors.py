"""The agent's last warnings and errors, as they are kept for a bug report."""

from __future__ import annotations

import logging
import stat

import pytest

from tailspan_agent.process.last_errors import keep_last_errors, read_last_errors

LOG = logging.getLogger("tailspan_agent.pipeline.queue")


def test_warnings_and_what_ended_the_agent_are_kept(tmp_path) -> None:
    """In order, over restarts, in a file of their own for its owner alone; what is said otherwise is not."""
    with keep_last_errors(tmp_path):
        LOG.info("all is well")
        LOG.warning("the endpoint refuses", extra={"signal": "logs"})
    with pytest.raises(RuntimeError), keep_last_errors(tmp_path):
        raise RuntimeError("two\nlines")
    LOG.error("nobody keeps this")
    first, second = read_last_errors(tmp_path)
    assert first.endswith("WARNING pipeline.queue the endpoint refuses signal=logs")
    assert "CRITICAL process.last_errors the agent ends: two\\nlines" in second
    assert "test_last_errors.py" in second
    assert stat.S_IMODE((tmp_path / "last-errors.log").stat().st_mode) == 0o600


def test_they_never_take_more_than_two_small_files(tmp_path) -> None:
    """However much goes wrong; the newest are there."""
    with keep_last_errors(tmp_path):
        for number in range(3000):
            LOG.error("fault %d %s", number, "x" * 100)
    assert read_last_errors(tmp_path, 1)[0].split()[4] == "2999"
    assert len(read_last_errors(tmp_path)) == 50
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 64 * 1024


def test_a_file_that_cannot_be_written_harms_nothing(tmp_path, capsys) -> None:
    """A link in its place is not followed, and stderr is not filled with what logging thinks of that."""
    (tmp_path / "last-errors.log").symlink_to(tmp_path / "elsewhere")
    with keep_last_errors(tmp_path):
        LOG.error("fault")
    assert not (tmp_path / "elsewhere").exists()
    assert "Traceback" not in capsys.readouterr().err
