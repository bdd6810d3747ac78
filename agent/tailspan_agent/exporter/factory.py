"""Create the exporter that a signal is configured for.

Each kind of exporter is imported only if it is used: importing gRPC takes 80 ms.
"""

from __future__ import annotations

from pathlib import Path

from tailspan.config import FilesSettings, SignalSettings
from tailspan.config.signals import Signal
from tailspan_agent.exporter.protocol import Exporter

__all__ = ["make_exporter"]


def make_exporter(signal: Signal, settings: SignalSettings, *, state_dir: Path, files: FilesSettings) -> Exporter:
    """Make the exporter of a signal. It connects with the first export.

    Args:
        signal: The signal.
        settings: Its destination.
        state_dir: Without an endpoint, requests go to ``otlp/{signal}.jsonl`` below it.
        files: Size and number of those files.

    Raises:
        ConfigError: A certificate cannot be read, or the endpoint is not a valid URL.
    """
    if settings.url is None:
        from tailspan_agent.exporter.file import FileExporter

        return FileExporter(signal, state_dir / "otlp", max_size=files.max_size, keep=files.keep)
    if settings.protocol == "grpc":
        from tailspan_agent.exporter.grpc import GrpcExporter

        return GrpcExporter(signal, settings.url, settings)
    from tailspan_agent.exporter.http import HttpExporter

    return HttpExporter(signal, settings.url, settings)
