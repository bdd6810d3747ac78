"""Who listens on a port of this machine: asked of the kernel, or read where it may not be asked."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tailspan import _listeners
from tailspan._listeners import listening_users

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux says who listens on a port")


@pytest.fixture(params=["asked", "no netlink", "refused", "no answer"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system answer, or not, as minimal kernels and sandboxes do."""
    if request.param == "no netlink":
        monkeypatch.delattr(socket, "AF_NETLINK")
    elif request.param == "refused":
        monkeypatch.setattr(_listeners, "_SOCK_DIAG_BY_FAMILY", 9999)
    elif request.param == "no answer":
        monkeypatch.setattr(_listeners, "_SOCK_DIAG", 31)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_only_a_listening_socket_has_a_user(family: socket.AddressFamily, address: str) -> None:
    """Neither a port that is only bound, nor the ports of connections; nor a port after its socket is closed."""
    with socket.socket(family) as server, socket.socket(family) as client:
        try:
            server.bind((address, 0))
        except OSError:
            pytest.skip(f"no {address} on this machine")
        port = server.getsockname()[1]
        assert listening_users(port) == set()
        server.listen()
        client.connect((address, port))
        assert listening_users(port) == {os.geteuid()}
        assert listening_users(client.getsockname()[1]) == set()
    assert listening_users(port) == set()


@pytest.mark.usefixtures("way")
def test_more_sockets_than_one_answer_has() -> None:
    """Hundreds of listening sockets come in several messages: each is found."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(700)]
    try:
        assert all(listening_users(server.getsockname()[1]) == {os.geteuid()} for server in servers[::70])
    finally:
        for server in servers:
            server.close()
