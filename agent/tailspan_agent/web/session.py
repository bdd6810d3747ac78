"""Sessions: the token, the cookie that a browser gets for it, and forms that only our page can send."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

__all__ = ["COOKIE", "Session", "local_path"]

COOKIE = "tailspan_session"


class Session:
    """One session key per process: its cookies and forms end with it. The token is never stored in a browser.

    Args:
        token: The required token; None requires none.
        owner: Identifies this agent on its machine, because browsers share cookies between the ports of a host.
    """

    def __init__(self, token: str | None, owner: str = "") -> None:
        self._token = token.encode() if token else None
        self._owner = owner
        self._key = secrets.token_bytes(32)

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
        if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
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
