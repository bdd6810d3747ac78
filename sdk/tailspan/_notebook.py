"""Jobs in a notebook: HTML cards and tables, and the card that is live while a verb waits.

The HTML has no scripts, takes its text colour from the page, and colours no text: it is readable in light and dark.
"""

from __future__ import annotations

import html
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from tailspan._clock import Clock
from tailspan._durations import duration_text
from tailspan.logs.clean import printable
from tailspan.logs.printing import end_text, progress_text, result_text
from tailspan.models import JobState, JobStatus

__all__ = ["LiveCard", "job_card", "live_card", "table", "time_text"]

_COLOURS = {
    JobState.PENDING: "#8a8a8a",
    JobState.RUNNING: "#2f81f7",
    JobState.SUCCEEDED: "#2da44e",
    JobState.FAILED: "#d1344b",
    JobState.CANCELED: "#bf8700",
    JobState.TIMED_OUT: "#d1344b",
    JobState.LOST: "#d1344b",
}
_GREY = "#8a8a8a"
_LINE = "rgba(128,128,128,.35)"
_CELL = f"text-align:left;vertical-align:top;padding:.15em .8em;border-bottom:1px solid {_LINE};"
_WRAPPED = ("error", "name", "result", "text")
_LONG_CHARS = 300
_REDRAW_S = 0.5


def job_card(status: JobStatus, links: Mapping[str, str]) -> str:
    """Return a job's card: state, progress, reason, times and links.

    Args:
        status: The job's status.
        links: URLs of its telemetry by label.
    """
    colour = _COLOURS.get(status.state, _GREY)
    fields = [
        ("exit code", None if status.exit_code is None else str(status.exit_code)),
        ("submitted", time_text(status.submitted_at)),
        ("started", time_text(status.started_at)),
        ("ended", time_text(status.finished_at)),
        ("machine", " ".join(part for part in (status.instance_id, status.instance_type) if part)),
        ("attempt", str(status.attempt) if status.attempt > 1 else None),
        ("attributes", " ".join(f"{key}={value}" for key, value in status.attributes.items())),
        ("service", status.service),
        ("job", status.job_id),
        ("trace id", status.trace_id),
    ]
    pairs = "".join(
        f'<span style="opacity:.75">{name}</span><span style="overflow-wrap:anywhere">{_text(value)}</span>'
        for name, value in fields
        if value
    )
    all_links = {**links, "page": status.url or ""}
    anchors = " · ".join(_link(url, label) for label, url in all_links.items() if url)
    return (
        f'<div style="border:1px solid {_LINE};border-left:4px solid {colour};border-radius:4px;'
        'padding:.5em .9em;margin:.3em 0;max-width:60em;line-height:1.5">'
        f"<div>{_head(status)}</div>{_progress(status)}{_reason(status)}"
        f'<div style="display:grid;grid-template-columns:max-content 1fr;column-gap:1.2em;font-size:90%">{pairs}</div>'
        + (f'<div style="font-size:90%">{anchors}</div>' if anchors else "")
        + "</div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str | None]], note: str = "") -> str:
    """Return a table. A column without any value is left out; a state has its colour.

    Args:
        head: The names of the columns.
        rows: The cells of each row.
        note: A sentence below the table.
    """
    shown = [place for place in range(len(head)) if any(row[place] for row in rows)]
    heads = "".join(f'<th scope="col" style="{_CELL}white-space:nowrap">{_text(head[place])}</th>' for place in shown)
    body = "".join(f"<tr>{''.join(_cell(head[place], row[place]) for place in shown)}</tr>" for row in rows)
    below = f'<div style="opacity:.75;font-size:90%">{_text(note)}</div>' if note else ""
    if not rows:
        return below
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;font-size:90%">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>{below}"
    )


def time_text(time: datetime | None) -> str | None:
    """Return a time in the zone of this machine; None for None."""
    if time is None:
        return None
    here = time.astimezone()
    return f"{here:%Y-%m-%d %H:%M:%S} {here:%Z}"


