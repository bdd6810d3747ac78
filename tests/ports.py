"""Ports for servers that are not there all the time: one that starts later, is restarted, or never listens.

The kernel gives ports for outgoing connections, and for servers that ask for port 0, out of its ephemeral range
(``/proc/sys/net/ipv4/ip_local_port_range``: by default 32768 and above; RFC 6335: 49152 and above). A port out of that
range may belong to some connection of a parallel test while its server is away.
"""

from __future__ import annotations

import errno
import random
import socket

_FIRST, _END = 12_000, 32_000

_random = random.SystemRandom()  # processes that were forked from one, too, take different ports


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 below the ephemeral range that is free at the moment."""
    while True:
        port = _random.randrange(_FIRST, _END)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
