"""Mask the secrets of this process in text: servers quote tokens in error messages, in many forms.

Who uses a token adds it here. Errors and log lines pass through `mask`; what shortens foreign text uses `mask_and_cut`,
because half a token is not found any more.
"""

from __future__ import annotations

# `tailspan run` imports this at its start: the other imports wait until there is a secret.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Iterator, Sequence

__all__ = ["MASK", "add_secret", "mask", "mask_and_cut"]

MASK = "***"

MIN_SECRET_CHARS = 8
"""Shorter values are not secrets here: they occur in any message."""

# Rotated tokens: the older ones are not sent any more.
_MAX_SECRETS = 100
_MIN_PREFIX_CHARS = 8
_MIN_BEGINNING_CHARS = 16
"""Within a text, a shorter beginning of a secret may be an ordinary word."""
_ROUNDS = 3
_ENDINGS = ".…\"')]}>"
_MARGIN_CHARS = 16
_LONGER = 48
"""The most characters that one character of a secret takes: ``\\u0041`` with each of its characters as ``\\u005c``."""

_NAMES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}

_secrets: dict[str, tuple[str, ...]] = {}
_escapes: list[re.Pattern[str]] = []


def add_secret(value: str) -> None:
    """Mask a value from now on: a token, or a header with a scheme and a token.

    Args:
        value: Values of less than `MIN_SECRET_CHARS` characters are ignored.
    """
    if value in _secrets or len(value) < MIN_SECRET_CHARS:
        return
    if not _escapes:
        import re

        _escapes.append(
            re.compile(
                r"%(?P<percent>[0-9a-f]{2})|\\+u00(?P<json>[0-9a-f]{2})|\\+u\{0*(?P<brace>[0-9a-f]{1,4})\}"
                r"|\\+x(?P<hex>[0-9a-f]{2})|\\+(?P<octal>[0-3][0-7]{2})|&#0*(?P<decimal>[0-9]{1,4});"
                r"|&#x0*(?P<html>[0-9a-f]{1,4});|&(?P<name>amp|lt|gt|quot|apos);|\\+(?P<plain>[^\w\s\\])|(?P<space>\+)",
                re.IGNORECASE,
            )
        )
    forms: dict[str, None] = {}
    scheme, _, token = value.strip().partition(" ")
    parts = [value, token.strip()] if token else [value]
    if scheme.lower() == "basic":
        parts += _user_and_password(token)
    for part in parts:
        if len(part) >= MIN_SECRET_CHARS:
            forms.update(dict.fromkeys(_forms(part)))
            # In a text that has other escapes, what looks like one in the secret is unescaped with them.
            plain = (text for text, _, _ in _unescaped(part))
            forms.update(dict.fromkeys(text for text in plain if len(text) >= MIN_SECRET_CHARS))
    _secrets[value] = tuple(forms)
    if len(_secrets) > _MAX_SECRETS:
        del _secrets[next(iter(_secrets))]


def mask(text: str) -> str:
    """Return text without the secrets, whatever their form: escaped for URL, JSON or HTML, in base64 or hexadecimal."""
    if not _secrets or len(text) < _MIN_PREFIX_CHARS:
        return text
    # A secret may itself look like an escape: it is searched before and after each round of them.
    found = [span for plain, starts, ends in _unescaped(text) for span in _found(plain, starts, ends)]
    if not found:
        return text
    parts: list[str] = []
    done = 0
    for start, end in sorted(found):
        if end > done:
            parts += [text[done:start], MASK] if start >= done else []
            done = end
    return "".join((*parts, text[done:]))


