"""`Redactor`: redact secrets in lines before they leave the host. Created once from ``[redact]``; then pure.

It finds secrets by value (the content of environment variables and files: one substring search each) and by pattern (a
literal that every match contains is searched first; the regular expression is used only if the literal is found).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tailspan.config import RedactSettings
from tailspan.errors import ConfigError
from tailspan.models import JobStatus, TaskRun
from tailspan_agent.records.framing import Lines, split_lines

__all__ = ["MIN_SECRET_CHARS", "REDACTED", "Redactor"]

MIN_SECRET_CHARS = 4
"""Shorter values are not redacted: they occur by chance in many lines."""

REDACTED = "[REDACTED]"


class Redactor:
    """Replace secrets in text with `REDACTED`.

    Each line of a value with several lines (a private key) is a secret, since a record is one line. White space around
    a value is ignored. Overlapping matches are replaced as one.

    Attributes:
        ignored: The settings that name no usable value, with the reason; without the values.
        patterns: The regular expressions.
    """

    def __init__(
        self, secrets: Mapping[str, str] | None = None, patterns: Sequence[tuple[str | None, re.Pattern[str]]] = ()
    ) -> None:
        """Prepare the search.

        Args:
            secrets: Values by their source.
            patterns: Regular expressions, each with a literal that all its matches contain, or None.
        """
        self.ignored: list[str] = []
        found: set[str] = set()
        for source, value in (secrets or {}).items():
            usable = {line.strip() for line in value.splitlines() if len(line.strip()) >= MIN_SECRET_CHARS}
            if not usable:
                self.ignored.append(f"{source} has no value of {MIN_SECRET_CHARS} characters or more")
            found |= usable
        self._secrets = tuple(sorted(found))
        self.patterns = tuple(patterns)
        # The empty literal of a pattern without one is in every text.
        literals = (*self._secrets, *(literal or "" for literal, _ in patterns))
        self._literals = tuple(literal.encode("utf-8", "surrogatepass") for literal in literals)

    @classmethod
    def from_settings(cls, settings: RedactSettings, environ: Mapping[str, str] | None = None) -> Redactor | None:
        """Return the redactor of a configuration; None without secrets and patterns.

        Args:
            settings: The table ``[redact]``; it accepts a pattern without a literal only with ``slow``.
            environ: The environment; None is the environment of the process.

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
        return f"<Redactor(secrets={len(self._secrets)}, patterns={len(self.patterns)})>"

    def redact(self, text: str) -> tuple[str, int]:
        """Return the redacted text and the number of redactions.

        Args:
            text: One whole line.
        """
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(self._matches(text)):
            if merged and start < merged[-1][1]:
                start, stop = merged[-1][0], max(stop, merged.pop()[1])
            merged.append((start, stop))
        kept_from = 0
        parts: list[str] = []
        for start, stop in merged:
            parts += (text[kept_from:start], REDACTED)
            kept_from = stop
        return "".join((*parts, text[kept_from:])), len(merged)

    def redact_job(self, job: JobStatus) -> JobStatus:
        """Return a status with redacted texts: its error, URL, attributes and details; names and ids stay."""

        def hide(texts: Mapping[str, str]) -> dict[str, str]:
            return {key: self.redact(text)[0] for key, text in texts.items()}

        return dataclasses.replace(
            job,
            error=job.error and self.redact(job.error)[0],
            url=job.url and self.redact(job.url)[0],
            attributes=hide(job.attributes),
            details=hide(job.details),
        )

    def redact_task(self, task: TaskRun) -> TaskRun:
        """Return a task with redacted texts: its name, error and URL; its id stays."""
        return dataclasses.replace(
            task,
            name=self.redact(task.name)[0],
            error=task.error and self.redact(task.error)[0],
            url=task.url and self.redact(task.url)[0],
        )

    def redact_lines(self, lines: Lines) -> tuple[Lines, int]:
        """Return redacted lines and the number of redactions.

        Args:
            lines: UTF-8. All lines are searched at once, and each line only if that finds something.
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

    def _matches(self, text: str) -> Iterator[tuple[int, int]]:
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
        raise ConfigError(f"redact.files: cannot read {path}: {error.strerror}", key="redact.files") from None
