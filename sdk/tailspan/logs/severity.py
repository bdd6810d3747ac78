"""The level in the text of a line. Pure.

It is the first word at the start of a line that is a level *and* is where loggers write it, not a word in a sentence.
Known places: Python's formats (``ERROR:root:...``, ``2024-05-01 12:00:00,123 - name - ERROR - ...``), brackets
(``[info ]``, ``| INFO |``), ``ERROR:`` or ``ERROR ...`` at the start, after a time stamp, logfmt (``level=info``), JSON
(``"level": "info"``) and glog (``I0501 12:00:00.000000``). Without one, the severity is unspecified, not INFO.

Numbers: opentelemetry-specification, logs data model, SeverityNumber; Python's CRITICAL is FATAL there.
"""

from __future__ import annotations

import functools
import re

__all__ = ["LEVELS", "LEVEL_NUMBERS", "UNSPECIFIED", "find_level", "find_level_end"]

LEVEL_NUMBERS = {
    "TRACE": 1,
    "DEBUG": 5,
    "INFO": 9,
    "NOTICE": 10,
    "SUCCESS": 10,
    "WARN": 13,
    "WARNING": 13,
    "ERR": 17,
    "ERROR": 17,
    "SEVERE": 17,
    "CRITICAL": 21,
    "FATAL": 21,
    "PANIC": 21,
    "ALERT": 22,
    "EMERGENCY": 24,
}
_GLOG = {b"I": b"INFO", b"W": b"WARNING", b"E": b"ERROR", b"F": b"FATAL"}
_HEAD_BYTES = 120
_JSON_HEAD_BYTES = 2048

LEVELS: tuple[tuple[int, str], ...] = (
    (0, ""),
    *((number, case) for word, number in LEVEL_NUMBERS.items() for case in (word, word.lower(), word.title())),
)
"""The OTLP severity number and the word of each level; elsewhere, a level is its index in this table."""
UNSPECIFIED = 0
_INDEX = {text.encode(): index for index, (_, text) in enumerate(LEVELS)}

_UPPER = sorted(LEVEL_NUMBERS, key=len, reverse=True)
_OPENERS = "[=\"'"
_NOT_OF_WORD = f"{_OPENERS} ".encode()
_AFTER_TIME = re.compile(rb"\d\d:\d\d(?::\d\d)?[\d.,:+Z-]*\s+(?:[\w.:$/@-]+\s+)?\Z")
_STRUCTURE_ENDS = (b"]", b"}", b")", b"|", b"]:", b"}:", b"):", b"|:", b" -")
_KEY_ENDS = (b"=", b'"', b"'")
_KEY_BYTES = 24
_AFTER_KEY = re.compile(rb"(?:^|\s)(?:level|lvl|severity)=[\"']?\Z")
_AFTER_JSON_KEY = re.compile(rb"\"(?:level|severity|levelname|lvl|log\.level|log_level)\"\s{0,4}:\s{0,4}\"\Z")
_BEFORE_STRUCTURE = re.compile(rb"\s*[:\]|]|\s+[-|]\s|/")
_BRACKETS = {b"[": b"]", b"|": b"|"}


@functools.cache
def _patterns() -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Return the pattern of a level at the start of a line, and of one anywhere; mostly C replaces both."""
    any_case = "|".join(case for word in _UPPER for case in (word, word.lower(), word.title()))
    start = rf"(?P<glog>[IWEF])\d{{4}} \d\d:\d\d:\d\d|\s{{0,40}}(?P<word>{any_case}):"
    # Each alternative starts with a literal: only then the search skips other text at the speed of memchr.
    word = (*(rf"{word}\b" for word in _UPPER), *(rf"\{opener} *(?:{any_case})\b" for opener in _OPENERS))
    return re.compile(start.encode()), re.compile("|".join(word).encode())


def find_level(line: bytes) -> int:
    """Return the level of a line, as its index in `LEVELS`.

    Args:
        line: UTF-8, cleaned.
    """
    return find_level_end(line)[0]


def find_level_end(line: bytes) -> tuple[int, int]:
    """Return the level of a line, and the number of bytes at the line's start that determine it.

    No test below reads bytes to the right of that number. So the level holds for all lines that start with these
    bytes, and since no test distinguishes digits, for all lines that differ from them in digits only. The
    agent's cache of line starts depends on this.
    """
    start, word_anywhere = _patterns()
    started = start.match(line)
    if started:
        return _INDEX[_GLOG[started["glog"]] if started["glog"] else started["word"]], started.end() + 1
    is_json = line.startswith((b'{"', b'{ "'))
    head = line[: _JSON_HEAD_BYTES if is_json else _HEAD_BYTES]
    for match in word_anywhere.finditer(head):
        word, end = match[0].lstrip(_NOT_OF_WORD), match.end()
        evidence = _json_end if is_json else _text_end
        width = evidence(head, end - len(word), end)
        if width:
            return _INDEX[word], width + 1
    return UNSPECIFIED, len(head)


def _json_end(head: bytes, start: int, end: int) -> int:
    is_value = head[end : end + 1] == b'"' and _AFTER_JSON_KEY.search(head, max(0, start - _KEY_BYTES), start)
    return end if is_value else 0


def _text_end(head: bytes, start: int, end: int) -> int:
    """Return the position after the text that makes this word the level of the line, or 0 if it is not."""
    left = head[:start]
    before = left.rstrip()
    is_upper = head[start:end].isupper()
    opener = before[-1:]
    # `Names[error]` is code.
    closer = None if opener == b"[" and before[-2:-1].isalnum() else _BRACKETS.get(opener)
    if closer == b"]" or (closer and is_upper):
        inner = end
        while head[inner : inner + 1] == b" ":
            inner += 1
        if head[inner : inner + 1] == closer:
            return inner + 1
    if opener in _KEY_ENDS and _AFTER_KEY.search(head, max(0, start - _KEY_BYTES), start):
        return end
    if not is_upper:
        return 0
    if not before and (end == len(head) or head[end : end + 1].isspace()):
        return end + 1
    if left[-1:].isspace() or left[-1:] in (b"[", b"|", b":"):
        if right := _BEFORE_STRUCTURE.match(head, end):
            return right.end()
        if before.endswith(_STRUCTURE_ENDS) or _AFTER_TIME.search(left):
            return end
    return 0