def _found(plain: str, starts: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where secrets begin and end in a text, by its form that is compared."""
    rest = plain.rstrip(_ENDINGS)
    for forms in _secrets.values():
        for form in forms:
            # A server may cut what it quotes, and go on: the beginning of a long secret gives most of it away.
            beginning = form[: max(_MIN_BEGINNING_CHARS, len(form) * 2 // 3)]
            at = plain.find(beginning)
            while at >= 0:
                size = len(beginning)
                while size < len(form) and plain.startswith(form[: size + 1], at):
                    size += 1
                yield starts[at], ends[at + size - 1]
                at = plain.find(beginning, at + size)
            # What was cut before it came here ends with the beginning of a secret.
            known = _overlap(rest, form)
            if known:
                yield starts[len(rest) - known], ends[len(rest) - 1]


def mask_and_cut(text: str, most_chars: int, mark: str = "…") -> str:
    """Return text without secrets, shortened to a number of characters and the mark.

    Args:
        text: Of any length; what follows is not searched.
        most_chars: Maximum number of characters before the mark.
        mark: Shows that something is missing.
    """
    longest = max((len(form) for forms in _secrets.values() for form in forms), default=0)
    window = most_chars + longest * _LONGER + _MARGIN_CHARS
    shown = mask(text[:window])
    return shown if len(text) <= window and len(shown) <= most_chars else shown[:most_chars] + mark


def _forms(secret: str) -> list[str]:
    import base64

    raw = secret.encode("utf-8", "replace")
    forms = [secret, raw.decode("latin-1"), raw.hex(), raw.hex(":"), raw.hex("-")]
    for before in range(3):
        # A secret within a longer text has one of three forms in base64; its first and last characters may differ.
        encoded = base64.b64encode(b"\0" * before + raw).decode()
        inner = encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        forms += [inner, inner.replace("+", "-").replace("/", "_")]
    return [_squeezed(form) for form in forms]


def _user_and_password(token: str) -> list[str]:
    import base64
    import binascii

    try:
        pair = base64.b64decode(token, validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError):
        return []
    return [pair, pair.partition(":")[2]]


def _squeezed(text: str) -> str:
    """Return text as it is compared: in lower case, without spaces, plus signs, backslashes and control characters."""
    return "".join(char for char in text.lower() if char not in "+\\" and char.isprintable() and not char.isspace())


def _unescaped(text: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield text as it is compared, and where each of its characters begins and ends: as it is, then unescaped."""
    chars, starts, ends = text.lower(), list(range(len(text))), list(range(1, len(text) + 1))
    if len(chars) != len(text):
        chars = text  # a few letters have a longer lower case
    for _ in range(_ROUNDS):
        yield _comparable(chars, starts, ends)
        parts: list[str] = []
        new_starts: list[int] = []
        new_ends: list[int] = []
        done = 0
        for match in _escapes[0].finditer(chars):
            start, end = match.span()
            parts += chars[done:start], _meaning(match)
            new_starts += [*starts[done:start], starts[start]]
            new_ends += [*ends[done:start], ends[end - 1]]
            done = end
        if not done:
            return
        chars = "".join((*parts, chars[done:]))
        starts, ends = [*new_starts, *starts[done:]], [*new_ends, *ends[done:]]
    yield _comparable(chars, starts, ends)


def _comparable(chars: str, starts: Sequence[int], ends: Sequence[int]) -> tuple[str, list[int], list[int]]:
    kept = [at for at, char in enumerate(chars) if _squeezed(char)]
    return "".join(chars[at] for at in kept), [starts[at] for at in kept], [ends[at] for at in kept]


def _meaning(match: re.Match[str]) -> str:
    kind, text = match.lastgroup, match[match.lastgroup or 0]
    if kind == "name":
        return _NAMES[text.lower()]
    if kind in ("plain", "space"):
        return text
    char = chr(int(text, {"decimal": 10, "octal": 8}.get(kind or "", 16))).lower()
    return char if len(char) == 1 else "?"


def _overlap(text: str, form: str) -> int:
    """Return how many characters at the end of a text are the beginning of a form; 0 if too few."""
    for size in range(min(len(form) - 1, len(text)), _MIN_PREFIX_CHARS - 1, -1):
        if text.endswith(form[:size]):
            return size
    return 0
