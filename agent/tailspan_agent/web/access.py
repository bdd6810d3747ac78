"""Access control: which requests the server answers.

With a token configured, protected endpoints require it. Every endpoint of the page checks the Host header, so that a
web site whose name resolves to 127.0.0.1 (DNS rebinding) cannot read anything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from tailspan_agent.web.session import Session, local_path

__all__ = ["AccessControl", "Endpoint"]

Endpoint = Callable[[Request], Awaitable[Response]]
"""A function that answers a request."""


class AccessControl:
    """Decides whether a request is answered.

    Args:
        session: Knows the token, and the cookie of browsers that have sent it.
        hosts: Accepted names of this server, besides ``localhost`` and any IP address.
        login: Returns the redirect to the login for a browser; None answers the request as any program's.
    """

    def __init__(
        self, session: Session, hosts: Collection[str], login: Callable[[Request], Response | None] = lambda _: None
    ) -> None:
        self._session = session
        self.change_hosts(hosts)
        self._login = login

    def change_hosts(self, hosts: Collection[str]) -> None:
        """Accept these names of this server, besides ``localhost`` and any IP address, and no others."""
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    def reject_unknown_host(self, host: str) -> Response | None:
        """Return a 421 response if the Host header does not name this server; otherwise None."""
        if self._is_known(host):
            return None
        return PlainTextResponse("this host name is not in agent.allowed_hosts\n", 421)

    def reject(self, host: str, authorization: str, cookie: str = "") -> Response | None:
        """Return the response to a request without access, from its headers and our cookie; otherwise None."""
        unknown_host = self.reject_unknown_host(host)
        if unknown_host is not None or not self._session.needs_token or self._session.knows_cookie(cookie):
            return unknown_host
        scheme, _, given = authorization.partition(" ")
        # Headers are bytes: a token that is not ASCII arrives as UTF-8.
        if scheme.lower() == "bearer" and self._session.knows_token(given.encode("latin-1").decode("utf-8", "replace")):
            return None
        return PlainTextResponse(
            "this needs the header Authorization: Bearer TOKEN\n", 401, {"www-authenticate": "Bearer"}
        )

    def require_token(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that requires a known host, and the token if one is configured."""

        async def protected(request: Request) -> Response:
            headers, cookie = request.headers, request.cookies.get(self._session.cookie_name, "")
            rejection = self.reject(headers.get("host", ""), headers.get("authorization", ""), cookie)
            if rejection is None and "token" not in request.query_params:
                return await endpoint(request)
            if rejection is None or rejection.status_code == 401:
                entered = self._enter(request)
                if entered is not None:
                    return entered
            if rejection is None:
                return await endpoint(request)
            return (self._login(request) if rejection.status_code == 401 else None) or rejection

        return protected

    def require_known_host(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that requires a known host, but no token."""

        async def protected(request: Request) -> Response:
            return self.reject_unknown_host(request.headers.get("host", "")) or await endpoint(request)

        return protected

    def _enter(self, request: Request) -> Response | None:
        """Return the answer to a link that has the token: a session, and the same address without the token."""
        query = request.query_params
        if request.method != "GET" or not self._session.knows_token(query.get("token", "")):
            return None
        rest = urlencode([(name, value) for name, value in query.multi_items() if name != "token"])
        path = local_path(request.url.path + (f"?{rest}" if rest else ""))
        response = RedirectResponse(self._session.root + path, 303)
        self._session.open(response)
        return response

    def _is_known(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        # rebinding needs a name that resolves to this host; an IP address cannot be rebound
        return True
