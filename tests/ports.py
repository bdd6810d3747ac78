"""Ports for servers that are not there all the time: one that starts later, is restarted, or never listens.

The kernel gives ports for outgoing connections, and for servers that ask for port 0, out of its ephemeral range
(``/proc/sys/net/ipv4/ip_local_port_range``: 32768 and above; RFC 6335: 49152 and above). A port out of that range
may belong to some connection of a parallel test while its server is away; one below it is left alone.
"""

from __future__ import annotations

import itertools
import random
import socket

_FIRST, _END = 12_000, 32_000

_candidates = itertools.count(random.SystemRandom().randrange(_END - _FIRST))


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nothing listens, and that this process was not given before."""
    while True:
        port = _FIRST + next(_candidates) % (_END - _FIRST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