class LiveCard:
    """A card in the output of the running cell that shows the newest status of a job."""

    def __init__(self, display: Callable[..., Any], clock: Clock) -> None:
        """Show nothing yet.

        Args:
            display: ``IPython.display.display``.
            clock: The clock that limits how often it is drawn.
        """
        self._display = display
        self._clock = clock
        self._handle: Any = None
        self._state: JobState | None = None
        self._drawn_s = 0.0

    def update(self, status: JobStatus) -> None:
        """Show a status, at most twice a second while its state stays."""
        now = self._clock.monotonic_s()
        if status.state is self._state and now - self._drawn_s < _REDRAW_S:
            return
        self._state, self._drawn_s = status.state, now
        self._draw(status)

    def close(self, status: JobStatus) -> None:
        """Replace the card by one line: the verb returns the status, which has a card of its own.

        Args:
            status: The last status.
        """
        self._draw(_EndLine(status))

    def _draw(self, shown: object) -> None:
        try:
            if self._handle is None:
                self._handle = self._display(shown, display_id=True)
            else:
                self._handle.update(shown)
        except Exception:
            import logging

            # A job is waited for and its lines are printed, whatever the front end does.
            logging.getLogger("tailspan").debug("the notebook cannot show the card", exc_info=True)


class _EndLine:
    """One line about the end of a job, as a front end shows it."""

    def __init__(self, status: JobStatus) -> None:
        self._status = status

    def __repr__(self) -> str:
        return end_text(self._status)

    def _repr_html_(self) -> str:
        return f"<div>{_head(self._status)}</div>"


def live_card(clock: Clock) -> LiveCard | None:
    """Return a card for the running cell; None outside of a notebook.

    Loads nothing outside of a notebook: in one, IPython is loaded and its shell has a kernel.

    Args:
        clock: The clock that limits how often it is drawn.
    """
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return None
    shell = getattr(ipython, "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return None
    return LiveCard(importlib.import_module("IPython.display").display, clock)


def _head(status: JobStatus) -> str:
    parts = [f"<strong>{_text(status.job_name)}</strong>", _state(status.state)]
    if status.stale:
        parts.append("(the service does not answer)")
    if status.duration is not None:
        parts.append(duration_text(status.duration.total_seconds()))
    if not status.state.is_terminal:
        parts.append(f'<span style="opacity:.75">at {datetime.now().astimezone():%H:%M:%S}</span>')
    return " &nbsp; ".join(parts)


def _state(state: str) -> str:
    colour = _COLOURS.get(state, _GREY)  # type: ignore[call-overload]
    return f'<span style="white-space:nowrap"><span style="color:{colour}">&#9679;</span> {_text(state)}</span>'


def _progress(status: JobStatus) -> str:
    text = progress_text(status)
    if not text:
        return ""
    done = min(status.finished_tasks, status.total_tasks)
    return f'<div><progress value="{done}" max="{status.total_tasks}"></progress> {_text(text)}</div>'


def _reason(status: JobStatus) -> str:
    reason = result_text(status) if status.error else ""
    if reason in ("", str(status.exit_code)):
        return ""
    first, _, rest = reason.partition("\n")
    if not rest and len(first) <= _LONG_CHARS:
        return f"<div>{_text(reason)}</div>"
    return (
        f"<details><summary>{_text(first[:_LONG_CHARS])}</summary>"
        f'<pre style="white-space:pre-wrap">{_text(reason)}</pre></details>'
    )


def _link(url: str, label: str) -> str:
    # What a service gives as an URL may be a script.
    if not url.lower().startswith(("https://", "http://")):
        return _text(f"{label}: {url}")
    # Browsers' own colour of links is not readable on a dark page.
    style = "text-decoration:underline;color:inherit"
    return f'<a href="{html.escape(url)}" target="_blank" rel="noopener noreferrer" style="{style}">{_text(label)}</a>'


def _cell(head: str, value: str | None) -> str:
    space = "pre-wrap;overflow-wrap:anywhere" if head in _WRAPPED else "nowrap"
    shown = _state(value) if head == "state" and value else _text(value or "")
    return f'<td style="{_CELL}white-space:{space}">{shown}</td>'


def _text(value: str) -> str:
    """Return text as HTML: without control characters, and apart from the text around it (right-to-left)."""
    escaped = html.escape(printable(value, colours=False))
    return escaped if value.isascii() else f"<bdi>{escaped}</bdi>"
