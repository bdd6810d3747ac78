"""Files mode: OTLP JSON lines on disk instead of an endpoint, for a later replay or for a collector to read."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tailspan.config.signals import Signal
from tailspan_agent.exporter.outcome import Delivered, Outcome, Rejected, Retry
from tailspan_agent.exporter.rotating_file import RotatingFile
from tailspan_agent.otlp.json_lines import encode_line
from tailspan_agent.otlp.messages import DecodeError

__all__ = ["FileExporter"]


class FileExporter:
    """Write each request as one line to ``{signal}.jsonl``.

    See `tailspan_agent.exporter.rotating_file` for rotation and crashes. If the disk is full or fails, the outcome is
    a `Retry`: nothing is lost while the service keeps the lines.

    Args:
        signal: The signal.
        directory: The directory of the files.
        max_size: Maximum size of one file, in bytes.
        keep: Maximum number of files; the oldest is deleted.
    """

    def __init__(self, signal: Signal, directory: Path, *, max_size: int, keep: int) -> None:
        self._signal = signal
        self._file = RotatingFile(directory, signal, max_size=max_size, keep=keep)
        self.endpoint = str(self._file.path)

    async def export(self, payload: bytes, count: int) -> Outcome:
        """See `tailspan_agent.exporter.protocol.Exporter.export`. Delivered means: on disk."""
        return await asyncio.to_thread(self._write, payload)

    async def aclose(self) -> None:
        """See `tailspan_agent.exporter.protocol.Exporter.aclose`."""
        self._file.close()

    def _write(self, payload: bytes) -> Outcome:
        try:
            self._file.append(encode_line(self._signal, payload))
        except OSError as error:
            return Retry(f"cannot write {self.endpoint}: {error.strerror or error}")
        except DecodeError as error:
            return Rejected(None, f"not a valid OTLP request: {error}")
        return Delivered()
