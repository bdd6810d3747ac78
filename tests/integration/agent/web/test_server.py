"""Health, readiness and metrics over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import httpx
import pytest
from jinja2 import TemplateNotFound

from tailspan.errors import ConfigError
from tailspan_agent.web.access import AccessControl
from tailspan_agent.web.server import StatusServer
from tailspan_agent.web.server_access import ServerAccess
from tailspan_agent.web.session import Session

T = TypeVar("T")
TOKEN = "s3cret-tökén"


async def scraped(accept: str) -> tuple[Iterator[bytes], str]:
    """Return the Accept header as metrics."""
    return iter([b"accept ", f"{accept}\n".encode()]), "text/plain; version=0.0.4; charset=utf-8"


def served(
    visit: Callable[[httpx.AsyncClient, StatusServer], Awaitable[T]],
    *,
    problems: list[str] | None = None,
    **access,
) -> T:
    """Start a server on a free port, run the visit, and stop the server."""

    async def main() -> T:
        server = StatusServer(
            ("127.0.0.1", 0),
            metrics=scraped,
            delivery=echoed,
            readiness=lambda: problems or [],
            access=ServerAccess(**access),
        )
        async with server, httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client:
            return await visit(client, server)

    return asyncio.run(main())


async def echoed(identity: str, job_id: str) -> dict[str, object]:
    """Return the query as the delivery state."""
    return {"identity": identity, "job_id": job_id}


async def no_delivery(identity: str, job_id: str) -> dict[str, object]:
    """Return the delivery state of a server without jobs."""
    return {}


def got(path: str, headers: dict[str, str] | None = None, **options) -> httpx.Response:
    """Start a server, get one path and stop the server."""
    return served(lambda client, _: client.get(path, headers=headers), **options)


def test_the_paths_for_programs_answer():
    """Probes, Prometheus and ``tailspan wait`` get an answer."""

    async def visit(client: httpx.AsyncClient, _: StatusServer) -> dict[str, httpx.Response]:
        return {path: await client.get(path) for path in ("/delivery", "/healthz", "/readyz", "/metrics", "/none")}

    responses = served(visit)
    assert {path: response.status_code for path, response in responses.items()} == {
        "/delivery": 200,
        "/healthz": 200,
        "/readyz": 200,
        "/metrics": 200,
        "/none": 404,
    }
    assert responses["/readyz"].text == "ready\n"


def test_readyz_lists_problems_by_code():
    """A probe gets 503 and an operator sees the reason; the process stays healthy."""

    async def visit(client: httpx.AsyncClient, _: StatusServer) -> tuple[httpx.Response, httpx.Response]:
        return await client.get("/readyz"), await client.get("/healthz")

    ready, health = served(visit, problems=["endpoint_logs_paused", "queue_stuck"])
    assert (ready.status_code, ready.text) == (503, "endpoint_logs_paused\nqueue_stuck\n")
    assert health.status_code == 200


def test_metrics_follow_the_accept_header():
    """The callback negotiates the content; the server passes the content type on unchanged."""
    answer = got("/metrics", {"accept": "application/openmetrics-text"})
    assert answer.text == "accept application/openmetrics-text\n"
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN}", 200),
    ],
)
@pytest.mark.parametrize("path", ["/delivery", "/metrics"])
def test_a_token_protects_everything_but_probes(path, authorization, status):
    """Without the right token there is no content, and no hint of the token."""
    headers = {} if authorization is None else {"authorization": authorization.encode()}

    async def visit(client: httpx.AsyncClient, _: StatusServer) -> httpx.Response:
        return await client.get(path, headers=headers)  # type: ignore[arg-type]

    answer = served(visit, token=TOKEN)
    assert answer.status_code == status
    assert TOKEN not in answer.text
    assert (answer.headers.get("www-authenticate") == "Bearer") is (status == 401)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_neither_token_nor_known_host(path):
    """A kubelet or a load balancer uses any host name and has no secret."""
    assert got(path, {"host": "tailspan.example.com"}, token=TOKEN).status_code == 200


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8797", True),
        ("127.0.0.1:1", True),
        ("[::1]:8797", True),
        ("10.1.2.3", True),
        ("agent.internal:8797", True),
        ("Agent.Internal.", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("agent.internal@evil.example", False),
        ("", False),
        ("[::1", False),
        ("a:b:c", False),
    ],
)
def test_only_known_names_and_addresses_are_answered(host, allowed):
    """A foreign name that resolves to this machine gets no content."""
    rejection = AccessControl(Session(None), ["agent.internal"]).reject(host, "")
    assert (rejection is None) is allowed
    if rejection:
        assert rejection.status_code == 421


def test_a_foreign_host_header_is_rejected_over_http():
    """Access control comes before every page, and its message names the key."""
    answer = got("/metrics", {"host": "evil.example"})
    assert answer.status_code == 421
    assert "agent.allowed_hosts" in answer.text
    assert got("/metrics", {"host": "evil.example"}, allowed_hosts=["evil.example"]).status_code == 200


def test_a_busy_port_is_an_error_that_names_the_key():
    """The agent reports the busy address at its start, before anything is read."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        with pytest.raises(ConfigError, match=rf"agent\.listen.*127\.0\.0\.1:{address[1]}.*in use") as caught:
            StatusServer(address, metrics=scraped, readiness=list, delivery=no_delivery)
    assert caught.value.key == "agent.listen"


