"""The OTLP/HTTP exporter: protobuf bodies over kept-alive connections."""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import urlsplit

from tailspan._net import tls_context
from tailspan.config import SignalSettings
from tailspan.config.signals import Signal
from tailspan.errors import ConfigError
from tailspan.http.client import BROKEN, FAULTY, TOO_SLOW, HttpClient
from tailspan_agent.exporter.outcome import EndpointFault, Outcome, Retry, classify_http
from tailspan_agent.exporter.protocol import header_values, public_url, scrub
from tailspan_agent.fast_zlib import gzip

__all__ = ["HttpExporter"]

_MAX_RESPONSE_BYTES = 256 << 10
# Smaller payloads are compressed faster than a thread is reached.
_THREAD_FROM_BYTES = 64 << 10
_KEEP_ALIVE_S = 30.0
_MAX_IDLE = 32


class HttpExporter:
    """OTLP over HTTP with protobuf bodies. It follows no redirects.

    Args:
        signal: The signal.
        url: The full URL to post to.
        settings: Compression, headers, timeout and certificates.

    Raises:
        ConfigError: A certificate cannot be read, or the URL is not valid.
    """

    def __init__(self, signal: Signal, url: str, settings: SignalSettings) -> None:
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
        """See `tailspan_agent.exporter.protocol.Exporter.export`."""
        if self._compress is None:
            content = payload
        elif len(payload) >= _THREAD_FROM_BYTES:
            content = await asyncio.to_thread(self._compress, payload)
        else:
            content = self._compress(payload)
        try:
            # The client limits each read only; an endpoint that sends a byte now and then would never time out.
            async with asyncio.timeout(self._timeout_s):
                status, headers, body = await self._post(content)
        except (*BROKEN, TimeoutError, OSError) as error:
            return self._failed(error)
        outcome = classify_http(self._signal, status, headers, body, count, datetime.now(UTC))
        return scrub(outcome, self._secrets)

    async def aclose(self) -> None:
        """See `tailspan_agent.exporter.protocol.Exporter.aclose`."""
        await self._client.aclose()

    async def _post(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        reply = await self._client.send("POST", content=content)
        body = bytearray()
        try:
            await reply.read_into(body, _MAX_RESPONSE_BYTES)
        except zlib.error:
            # The status decides; the body only explains it.
            body += b"(the body does not match its Content-Encoding)"
        finally:
            await reply.aclose()
        return reply.status, reply.headers, bytes(body)

    def _failed(self, error: Exception) -> Outcome:
        reason = f"{self.endpoint}: {str(error) or type(error).__name__}"
        if isinstance(error, TimeoutError | TOO_SLOW):
            reason = f"{self.endpoint}: no answer within {self._timeout_s:g} s"
        fault = isinstance(error, FAULTY) or _is_tls_fault(error)
        return scrub(EndpointFault(reason) if fault else Retry(reason), self._secrets)


def _tls_context(settings: SignalSettings, url: str) -> ssl.SSLContext | None:
    has_files = settings.ca_file is not None or settings.client_cert is not None
    if not has_files and urlsplit(url).scheme == "http":
        return None  # plain HTTP, also through a proxy: no TLS context is needed
    return tls_context(
        ca_file=settings.ca_file, client_cert=settings.client_cert, client_key=settings.client_key, table="otlp"
    )


def _is_tls_fault(error: BaseException) -> bool:
    """Return whether TLS itself failed (a certificate, a version), not only the connection below it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class _Pool:
    """Compresses payloads in any thread with compressors that are kept: a new one has new memory to fill.

    Args:
        make: Makes a compressor. One thread at a time may use it.
    """

    def __init__(self, make: Callable[[], Callable[[bytes], bytes]]) -> None:
        self._make = make
        self._idle: list[Callable[[bytes], bytes]] = []

    def __call__(self, payload: bytes) -> bytes:
        """Return a payload compressed."""
        try:
            compress = self._idle.pop()
        except IndexError:
            compress = self._make()
        try:
            return compress(payload)
        finally:
            self._idle.append(compress)


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
            # Level 1 with a window and a table of hashes that fit into a core's cache: a sixth faster, and no larger.
            settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=18, hash_log=14, min_match=7)
            return _Pool(lambda: zstandard.ZstdCompressor(compression_params=settings).compress)
    raise ConfigError(f"otlp.compression is {compression!r}; use gzip, none or zstd", key="otlp.compression")
