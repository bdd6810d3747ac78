"""A TCP proxy that can be cut: connections stay open and nothing passes, as when a network drops packets."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Self

from tests.ports import free_port

_CHUNK_BYTES = 1 << 16


class TcpProxy:
    """Passes connections on to a Unix socket.

    Args:
        target: The Unix socket.

    Attributes:
        port: The port of 127.0.0.1 that it listens on.
    """

    def __init__(self, target: Path) -> None:
        self.port = free_port()
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._closed = False

    def cut(self) -> None:
        """Let nothing pass from now on."""
        self._open.clear()

    def heal(self) -> None:
        """Close what hung, and let new connections pass."""
        self._close_all()
        self._open.set()

    def __enter__(self) -> Self:
        """Start to accept."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self._closed = True
        self._listener.close()
        self._open.set()
        self._close_all()

    def _close_all(self) -> None:
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._target))
            except OSError:
                continue
            self._sockets |= {client, server}
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(_CHUNK_BYTES):
                self._open.wait()
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
