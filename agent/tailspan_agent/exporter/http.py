"""Exporters: one request to where telemetry goes, one outcome back.

    Exporter (protocol)
      HttpExporter    OTLP/HTTP with protobuf
      GrpcExporter    OTLP/gRPC (`tailspan_agent.exporter.grpc`, imported only where it is used)
      FileExporter    OTLP JSON lines in files (`tailspan_agent.exporter.file`), for signals without an endpoint

An exporter tries once and never raises for what an endpoint or a disk may do; trying again is the business of
`tailspan_agent.exporter.retry.RetryingExporter`.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from tailspan._net import tls_context
from tailspan.config import FilesSettings, SignalSettings
from tailspan.errors import ConfigError
from tailspan.http.client import BROKEN, FAULTY, TOO_SLOW, HttpClient
from tailspan_agent.exporter.outcome import (
    Delivered,
    EndpointFault,
    Outcome,
    Rejected,
    Retry,
    TooLarge,
    classify_http,
)
from tailspan_agent.fast_zlib import gzip

__all__ = [
    "Delivered",
    "EndpointFault",
    "Exporter",
    "HttpExporter",
    "Outcome",
    "Rejected",
    "Retry",
    "TooLarge",
    "header_values",
    "make_exporter",
    "public_url",
    "read_pem",
    "scrub",
]

_MAX_ANSWER_BYTES = 256 << 10
_THREAD_FROM_BYTES = 64 << 10
_SECRET_CHARS = 6
_KEEP_ALIVE_S = 30.0
_MAX_IDLE = 32


class Exporter(Protocol):
    """The seam to where telemetry goes.

    Attributes:
        endpoint: Where that is, for people; without credentials.
    """

    endpoint: str

    async def export(self, payload: bytes, count: int) -> Outcome:
        """Send one serialized Export*ServiceRequest once.

        Args:
            payload: Its bytes; sent as they are, so that sending again sends the same.
            count: Records in it.
        """
        ...

    async def aclose(self) -> None:
        """Release connections and files."""
        ...


def make_exporter(signal: str, settings: SignalSettings, *, state_dir: Path, files: FilesSettings) -> Exporter:
    """Make the exporter that the configuration asks for. Reaches out to nothing yet.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        settings: Where the signal goes.
        state_dir: Under it, without endpoint, ``otlp/{signal}.jsonl``.
        files: Size and number of those files.

    Raises:
        ConfigError: Certificates that cannot be read, or an endpoint that is none.
    """
    if settings.url is None:
        from tailspan_agent.exporter.file import FileExporter

        return FileExporter(signal, state_dir / "otlp", max_size=files.max_size, keep=files.keep)
    if settings.protocol == "grpc":
        from tailspan_agent.exporter.grpc import GrpcExporter

        return GrpcExporter(signal, settings.url, settings)
    return HttpExporter(signal, settings.url, settings)


class HttpExporter:
    """OTLP over HTTP with protobuf bodies, over kept-alive connections; follows no redirects.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        url: The full URL to post to.
        settings: Compression, headers, timeout and certificates.

    Raises:
        ConfigError: Certificates that cannot be read, or a URL that is none.
    """

    def __init__(self, signal: str, url: str, settings: SignalSettings) -> None:
        self.endpoint = public_url(url)
        self._signal = signal
        self._timeout_s = settings.timeout
        self._compress = _compressor(settings.compression)
        custom = header_values(settings)
        self._secrets = list(custom.values())
        headers = {"Content-Type": "application/x-protobuf"}
        if settings.compression != "none":
            headers["Content-Encoding"] = settings.compression
        self._client = HttpClient(
            url,
            key="otlp.endpoint",
            headers={**headers, **custom},
            timeout_s=settings.timeout,
            tls=_tls_context(settings, url),
            keep_alive_s=_KEEP_ALIVE_S,
            max_idle=_MAX_IDLE,
        )

    async def export(self, payload: bytes, count: int) -> Outcome:
        """See `Exporter.export`."""
        if self._compress is None:
            content = payload
        elif len(payload) >= _THREAD_FROM_BYTES:
            content = await asyncio.to_thread(self._compress, payload)
        else:
            content = self._compress(payload)
        try:
            # The client bounds each read; an endpoint that drips its answer would stay within that for ever.
            async with asyncio.timeout(self._timeout_s):
                status, headers, body = await self._post(content)
        except (*BROKEN, TimeoutError, OSError) as error:
            return self._failed(error)
        outcome = classify_http(self._signal, status, headers, body, count, datetime.now(UTC))
        return scrub(outcome, self._secrets)

    async def aclose(self) -> None:
        """See `Exporter.aclose`."""
        await self._client.aclose()

    async def _post(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        reply = await self._client.send("POST", content=content)
        body = bytearray()
        try:
            await reply.read_into(body, _MAX_ANSWER_BYTES)
        except zlib.error:
            # The status is the answer; a body that cannot be unpacked only fails to explain it.
            body += b"(a body that its Content-Encoding does not fit)"
        finally:
            await reply.aclose()
        return reply.status, reply.headers, bytes(body)

    def _failed(self, error: Exception) -> Outcome:
        reason = f"{self.endpoint}: {str(error) or type(error).__name__}"
        if isinstance(error, TimeoutError | TOO_SLOW):
            reason = f"{self.endpoint}: no answer within {self._timeout_s:g} s"
        fault = isinstance(error, FAULTY) or _is_tls_fault(error)
        return scrub(EndpointFault(reason) if fault else Retry(reason), self._secrets)


def header_values(settings: SignalSettings) -> dict[str, str]:
    """Return the configured headers; spaces around a value are no part of it (RFC 9110, 5.5)."""
    return {name: value.get_secret_value().strip() for name, value in settings.headers.items()}


def public_url(url: str) -> str:
    """Return the URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def scrub(outcome: Outcome, secrets: list[str]) -> Outcome:
    """Return the outcome without header values that an endpoint repeated in its error message."""
    text = (outcome.warning if isinstance(outcome, Delivered) else outcome.reason) or ""
    found = [secret for secret in secrets if len(secret) >= _SECRET_CHARS and secret in text]
    if not found:
        return outcome
    for secret in found:
        text = text.replace(secret, "***")
    match outcome:
        case Delivered():
            return Delivered(text)
        case Retry():
            return Retry(text, outcome.after_s, outcome.server_error)
        case Rejected():
            return Rejected(outcome.rejected, text, outcome.kind)
        case EndpointFault():
            return EndpointFault(text)
        case TooLarge():
            return TooLarge(text)


