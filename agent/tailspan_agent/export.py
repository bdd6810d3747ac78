"""Exporters: one request to where telemetry goes, one outcome back.

    Exporter (protocol)
      HttpExporter    OTLP/HTTP with protobuf
      GrpcExporter    OTLP/gRPC (`tailspan_agent.export_grpc`, imported only where it is used)
      FileExporter    OTLP JSON lines in files (`tailspan_agent.files`), for signals without an endpoint

An exporter tries once and never raises for what an endpoint or a disk may do; trying again is the business of
`tailspan_agent.sender.Sender`.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from tailspan.config import FilesSettings, SignalSettings
from tailspan.errors import ConfigError
from tailspan_agent.outcome import (
    Delivered,
    EndpointFault,
    Outcome,
    Rejected,
    Retry,
    TooLarge,
    classify_http,
)

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
    "user_agent",
]

_MAX_ANSWER_BYTES = 256 << 10
_THREAD_FROM_BYTES = 64 << 10
_SLICE_BYTES = 1 << 20
_SECRET_CHARS = 6


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
        from tailspan_agent.files import FileExporter

        return FileExporter(signal, state_dir / "otlp", max_size=files.max_size, keep=files.keep)
    if settings.protocol == "grpc":
        from tailspan_agent.export_grpc import GrpcExporter

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
        self._url = url
        self._timeout_s = settings.timeout
        self._compress = _compressor(settings.compression)
        custom = header_values(settings)
        self._secrets = list(custom.values())
        headers = {"User-Agent": user_agent(), "Content-Type": "application/x-protobuf", "Accept-Encoding": "gzip"}
        if settings.compression != "none":
            headers["Content-Encoding"] = settings.compression
        self._client = httpx.AsyncClient(
            headers={**headers, **custom},
            verify=_tls_context(settings, url),
            timeout=settings.timeout,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=30.0),
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
            # httpx bounds each read; an endpoint that drips its answer would stay within that for ever.
            async with asyncio.timeout(self._timeout_s):
                status, headers, body = await self._post(content)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            return self._failed(error)
        outcome = classify_http(self._signal, status, headers, body, count, datetime.now(UTC))
        return scrub(outcome, self._secrets)

    async def aclose(self) -> None:
        """See `Exporter.aclose`."""
        await self._client.aclose()

    async def _post(self, content: bytes) -> tuple[int, httpx.Headers, bytes]:
        length = {"Content-Length": str(len(content))}
        async with self._client.stream("POST", self._url, content=_slices(content), headers=length) as response:
            body = bytearray()
            unpack = _unpacker(response.headers.get("content-encoding", ""))
            try:
                async for chunk in response.aiter_raw():
                    body += unpack(chunk)
                    if len(body) > _MAX_ANSWER_BYTES:
                        break
            except zlib.error:
                # The status is the answer; a body that cannot be unpacked only fails to explain it.
                body += b"(a body that its Content-Encoding does not fit)"
            return response.status_code, response.headers, bytes(body)

    def _failed(self, error: Exception) -> Outcome:
        reason = f"{self.endpoint}: {str(error) or type(error).__name__}"
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            reason = f"{self.endpoint}: no answer within {self._timeout_s:g} s"
        ours = isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError | httpx.InvalidURL)
        fault = ours or _is_tls_fault(error)
        return scrub(EndpointFault(reason) if fault else Retry(reason), self._secrets)


async def _slices(content: bytes) -> AsyncIterator[Any]:
    """Yield the content in parts: asyncio copies what the socket does not take at once.

    It also lets go of the content when all is sent: httpx's responses are part of reference cycles, and with them lives
    whatever their requests hold.
    """
    view = memoryview(content)
    for start in range(0, len(content), _SLICE_BYTES):
        yield view[start : start + _SLICE_BYTES]


def header_values(settings: SignalSettings) -> dict[str, str]:
    """Return the configured headers; spaces around a value are no part of it (RFC 9110, 5.5)."""
    return {name: value.get_secret_value().strip() for name, value in settings.headers.items()}


def public_url(url: str) -> str:
    """Return the URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def user_agent() -> str:
    """Return what the agent calls itself to endpoints."""
    return f"tailspan/{version('tailspan')}"


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


@cache
def _default_tls_context() -> ssl.SSLContext:
    # Reading the system's authorities takes 50 ms: once for all signals.
    return httpx.create_ssl_context()


def _tls_context(settings: SignalSettings, url: str) -> ssl.SSLContext:
    if settings.ca_file is None and settings.client_cert is None:
        if urlsplit(url).scheme == "http" and not getproxies():
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and nobody is asked
        return _default_tls_context()
    if settings.ca_file is not None:
        read_pem(settings.ca_file, "ca_file")
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except ssl.SSLError as error:
        raise ConfigError(
            f"otlp.ca_file: {settings.ca_file} has no PEM certificate: {error.reason}", key="otlp.ca_file"
        ) from error
    if settings.client_cert is not None:
        read_pem(settings.client_cert, "client_cert")
        if settings.client_key is not None:
            read_pem(settings.client_key, "client_key")
        try:
            # An empty passphrase instead of OpenSSL's question on the terminal.
            context.load_cert_chain(settings.client_cert, settings.client_key, password="")
        except ssl.SSLError as error:
            raise ConfigError(
                f"otlp.client_cert: {settings.client_cert} and its key do not fit together or are no PEM:"
                f" {error.reason or error}",
                key="otlp.client_cert",
            ) from error
    return context


def _is_tls_fault(error: BaseException) -> bool:
    """Whether TLS itself refused: not a connection that merely broke."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _unpacker(encoding: str) -> Callable[[bytes], bytes]:
    """Return what unpacks an answer piece by piece; of a piece that grows a thousandfold only the beginning."""
    if encoding.strip().lower() in ("", "identity"):
        return bytes
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say
    return lambda chunk: unpacker.decompress(chunk, _MAX_ANSWER_BYTES + 1)


def _compressor(compression: str) -> Callable[[bytes], bytes] | None:
    match compression:
        case "none":
            return None
        case "gzip":
            # Level 1: the SDK's level 9 costs four times as much for 18% fewer bytes. mtime=0: the same bytes again.
            return lambda payload: gzip.compress(payload, compresslevel=1, mtime=0)
        case "zstd":
            try:
                import zstandard
            except ImportError as error:
                raise ConfigError(
                    "otlp.compression is zstd, which needs: pip install 'tailspan[zstd]'", key="otlp.compression"
                ) from error
            return lambda payload: zstandard.ZstdCompressor(level=1).compress(payload)
    raise ConfigError(f"otlp.compression is {compression!r}; there is gzip, none and zstd", key="otlp.compression")
