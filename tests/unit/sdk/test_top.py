"""`tailspan top`: what each key does to the list, and what the screen shows."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from rich.console import Console

from tailspan.cli import main, show
from tailspan.cli.top import TopScreen, keys_of
from tailspan.client import RunResponse
from tailspan.models import JobState, ListedJob

NAMES = ("etl", "report", "etl", "backup")
STATES = (JobState.RUNNING, JobState.FAILED, JobState.SUCCEEDED, JobState.RUNNING)


@pytest.fixture
def screen() -> TopScreen:
    """Return the screen of four jobs, ``j0`` the newest."""
    screen = TopScreen()
    now = datetime.now(UTC)
    screen.update(
        [
            (
                ListedJob(job_id=f"j{number}", job_name=name, state=state),
                RunResponse.from_state(
                    state, job_id=f"j{number}", job_name=name, identity="x", trace_id="0", attributes={"team": name[0]},
                    started_at=now - timedelta(seconds=90), total_tasks=4, finished_tasks=number, exit_code=3,
                ),
            )
            for number, (name, state) in enumerate(zip(NAMES, STATES, strict=True))
        ]
    )  # fmt: skip
    return screen


def shown(screen: TopScreen) -> list[str]:
    """Return the ids of the rows."""
    return [row.job_id for row, _ in screen.rows]


def press(screen: TopScreen, text: str) -> list[str]:
    """Press what a terminal sent; return what is asked for."""
    return [action for action in map(screen.press, keys_of(text)) if action]


def test_the_selection_stays_at_its_job(screen: TopScreen) -> None:
    """Arrows and letters move it, within the list; new jobs above it do not."""
    for keys, selected in (("\x1b[B", "j1"), ("jjjj", "j3"), ("k\x1b[A", "j1"), ("\x1b[5~", "j0"), ("j", "j1")):
        assert press(screen, keys) == []
        assert screen.selected is not None
        assert screen.selected[0].job_id == selected
    screen.update([(ListedJob(job_id="new"), None), *screen.rows])
    assert screen.selected[0].job_id == "j1"


def test_a_filter_is_text_of_a_row(screen: TopScreen) -> None:
    """Name, state, id and attributes, all words; Escape takes it away; `a` shows what runs."""
    for typed, ids in (("/ETL\r", ["j0", "j2"]), ("/ succ\r", ["j2"]), ("\x1b", ["j0", "j1", "j2", "j3"])):
        assert press(screen, typed) == []
        assert shown(screen) == ids
    press(screen, "/team=rx\x7f\r")
    assert shown(screen) == ["j1"]
    press(screen, "\x1ba")
    assert shown(screen) == ["j0", "j3"]
    press(screen, "/q")
    assert (shown(screen), screen.selected) == ([], None)
    assert press(screen, "\r" + "co\r") == []


def test_keys_ask_for_what_they_do(screen: TopScreen) -> None:
    """A job is canceled after a yes only, and only while it runs."""
    assert press(screen, "\r") == ["log"]
    assert press(screen, "ot") == ["open", "trace"]
    assert press(screen, "c") == []
    assert screen.message == "cancel job j0 (etl)? y or n"
    assert press(screen, "n") == []
    assert press(screen, "cy") == ["cancel"]
    assert press(screen, "jc") == []
    assert screen.message == "job j1 has ended"
    assert press(screen, "q") == ["quit"]


def test_the_screen_fits_the_terminal(screen: TopScreen, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few lines it has: the selected row is among them, with progress, duration and result."""
    monkeypatch.setattr(show, "is_terminal", lambda _: True)
    press(screen, "jjj")
    file = io.StringIO()
    Console(file=file, width=120, height=8).print(screen.render(8))
    lines = file.getvalue().splitlines()
    assert len(lines) <= 8
    assert lines[0].startswith("4 of 4 newest jobs, 2 running")
    (row,) = [line for line in lines if "j3" in line]
    assert {"RUNNING", "backup", "30s", "75%", "(3", "4)", "3"} <= set(row.split())


def test_without_a_terminal_it_names_the_other_command() -> None:
    """A pipe gets `jobs`."""
    result = CliRunner().invoke(main, ["top"])
    assert (result.exit_code, "there is 'tailspan jobs'" in result.stderr) == (2, True)
