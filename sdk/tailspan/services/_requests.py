"""`ServiceRequests`: requests to the HTTP API of a job service, for all services that have one.

Authorizer and their renewal, requests per second, retries, time limits, and the one place that turns HTTP into our
errors.
"""

from __future__ import annotations

import random
import ssl
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import anyio
import anyio.lowlevel
import msgspec

from tailspan._backoff import backoff_s, parse_retry_after_s
from tailspan._net import host_port, is_loopback, tls_context
from tailspan._secrets import MASK, add_secret, mask_and_cut
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.http.client import BROKEN, NEVER_SENT, TOO_SLOW, HttpClient, Reply
from tailspan.logs.clean import printable
from tailspan.services._json_stream import ReplyError, Splitter, decode_json

if TYPE_CHECKING:
    from tailspan.http.websocket import WebSocket

__all__ = [
    "Authorization",
    "Authorizer",
    "Pace",
    "Params",
    "Retries",
    "ServiceRequests",
    "Tls",
    "encode_json",
    "error_text",
    "is_confidential",
    "is_local",
    "make_authorization",
    "normalise_base_url",
    "path_segment",
]

T = TypeVar("T")

_RETRY_FOR_S = 5.0
# Decoded, a reply of empty lists takes twenty times its size.
_MAX_REPLY_BYTES = 8 << 20
_MAX_ERROR_BYTES = 64 << 10
# How long a turn waits before it reads the share again, in seconds.
_STEP_S = 1.0
_EXACT_S = 1e-6
_KEEP_ALIVE_S = 90.0
_MAX_IDLE = 20
_MAX_ERROR_CHARS = 500
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ANY_JSON = msgspec.json.Decoder()

Params = Mapping[str, int | str] | Sequence[tuple[str, str]]


class Authorization(NamedTuple):
    """A header to send, and its source.

    Attributes:
        value: What the header has; empty: send none.
        source: Where the token is stored, for messages.
        header: The name of the header.
    """

    value: str
    source: str
    header: str = "Authorization"

    def __repr__(self) -> str:
        return f"<authorization from {self.source}>"


def make_authorization(
    scheme: str, token: str, source: str, *, service: str, header: str = "Authorization"
) -> Authorization:
    """Return the header with a token, which is masked in all messages from now on.

    Args:
        scheme: The word before the token; empty: none.
        token: The token.
        source: Where it is stored, for messages.
        service: Name of the configured service, for messages.
        header: The name of the header.

    Raises:
        AuthError: The token is empty, or has characters that a header cannot have.
    """
    value = f"{scheme} {token}" if scheme else token
    if not token or not value.isascii() or not value.isprintable():
        wrong = "has characters that a token cannot have" if token else "is empty"
        raise AuthError(f"the token of service {service} from {source} {wrong}", service=service)
    add_secret(value)
    return Authorization(value, source, header)


