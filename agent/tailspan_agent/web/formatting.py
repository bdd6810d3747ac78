"""Formats values for the page: times, durations, counts, text, and plots as SVG numbers. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup

from tailspan._durations import age_text, duration_text
from tailspan_agent.analysis.baseline import PastRun, PipelineHistory

__all__ = ["Bar", "ago", "bars", "count", "duration", "exact", "marked", "size", "time_tag", "visible", "visible_block"]

_PICTURES = {code: 0x2400 + code for code in range(0x20) if code != 0x09} | {0x7F: 0x2421}
# Characters that reorder or hide text: a line must not look different from what it is.
_PICTURES |= dict.fromkeys(
    (*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)


def duration(seconds: float | None) -> str:
    """Return a duration as `tailspan._durations.duration_text` writes it; None as nothing, a negative one as 0."""
    # Clocks of two machines differ, so that a time may lie before the one that it is counted from.
    return "" if seconds is None else duration_text(max(0.0, seconds))


def ago(unix_nano: int | None, now_unix_nano: int) -> str:
    """Return the age of a time in one unit: ``now``, ``12s ago``, ``3h ago``; ``in 5m`` for the future."""
    return "" if unix_nano is None else age_text((now_unix_nano - unix_nano) / 1e9)


def exact(unix_nano: int | None) -> str:
    """Return a time in UTC to the millisecond; a time outside of the calendar as a number."""
    if unix_nano is None:
        return ""
    try:
        when = datetime.fromtimestamp(unix_nano / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{unix_nano} ns"
    return f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03} UTC"


def time_tag(unix_nano: int | None, form: str = "full", now_unix_nano: int = 0) -> str:
    """Return a time as HTML, which the page's script shows in the browser's zone; without it, it is in UTC.

    Args:
        unix_nano: The time in ns since the epoch.
        form: ``full`` (date and time), ``clock`` (time of day), ``minute``, ``line`` (with ms), ``day`` or ``ago``.
        now_unix_nano: The present, for ``ago``.
    """
    text = exact(unix_nano)
    if not text.endswith(" UTC"):
        return Markup.escape(text)
    iso = f"{text[:10]}T{text[11:23]}Z"
    shown = {
        "full": f"{text[:19]} UTC",
        "clock": text[11:19],
        "minute": text[11:16],
        "line": text[11:23],
        "day": text[5:10],
    }.get(form)
    shown = ago(unix_nano, now_unix_nano) if shown is None else shown
    return Markup('<time datetime="{}" data-form="{}" title="{}">{}</time>').format(iso, form, text, shown)


def marked(text: str, needle: str) -> str:
    """Return text as HTML in which each place of another text is marked, in upper or lower case."""
    if not needle:
        return Markup.escape(text)
    found, end = Markup(), 0
    for match in re.finditer(re.escape(needle), text, re.IGNORECASE):
        found += Markup("{}<mark>{}</mark>").format(text[end : match.start()], match[0])
        end = match.end()
    return found + text[end:]


def count(number: float) -> str:
    """Return a number with thousands separators, and decimals only if it has any."""
    return f"{number:,.0f}" if number == round(number) else f"{number:,.2f}"


def size(bytes_: int) -> str:
    """Return a size in one unit: ``12 B``, ``4.5 KiB``, ``10 GiB``."""
    number, unit = float(bytes_), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:.0f} {unit}" if number >= 100 or number == int(number) else f"{number:.1f} {unit}"


def visible(text: str) -> str:
    """Return text with symbols for control characters, and without characters that reorder it."""
    return text.translate(_PICTURES)


def visible_block(text: str) -> str:
    """Return text of several lines, each as `visible` returns it."""
    return "\n".join(map(visible, text.split("\n")))


@dataclass(frozen=True, slots=True)
class Bar:
    """One run in a plot of durations.

    Attributes:
        run: The run.
        x: The left edge, 0 to 1000.
        width: In units of x.
        y: The upper edge, 0 (top) to 100.
        height: In units of y.
    """

    run: PastRun
    x: float
    width: float
    y: float
    height: float


def bars(history: PipelineHistory, limit: int = 60) -> Sequence[Bar]:
    """Return the last runs of a pipeline as bars, oldest first; the longest run has the full height."""
    runs = history.runs[-limit:]
    longest_s = max((run.duration_s for run in runs), default=0.0) or 1.0
    step = 1000 / max(len(runs), 12)
    found = []
    for number, run in enumerate(runs):
        height = max(3.0, 100 * run.duration_s / longest_s)
        found.append(Bar(run, round(number * step, 1), round(step * 0.72, 1), round(100 - height, 1), round(height, 1)))
    return found
