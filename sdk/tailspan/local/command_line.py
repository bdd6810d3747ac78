"""What a command is called, and how it is shown without its secrets. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

__all__ = ["default_name", "redact_command"]

_HIDDEN = "***"
_INTERPRETERS = re.compile(r"(?:python|pypy|ruby|perl|node|Rscript|php|bash|sh|zsh|dash|ksh|fish|uv|java)[0-9.]*")
_SCRIPT = re.compile(r"\.(?:py|sh|bash|rb|pl|js|mjs|ts|R|r|php|jar)$")
# An argument may be 128 KB long: whatever repeats is bounded, or the search would be quadratic in its length.
_NAME = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential"
    r"|authorization|cookie)[\w.-]{0,64}+"
)
_SECRET_OPTION = re.compile(rf"--?[\w.-]{{0,64}}?{_NAME}", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    rf"""(?P<name>{_NAME}["']?\s*[=:]\s*)(?P<quote>["']?)(?:(?:Bearer|Basic|Token)\s+)?[^\s"'&]+""",
    re.IGNORECASE,
)
_SECRET_WORD = re.compile(
    r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|eyJ[\w-]{10,4096}+\.[\w-]{10,8192}+\.[\w-]*)|(?<=Bearer )\S+",
)
_URL_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}+://)[^\s/@:]*+(?P<password>:[^\s/@]*)?@", re.IGNORECASE)


def default_name(command: Sequence[str]) -> str:
    """Return what a job is called that was given no name: its program, or the script that an interpreter runs.

    Args:
        command: The command and its arguments, at least one.
    """
    # A file's name may be any bytes: what is no UTF-8 has no place in a name, which goes to where all must be.
    return _called(command).encode("utf-8", "replace").decode()


def _called(command: Sequence[str]) -> str:
    program = os.path.basename(command[0]) or command[0]
    if not _INTERPRETERS.fullmatch(program):
        return _SCRIPT.sub("", program) or program
    arguments = iter(command[1:])
    for argument in arguments:
        if argument == "-m":
            return next(arguments, program)
        if argument in {"-c", "-e"}:
            break
        if not argument.startswith("-") and argument != "run":
            script = os.path.basename(argument)
            return _SCRIPT.sub("", script) or program
    return program


def redact_command(command: Sequence[str]) -> list[str]:
    """Return the command with what looks like a secret hidden: by the name before it, or by its own form."""
    shown: list[str] = []
    for number, argument in enumerate(command):
        if number and _SECRET_OPTION.fullmatch(command[number - 1]) and not argument.startswith("--"):
            shown.append(_HIDDEN)
            continue
        text = _URL_USER.sub(rf"\g<scheme>{_HIDDEN}@", argument)
        text = _SECRET_VALUE.sub(rf"\g<name>\g<quote>{_HIDDEN}", text)
        shown.append(_SECRET_WORD.sub(_HIDDEN, text))
    return shown
