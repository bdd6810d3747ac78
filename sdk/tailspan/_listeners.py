"""Which users listen on a TCP port of this machine."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["listening_users"]

# Linux, sock_diag(7): `struct nlmsghdr`, then `struct inet_diag_req_v2` with an empty socket ID, or as the answer
# `struct inet_diag_msg`: we read its local port and its user.
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")
_PORT, _USER = struct.Struct(">H"), struct.Struct("=I")
_PORT_AT, _USER_AT = _HEADER.size + 4, _HEADER.size + 64
_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _DUMP = 4, 20, 0x301
_ERROR, _DONE = 2, 3
_LISTENING = 10
_ANSWER_BYTES = 1 << 16
_WAIT_S = 5.0
# IPv4 and IPv6: "sl local_address rem_address st tx:rx tr:tm retrnsmt uid ...", with hexadecimal ports and states.
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def listening_users(port: int) -> set[int]:
    """Return the IDs of the users that listen on a port, in our network namespace; empty if the system does not say.

    Args:
        port: The TCP port.
    """
    try:
        found = list(_asked())
    except (OSError, AttributeError, struct.error):
        # The kernel has no sock_diag, the process may not use netlink, or this is not Linux.
        found = list(_read())
    return {user for listening, user in found if listening == port}


def _asked() -> Iterator[tuple[int, int]]:
    """Yield port and user of each listening socket, as the kernel answers: its time does not grow with connections."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as kernel:
        kernel.settimeout(_WAIT_S)
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _LISTENING)
            kernel.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 0, 0) + request)
            yield from _answers(kernel)


def _answers(kernel: socket.socket) -> Iterator[tuple[int, int]]:
    while True:
        answer, at = kernel.recv(_ANSWER_BYTES), 0
        while at < len(answer):
            length, kind, *_ = _HEADER.unpack_from(answer, at)
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError("the kernel does not say who listens")
            yield *_PORT.unpack_from(answer, at + _PORT_AT), *_USER.unpack_from(answer, at + _USER_AT)
            at += length + 3 & ~3


def _read() -> Iterator[tuple[int, int]]:
    """Yield port and user of each listening socket, from tables that have the connections too."""
    for name in _TABLES:
        try:
            rows = Path(name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if int(fields[3], 16) == _LISTENING:
                yield int(fields[1].rpartition(":")[2], 16), int(fields[7])
