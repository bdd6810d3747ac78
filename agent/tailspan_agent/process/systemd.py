"""Tells systemd how the agent fares, without its library: one datagram per message.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Mapping

__all__ = ["keep_watchdog", "notify", "watchdog_interval_s"]


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send a state such as ``READY=1``, ``WATCHDOG=1`` or ``STOPPING=1``.

    Args:
        state: Assignments, one a line.
        environ: Where ``NOTIFY_SOCKET`` is looked up.

    Returns:
        Whether systemd was told; without it there is nobody to tell, which is no error.
    """
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(path.replace("@", "\0", 1) if path.startswith("@") else path)
            channel.sendall(state.encode())
    except OSError:
        return False
    return True


def watchdog_interval_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """Return how often to send ``WATCHDOG=1``, in seconds: half of what systemd allows; None where it does not watch.

    Args:
        environ: Where ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are looked up.
        pid: The process that asks; None: this one.
    """
    usec = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID") or str(os.getpid() if pid is None else pid)
    if not usec.isdecimal() or int(usec) == 0 or watched != str(os.getpid() if pid is None else pid):
        return None
    return int(usec) / 2e6


@contextlib.contextmanager
def keep_watchdog(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Send ``WATCHDOG=1`` from the running event loop: an agent whose loop hangs is restarted by systemd.

    Args:
        environ: As `watchdog_interval_s` and `notify` read it; nothing is sent where systemd does not watch.
    """
    interval_s = watchdog_interval_s(environ)
    if interval_s is None:
        yield
        return

    async def feed() -> None:
        while True:
            notify("WATCHDOG=1", environ)
            await asyncio.sleep(interval_s)

    feeding = asyncio.create_task(feed(), name="systemd watchdog")
    try:
        yield
    finally:
        feeding.cancel()
