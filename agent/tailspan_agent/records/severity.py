"""The severity in the text of a line, as `tailspan.logs.severity` finds it, for all lines of a page. Pure."""

from __future__ import annotations

from tailspan._native import compiled
from tailspan.errors import ConfigError
from tailspan.logs.page import level_name
from tailspan.logs.severity import LEVEL_NUMBERS, LEVELS, UNSPECIFIED, find_level_end
from tailspan.logs.severity import find_level as find_severity
from tailspan_agent.otlp.log_record import Severity
from tailspan_agent.records.framing import Lines, split_lines

__all__ = [
    "SEVERITIES",
    "UNSPECIFIED",
    "find_severities",
    "find_severities_in_python",
    "find_severity",
    "severity_index",
    "severity_number",
]

SEVERITIES: tuple[Severity, ...] = tuple(Severity(number, text) for number, text in LEVELS)
"""All severities of lines; elsewhere, a severity is its index in this table."""
_INDEX = {text: index for index, (_, text) in enumerate(LEVELS)}
_BY_NUMBER = {number: _INDEX[word] for word, number in reversed(LEVEL_NUMBERS.items())}
_BY_NUMBER |= {number: _INDEX[level_name(number)] for number in range(1, 25, 4)}


def severity_number(name: str) -> int:
    """Return the OTLP severity number of a level's name, in any case.

    Raises:
        ConfigError: The level is unknown.
    """
    number = LEVEL_NUMBERS.get(name.upper())
    if number is None:
        raise ConfigError(f"{name!r} is not a severity: use one of {', '.join(LEVEL_NUMBERS)}", key="min_severity")
    return number


def severity_index(number: int) -> int:
    """Return the index in `SEVERITIES` of a number that a service gives, with the name that the number has.

    A number without an entry, for example 11 (INFO3), takes that of its name, so that it is not lost.
    """
    return _BY_NUMBER.get(number) or _BY_NUMBER[(number - 1) // 4 * 4 + 1]


_MAX_WIDTHS = 8
_MAX_SHAPES = 512
_SAME_DIGITS = bytes(ord("0") if 0x30 <= byte <= 0x39 else byte for byte in range(256))


class _Learner:
    """Finds severities like `find_severity`, but faster for the lines of one page: they have their level in few places.

    It caches line starts up to the level, with all digits replaced by 0: most lines of a job share a few.
    """

    def __init__(self) -> None:
        self._shapes: dict[bytes, int] = {}
        self._widths: list[int] = []

    def find(self, line: bytes) -> int:
        """Return the severity of one line, as its index in `SEVERITIES`."""
        for width in self._widths:
            index = self._shapes.get(line[:width].translate(_SAME_DIGITS))
            if index is not None:
                return index
        index, width = find_level_end(line)
        # A line shorter than the width does not determine the severity of longer lines.
        if index != UNSPECIFIED and len(line) >= width and len(self._shapes) < _MAX_SHAPES:
            if width not in self._widths:
                if len(self._widths) >= _MAX_WIDTHS:
                    return index
                self._widths.append(width)
            self._shapes[line[:width].translate(_SAME_DIGITS)] = index
        return index


def find_severities_in_python(lines: Lines, /) -> bytes:
    """Return the severity of each line, one byte for its index in `SEVERITIES`.

    Args:
        lines: UTF-8, cleaned.
    """
    return bytes(map(_Learner().find, split_lines(lines)))


find_severities = compiled("find_severities", find_severities_in_python)
