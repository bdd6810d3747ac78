"""How a run ended, as its end marker, its exit file or its silence says. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from tailspan.models import JobState

__all__ = ["RunEnd", "end_of_exit_file", "end_of_markers", "end_of_silence", "marker_end"]

_SIGNALED = 128
_MAX_EXIT_CODE = 1 << 31
_WORDS = (
    ("canceled", JobState.CANCELED),
    ("timed_out", JobState.TIMED_OUT),
    ("failed", JobState.FAILED),
)


class RunEnd(msgspec.Struct, frozen=True):
    """The end of a run.

    Attributes:
        state: The terminal state.
        by: What it follows from: ``marker``, ``exit_file`` or ``silence``.
        unix_nano: When it ended, in ns since the epoch.
        exit_code: The exit code, if it is known; 128 + n after signal n.
        error: Why it did not succeed.
    """

    state: JobState
    by: str
    unix_nano: int
    exit_code: int | None = None
    error: str | None = None


def marker_end(match: re.Match[bytes], unix_nano: int) -> RunEnd:
    """Return the end that one match of the end marker says."""
    return _end_of(_groups(match), unix_nano)


def end_of_markers(matches: Iterable[re.Match[bytes]], unix_nano: int) -> RunEnd | None:
    """Return the end that all matches of the end marker say together; None if they do not say that the run ended.

    If the expression has a group ``end``, only that one ends a run, and the others say how.

    Args:
        matches: The matches, in their order; of one group the last one counts.
        unix_nano: When the last one was written, in ns since the epoch.
    """
    groups: dict[str, str] = {}
    found = None
    for found in matches:
        groups |= _groups(found)
    if found is None or ("end" in found.re.groupindex and "end" not in groups):
        return None
    return _end_of(groups, unix_nano)


def end_of_exit_file(text: bytes, unix_nano: int) -> RunEnd | None:
    """Return the end that an exit file says; None while it has no number, because it is being written.

    Args:
        text: What it begins with: a number, as ``echo $?`` writes it.
        unix_nano: When it was written, in ns since the epoch.
    """
    words = text.split(maxsplit=1)
    if not words or not re.fullmatch(rb"-?\d{1,9}", words[0]):
        return None
    return _by_code(int(words[0]), "exit_file", unix_nano)


def end_of_silence(state: JobState | None, *, marks_end: bool, silence_s: float, unix_nano: int) -> RunEnd:
    """Return the end of a run that writes nothing any more.

    Without any mark, silence is the only sign of an end, and a success as likely as not; where a run should have
    marked its end and did not, it was killed.

    Args:
        state: The configured state; None: ``LOST`` if the end should have been marked, else ``SUCCEEDED``.
        marks_end: Whether the end should have been marked.
        silence_s: After how many seconds a run counts as ended.
        unix_nano: When it wrote last, in ns since the epoch.
    """
    state = state or (JobState.LOST if marks_end else JobState.SUCCEEDED)
    error = f"it wrote nothing for {silence_s:g} s" + (", and its end was not marked" if marks_end else "")
    return RunEnd(state, "silence", unix_nano, error=None if state is JobState.SUCCEEDED else error)


def _groups(match: re.Match[bytes]) -> dict[str, str]:
    return {name: text.decode("utf-8", "replace") for name, text in match.groupdict().items() if text is not None}


def _end_of(groups: Mapping[str, str], unix_nano: int) -> RunEnd:
    code = _number(groups.get("exit_code"))
    if code is None and (signal := _number(groups.get("signal"))) is not None:
        code = _SIGNALED + signal
    for word, state in _WORDS:
        if word in groups:
            return RunEnd(state, "marker", unix_nano, code, groups[word].strip()[:1000] or None)
    if code is not None:
        return _by_code(code, "marker", unix_nano)
    # The expression was written for the end that is reached: a script that fails hardly prints it.
    return RunEnd(JobState.SUCCEEDED, "marker", unix_nano)


def _by_code(code: int, by: str, unix_nano: int) -> RunEnd:
    if code == 0:
        return RunEnd(JobState.SUCCEEDED, by, unix_nano, 0)
    return RunEnd(JobState.FAILED, by, unix_nano, code, f"it exited with code {code}")


def _number(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"\s*-?\d{1,9}\s*", text):
        return None
    return int(text)
