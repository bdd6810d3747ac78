"""Sessions: the token, the cookie that a browser gets for it, and forms that only our page can send."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.responses import Response

__all__ = ["COOKIE", "Session", "local_path"]

COOKIE = "tailspan_session"


class Session:
    """The sessions of one token: its cookies and forms end with it and with the process. No browser stores the token.

    Args:
        token: The required token; None requires none.
        owner: Identifies this agent on its machine, because browsers share cookies between the ports of a host.
        public_url: The URL of a proxy in front of the server.
    """

    def __init__(self, token: str | None, owner: str = "", public_url: str | None = None) -> None:
        self._token = token.encode() if token else None
        self._owner = owner
        self._key = secrets.token_bytes(32)
        self.public_url = public_url

    def change_token(self, token: str | None) -> bool:
        """Take the token's current value; if it has changed, all sessions end and the result is True."""
        new = token.encode() if token else None
        if hmac.compare_digest(new or b"", self._token or b""):
            return False
        self._token, self._key = new, secrets.token_bytes(32)
        return True

    @property
    def needs_tls(self) -> bool:
        """Whether browsers may send the cookie over TLS only: a proxy in front of the server speaks it."""
        return self.public_url is not None and self.public_url.startswith("https:")

    @property
    def root(self) -> str:
        """The path below which a proxy has the page, without a slash at the end: empty at the top of its host."""
        return urlsplit(self.public_url or "").path.rstrip("/")

    @property
    def needs_token(self) -> bool:
        """Whether a token is required."""
        return self._token is not None

    @property
    def cookie_name(self) -> str:
        """The name of the session cookie."""
        return f"{COOKIE}_{self._owner}" if self._owner else COOKIE

    @property
    def cookie(self) -> str:
        """The value of the session cookie."""
        return self._sign("session")

    @property
    def form_token(self) -> str:
        """The secret field of our forms, which no other site knows."""
        return self._sign("form")

    def open(self, response: Response) -> None:
        """Add the session cookie to a response."""
        response.set_cookie(
            self.cookie_name,
            self.cookie,
            httponly=True,
            samesite="strict",
            secure=self.needs_tls,
            path=self.root or "/",
        )

    def knows_token(self, given: str) -> bool:
        """Return whether this is the token, in constant time."""
        return self._token is not None and hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)

    def knows_cookie(self, given: str) -> bool:
        """Return whether this is the session cookie, in constant time."""
        return _same(given, self.cookie)

    def sent_by_us(self, headers: Mapping[str, str], form_token: str) -> bool:
        """Return whether our own page sent a form, and not another site in the same browser.

        Args:
            headers: The request's headers, by their names in lower case.
            form_token: The form's secret field.
        """
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        if origin is not None:
            ours = {headers.get("host", "").lower(), urlsplit(self.public_url or "").netloc.lower()}
            if urlsplit(origin).netloc.lower() not in ours - {""}:
                return False
        return _same(form_token, self.form_token)

    def _sign(self, purpose: str) -> str:
        return hmac.new(self._key, purpose.encode(), hashlib.sha256).hexdigest()


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), right.encode())


def local_path(target: str) -> str:
    """Return a target after the login: a path of this server, or ``/`` if the target leads elsewhere."""
    plain = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if plain else "/"
