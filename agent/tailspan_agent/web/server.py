"""The agent's own HTTP server on ``agent.listen``, which loads what answers requests with the first of them.

Most agents are never asked for their page: until then they need neither its 70 ms of CPU nor its 6 MiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import importlib.util
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlencode

from tailspan._net import host_port
from tailspan.errors import ConfigError
from tailspan_agent.tasks import cancelled
from tailspan_agent.web.agent_view import AgentView
from tailspan_agent.web.server_access import ServerAccess

if TYPE_CHECKING:
    from tailspan_agent.web.app import StatusApp

__all__ = ["StatusServer"]

_BACKLOG = 16  # as in `tailspan.http.server_limits`, which sets it again
_OPEN = ServerAccess()
_OWN_MODE = 0o177
_RETRY_S = 1.0
_SHORTAGES = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_NEEDED = ("h11", "jinja2", "starlette", "uvicorn")

_log = logging.getLogger(__name__)

# The lack of a package that answers requests is an error of this import, for each command that needs the agent.
for _package in _NEEDED:
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


class StatusServer:
    """Serves in the event loop that starts it, until it is stopped; handles no signals.

    Args:
        address: Host and port to listen on; port 0 means any free port. Or the path of a Unix socket.
        metrics: Returns the Prometheus text in pieces and its content type for an Accept header.
        readiness: Returns codes of what keeps the agent from relaying, without anything private; empty if ready.
        delivery: Returns the delivery state of a job's lines as plain values, for a service's identity and a job's id.
        view: The data for the page; None serves no page.
        access: Who may use what.

    Raises:
        ConfigError: The server cannot listen on the address.
    """

    def __init__(
        self,
        address: tuple[str, int] | Path,
        *,
        metrics: Callable[[str], Awaitable[tuple[Iterator[bytes], str]]],
        readiness: Callable[[], Sequence[str]],
        delivery: Callable[[str, str], Awaitable[Mapping[str, object]]],
        view: AgentView | None = None,
        access: ServerAccess = _OPEN,
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._delivery = delivery
        self._view = view
        self._access = access
        self._path = address if isinstance(address, Path) else None
        self._own_names = [] if isinstance(address, Path) else [address[0]]
        self._socket = _listen_on_path(address) if isinstance(address, Path) else _listen(*address)
        self._app: StatusApp | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that the server listens on; no valid ones on a Unix socket."""
        if self._path is not None:
            return "localhost", 0
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return f"unix:{self._path}" if self._path is not None else f"http://{host_port(*self.address)}"

    @property
    def page_url(self) -> str | None:
        """The page's URL without a token; None on a Unix socket that no proxy publishes."""
        return self._access.public_url or (self.url if self._path is None else None)

    @property
    def link(self) -> str:
        """The page's URL; with the token if the agent has made it, because no other file of the user has it."""
        url = (self._access.public_url or self.url).rstrip("/")
        own = self._access.page_token if self._access.token is None else None
        return f"{url}/?{urlencode({'token': own})}" if own else url

    def change_access(self, access: ServerAccess) -> None:
        """Apply changed access; if the token has changed, all sessions and live updates end.

        Args:
            access: The access from now on.
        """
        self._access = access
        if self._app is not None:
            self._app.change_access(access)

    async def __aenter__(self) -> Self:
        """Start to answer. Connections wait in the socket's queue since the constructor."""
        self._serving = asyncio.create_task(self._serve(), name="status server")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop: close idle connections at once, and give running responses one second."""
        if self._serving is not None:
            if self._app is None:
                await cancelled(self._serving)
            else:
                self._app.stop()
                await self._serving
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _serve(self) -> None:
        await _first_connection(self._socket)
        try:
            self._app = await self._load_app_when_possible()
        except Exception:
            # A client must not wait for an answer that never comes.
            _log.exception("nothing can be served; were packages updated since the agent started? Restart it")
            self._socket.close()
            return
        await self._app.serve(self._socket)

    async def _load_app_when_possible(self) -> StatusApp:
        """Load what answers requests; try again while the process has no open file, memory or thread left for it."""
        logged = False
        while True:
            try:
                return await self._load_app()
            except (OSError, MemoryError, RuntimeError) as error:
                if not _is_shortage(error):
                    raise
                if not logged:
                    _log.warning("requests wait: what answers them cannot be loaded yet, retrying: %r", error)
                logged = True
                await asyncio.sleep(_RETRY_S)

    async def _load_app(self) -> StatusApp:
        # In a thread: it takes a tenth of a second, and lines are relayed meanwhile. In one of its own: the loop's
        # threads may all wait for a slow disk, and probes need an answer then.
        from concurrent.futures import ThreadPoolExecutor

        thread = ThreadPoolExecutor(1, thread_name_prefix="page")
        try:
            name = "tailspan_agent.web.app"
            await asyncio.get_running_loop().run_in_executor(thread, importlib.import_module, name)
        finally:
            thread.shutdown(wait=False)
        from tailspan_agent.web.app import StatusApp

        return StatusApp(
            metrics=self._metrics,
            readiness=self._readiness,
            delivery=self._delivery,
            view=self._view,
            access=self._access,
            own_names=self._own_names,
        )


def _is_shortage(error: OSError | MemoryError | RuntimeError) -> bool:
    """Return whether an error may pass; that of a missing template, for example, is an OSError that does not."""
    if isinstance(error, OSError):
        return error.errno in _SHORTAGES
    return isinstance(error, MemoryError) or "new thread" in str(error)


async def _first_connection(listener: socket.socket) -> None:
    loop, connected = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, connected.set)
    try:
        await connected.wait()
    finally:
        loop.remove_reader(listener)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
    except OSError as error:
        # resolver errors have their own negative numbers
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such host"
        hint = "; is another agent running?" if "in use" in reason else ""
        raise ConfigError(
            f"agent.listen: cannot listen on {host}:{port}: {reason}{hint}", key="agent.listen"
        ) from error


def _listen_on_path(path: Path) -> socket.socket:
    """Return a Unix socket that only this user can connect to; it replaces one that no process listens on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode) and not _is_used(path):
                path.unlink()
        # The mode of the socket decides who may connect, and it must never be another one.
        before = os.umask(_OWN_MODE)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        hint = "; is another agent running?" if "in use" in reason else ""
        raise ConfigError(f"agent.listen: cannot listen on {path}: {reason}{hint}", key="agent.listen") from error
    return listener


def _is_used(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True
