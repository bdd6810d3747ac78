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
from tailspan.local.index import MAX_ENTRY_BYTES
from tailspan.models import JobStatus, TaskRun
from tailspan_agent.records.framing import Lines, split_lines

__all__ = ["CUT_BYTES", "CUT_WINDOW_CHARS", "MIN_SECRET_CHARS", "REDACTED", "Redactor"]

MIN_SECRET_CHARS = 4
"""Shorter values are not redacted: they occur by chance in many lines."""

REDACTED = "[REDACTED]"
_MARK = re.compile(re.escape(REDACTED))

CUT_BYTES = MAX_ENTRY_BYTES - 3
"""A line of this size or more may be a piece of a longer one: capture cuts there, at most 3 bytes before 1 MiB."""

CUT_WINDOW_CHARS = 4096
"""How much of a piece is searched together with the next one."""

_OPEN_CHARS = 1024
_SLOW_OPEN_CHARS = 128


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
        self._texts = (*self._secrets, *(literal or "" for literal, _ in patterns))
        self._literals = tuple(literal.encode("utf-8", "surrogatepass") for literal in self._texts)

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

    def redact(self, text: str, *, before: str = "") -> tuple[str, int]:
        """Return the redacted text and the number of redactions.

        Args:
            text: One line. If capture may have cut it, its end is redacted where that may begin a secret.
            before: The end of the piece before it, unredacted, if the line continues that.
        """
        if not before and self._is_harmless(text):
            return text, 0
        found = [(max(0, start), stop) for start, stop in self._matches_after(before, text) if stop > 0]
        if len(text) >= CUT_BYTES // 4 and len(text.encode("utf-8", "replace")) >= CUT_BYTES:
            found.append((self._open_start(text), len(text)))
        if not found:
            return text, 0
        # What was redacted before stays as it is, also if a secret is a part of the mark.
        marks = [match.span() for match in _MARK.finditer(text)] if REDACTED in text else []
        found = [span for span in found if not any(start <= span[0] and span[1] <= stop for start, stop in marks)]
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(span for span in found if span[0] < span[1]):
            if merged and start < merged[-1][1]:
                start, stop = merged[-1][0], max(stop, merged.pop()[1])
            merged.append((start, stop))
        kept_from = 0
        parts: list[str] = []
        for start, stop in merged:
            parts += (text[kept_from:start], REDACTED)
            kept_from = stop
        return "".join((*parts, text[kept_from:])), len(merged)

    def _is_harmless(self, text: str) -> bool:
        """Return whether nothing is redacted in a text, nor in any part of it."""
        return len(text) < CUT_BYTES // 4 and not any(map(text.__contains__, self._texts))

    def redact_open(self, text: str) -> str:
        """Return the redacted beginning of a line, without an end that may be the beginning of a secret.

        Args:
            text: The beginning of a line. Empty is returned if there are patterns: they see whole lines only.
        """
        if self.patterns:
            return ""
        # From the longest: the end of the text may begin several secrets.
        starts = (text.endswith(secret[:size]) and size for secret in self._secrets for size in range(1, len(secret)))
        return self.redact(text[: len(text) - max(starts, default=0)])[0]

    def redact_job(self, job: JobStatus) -> JobStatus:
        """Return a status with redacted texts: its name, error, URL, attributes and details; ids stay."""
        texts = (job.job_name, job.error or "", job.url or "", *job.attributes, *job.details)
        if self._is_harmless("\n".join((*texts, *job.attributes.values(), *job.details.values()))):
            return job

        def hide(texts: Mapping[str, str]) -> dict[str, str]:
            return {self.redact(key)[0]: self.redact(text)[0] for key, text in texts.items()}

        return dataclasses.replace(
            job,
            job_name=self.redact(job.job_name)[0],
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

    def _matches_after(self, before: str, text: str) -> Iterator[tuple[int, int]]:
        """Yield the matches in a text and what is before it, by their offsets in the text."""
        for start, stop in self._matches(before + text):
            yield start - len(before), stop - len(before)

    def _open_start(self, text: str) -> int:
        """Return the offset of what may be the beginning of a secret that goes on behind the text."""
        starts = [len(text)]
        for secret in (*self._secrets, *(literal for literal, _ in self.patterns if literal)):
            sizes = range(min(len(secret) - 1, len(text)), 0, -1)
            starts += (len(text) - size for size in sizes if text.endswith(secret[:size]))
        offset = max(0, len(text) - _OPEN_CHARS)
        for literal, regex in self.patterns:
            if literal is None:
                starts.append(max(0, len(text) - _SLOW_OPEN_CHARS))
                continue
            closed = [match.span() for match in regex.finditer(text, offset) if match.end() < len(text)]
            found = text.find(literal, offset)
            while found >= 0:
                if not any(start <= found < stop for start, stop in closed):
                    # The match may begin before its literal, but hardly before the word.
                    starts.append(max(text.rfind(" ", 0, found), text.rfind("\t", 0, found), offset - 1) + 1)
                    break
                found = text.find(literal, found + 1)
        return min(starts)

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
