"""How a command is shown without its secrets. Pure.

`tailspan run` imports this before it starts the command: the patterns are compiled only where a text can match.
"""

from __future__ import annotations

from tailspan.local.job_name import default_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Sequence

    _Patterns = tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str], re.Pattern[str]]


__all__ = ["default_name", "redact_command", "redact_name"]

_HIDDEN = "***"
# Each match of a pattern contains one of these, in lower case.
_HINTS = (
    "passw", "passphrase", "pwd", "secret", "token", "key", "credential", "authorization", "cookie", "bearer", "gh",
    "glpat-", "xox", "sk-", "akia", "asia", "eyj", "://",
)  # fmt: skip
_compiled: _Patterns | None = None


def _patterns() -> _Patterns:
    global _compiled
    if _compiled is None:
        _compiled = _compile()
    return _compiled


def _compile() -> _Patterns:
    """Return the patterns of an option with a secret, a secret after its name, a secret word, and a URL with a user."""
    import re

    # An argument may be 128 KB long: whatever repeats is bounded, or the search would be quadratic in its length.
    name = (
        r"(?:passw(?:or)?d|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential"
        r"|authorization|cookie)[\w.-]{0,64}+"
    )
    return (
        re.compile(rf"--?[\w.-]{{0,64}}?{name}", re.IGNORECASE),
        re.compile(
            rf"""(?P<name>{name}["']?\s*[=:]\s*)(?P<quote>["']?)(?:(?:Bearer|Basic|Token)\s+)?[^\s"'&]+""",
            re.IGNORECASE,
        ),
        re.compile(
            r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|eyJ[\w-]{10,4096}+\.[\w-]{10,8192}+\.[\w-]*)|(?<=Bearer )\S+",
        ),
        re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}+://)[^\s/@:]*+(?P<password>:[^\s/@]*)?@", re.IGNORECASE),
    )


def redact_command(command: Sequence[str]) -> list[str]:
    """Return the command with what looks like a secret hidden: by the name before it, or by its own form."""
    if not _may_have_secret(" ".join(command)):
        return list(command)
    shown: list[str] = []
    for number, argument in enumerate(command):
        if number and _patterns()[0].fullmatch(command[number - 1]) and not argument.startswith("--"):
            shown.append(_HIDDEN)
        else:
            shown.append(redact_name(argument))
    return shown


def redact_name(text: str) -> str:
    """Return a text with what looks like a secret hidden, by its own form or by the name in front of it."""
    if not _may_have_secret(text):
        return text
    _, value, word, url_user = _patterns()
    text = url_user.sub(rf"\g<scheme>{_HIDDEN}@", text)
    text = value.sub(rf"\g<name>\g<quote>{_HIDDEN}", text)
    return word.sub(_HIDDEN, text)


def _may_have_secret(text: str) -> bool:
    lower = text.lower()
    return any(hint in lower for hint in _HINTS)
