"""Whether a text that a regular expression matches can contain a literal. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["can_contain"]

_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_ONE_CHARACTER = (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY)
# They say something of the text around the match, or of what was matched before: nothing is known of that.
_UNKNOWN = (codes.GROUPREF, codes.GROUPREF_EXISTS, codes.ASSERT)


def can_contain(regex: str, literal: str) -> bool:
    """Return whether some match can contain the literal; True where that is not certain.

    It follows all matches at once through the positions in the literal that their text so far can have reached, as the
    algorithm of Knuth, Morris and Pratt does for one text.

    Args:
        regex: A valid regular expression.
        literal: The text.
    """
    parsed = parser.parse(regex)
    return len(literal) in _Search(literal).after(parsed, {0}, parsed.state.flags)


class _Search:
    """The search for one literal.

    A position is how many characters of the literal the text so far ends with; the length of the literal means found.
    """

    def __init__(self, literal: str) -> None:
        self._literal = literal
        self._all = set(range(len(literal) + 1))

    def after(self, pattern: Iterable[tuple[Any, Any]], positions: set[int], flags: int) -> set[int]:
        """Return the positions after a pattern, from those before it."""
        for code, argument in pattern:
            positions = self._after_one(code, argument, positions, flags)
        return positions

    def _after_one(self, code: Any, argument: Any, positions: set[int], flags: int) -> set[int]:
        if code in _ONE_CHARACTER:
            return self._after_character(code, argument, positions, flags)
        if code in _REPEATS:
            return self._after_repeat(argument, positions, flags)
        if code is codes.SUBPATTERN:
            _, added, removed, inner = argument
            return self.after(inner, positions, (flags | added) & ~removed)
        if code is codes.ATOMIC_GROUP:
            return self.after(argument, positions, flags)
        if code is codes.BRANCH:
            return set().union(*(self.after(branch, positions, flags) for branch in argument[1]))
        if code in _UNKNOWN:
            return self._all
        # The beginning, the end, a border of a word, or what must not follow.
        return positions

    def _after_repeat(self, argument: Any, positions: set[int], flags: int) -> set[int]:
        least, most, inner = argument
        # After as many rounds as there are positions, a further one brings nothing new.
        rounds = len(self._all)
        for _ in range(min(least, rounds)):
            positions = self.after(inner, positions, flags)
        reached = set(positions)
        for _ in range(min(int(most) - min(least, rounds), rounds)):
            positions = self.after(inner, positions, flags) - reached
            if not positions:
                break
            reached |= positions
        return reached

    def _after_character(self, code: Any, argument: Any, positions: set[int], flags: int) -> set[int]:
        literal = self._literal
        accepted = {char for char in set(literal) if _accepts(code, argument, char, flags)}
        after = {len(literal)} & positions
        for position in positions - after:
            after |= {self._next(position, char) for char in accepted}
        # Other characters, which are not in the literal, lead back to its start.
        return after if code is codes.LITERAL and accepted and not flags & re.IGNORECASE else after | {0}

    def _next(self, position: int, char: str) -> int:
        text = self._literal[:position] + char
        return next(size for size in range(len(text), -1, -1) if text.endswith(self._literal[:size]))


def _accepts(code: Any, argument: Any, char: str, flags: int) -> bool:
    variants = {char, char.lower(), char.upper(), char.swapcase()} if flags & re.IGNORECASE else {char}
    return any(_accepts_one(code, argument, variant, flags) for variant in variants)


def _accepts_one(code: Any, argument: Any, char: str, flags: int) -> bool:
    if code is codes.ANY:
        return char != "\n" or bool(flags & re.DOTALL)
    if code is codes.IN:
        negated = argument[0][0] is codes.NEGATE
        found = any(_is_in(one, char) for one in argument)
        # A category may mean other characters with another flag: it is never taken to exclude one.
        return not found or any(one[0] is codes.CATEGORY for one in argument) if negated else found
    if len(char) != 1:
        return True
    return bool(ord(char) != argument if code is codes.NOT_LITERAL else ord(char) == argument)


def _is_in(one: tuple[Any, Any], char: str) -> bool:
    code, argument = one
    if code is codes.NEGATE:
        return False
    if code is codes.CATEGORY or len(char) != 1:
        return _is_in_category(argument, char) if code is codes.CATEGORY and len(char) == 1 else True
    return bool(argument[0] <= ord(char) <= argument[1] if code is codes.RANGE else ord(char) == argument)


def _is_in_category(category: Any, char: str) -> bool:
    escapes = {
        codes.CATEGORY_DIGIT: r"\d",
        codes.CATEGORY_NOT_DIGIT: r"\D",
        codes.CATEGORY_SPACE: r"\s",
        codes.CATEGORY_NOT_SPACE: r"\S",
        codes.CATEGORY_WORD: r"\w",
        codes.CATEGORY_NOT_WORD: r"\W",
    }
    escape = escapes.get(category)
    return escape is None or any(re.match(escape, char, flags) for flags in (0, re.ASCII))
