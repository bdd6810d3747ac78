"""Requests to one Fused API: credentials, rate, retries, and the one place that turns HTTP into our errors."""

from __future__ import annotations

import random
import ssl
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlencode

import anyio
import anyio.lowlevel

from tailspan._backoff import backoff_s, parse_retry_after_s
from tailspan._net import tls_context
from tailspan._secrets import MASK
from tailspan.errors import (
    AuthError,
    ConfigError,
    CursorExpiredError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.http.client import BROKEN, NEVER_SENT, TOO_SLOW, HttpClient, Reply
from tailspan.logs.page_wire import CURSOR_MARK, RESUME_HEADER, FrameError, read_cursor
from tailspan.services.fused.auth import Authorization, Credentials
from tailspan.services.fused.stream import ReplyError, Splitter
from tailspan.services.fused.wire import error_text

__all__ = ["FusedHttp", "Pace", "Retries", "Tls"]

_RETRY_FOR_S = 5.0
# Decoded, a reply of empty lists takes twenty times its size.
_MAX_REPLY_BYTES = 8 << 20
_MAX_ERROR_BYTES = 64 << 10
_KEEP_ALIVE_S = 90.0
_MAX_IDLE = 20


T = TypeVar("T")
Params = Mapping[str, int | str] | Sequence[tuple[str, str]]


class Pace:
    """A token bucket: an average rate per second, with bursts of at most one second's worth."""

    def __init__(self, per_second: float) -> None:
        self._interval_s = 1.0 / per_second
        self._next_s = 0.0

    async def wait(self) -> None:
        """Wait for the next turn; turns are given in the order of the calls."""
        now = time.monotonic()
        self._next_s = max(self._next_s, now - 1.0) + self._interval_s
        if self._next_s > now:
            await anyio.sleep(self._next_s - now)


class Retries:
    """The attempts of one request, limited in number and time."""

    def __init__(self, tries: int) -> None:
        self._tries = tries
        self._failed = 0
        self._started_s = time.monotonic()

    async def wait(self, error: ServiceUnavailableError) -> None:
        """Wait until the request may be tried again.

        Raises:
            ServiceUnavailableError: The given error, after enough attempts or time, or if the service asks for a longer
                delay than is left; the error has that delay.
        """
        delay_s = backoff_s(self._failed, random.random(), retry_after_s=error.retry_after_s)
        self._failed += 1
        # A caller whose time ends before the delay gets the service's error rather than a bare timeout.
        left_s = anyio.current_effective_deadline() - anyio.current_time()
        is_over = time.monotonic() + delay_s > self._started_s + _RETRY_FOR_S
        if self._failed >= self._tries or is_over or delay_s >= left_s:
            raise error
        await anyio.sleep(delay_s)


class Tls(NamedTuple):
    """Files in PEM for TLS; verification is always on.

    Attributes:
        ca_file: Certificates to trust instead of the system's.
        client_cert: Certificate to show to the server.
        client_key: Its key, where it is not in the same file.
    """

    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


class FusedHttp:
    """One API at one base URL, over one pool of kept-alive connections.

    Attributes:
        tries: Number of attempts of a request that only reads; 1 for callers with a schedule of their own.
    """

    def __init__(
        self,
        service: str,
        base_url: str,
        credentials: Credentials,
        *,
        timeout_s: float,
        tls: Tls,
        requests_per_second: float,
        tries: int,
    ) -> None:
        self.tries = tries
        self._service = service
        self._base_url = base_url
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._tls_files = tls
        self._pace = Pace(requests_per_second)
        self._client: HttpClient | None = None
        self._client_loop: object = None

    async def get(self, path: str, params: Params | None = None, *, job_id: str | None = None) -> bytes:
        """Return the body of a small reply.

        Args:
            path: Below the base URL, escaped.
            params: The query.
            job_id: The job that the request is about.

        Raises:
            ServiceError: See the tree in `tailspan.errors`.
        """
        retries = Retries(self.tries)
        while True:
            try:
                return await self._whole("GET", path, params, job_id)
            except ServiceUnavailableError as error:
                await retries.wait(error)

    async def post(self, path: str, *, job_id: str) -> bytes:
        """Send an empty POST and return the body of the reply.

        It is sent again only if it never left this host: without an answer, the server may still have acted on it.
        """
        retries = Retries(self.tries)
        while True:
            try:
                return await self._whole("POST", path, None, job_id)
            except ServiceUnavailableError as error:
                if not isinstance(error.__cause__, NEVER_SENT):
                    raise
                await retries.wait(error)

    async def parts(
        self,
        path: str,
        params: Params | None,
        make_splitter: Callable[[], Splitter[T]],
        expected: str,
        *,
        job_id: str | None,
        others: Mapping[str, Callable[[], Splitter[T]]] | None = None,
    ) -> AsyncGenerator[list[T], None]:
        """Yield the parts of a reply of any size as they arrive. Retries until the first part.

        Args:
            path: Below the base URL, escaped.
            params: The query.
            make_splitter: Makes the splitter of a JSON reply.
            expected: The expected reply, for errors.
            job_id: The job that the request is about; None for several.
            others: Makers of splitters for other accepted replies, by media type.
        """
        retries = Retries(self.tries)
        begun = False
        while True:
            try:
                async with (
                    self._reply("GET", path, params, job_id, also=tuple(others or ())) as response,
                    aclosing(self._pieces(response, "GET", path, job_id)) as pieces,
                ):
                    media_type = response.headers.get("content-type", "").partition(";")[0].strip()
                    splitter = (others or {}).get(media_type, make_splitter)()
                    async for piece in pieces:
                        if parts := splitter.feed(piece):
                            begun = True
                            yield parts
                    if parts := splitter.close():
                        yield parts
                return
            except (ReplyError, FrameError) as error:
                raise ProtocolError(
                    f"GET {path}: the reply should be {expected}, but {error}; check services.{self._service}.base_url "
                    f"({self._base_url})",
                    service=self._service,
                    job_id=job_id,
                ) from None
            except ServiceUnavailableError as error:
                if begun:
                    raise
                await retries.wait(error)

    async def aclose(self) -> None:
        """Close the connections; a later request opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_loop == anyio.lowlevel.current_token():
            await client.aclose()

    async def _whole(self, method: str, path: str, params: Params | None, job_id: str | None) -> bytes:
        await self._pace.wait()
        try:
            # The client limits each wait; a server that sends a byte now and then never reaches that limit.
            with anyio.fail_after(2 * self._timeout_s):
                async with self._reply(method, path, params, job_id, paced=True) as response:
                    body = bytearray()
                    async for piece in self._pieces(response, method, path, job_id):
                        body += piece
                        if len(body) > _MAX_REPLY_BYTES:
                            raise ProtocolError(
                                f"{method} {path}: the reply is larger than {_MAX_REPLY_BYTES >> 20} MiB",
                                service=self._service,
                                job_id=job_id,
                            )
        except TimeoutError:
            raise self._unavailable(
                f"{method} {path}: no complete answer within {2 * self._timeout_s:g} s", job_id
            ) from None
        return bytes(body)

    @asynccontextmanager
    async def _reply(
        self,
        method: str,
        path: str,
        params: Params | None,
        job_id: str | None,
        *,
        paced: bool = False,
        also: Sequence[str] = (),
    ) -> AsyncIterator[Reply]:
        """Send a request and yield a successful answer; raise an error for any other. Renews credentials once."""
        if not paced:
            await self._pace.wait()
        client = self._open_client()
        authorization = await self._credentials.authorization()
        response = await self._send(client, method, path, params, job_id, authorization, also)
        try:
            if response.status == 401:
                renewed = await self._credentials.renew(authorization)
                if renewed is not None:
                    await response.aclose()
                    authorization = renewed
                    response = await self._send(client, method, path, params, job_id, authorization, also)
            if not response.is_success:
                raise await self._error(response, method, path, job_id, authorization)
            yield response
        finally:
            await response.aclose()

    async def _send(
        self,
        client: HttpClient,
        method: str,
        path: str,
        params: Params | None,
        job_id: str | None,
        authorization: Authorization,
        also: Sequence[str],
    ) -> Reply:
        headers = {"Authorization": authorization.value} if authorization.value else {}
        if also:
            headers["Accept"] = ", ".join(("application/json", *also))
        try:
            return await client.send(method, path, urlencode(params or {}), headers=headers)
        except BROKEN as error:
            raise self._unavailable(f"{method} {self._base_url}{path}: {self._reason(error)}", job_id) from error

    async def _pieces(self, response: Reply, method: str, path: str, job_id: str | None) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(response.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        except BROKEN as error:
            text = f"{method} {path}: the reply broke off: {self._reason(error)}"
            raise self._unavailable(text, job_id) from error
        except zlib.error:
            raise ProtocolError(
                f"{method} {path}: the reply's compression is damaged",
                service=self._service,
                job_id=job_id,
            ) from None

    async def _error(
        self, response: Reply, method: str, path: str, job_id: str | None, authorization: Authorization
    ) -> TailspanError:
        """Return the error for an answer that is not a success, with the server's own text if it has any."""
        code = response.status
        detail = await self._error_detail(response, authorization)
        text = f"{method} {path}: {code} {response.reason}".rstrip() + (f": {detail}" if detail else "")
        html = "html" in response.headers.get("content-type", "")
        if code in (401, 403):
            hint = f"; the token came from {authorization.source}" if authorization.value else "; none was sent"
            return AuthError(text + hint, service=self._service, job_id=job_id)
        if 300 <= code < 400 or (code == 404 and html):
            return ProtocolError(
                f"{text}: this is not the job API; check services.{self._service}.base_url ({self._base_url})",
                service=self._service,
                job_id=job_id,
            )
        if code == 404 and job_id is not None:
            unknown = f"service {self._service} knows no job {job_id}"
            return JobNotFoundError(f"{unknown}: {detail}" if detail else unknown, service=self._service, job_id=job_id)
        if code == 410 and (resume := response.headers.get(RESUME_HEADER.lower())) is not None:
            try:
                cursor = CURSOR_MARK + read_cursor(resume) if resume else None
            except ConfigError as error:
                return ProtocolError(f"{text}: {RESUME_HEADER}: {error}", service=self._service, job_id=job_id)
            return CursorExpiredError(detail or text, resume_cursor=cursor, service=self._service, job_id=job_id)
        if code in (408, 429) or code >= 500:
            after_s = parse_retry_after_s(response.headers.get("retry-after"), datetime.now(UTC))
            return self._unavailable(text, job_id, after_s)
        return RequestRejectedError(text, status_code=code, service=self._service, job_id=job_id)

    async def _error_detail(self, response: Reply, authorization: Authorization) -> str:
        body = bytearray()
        try:
            await response.read_into(body, _MAX_ERROR_BYTES)
        except (*BROKEN, zlib.error):
            # The status alone must do.
            return ""
        detail = error_text(bytes(body))
        token = authorization.value.partition(" ")[2]
        return detail.replace(token, MASK) if token else detail

    def _unavailable(
        self, text: str, job_id: str | None, retry_after_s: float | None = None
    ) -> ServiceUnavailableError:
        return ServiceUnavailableError(text, retry_after_s=retry_after_s, service=self._service, job_id=job_id)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TOO_SLOW):
            what = "no connection" if isinstance(error, NEVER_SENT) else "no answer"
            return f"{what} within {self._timeout_s:g} s"
        text = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in text:
            text += f"; for a private authority set services.{self._service}.ca_file"
        elif "CERTIFICATE_REQUIRED" in text:
            text += f"; set services.{self._service}.client_cert"
        return text

    def _open_client(self) -> HttpClient:
        # Connections belong to an event loop: in the next loop a service needs new ones.
        loop = anyio.lowlevel.current_token()
        if self._client is None or self._client_loop != loop:
            self._client = HttpClient(
                self._base_url,
                key=f"services.{self._service}.base_url",
                headers={"X-Fused-Cache-Disable": "true", "Accept": "application/json"},
                timeout_s=self._timeout_s,
                tls=self._tls(),
                keep_alive_s=_KEEP_ALIVE_S,
                max_idle=_MAX_IDLE,
            )
            self._client_loop = loop
        return self._client

    def _tls(self) -> ssl.SSLContext | None:
        if self._base_url.startswith("http:"):
            # Plain HTTP: no TLS context is needed, and loading one takes longer than the first request.
            return None
        ca_file, client_cert, client_key = (path and path.expanduser() for path in self._tls_files)
        return tls_context(
            ca_file=ca_file, client_cert=client_cert, client_key=client_key, table=f"services.{self._service}"
        )
