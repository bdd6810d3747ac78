"""OTLP over gRPC, with the request's bytes as they are."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from tailspan._net import host_port
from tailspan.config import SignalSettings
from tailspan.errors import ConfigError
from tailspan.http.client import user_agent
from tailspan_agent.exporter.http import header_values, public_url, read_pem, scrub
from tailspan_agent.exporter.outcome import EndpointFault, Outcome, classify_grpc, classify_success
from tailspan_agent.otlp.signals import SIGNALS

__all__ = ["GrpcExporter"]

# `RetryingExporter` waits and counts the tries: gRPC's own retries and its backoff (up to two minutes) would hide both.
_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_METADATA_NAME = re.compile(r"[a-z0-9_.-]+")


class GrpcExporter:
    """OTLP over gRPC.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        url: ``http://HOST:PORT`` without TLS, ``https://HOST:PORT`` with it.
        settings: Compression, headers (metadata), timeout and certificates.

    Raises:
        ConfigError: Certificates that cannot be read, a compression or a URL that gRPC has not.
    """

    def __init__(self, signal: str, url: str, settings: SignalSettings) -> None:
        self.endpoint = public_url(url)
        self._signal = signal
        self._timeout_s = settings.timeout
        custom = header_values(settings)
        self._secrets = list(custom.values())
        self._metadata = tuple((_metadata_name(name), value) for name, value in custom.items())
        self._target = _target(url)
        if settings.compression == "zstd":
            raise ConfigError(
                "otlp.compression is zstd, which gRPC has not; there is gzip and none", key="otlp.compression"
            )
        gzip = settings.compression == "gzip"
        self._compression = grpc.Compression.Gzip if gzip else grpc.Compression.NoCompression
        self._credentials = _credentials(settings) if urlsplit(url).scheme == "https" else None
        self._channel: Any = None
        self._call: Any = None

    async def export(self, payload: bytes, count: int) -> Outcome:
        """See `tailspan_agent.exporter.http.Exporter.export`."""
        if self._channel is None:
            self._open()
        try:
            body = await self._call(
                payload, timeout=self._timeout_s, metadata=self._metadata, compression=self._compression
            )
        except grpc.aio.AioRpcError as error:
            return scrub(self._failed(error), self._secrets)
        except grpc.aio.InternalError:
            # gRPC says why only on stderr; the metadata is all that a configuration can make unfit to send.
            return EndpointFault(f"{self.endpoint}: gRPC cannot send the request: look at otlp.headers")
        return scrub(classify_success(self._signal, body, count), self._secrets)

    async def aclose(self) -> None:
        """See `tailspan_agent.exporter.http.Exporter.aclose`."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _open(self) -> None:
        # A channel belongs to the event loop that is running when it is made.
        options = (*_OPTIONS, ("grpc.primary_user_agent", user_agent()))
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self._target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(self._target, self._credentials, options=options)
        self._call = self._channel.unary_unary(SIGNALS[self._signal].grpc_method)

    def _failed(self, error: grpc.aio.AioRpcError) -> Outcome:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        message = error.details() or ""
        return classify_grpc(error.code().name, message, details if isinstance(details, bytes) else None)


def _metadata_name(name: str) -> str:
    # gRPC refuses upper case.
    lower = name.lower()
    if not _METADATA_NAME.fullmatch(lower) or lower.startswith("grpc-") or lower.endswith("-bin"):
        raise ConfigError(
            f"otlp.headers.{name} cannot be sent over gRPC, which needs a name of letters, digits, '-', '_' and '.',"
            " not beginning with grpc- and not ending with -bin",
            key=f"otlp.headers.{name}",
        )
    return lower


def _target(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"otlp.endpoint is {public_url(url)}; gRPC needs http(s)://HOST:PORT", key="otlp.endpoint")
    if parts.username:
        raise ConfigError("otlp.endpoint has a user in it; gRPC needs it in otlp.headers", key="otlp.endpoint")
    return f"dns:///{host_port(parts.hostname, parts.port or 4317)}"


def _credentials(settings: SignalSettings) -> grpc.ChannelCredentials:
    ca = read_pem(settings.ca_file, "ca_file") if settings.ca_file else None
    cert = read_pem(settings.client_cert, "client_cert") if settings.client_cert else None
    key_file = settings.client_key or settings.client_cert
    key = read_pem(key_file, "client_key") if key_file else None
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
