"""`Redactor`: takes secrets out of lines before they leave the machine. Built once from ``[redact]``; then pure.

Two ways to find one: by value (what named environment variables and files hold, one substring search each), and by
pattern (a literal that every match contains is searched first, the regular expression only where it is found).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tailspan.config import RedactSettings
from tailspan.errors import ConfigError
from tailspan.models import RunResponse
from tailspan_agent.records.framing import Lines, split_lines

__all__ = ["MIN_SECRET_CHARS", "REDACTED", "Redactor"]

MIN_SECRET_CHARS = 4
"""Values shorter than this are not searched for: they would be found in every other line."""

REDACTED = "[REDACTED]"


class Redactor:
    """Finds secrets in text and puts `REDACTED` in their place.

    A value of several lines (a private key) is as many secrets, since a record is one line. Blank space around a
    value does not count. Where finds overlap, all of them go as one.

    Attributes:
        ignored: What the settings name but cannot be searched for, with the reason; without the values.
        patterns: The regular expressions that it was made with.
    """

    def __init__(
        self, secrets: Mapping[str, str] | None = None, patterns: Sequence[tuple[str | None, re.Pattern[str]]] = ()
    ) -> None:
        """Prepare the search.

        Args:
            secrets: Values by where they come from.
            patterns: Regular expressions, each with a literal that all its matches contain, or None.
        """
        self.ignored: list[str] = []
        found: set[str] = set()
        for source, value in (secrets or {}).items():
            usable = {line.strip() for line in value.splitlines() if len(line.strip()) >= MIN_SECRET_CHARS}
            if not usable:
                self.ignored.append(f"{source} holds no value of {MIN_SECRET_CHARS} characters or more")
            found |= usable
        self._secrets = tuple(sorted(found))
        self.patterns = tuple(patterns)
        # An empty one, of a pattern without literal, is in every text.
        literals = (*self._secrets, *(literal or "" for literal, _ in patterns))
        self._literals = tuple(literal.encode("utf-8", "surrogatepass") for literal in literals)

    @classmethod
    def from_settings(cls, settings: RedactSettings, environ: Mapping[str, str] | None = None) -> Redactor | None:
        """Return the redactor that the configuration asks for, or None if it asks for none.

        Args:
            settings: The table ``[redact]``; it lets patterns without a literal pass only if they say ``slow``.
            environ: The environment; None is the process's own.

        Raises:
            ConfigError: A file cannot be read.
        """
        environ = os.environ if environ is None else environ
        secrets = {f"redact.env {name}": environ.get(name, "") for name in settings.env}
        for path in settings.files:
            secrets[f"redact.files {path}"] = _read(path)
        patterns = [(pattern.literal, re.compile(pattern.regex)) for pattern in settings.patterns]
        return cls(secrets, patterns) if secrets or patterns else None

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._secrets)} secrets and {len(self.patterns)} patterns>"

    def redact(self, text: str) -> tuple[str, int]:
        """Return the text without secrets, and how many were taken out.

        Args:
            text: One whole line.
        """
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._finds(text)):
            if merged and start < merged[-1][1]:
                start, stop = merged[-1][0], max(stop, merged.pop()[1])
            merged.append((start, stop))
        kept_from = 0
        parts: list[str] = []
        for start, stop in merged:
            parts += (text[kept_from:start], REDACTED)
            kept_from = stop
        return "".join((*parts, text[kept_from:])), len(merged)

    def redact_job(self, job: RunResponse) -> RunResponse:
        """Return a status without secrets in what it quotes: its error, command, attributes, page; names and ids stay.

        Args:
            job: As its service told it.
        """

        def hide(texts: Mapping[str, str]) -> dict[str, str]:
            return {key: self.redact(text)[0] for key, text in texts.items()}

        return dataclasses.replace(
            job,
            error=job.error and self.redact(job.error)[0],
            url=job.url and self.redact(job.url)[0],
            attributes=hide(job.attributes),
            details=hide(job.details),
        )

    def redact_lines(self, lines: Lines) -> tuple[Lines, int]:
        """Return lines without secrets, and how many were taken out.

        Args:
            lines: UTF-8. All are searched at once, and one by one only if something is found.
        """
        text = lines if isinstance(lines, bytes) else b"\n".join(lines)
        if not any(literal in text for literal in self._literals):
            return lines, 0
        redacted = []
        total = 0
        for line in split_lines(lines):
            kept, count = self.redact(line.decode("utf-8", "replace"))
            redacted.append(kept.encode() if count else line)
            total += count
        return redacted, total

    def _finds(self, text: str) -> Iterator[tuple[int, int]]:
        for secret in self._secrets:
            start = text.find(secret)
            while start >= 0:
                yield start, start + len(secret)
                start = text.find(secret, start + 1)
        for literal, regex in self.patterns:
            if literal is None or literal in text:
                yield from (match.span() for match in regex.finditer(text) if match[0])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} to learn the secrets in it: {error.strerror}", key="redact.files"
        ) from None