class Authorizer(Protocol):
    """Where the ``Authorization`` header comes from."""

    async def authorization(self) -> Authorization:
        """Return the header of the next request.

        Raises:
            AuthError: There are no credentials, or they are not usable.
            ServiceUnavailableError: They could not be had now.
        """
        ...

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return other credentials than the refused ones; None if there are none.

        Raises:
            AuthError: The credentials are no longer valid.
            ServiceUnavailableError: They could not be renewed now.
        """
        ...


class Pace:
    """A token bucket: an average rate per second, with bursts of at most one second's worth.

    Attributes:
        share: The part of each rate that this process uses: a fleet of agents shares the rate of a service.
    """

    share: ClassVar[float] = 1.0

    def __init__(self, per_second: float) -> None:
        self._interval_s = 1.0 / per_second
        # The time of the whole rate that this process's part has had, and the time that is given away.
        self._had_s, self._given_s = 0.0, -1.0
        self._now_s = time.monotonic()

    async def wait(self) -> None:
        """Wait for the next turn; turns are in the order of the calls, but for a second after a change of the share."""
        turn_s = self._given_s = max(self._given_s, self._had() - self.share) + self._interval_s
        while (left_s := turn_s - self._had()) > _EXACT_S:  # noqa: ASYNC110 - the share may change meanwhile
            await anyio.sleep(min(left_s / self.share, _STEP_S))

    def _had(self) -> float:
        now_s = time.monotonic()
        self._had_s += (now_s - self._now_s) * self.share
        self._now_s = now_s
        return self._had_s


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


class ServiceRequests:
    """Requests to one HTTP API at one base URL, over one pool of kept-alive connections.

    Attributes:
        tries: Number of attempts of a request that only reads; 1 for callers with a schedule of their own.
        timeout_s: How long to wait for a connection and for each part of an answer, in seconds.
        reply_errors: What splitters raise for a reply that is not the expected one.
        url_key: The key of the service's section that has the base URL, for messages.
    """

    url_key = "base_url"
    reply_errors: tuple[type[Exception], ...] = (ReplyError,)

    def __init__(
        self,
        service: str,
        base_url: str,
        credentials: Authorizer,
        *,
        timeout_s: float = 10.0,
        tls: Tls | None = None,
        requests_per_second: float = 20.0,
        tries: int = 1,
        headers: Mapping[str, str] | None = None,
        renew_on: Sequence[int] = (401,),
        server_name: str | None = None,
        streams: bool = False,
        socket: Path | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            service: Name of the configured service, for messages.
            base_url: The URL that paths are below.
            credentials: Where the ``Authorization`` header comes from; one refusal renews it.
            timeout_s: As the attribute.
            tls: Files for TLS.
            requests_per_second: The average rate of all requests.
            tries: As the attribute.
            headers: Headers of every request.
            renew_on: Statuses of a refused ``Authorization``.
            server_name: The name in the server's certificate; None: the URL's host.
            streams: Whether replies may be silent for hours; see `HttpClient`.
            socket: The Unix socket to connect to instead of the URL's host.
        """
        self.tries = tries
        self._socket = socket
        self._service = service
        self._base_url = base_url
        self._credentials = credentials
        self.timeout_s = timeout_s
        self._tls_files = tls or Tls()
        self._pace = Pace(requests_per_second)
        self._headers = {"Accept": "application/json", **(headers or {})}
        self._renew_on = frozenset(renew_on)
        self._server_name = server_name
        self._streams = streams
        self._client: HttpClient | None = None
        self._client_loop: object = None

    async def get(self, path: str, params: Params | None = None, *, job_id: str | None = None) -> bytes:
        """Return the body of a reply of at most 8 MiB.

        Args:
            path: Below the base URL, escaped.
            params: The query.
            job_id: The job that the request is about.

        Raises:
            ServiceError: See the tree in `tailspan.errors`.
        """
        return await self._retried("GET", path, params, job_id, reads=True)

    async def post(self, path: str, *, job_id: str) -> bytes:
        """Send an empty POST and return the body of the reply.

        It is sent again only if it never left this host: without an answer, the server may still have acted on it.
        """
        return await self._retried("POST", path, None, job_id, reads=False)

    async def get_json(self, path: str, params: Params | None = None, *, job_id: str | None = None) -> Any:
        """Return the JSON of a reply; see `get`."""
        return self._json("GET", path, await self.get(path, params, job_id=job_id), job_id)

    async def send_json(
        self, method: str, path: str, body: Any, *, job_id: str | None = None, reads: bool = False
    ) -> Any:
        """Send JSON and return the JSON of the reply; None for an empty one.

        Args:
            method: ``POST``, ``PATCH`` ...
            path: Below the base URL, escaped.
            body: What to send.
            job_id: The job that the request is about.
            reads: Whether the request only reads, as filters and queries do: it may be sent again.

        Raises:
            ServiceError: See the tree in `tailspan.errors`.
        """
        content = encode_json(body)
        reply = await self._retried(method, path, None, job_id, reads=reads, content=content)
        return self._json(method, path, reply, job_id) if reply else None

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
            except self.reply_errors as error:
                text = f"GET {path}: the reply should be {expected}, but {error}"
                raise self.protocol_error(text, job_id) from None
            except ServiceUnavailableError as error:
                if begun:
                    raise
                await retries.wait(error)

    async def authorization(self) -> Authorization:
        """Return the header of the next request, for a protocol that has the token elsewhere. See `Authorizer`."""
        return await self._credentials.authorization()

    async def open_socket(self, path: str, *, subprotocol: str = "", **options: Any) -> WebSocket:
        """Open a WebSocket. A refusal renews the credentials once.

        Args:
            path: Below the base URL, escaped.
            subprotocol: The protocol of the messages; empty: none.
            **options: Further options of `WebSocket.open`.

        Raises:
            ServiceUnavailableError: There is no connection.
            AuthError: There are no usable credentials.
        """
        try:
            # The package is not part of the SDK, and slow to import.
            from tailspan.http.websocket import WebSocket, WebSocketError
        except ImportError:
            text = f"a WebSocket to {path} needs the package websockets: pip install 'tailspan[agent]'"
            raise self._unavailable(text, None) from None
        authorization = await self._credentials.authorization()
        may_renew = True
        while True:
            await self._pace.wait()
            try:
                return await WebSocket.open(
                    f"ws{self._base_url.removeprefix('http')}{path}",
                    headers={authorization.header: authorization.value} if authorization.value else {},
                    subprotocol=subprotocol,
                    timeout_s=self.timeout_s,
                    tls=self._tls(),
                    **options,
                )
            except WebSocketError as error:
                renewed = None
                if may_renew and error.status in self._renew_on:
                    renewed = await self._credentials.renew(authorization)
                if renewed is None:
                    raise self._unavailable(f"WebSocket {self._base_url}{path}: {error}", None) from None
                authorization, may_renew = renewed, False

    @contextmanager
    def socket_errors(self, path: str) -> Iterator[None]:
        """Raise the errors of a WebSocket, and of messages with another form than expected, as ours.

        Args:
            path: Below the base URL, for messages.

        Raises:
            ServiceUnavailableError: The connection has ended, or is too slow.
            ProtocolError: A message does not match what this API sends.
        """
        from tailspan.http.websocket import WebSocketError

        try:
            yield
        except (WebSocketError, TimeoutError) as error:
            why = str(error) or f"no answer within {self.timeout_s:g} s"
            raise self._unavailable(f"WebSocket {self._base_url}{path}: {why}", None) from None
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self.protocol_error(f"WebSocket {path}: a message is not as expected", None) from None

    async def aclose(self) -> None:
        """Close the connections; a later request opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_loop == anyio.lowlevel.current_token():
            await client.aclose()

    def error_of(self, status: int, headers: Mapping[str, str], text: str, job_id: str | None) -> TailspanError | None:
        """Return the error for an answer with a meaning of its own at this service; None for the usual one.

        Args:
            status: The status code, not 2xx.
            headers: The headers by lower-case name.
            text: The request, the status and the server's own text.
            job_id: The job that the request is about.
        """
        return None

    def protocol_error(self, text: str, job_id: str | None) -> ProtocolError:
        """Return the error for a reply that does not match what this API sends."""
        hint = f"check services.{self._service}.{self.url_key} ({self._base_url})"
        return ProtocolError(f"{text}; {hint}", service=self._service, job_id=job_id)

    def _json(self, method: str, path: str, body: bytes, job_id: str | None) -> Any:
        try:
            return decode_json(_ANY_JSON, body)
        except msgspec.DecodeError:
            raise self.protocol_error(f"{method} {path}: the reply is not JSON", job_id) from None

    async def _retried(
        self,
        method: str,
        path: str,
        params: Params | None,
        job_id: str | None,
        *,
        reads: bool,
        content: bytes | None = None,
    ) -> bytes:
        retries = Retries(self.tries)
        while True:
            try:
                return await self._whole(method, path, params, job_id, content)
            except ServiceUnavailableError as error:
                if not reads and not isinstance(error.__cause__, NEVER_SENT):
                    raise
                await retries.wait(error)

    async def _whole(
        self, method: str, path: str, params: Params | None, job_id: str | None, content: bytes | None
    ) -> bytes:
        await self._pace.wait()
        try:
            # The client limits each wait; a server that sends a byte now and then never reaches that limit.
            with anyio.fail_after(2 * self.timeout_s):
                async with self._reply(method, path, params, job_id, paced=True, content=content) as response:
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
                f"{method} {path}: no complete answer within {2 * self.timeout_s:g} s", job_id
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
        content: bytes | None = None,
    ) -> AsyncIterator[Reply]:
        """Send a request and yield a successful answer; raise an error for any other. Renews credentials once."""
        if not paced:
            await self._pace.wait()
        client = self._open_client()
        authorization = await self._credentials.authorization()
        response = await self._send(client, method, path, params, job_id, authorization, also, content)
        try:
            if response.status in self._renew_on:
                renewed = await self._credentials.renew(authorization)
                if renewed is not None:
                    await response.aclose()
                    authorization = renewed
                    response = await self._send(client, method, path, params, job_id, authorization, also, content)
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
        content: bytes | None,
    ) -> Reply:
        headers = {authorization.header: authorization.value} if authorization.value else {}
        if also:
            headers["Accept"] = ", ".join(("application/json", *also))
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            return await client.send(method, path, urlencode(params or {}), headers=headers, content=content)
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
        own = self.error_of(code, response.headers, text, job_id)
        if own is not None:
            return own
        if code in (401, 403):
            hint = f"; the token came from {authorization.source}"
            if not authorization.value:
                hint = f"; none was sent: set services.{self._service}.token_file"
            return AuthError(text + hint, service=self._service, job_id=job_id)
        if 300 <= code < 400 or (code == 404 and html):
            return self.protocol_error(f"{text}: this is not the job API", job_id)
        if code == 404 and job_id is not None:
            unknown = f"service {self._service} knows no job {job_id}"
            return JobNotFoundError(f"{unknown}: {detail}" if detail else unknown, service=self._service, job_id=job_id)
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
        token = authorization.value.rpartition(" ")[2]
        return detail.replace(token, MASK) if token else detail

    def _unavailable(
        self, text: str, job_id: str | None, retry_after_s: float | None = None
    ) -> ServiceUnavailableError:
        return ServiceUnavailableError(text, retry_after_s=retry_after_s, service=self._service, job_id=job_id)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TOO_SLOW):
            what = "no connection" if isinstance(error, NEVER_SENT) else "no answer"
            return f"{what} within {self.timeout_s:g} s"
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
                key=f"services.{self._service}.{self.url_key}",
                headers=self._headers,
                timeout_s=self.timeout_s,
                tls=self._tls(),
                keep_alive_s=_KEEP_ALIVE_S,
                max_idle=_MAX_IDLE,
                server_name=self._server_name,
                streams=self._streams,
                socket=self._socket,
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


def error_text(body: bytes) -> str:
    """Return the text of an error reply, in one line; empty if it has none for people.

    Source: ``{"message": str}`` or ``{"detail": str}``; with status 422 ``detail`` is a list of findings. GraphQL has
    ``{"errors": [{"message": str}]}``.
    """
    try:
        reply = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    found = reply
    if isinstance(reply, dict):
        found = next((reply[key] for key in ("message", "detail", "error", "errors") if reply.get(key)), "")
    if isinstance(found, list):
        found = "; ".join(_finding(item) for item in found)
    # An exception's text reaches terminals unchanged, for example in a traceback.
    text = mask_and_cut(str(found), _MAX_ERROR_CHARS, "...") if isinstance(found, str | dict) else ""
    return printable(" ".join(text.split()), colours=False)


def _finding(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    place = item.get("loc")
    where = ".".join(str(part) for part in place) if isinstance(place, list) else ""
    text = str(item.get("msg") or item.get("message") or item)
    return f"{where}: {text}" if where else text


def normalise_base_url(base_url: str) -> str:
    """Return the normal form of a base URL, which is the service's identity.

    Scheme and host become lower case; credentials, default port and trailing slashes are removed.

    Raises:
        ConfigError: `base_url` is not an http or https URL, or has a query or a fragment.
    """
    try:
        parts = urlsplit(base_url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"base_url is not a valid URL: {error}", key="base_url") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise ConfigError("base_url is not a URL such as https://jobs.example.com/api", key="base_url")
    if parts.query or parts.fragment:
        raise ConfigError("base_url has a query or a fragment; use only scheme, host and path", key="base_url")
    named = host_port(host, None if port == _DEFAULT_PORTS[parts.scheme] else port)
    return f"{parts.scheme}://{named}{parts.path.rstrip('/')}"


def is_local(base_url: str) -> bool:
    """Return whether the URL's host is this machine by its text alone (RFC 6761 reserves ``.localhost``)."""
    host = urlsplit(base_url).hostname or ""
    return is_loopback(host) or host.endswith(".localhost")


def is_confidential(base_url: str) -> bool:
    """Return whether only the receiver can read what is sent there: over TLS, or on this machine."""
    return urlsplit(base_url).scheme == "https" or is_local(base_url)


def path_segment(job_id: str) -> str:
    """Return an id as one segment of a URL path, escaped.

    Raises:
        ConfigError: It has half of a surrogate pair, which no URL can have.
    """
    if job_id in (".", ".."):
        # Unescaped, clients and proxies resolve them as steps in the path.
        return job_id.replace(".", "%2E")
    try:
        return quote(job_id, safe="")
    except UnicodeEncodeError:
        raise ConfigError(f"{job_id[:60]!r} is not valid Unicode", job_id=job_id) from None


def encode_json(body: Any) -> bytes:
    """Return a value as JSON.

    Raises:
        ConfigError: A text in it has half of a surrogate pair, as an argument of a command has that is not UTF-8.
    """
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{error.object[:60]!r} is not valid Unicode") from None
