"""`HttpService`: base class of services over an HTTP API with JSON; their common options and credentials."""

from __future__ import annotations

import base64
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import anyio
import msgspec

from tailspan._net import read_secret_file
from tailspan._secrets import add_secret
from tailspan.errors import AuthError, ConfigError
from tailspan.services import JobService
from tailspan.services._http_options import LoginOptions
from tailspan.services._requests import (
    Authorization,
    Authorizer,
    ServiceRequests,
    Tls,
    is_confidential,
    make_authorization,
    normalise_base_url,
)

__all__ = [
    "HttpService",
    "Login",
    "Token",
    "drop_oldest",
    "pack_cursor",
    "parameter_value",
    "read_parameters",
    "unpack_cursor",
]


class Token(Authorizer):
    """A fixed token: from the options, a file that may change at any time, or the environment.

    The environment's token was set for this API's own tools: it is not sent in clear text, except on this machine.
    """

    def __init__(
        self,
        name: str,
        options: LoginOptions,
        *,
        variable: str = "",
        scheme: str = "Bearer",
        header: str = "Authorization",
        environ: Mapping[str, str],
    ) -> None:
        """Read nothing yet.

        Args:
            name: The name of the service, for messages.
            options: Its options.
            variable: The environment variable that holds a token; empty: none.
            scheme: The word before the token; empty: none.
            header: The header that has it.
            environ: The environment.
        """
        self._name = name
        self._options = options
        self._header_name = header
        self._variable = variable
        self._scheme = scheme
        self._environ = environ

    async def authorization(self) -> Authorization:
        """Return the header of the next request; an empty one where no token is configured.

        Raises:
            AuthError: The token cannot be read, or is no token.
        """
        options, key = self._options, f"services.{self._name}"
        if options.token is not None:
            return self._header(options.token.get_secret_value(), f"{key}.token")
        if options.token_file is not None:
            return self._header(_secret(options.token_file, f"{key}.token_file"), str(options.token_file))
        token = self._environ.get(self._variable, "") if self._variable else ""
        if token and is_confidential(options.base_url):
            return self._header(token, f"the environment variable {self._variable}")
        return Authorization("", "nowhere")

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return a token that has changed since; None without one."""
        current = await self.authorization()
        return current if current.value and current.value != refused.value else None

    def _header(self, token: str, source: str) -> Authorization:
        return make_authorization(self._scheme, token, source, service=self._name, header=self._header_name)


class Login(Authorizer):
    """User and password, sent as they are (``Basic``), or changed for a token that expires."""

    def __init__(
        self, name: str, options: LoginOptions, log_in: Callable[[str, str], Awaitable[str]] | None = None
    ) -> None:
        """Log in at the first request.

        Args:
            name: The name of the service, for messages.
            options: Its options, with ``user``.
            log_in: Returns a token for user and password; None: each request has user and password.
        """
        self._name = name
        self._options = options
        self._log_in = log_in
        self._token = ""
        self._lock = anyio.Lock()

    async def authorization(self) -> Authorization:
        """Return the header of the next request; log in if there is no token yet.

        Raises:
            AuthError: The password is missing, cannot be read, or is refused.
        """
        source = f"services.{self._name}.user"
        if self._log_in is None:
            pair = f"{self._options.user}:{self._password()}".encode()
            return make_authorization("Basic", base64.b64encode(pair).decode(), source, service=self._name)
        async with self._lock:
            if not self._token:
                self._token = await self._log_in(self._options.user or "", self._password())
            return make_authorization("Bearer", self._token, source, service=self._name)

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Log in again; None if that cannot help."""
        if self._log_in is None:
            current = await self.authorization()
            return current if current != refused else None
        async with self._lock:
            # Of many requests that were refused, the first one logs in.
            if refused.value == f"Bearer {self._token}":
                self._token = ""
        return await self.authorization()

    def _password(self) -> str:
        key = f"services.{self._name}"
        if self._options.password is not None:
            password = self._options.password.get_secret_value()
        elif self._options.password_file is not None:
            password = _secret(self._options.password_file, f"{key}.password_file")
        else:
            raise AuthError(f"{key}: user is set, and neither password nor password_file", service=self._name)
        add_secret(password)
        return password


class HttpService(JobService):
    """Base class of services over an HTTP API with JSON; a subclass has the three methods of `JobService`.

    Errors of requests are those of `tailspan.errors`. Requests are limited to ``requests_per_second``; one that only
    reads is sent again where that can help, and credentials are renewed once when they are refused.

    Attributes:
        Options: The model of the section's keys; a subclass may add keys.
        renew_on: Statuses by which the API refuses credentials.
        http: Sends requests.
        options: The section's keys.
    """

    Options: ClassVar[type[LoginOptions]] = LoginOptions
    renew_on: Sequence[int] = (401,)

    def __init__(self, name: str, options: LoginOptions, *, environ: Mapping[str, str] = os.environ) -> None:
        """Open nothing yet.

        Args:
            name: The configured name.
            options: The section's keys.
            environ: The environment.

        Raises:
            ConfigError: ``base_url`` is not a valid URL.
        """
        self.name = name
        self.options = options
        self.identity = normalise_base_url(options.base_url)
        self.http = ServiceRequests(
            name,
            self.identity,
            self.make_credentials(environ),
            timeout_s=options.timeout,
            tls=Tls(options.ca_file, options.client_cert, options.client_key),
            requests_per_second=options.requests_per_second,
            tries=_TRIES,
            renew_on=self.renew_on,
        )

    def make_credentials(self, environ: Mapping[str, str]) -> Authorizer:
        """Return the credentials: user and password as they are, else a bearer token."""
        if self.options.user is not None:
            return Login(self.name, self.options)
        return Token(self.name, self.options, environ=environ)

    @property
    def tries(self) -> int:
        """How often a request that only reads is sent before it raises its error."""
        return self.http.tries

    @tries.setter
    def tries(self, tries: int) -> None:
        self.http.tries = tries

    async def aclose(self) -> None:
        """Close the connections."""
        await self.http.aclose()


_TRIES = 3


def pack_cursor(parts: Mapping[str, Any]) -> bytes:
    """Return a cursor that consists of parts, for example one for each attempt of a task.

    Args:
        parts: Texts, numbers, lists and maps of them, by name.
    """
    return msgspec.msgpack.encode(parts)


def unpack_cursor(cursor: bytes | None, *, service: str, job_id: str) -> dict[str, Any]:
    """Return the parts of a cursor; empty for None.

    Raises:
        ConfigError: The cursor does not come from `pack_cursor`.
    """
    if cursor is None:
        return {}
    try:
        return msgspec.msgpack.decode(cursor, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{cursor[:40]!r} is not a cursor of this service", service=service, job_id=job_id) from None


def parameter_value(text: str) -> Any:
    """Return the value of a parameter of a command: JSON, or else the text itself."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def read_parameters(pairs: Iterable[str]) -> dict[str, Any]:
    """Return the parameters of a command, given as ``KEY=VALUE``; see `parameter_value`."""
    return {key: parameter_value(text) for key, _, text in (pair.partition("=") for pair in pairs)}


def drop_oldest(known: dict[Any, Any], most: int) -> None:
    """Drop what was added first from a dict with more than ``most`` entries."""
    while len(known) > most:
        del known[next(iter(known))]


def _secret(path: Path, key: str) -> str:
    try:
        return read_secret_file(path, key=key)
    except ConfigError as error:
        raise AuthError(str(error)) from None
