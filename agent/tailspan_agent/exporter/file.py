"""The files mode: OTLP JSON lines on disk instead of an endpoint, to be replayed or read by a collector later."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tailspan_agent.exporter.outcome import Delivered, Outcome, Rejected, Retry
from tailspan_agent.exporter.rotating_file import LineFiles
from tailspan_agent.otlp.json_lines import encode_line
from tailspan_agent.otlp.signals import DecodeError

__all__ = ["FileExporter"]


class FileExporter:
    """Writes each request as one line to ``{signal}.jsonl``.

    See `tailspan_agent.exporter.rotating_file` for rotation and crashes.

    A full or failing disk is a `Retry`: nothing is lost while the service keeps the lines.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        directory: Where the files are.
        max_size: Of one file, in bytes.
        keep: How many files; older ones are deleted.
    """

    def __init__(self, signal: str, directory: Path, *, max_size: int, keep: int) -> None:
        self._signal = signal
        self._files = LineFiles(directory, signal, max_size=max_size, keep=keep)
        self.endpoint = str(self._files.path)

    async def export(self, payload: bytes, count: int) -> Outcome:
        """See `tailspan_agent.exporter.http.Exporter.export`. Delivered means: on the disk."""
        return await asyncio.to_thread(self._write, payload)

    async def aclose(self) -> None:
        """See `tailspan_agent.exporter.http.Exporter.aclose`."""
        self._files.close()

    def _write(self, payload: bytes) -> Outcome:
        try:
            self._files.append(encode_line(self._signal, payload))
        except OSError as error:
            return Retry(f"cannot write {self.endpoint}: {error.strerror or error}")
        except DecodeError as error:
            return Rejected(None, f"no OTLP request: {error}")
        return Delivered()
