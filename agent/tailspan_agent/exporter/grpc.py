"""The OTLP/gRPC exporter. It sends the serialized request as it is: no second encoding, no generated stubs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from tailspan._net import host_port
from tailspan.config import SignalSettings
from tailspan.config.signals import Signal
from tailspan.errors import ConfigError
from tailspan.http.client import user_agent
from tailspan_agent.exporter.outcome import EndpointFault, Outcome, classify_grpc, classify_success
from tailspan_agent.exporter.protocol import header_values, public_url, scrub

__all__ = ["GrpcExporter"]

# `RetryingExporter` waits and counts: gRPC's own retries and backoff (up to two minutes) would hide both.
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_METHODS: dict[Signal, str] = {
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
}

_METADATA_NAME = re.compile(r"[a-z0-9_.-]+")


class GrpcExporter:
    """OTLP over gRPC.

    Args:
        signal: The signal.
        url: ``http://HOST:PORT`` without TLS, ``https://HOST:PORT`` with TLS.
        settings: Compression, headers (metadata), timeout and certificates.

    Raises:
        ConfigError: A certificate cannot be read, or gRPC does not support the compression or the URL.
    """

    def __init__(self, signal: Signal, url: str, settings: SignalSettings) -> None:
        self.endpoint = public_url(url)
        self._signal = signal
        self._timeout_s = settings.timeout
        custom = header_values(settings)
        self._secrets = list(custom.values())
        self._metadata = tuple((_metadata_name(name), value) for name, value in custom.items())
        self._target = _target(url)
        if settings.compression == "zstd":
            raise ConfigError(
                "otlp.compression is zstd, which gRPC does not support; use gzip or none", key="otlp.compression"
            )
        gzip = settings.compression == "gzip"
        self._compression = grpc.Compression.Gzip if gzip else grpc.Compression.NoCompression
        self._credentials = _credentials(settings) if urlsplit(url).scheme == "https" else None
        self._channel: Any = None
        self._call: Any = None

    async def export(self, payload: bytes, count: int) -> Outcome:
        """See `tailspan_agent.exporter.protocol.Exporter.export`."""
        if self._channel is None:
            self._open()
        try:
            body = await self._call(
                payload, timeout=self._timeout_s, metadata=self._metadata, compression=self._compression
            )
        except grpc.aio.AioRpcError as error:
            return scrub(self._failed(error), self._secrets)
        except grpc.aio.InternalError:
            # gRPC writes the reason to stderr only; of what it sends, only the metadata comes from the configuration.
            return EndpointFault(f"{self.endpoint}: gRPC cannot send the request: check otlp.headers")
        return scrub(classify_success(self._signal, body, count), self._secrets)

    async def aclose(self) -> None:
        """See `tailspan_agent.exporter.protocol.Exporter.aclose`."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _open(self) -> None:
        # A channel belongs to the event loop that runs when it is created.
        options = (*_OPTIONS, ("grpc.primary_user_agent", user_agent()))
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(self._target, self._credentials, options=options)
        self._call = self._channel.unary_unary(_METHODS[self._signal])

    def _failed(self, error: grpc.aio.AioRpcError) -> Outcome:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        message = error.details() or ""
        return classify_grpc(error.code().name, message, details if isinstance(details, bytes) else None)


def _metadata_name(name: str) -> str:
    # gRPC accepts lower case only.
    lower = name.lower()
    if not _METADATA_NAME.fullmatch(lower) or lower.startswith("grpc-") or lower.endswith("-bin"):
        raise ConfigError(
            f"otlp.headers.{name} is not a valid gRPC metadata name: use letters, digits, '-', '_' and '.',"
            " without grpc- in front and -bin at the end",
            key=f"otlp.headers.{name}",
        )
    return lower


def _target(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"otlp.endpoint is {public_url(url)}; gRPC needs http(s)://HOST:PORT", key="otlp.endpoint")
    if parts.username:
        raise ConfigError("otlp.endpoint has a user name; for gRPC, use otlp.headers", key="otlp.endpoint")
    return f"dns:///{host_port(parts.hostname, parts.port or 4317)}"


def _credentials(settings: SignalSettings) -> grpc.ChannelCredentials:
    ca = _read_pem(settings.ca_file, "ca_file") if settings.ca_file else None
    cert = _read_pem(settings.client_cert, "client_cert") if settings.client_cert else None
    key_file = settings.client_key or settings.client_cert
    key = _read_pem(key_file, "client_key") if key_file else None
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def _read_pem(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"otlp.{key}: cannot read {path}: {error.strerror}", key=f"otlp.{key}") from error