@pytest.mark.parametrize(
    ("address", "reason"),
    [(("no-such-host.invalid", 0), "no such host"), (("203.0.113.1", 0), "[Cc](an't|annot) assign requested address")],
)
def test_an_address_that_is_not_ours_is_an_error(address, reason):
    """An unusable address is a configuration error with its reason, not a traceback."""
    with pytest.raises(ConfigError, match=rf"agent\.listen: cannot listen on .*: {reason}"):
        StatusServer(address, metrics=scraped, readiness=list, delivery=no_delivery)


def test_signals_are_left_to_the_agent():
    """The server installs no signal handlers: the agent drains first."""

    async def visit(client: httpx.AsyncClient, _: StatusServer) -> object:
        await client.get("/healthz")
        return signal.getsignal(signal.SIGTERM)

    # asyncio.run has its own handler for SIGINT
    assert served(visit) == signal.getsignal(signal.SIGTERM)


def test_stopping_frees_the_port_although_a_connection_is_open():
    """A kept-alive connection does not delay the end, and the next agent can listen on the port."""

    async def main() -> None:
        server = StatusServer(
            ("127.0.0.1", 0),
            metrics=scraped,
            readiness=list,
            delivery=no_delivery,
        )
        address = server.address
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client:
            async with server:
                assert (await client.get("/healthz")).status_code == 200
            async with StatusServer(address, metrics=scraped, readiness=lambda: ["new"], delivery=no_delivery):
                assert (await client.get("/readyz")).text == "new\n"

    asyncio.run(main())


def test_stopping_a_server_that_never_served_is_quick():
    """An agent that fails while starting leaves no socket behind."""

    async def main() -> tuple[str, int]:
        async with StatusServer(("127.0.0.1", 0), metrics=scraped, readiness=list, delivery=no_delivery) as server:
            return server.address

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(asyncio.run(main()))


def lack_when_the_page_loads(errors: list[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each attempt to import what answers requests fail, with the errors from the last to the first."""

    class Finder:
        """Raises the errors; afterwards it leaves the module to the other finders."""

        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> None:
            if name == "tailspan_agent.web.app" and errors:
                raise errors.pop()

    monkeypatch.delitem(sys.modules, "tailspan_agent.web.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


def test_a_request_is_answered_when_what_answers_it_can_be_loaded_again(monkeypatch, caplog):
    """As where a process has no open file left at its first request: the request waits, and the log has the reason."""
    lacks = [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")]
    lack_when_the_page_loads(lacks, monkeypatch)
    monkeypatch.setattr("tailspan_agent.web.server._RETRY_S", 0)
    assert got("/healthz").status_code == 200
    (record,) = caplog.records
    assert "can't start new thread" in record.message


def test_the_page_loads_while_the_threads_of_the_loop_wait():
    """A disk that hangs may hold all of them; a probe must get its answer."""
    released = threading.Event()

    async def visit(client: httpx.AsyncClient, _: StatusServer) -> httpx.Response:
        waiting = [asyncio.create_task(asyncio.to_thread(released.wait)) for _ in range((os.cpu_count() or 1) + 4)]
        try:
            return await client.get("/healthz")
        finally:
            released.set()
            await asyncio.gather(*waiting)

    assert served(visit).status_code == 200


@pytest.mark.parametrize("error", [ImportError("No module named 'starlette'"), TemplateNotFound("_head.html")])
def test_a_server_that_cannot_load_its_page_refuses_clients(error, monkeypatch, caplog):
    """As after an update of the packages under a running agent: the log has the reason, and the agent goes on."""
    lack_when_the_page_loads([error], monkeypatch)

    async def visit(client: httpx.AsyncClient, _: StatusServer) -> None:
        for error in (httpx.TransportError, httpx.ConnectError):
            with pytest.raises(error):
                await client.get("/healthz")

    served(visit)
    (record,) = caplog.records
    assert "Restart it" in record.message


@pytest.mark.parametrize("package", ["h11", "jinja2", "starlette", "uvicorn"])
def test_a_missing_package_is_an_error_of_the_start(package, monkeypatch):
    """Although it is loaded later: `agent check` and the demo must not find everything in order without it."""
    spec = importlib.util.find_spec("tailspan_agent.web.server")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert error.value.name == package