def read_pem(path: Path, key: str) -> bytes:
    """Return a certificate or key file's bytes.

    Raises:
        ConfigError: It cannot be read; names ``otlp.KEY``.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"otlp.{key}: cannot read {path}: {error.strerror}", key=f"otlp.{key}") from error


def _tls_context(settings: SignalSettings, url: str) -> ssl.SSLContext | None:
    if settings.ca_file is None and settings.client_cert is None and urlsplit(url).scheme == "http":
        return None  # plain HTTP: no TLS context is needed
    return tls_context(
        ca_file=settings.ca_file, client_cert=settings.client_cert, client_key=settings.client_key, table="otlp"
    )


def _is_tls_fault(error: BaseException) -> bool:
    """Whether TLS itself refused: not a connection that merely broke."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _compressor(compression: str) -> Callable[[bytes], bytes] | None:
    match compression:
        case "none":
            return None
        case "gzip":
            return gzip
        case "zstd":
            try:
                import zstandard
            except ImportError as error:
                raise ConfigError(
                    "otlp.compression is zstd, which needs: pip install 'tailspan[zstd]'", key="otlp.compression"
                ) from error
            return lambda payload: zstandard.ZstdCompressor(level=1).compress(payload)
    raise ConfigError(f"otlp.compression is {compression!r}; there is gzip, none and zstd", key="otlp.compression")
