"""The command ``top``: a live table of jobs, and what to do with the selected one.

With rich, which every installation has, and not with textual: a table, a filter and some keys need no framework of four
more packages, whose import takes longer than the first list of jobs.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tailspan._plural import plural
from tailspan.cli.options import config_option, service_option, with_client
from tailspan.errors import ConfigError, TailspanError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tailspan.client import AsyncJobClient, RunResponse
    from tailspan.models import ListedJob

    Row = tuple[ListedJob, RunResponse | None]

__all__ = ["TopScreen", "keys_of", "top"]

_REFRESH_S = 2.0
_JOBS = 200
_BORDERS = 6
"""Lines of the screen that are not rows."""
_ESCAPE_S = 0.05
_SEQUENCES = {
    "\x1b[A": "up", "\x1bOA": "up",
    "\x1b[B": "down", "\x1bOB": "down",
    "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\r": "enter", "\n": "enter",
    "\x7f": "erase", "\x08": "erase",
    "\x1b": "escape", "\x03": "q",
}  # fmt: skip
_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10}
KEYS = "↑↓ select   Enter log   c cancel   o open   t trace   / filter   a all or running   q quit"


class TopScreen:
    """What ``top`` shows, and which key does what. It reads no key and no job itself.

    Attributes:
        message: A line about the last action.
    """

    def __init__(self) -> None:
        """Show no job yet."""
        self.message = ""
        self._rows: Sequence[Row] = ()
        self._selected = ""
        self._filter = ""
        self._is_typing = False
        self._asks = False
        self._only_running = False

    @property
    def rows(self) -> list[Row]:
        """The rows that match the filter, newest first: in the id, the name, the state or an attribute."""
        words = self._filter.lower().split()
        return [row for row in self._rows if self._is_shown(row) and all(word in _text_of(row) for word in words)]

    @property
    def selected(self) -> Row | None:
        """The selected row; the first one if the selected job is not shown any more."""
        rows = self.rows
        return next((row for row in rows if row[0].job_id == self._selected), rows[0] if rows else None)

    def update(self, rows: Sequence[Row]) -> None:
        """Show these jobs from now on; the selection stays at its job."""
        self._rows = rows

    def press(self, key: str) -> str:
        """Do what a key does.

        Args:
            key: One of what `keys_of` returns.

        Returns:
            What it asks for: ``log``, ``cancel``, ``open``, ``trace`` or ``quit``; empty for nothing more.
        """
        if self._asks:
            self._asks = False
            self.message = ""
            return "cancel" if key in ("y", "Y") else ""
        if self._is_typing:
            self._type(key)
        elif key in _MOVES:
            self._move(_MOVES[key])
        elif key == "/":
            self._is_typing = True
        elif key == "a":
            self._only_running = not self._only_running
        elif key == "q":
            return "quit"
        elif key == "escape":
            self._filter = self.message = ""
        elif self.selected is not None:
            return self._act(key, self.selected)
        return ""

    def render(self, height: int) -> RenderableType:
        """Return the screen.

        Args:
            height: The number of lines of the terminal.
        """
        from rich.console import Group
        from rich.text import Text

        from tailspan.cli.show import jobs_table

        rows, chosen = self.rows, self.selected
        position = rows.index(chosen) if chosen is not None else 0
        size = max(1, height - _BORDERS)
        start = max(0, min(position - size // 2, len(rows) - size))
        table = jobs_table(rows[start : start + size], selected=position - start if rows else None)
        running = sum(not _state_of(row).is_terminal for row in self._rows)
        kind = "running" if self._only_running else "newest"
        head = Text(
            f"{len(rows)} of {len(self._rows)} {kind} {plural(len(self._rows), 'job')}, {running} running"
            f"   {datetime.now(UTC).astimezone():%H:%M:%S %Z}",
            style="bold",
        )
        typed = f"filter: {self._filter}{'▏' if self._is_typing else ''}" if self._is_typing or self._filter else ""
        return Group(head, table, Text(""), Text(self.message or typed, style="yellow"), Text(KEYS, style="dim"))

    def _is_shown(self, row: Row) -> bool:
        return not (self._only_running and _state_of(row).is_terminal)

    def _type(self, key: str) -> None:
        if key in ("enter", "escape"):
            self._is_typing = False
            if key == "escape":
                self._filter = ""
        elif key == "erase":
            self._filter = self._filter[:-1]
        elif len(key) == 1 and key.isprintable():
            self._filter += key
        elif key in _MOVES:
            self._move(_MOVES[key])

    def _move(self, rows: int) -> None:
        shown, chosen = self.rows, self.selected
        if chosen is not None:
            position = max(0, min(shown.index(chosen) + rows, len(shown) - 1))
            self._selected = shown[position][0].job_id

    def _act(self, key: str, row: Row) -> str:
        self._selected = row[0].job_id
        if key == "c":
            if _state_of(row).is_terminal:
                self.message = f"job {row[0].job_id} has ended"
                return ""
            self._asks = True
            self.message = f"cancel job {row[0].job_id} ({_name_of(row)})? y or n"
            return ""
        return {"enter": "log", "o": "open", "t": "trace"}.get(key, "")


@click.command()
@click.option("--name", metavar="GLOB", help="Only jobs whose name matches, for example 'etl-*'.")
@click.option("--limit", default=_JOBS, show_default=True, type=click.IntRange(1), metavar="N", help="Newest jobs.")
@service_option
@config_option
def top(name: str | None, limit: int, service: str | None, config_path: Path | None) -> None:
    """Show a live table of jobs: progress, duration, how they ended; follow, cancel and open the selected one.

    Keys: arrows (or j, k) select, Enter follows the log until Ctrl-C, c cancels after a question, o opens the job's
    page and t its trace, / filters by text, a shows running jobs only, q quits.

    \b
    Example:
      tailspan top
    """  # noqa: D301 - click wants the backspace character itself
    from tailspan.logs.printing import is_terminal

    if not (is_terminal(sys.stdout) and is_terminal(sys.stdin)):
        raise ConfigError("'tailspan top' needs a terminal; for pipes there is 'tailspan jobs'")
    screen = TopScreen()
    while True:
        action = with_client(config_path, service, lambda client: _show(client, screen, name, limit))
        if action == "quit":
            return
        if screen.selected is not None:
            _do(action, screen, screen.selected[0].job_id, service, config_path)


async def _show(client: AsyncJobClient, screen: TopScreen, name: str | None, limit: int) -> str:
    """Show the table until a key asks for something that leaves it; return that."""
    import anyio
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stdout, highlight=False)
    with _single_keys() as read_keys, Live(console=console, auto_refresh=False, screen=True) as live:
        due_s = 0.0
        while True:
            if anyio.current_time() >= due_s:
                try:
                    screen.update(await client.list_with_status(limit, name=name))
                except TailspanError as error:
                    screen.message = f"no answer: {error}"
                due_s = anyio.current_time() + _REFRESH_S
            live.update(screen.render(console.size.height), refresh=True)
            action = ""
            with anyio.move_on_after(max(0.0, due_s - anyio.current_time())):
                await anyio.wait_readable(sys.stdin.fileno())
                action = next(filter(None, map(screen.press, read_keys())), "")
            if action == "cancel":
                await _cancel(client, screen)
                due_s = 0.0
            elif action:
                return action


async def _cancel(client: AsyncJobClient, screen: TopScreen) -> None:
    row = screen.selected
    if row is None:
        return
    try:
        status = await client.job_cancel(row[0].job_id)
        screen.message = f"job {status.job_id} is {status.state}"
    except TailspanError as error:
        screen.message = f"not canceled: {error}"


def _do(action: str, screen: TopScreen, job_id: str, service: str | None, config_path: Path | None) -> None:
    """Do what needs the whole terminal, or a browser."""
    from tailspan.cli.watch import address_of

    if action == "log":
        _follow(job_id, service, config_path)
    else:
        try:
            status = with_client(config_path, service, lambda client: client.find_job(job_id), only_reads=True)
            url = address_of(config_path, status, trace=action == "trace")
        except TailspanError as error:
            screen.message = str(error)
            return
        screen.message = f"opened {url}" if click.launch(url) == 0 else f"no browser could be started; open {url}"


def _follow(job_id: str, service: str | None, config_path: Path | None) -> None:
    """Run ``tail`` on the job; wait for Enter at its end, so that it can be read."""
    from tailspan.cli.read import tail

    arguments = [job_id, *(["--service", service] if service else [])]
    arguments += ["--config", str(config_path)] if config_path is not None else []
    try:
        tail.main(arguments, prog_name="tailspan tail", standalone_mode=False)
    except KeyboardInterrupt:
        return
    except (TailspanError, click.ClickException, click.exceptions.Abort) as error:
        click.echo(f"tailspan: {error}", err=True)
    click.echo("Enter returns to the list ", nl=False, err=True)
    try:
        sys.stdin.readline()
    except KeyboardInterrupt:
        pass


@contextmanager
def _single_keys() -> Iterator[Callable[[], list[str]]]:
    """Let the terminal deliver each key at once and without echo; give what reads the keys that are there."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield lambda: keys_of(_read_waiting(fd))
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _read_waiting(fd: int) -> str:
    data = os.read(fd, 1024)
    while data.endswith(b"\x1b") and select.select([fd], [], [], _ESCAPE_S)[0]:
        data += os.read(fd, 1024)
    if not data:
        return "q"  # the terminal is gone
    return data.decode("utf-8", "replace")


def keys_of(text: str) -> list[str]:
    """Return the keys in what a terminal sent: characters, and the names of keys that send sequences.

    Args:
        text: What it sent.
    """
    keys: list[str] = []
    while text:
        found = next((one for one in _BY_LENGTH if len(one) > 1 and text.startswith(one)), text[0])
        keys.append(_SEQUENCES.get(found, found) if len(found) > 1 or not found.isprintable() else found)
        text = text[len(found) :]
    return keys


_BY_LENGTH = sorted(_SEQUENCES, key=len, reverse=True)


def _state_of(row: Row) -> Any:
    return row[1].state if row[1] is not None else row[0].state


def _name_of(row: Row) -> str:
    return (row[1].job_name if row[1] is not None else row[0].job_name) or "no name"


def _text_of(row: Row) -> str:
    attributes = row[1].attributes if row[1] is not None else {}
    parts = [
        row[0].job_id,
        _name_of(row),
        str(_state_of(row)),
        *(f"{key}={value}" for key, value in attributes.items()),
    ]
    return " ".join(parts).lower()
