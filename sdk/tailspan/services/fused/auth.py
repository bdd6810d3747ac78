"""The ``Authorization`` header of the Fused API: its sources and its renewal. No message contains a token.

Sources, in this order: the service's own options, the environment, and the login of the official client in
``~/.fused/credentials``, the only one that expires by itself. The options belong to their service. The other two belong
to the public Fused server (the login: to the server that it names), and no other server gets them.

Source: ``fused`` 2.9.5, ``_auth.py`` and ``_options.py``.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import msgspec

from tailspan._net import default_tls, read_secret_file
from tailspan._own_token import read_own_token
from tailspan._secrets import MASK, add_secret
from tailspan.config.units import serve_token_file
from tailspan.errors import AuthError, ConfigError, ServiceUnavailableError
from tailspan.http.client import BROKEN, HttpClient
from tailspan.services._requests import Authorization, error_text, is_confidential, is_local, make_authorization
from tailspan.services.fused.wire import DEFAULT_BASE_URL

__all__ = ["DEFAULT_SCHEME", "Authorization", "Credentials"]

DEFAULT_SCHEME = "Fused-Env-Bearer"

_ENV_SCHEMES = ("Fused-Rtenv-Bearer", "Fused-Env-Bearer", "Fused-Service-Token")
_LOGIN_FILE = "~/.fused/credentials"
_OAUTH_URL = "https://dev-tjcykxcetrz6bps6.us.auth0.com/oauth/token"
_OAUTH_CLIENT_ID = "OK8Yjyl2vJoJP4QNescjImHNkdMK8f2k"
_OAUTH_TIMEOUT_S = 5.0
_MAX_OAUTH_BYTES = 1 << 20
# A token that expires while the request is on its way is refused.
_LEEWAY = timedelta(seconds=30)


class Credentials:
    """The credentials of one configured service. Sources are read at each request."""

    def __init__(
        self,
        service: str,
        base_url: str,
        *,
        token: str | None = None,
        token_file: Path | None = None,
        scheme: str = DEFAULT_SCHEME,
        login_file: Path | None = None,
        oauth_url: str = _OAUTH_URL,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Configure the sources.

        Args:
            service: Name of the configured service, for messages.
            base_url: Where the header is sent; on loopback none is needed, and a `tailspan serve` of the same user gets
                the token that it has made. The environment's token and the login are
                sent to `DEFAULT_BASE_URL`'s server only, or to the server that the login names as ``base_url``.
            token: A fixed token.
            token_file: A file with a token, which may change at any time.
            scheme: The word before ``token`` or the content of ``token_file``.
            login_file: The official client's login; None: its usual place.
            oauth_url: Where a login is renewed.
            environ: The environment variables.
        """
        self._service = service
        self._base_url = base_url
        self._is_default_server = _same_server(base_url, DEFAULT_BASE_URL)
        # The port of a server on this machine.
        self._local_port = _server(base_url)[2] if is_local(base_url) else None
        self._token = token
        self._token_file = token_file
        self._scheme = scheme
        self._login_file = login_file or Path(_LOGIN_FILE)
        self._oauth_url = oauth_url
        self._environ = environ
        # A renewed login whose file could not be written, and the content of the file that it should replace.
        self._unsaved: tuple[bytes, dict[str, Any]] | None = None
        self._renewing = anyio.Lock()

    async def authorization(self) -> Authorization:
        """Return the header of the next request; renew an expired login first.

        Raises:
            AuthError: There are no credentials, or they are not usable.
            ServiceUnavailableError: The login could not be renewed now.
        """
        if self._token is not None:
            return self._with_scheme(self._scheme, self._token, f"services.{self._service}.token")
        if self._token_file is not None:
            return self._from_file(self._token_file)
        scheme = self._environ.get("FUSED_AUTH_TOKEN_TYPE", "")
        token = self._environ.get("FUSED_AUTH_TOKEN", "")
        if token and scheme in _ENV_SCHEMES and self._is_default_server:
            return self._with_scheme(scheme, token, "the environment variable FUSED_AUTH_TOKEN")
        login = self._read_login()
        if login is not None:
            if _expired(login):
                login = await self._renew_login(refused=None)
            return self._from_login(login)
        if self._local_port is not None:
            own = read_own_token(serve_token_file(), self._local_port)
            return self._with_scheme("Bearer", own, "tailspan serve") if own else Authorization("", "nowhere")
        raise AuthError(self._nothing_found(token, scheme), service=self._service)

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return other credentials than the refused ones; None if there are none.

        Raises:
            AuthError: The login is no longer valid.
            ServiceUnavailableError: The login could not be renewed now.
        """
        current = await self.authorization()
        if current.value != refused.value:
            return current
        login = self._read_login()
        if login is None or self._from_login(login) != refused:
            return None
        return self._from_login(await self._renew_login(refused=refused))

    def _from_file(self, path: Path) -> Authorization:
        try:
            token = read_secret_file(path.expanduser(), key=f"services.{self._service}.token_file")
        except ConfigError as error:
            raise AuthError(str(error), service=self._service) from None
        return self._with_scheme(self._scheme, token, f"the file {path}")

    def _with_scheme(self, scheme: str, token: str, source: str) -> Authorization:
        return make_authorization(scheme, token, source, service=self._service)

    def _from_login(self, login: Mapping[str, Any]) -> Authorization:
        scheme = login.get("auth_scheme") or "Bearer"
        return self._with_scheme(str(scheme), login["access_token"], f"the file {self._login_file}")

    def _nothing_found(self, env_token: str, env_scheme: str) -> str:
        text = (
            f"there are no credentials for service {self._service} ({self._base_url}): set "
            f"services.{self._service}.token_file (or token)"
        )
        if not self._is_default_server:
            return f"{text}; FUSED_AUTH_TOKEN and the login in {self._login_file} are for another server"
        text += (
            f", or FUSED_AUTH_TOKEN with FUSED_AUTH_TOKEN_TYPE, or log in with the fused client ({self._login_file})"
        )
        if env_token:
            known = ", ".join(_ENV_SCHEMES)
            text += f"; FUSED_AUTH_TOKEN is set, but FUSED_AUTH_TOKEN_TYPE is {env_scheme!r}: expected one of {known}"
        return text

    def _login_bytes(self) -> bytes | None:
        try:
            return self._login_file.expanduser().read_bytes()
        except (OSError, RuntimeError):
            # RuntimeError: there is no home directory, so there is no login.
            return None

    def _read_login(self) -> dict[str, Any] | None:
        content = self._login_bytes()
        if content is None:
            return None
        if self._unsaved is not None and self._unsaved[0] == content:
            return self._unsaved[1]
        try:
            login = msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if not isinstance(login, dict) or not isinstance(login.get("access_token"), str):
            return None
        return login if _same_server(self._base_url, login.get("base_url", DEFAULT_BASE_URL)) else None

    async def _renew_login(self, *, refused: Authorization | None) -> dict[str, Any]:
        # One at a time: with rotating refresh tokens the second would invalidate the first.
        async with self._renewing:
            login = self._read_login()
            if login is not None and not _expired(login) and self._from_login(login) != refused:
                return login
            if login is None or not isinstance(login.get("refresh_token"), str):
                raise self._login_is_over("it has no refresh_token")
            content = self._login_bytes() or b""
            renewed = {**login, **await self._ask_for_token(login["refresh_token"]), "auth_scheme": "Bearer"}
            self._save_login(content, renewed)
            return renewed

    async def _ask_for_token(self, refresh_token: str) -> dict[str, Any]:
        add_secret(refresh_token)
        asked = {"client_id": _OAUTH_CLIENT_ID, "grant_type": "refresh_token", "refresh_token": refresh_token}
        # Not the job API's client, which may trust a private authority only.
        client = HttpClient(
            self._oauth_url,
            key=f"services.{self._service}.oauth_url",
            headers={"Content-Type": "application/json"},
            timeout_s=_OAUTH_TIMEOUT_S,
            tls=default_tls() if self._oauth_url.startswith("https:") else None,
            keep_alive_s=0.0,
            max_idle=0,
        )
        try:
            reply, body = await client.fetch("POST", content=msgspec.json.encode(asked), max_bytes=_MAX_OAUTH_BYTES)
        except (*BROKEN, zlib.error) as error:
            raise ServiceUnavailableError(
                f"the login in {self._login_file} has expired and {self._oauth_url} cannot be reached to renew it: "
                f"{type(error).__name__}",
                service=self._service,
            ) from None
        finally:
            await client.aclose()
        if reply.status == 429 or reply.status >= 500:
            raise ServiceUnavailableError(
                f"the login in {self._login_file} has expired and {self._oauth_url} cannot renew it now "
                f"({reply.status})",
                service=self._service,
            )
        try:
            granted: Any = msgspec.json.decode(body) if reply.is_success else None
            token, lifetime_s = granted["access_token"], float(granted["expires_in"])
        except (ValueError, KeyError, TypeError, RecursionError):
            text = error_text(body) or f"status {reply.status}"
            raise self._login_is_over(text.replace(refresh_token, MASK)) from None
        if not isinstance(token, str):
            raise self._login_is_over("the reply has no token")
        expires_at = datetime.now(UTC) + timedelta(seconds=lifetime_s - 1)
        return {**granted, "expires_at": expires_at.isoformat()}

    def _login_is_over(self, why: str) -> AuthError:
        return AuthError(
            f"the login in {self._login_file} has expired and was not renewed ({why}): log in again with the fused "
            f"client, or set services.{self._service}.token_file",
            service=self._service,
        )

    def _save_login(self, replaced: bytes, login: dict[str, Any]) -> None:
        """Replace the file in one step: another reader sees the old login or the new one."""
        path = self._login_file.expanduser()
        try:
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with mode 0600
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(msgspec.json.encode(login))
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError:
            self._unsaved = (replaced, login)


def _same_server(base_url: str, named: object) -> bool:
    """Return whether two URLs name one server, over TLS or on this machine: a token is not for any other."""
    if not isinstance(named, str):
        return False
    try:
        ours, theirs = (_server(url) for url in (base_url, named))
    except ValueError:
        return False
    return ours == theirs and is_confidential(base_url)


def _server(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)


def _expired(login: Mapping[str, Any]) -> bool:
    try:
        expires_at = msgspec.convert(login.get("expires_at"), datetime)
    except msgspec.ValidationError:
        return False
    if expires_at.tzinfo is None:
        expires_at = expires_at.replace(tzinfo=UTC)
    return expires_at < datetime.now(UTC) + _LEEWAY
