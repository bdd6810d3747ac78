"""Find words in the project's text that plain English does not use: private terms and German syntax.

Searched are docstrings, comments and string literals of Python files, and Markdown outside code, but not names.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BANNED = re.compile(
    r"""\b(
    told | tells? | anew | whoever | somebody | nobody | mend(s|ed|ing)? | odd(ly)? | shall | hears?\ of | of\ which |
    look(s|ed|ing)?\ at | (goes|go|went)\ over | (take|takes|took)\ up | so\ many |
    each\ (two|three|five|ten)\ seconds | for\ itself | (?-i:is\ none)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
# What a file must have for a finding: a word may follow an escape (``\ntold``), a phrase may be in two strings. Much
# faster than the tokens of each file.
_PERHAPS = re.compile(
    BANNED.pattern.removeprefix(r"\b").replace(r"\ ", r"\W+(?:\w{1,2}\W+)?"), re.IGNORECASE | re.VERBOSE
)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True, order=True)
class Finding:
    """A banned word.

    Attributes:
        path: The file, as it was given.
        line: The line, from 1.
        word: The word or phrase.
    """

    path: str
    line: int
    word: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word}"


def in_python(path: str, source: str) -> list[Finding]:
    """Return the banned words in comments, docstrings and other string literals, f-strings included."""
    if not _PERHAPS.search(source):
        return []
    texts = [
        *((token.start[0], token.string) for token in _tokens(source) if token.type == tokenize.COMMENT),
        *((node.lineno, node.value) for node in _strings(ast.parse(source))),
    ]
    return sorted(_findings(path, texts))


def in_markdown(path: str, source: str) -> list[Finding]:
    """Return the banned words outside code."""
    # Code keeps its line feeds, so that what follows has its line number.
    return sorted(_findings(path, [(1, _CODE.sub(lambda code: "\n" * code[0].count("\n"), source))]))


def in_file(file: Path, root: Path) -> list[Finding]:
    """Return the banned words of a file; its path is given from the root."""
    find = in_python if file.suffix == ".py" else in_markdown
    return find(str(file.relative_to(root)), file.read_text(encoding="utf-8"))


def _findings(path: str, texts: list[tuple[int, str]]) -> Iterator[Finding]:
    for first_line, text in texts:
        for found in BANNED.finditer(re.sub(r"[^\S\n]+", " ", text)):
            yield Finding(path, first_line + text.count("\n", 0, found.start()), found[0])


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(source).readline)


def _strings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node
