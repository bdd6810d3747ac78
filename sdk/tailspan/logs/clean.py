"""Lines without what acts on a terminal. Pure, standard library only.

`clean` makes the text of a log record; `printable` makes a line safe to print on a user's own terminal, which a
hostile line could otherwise rename, reprogram or make type commands.

Source: ECMA-48 (control sequences), xterm's ctlseqs (OSC ended by BEL, ``ESC k`` titles).
"""

from __future__ import annotations

import re

__all__ = ["MAX_BODY_BYTES", "clean", "is_clean", "printable", "split_long"]

MAX_BODY_BYTES = 256 * 1024
"""Longest body of one record: Loki rejects longer lines by default."""

_ESCAPE = re.compile(
    # Strings (OSC, DCS, SOS, PM, APC, screen titles) up to their end. One that never ends loses its introducer only:
    # a terminal would swallow the text after it, a log must not.
    r"(?:\x1b[\]PX^_k]|[\x90\x98\x9d-\x9f])[^\x07\r\n\x1b\x90\x98\x9b-\x9f]*+(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]*+[ -/]*+[@-~]?"  # CSI, possibly cut off by the end of the line
    r"|\x1b[ -/]++[0-~]?"  # character sets and the like
    r"|\x1b[0-~]?"  # two-character sequences, and ESC alone
    r"|[\x90\x98\x9b-\x9f]"
)
_INTRODUCER = re.compile(r"[\x1b\x90\x98\x9b-\x9f]")
_C1_INTRODUCER = re.compile(rb"\xc2[\x90\x98\x9b-\x9f]")
_CSI = re.compile(r"\x1b\[[0-?]*+[ -/]*+[@-~]")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*+m")
_RESET = "\x1b[0m"
# Every C0 and C1 control but tab and newline, which act on nothing but the text itself. ESC goes with `_ESCAPE`.
_CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\x1b")


def clean(line: bytes) -> str:
    r"""Return the text of a line, as a person reading the terminal would have it.

    Escape sequences and NUL go, invalid UTF-8 becomes U+FFFD, trailing line endings go. Of the states that carriage
    returns wrote over each other, the last that is not blank stays (``10%\r50%\r100%\r`` reads ``100%``); a shorter
    state replaces a longer one entirely. Cleaning a clean line changes nothing.

    Args:
        line: The line as read, with or without its line ending. Newlines within it are kept.
    """
    if is_clean(line):
        return line.decode().rstrip("\n")
    text = line.decode("utf-8", "replace").replace("\0", "")
    if not text.isascii() or "\x1b" in text:
        text = _CSI.sub("", text)
        if _INTRODUCER.search(text):
            text = _ESCAPE.sub("", text)
    return _collapse(text).rstrip("\n")


def is_clean(lines: bytes) -> bool:
    """Return whether `clean` would change nothing but the line endings, in any of many lines at once.

    Args:
        lines: As read, joined by newlines.
    """
    if b"\x1b" in lines or b"\r" in lines or b"\0" in lines:
        return False
    if lines.isascii():
        return True
    try:
        lines.decode()
    except UnicodeDecodeError:
        return False
    return _C1_INTRODUCER.search(lines) is None


def _collapse(text: str) -> str:
    """Return the text with only the last state of each line that carriage returns wrote over."""
    if "\r" not in text:
        return text
    return "\n".join(_last_state(line) for line in text.split("\n"))


def _last_state(line: str) -> str:
    states = line.rstrip("\r").split("\r")
    for state in reversed(states):
        # Progress bars wipe themselves with blanks; the state before that is what there was to read.
        if (_COLOUR.sub("", state) if "\x1b" in state else state).strip(" \t"):
            return state
    return states[-1]


def printable(line: str, *, colours: bool) -> str:
    """Return a line that is safe to print on a terminal.

    Args:
        line: Any text.
        colours: Keep colours and emphasis (SGR), ended by a reset. Everything else that acts on a terminal goes.

    Returns:
        The last state of the line, as `clean` reads it, with no control character but tab and newline.
    """
    if line.isprintable():
        return line
    text = _ESCAPE.sub(_keep_colour if colours else "", line)
    text = _collapse(text).translate(_CONTROLS)
    return text if "\x1b" not in text or text.endswith(_RESET) else text + _RESET


def _keep_colour(escape: re.Match[str]) -> str:
    return escape[0] if _COLOUR.fullmatch(escape[0]) else ""


def split_long(body: bytes, limit: int = MAX_BODY_BYTES) -> list[bytes]:
    """Return the parts of a body that is too long for one record; joined, they are the body.

    Args:
        body: UTF-8.
        limit: Longest part in bytes, at least 4. Parts end between characters.
    """
    parts = []
    start = 0
    while len(body) - start > limit:
        end = start + limit
        # A character has at most three continuation bytes (10xxxxxx); anything else is not UTF-8 and is cut anywhere.
        back = next((step for step in range(4) if body[end - step] & 0xC0 != 0x80), 0)
        parts.append(body[start : end - back])
        start = end - back
    parts.append(body[start:])
    return parts
