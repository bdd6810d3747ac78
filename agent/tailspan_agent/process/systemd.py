"""Notifications to systemd without its library: one datagram per message.

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
        state: Assignments, one per line.
        environ: Where to find ``NOTIFY_SOCKET``.

    Returns:
        True if systemd was notified. False without systemd, which is not an error.
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
    """Return the interval of ``WATCHDOG=1`` in seconds; None without a watchdog.

    It is half of the time that systemd allows.

    Args:
        environ: Where to find ``WATCHDOG_USEC`` and ``WATCHDOG_PID``.
        pid: The id of the process that notifies; None means this one.
    """
    usec = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID") or str(os.getpid() if pid is None else pid)
    if not usec.isdecimal() or int(usec) == 0 or watched != str(os.getpid() if pid is None else pid):
        return None
    return int(usec) / 2e6


@contextlib.contextmanager
def keep_watchdog(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Send ``WATCHDOG=1`` from the running event loop, so that systemd restarts a hung agent.

    Args:
        environ: See `watchdog_interval_s` and `notify`. Without a watchdog nothing is sent.
    """
    interval_s = watchdog_interval_s(environ)
    if interval_s is None:
        yield
        return

    async def send_regularly() -> None:
        while True:
            notify("WATCHDOG=1", environ)
            await asyncio.sleep(interval_s)

    sending = asyncio.create_task(send_regularly(), name="systemd watchdog")
    try:
        yield
    finally:
        sending.cancel()
