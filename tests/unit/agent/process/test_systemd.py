"""Notifications to systemd."""

import asyncio
import contextlib
import os
import socket
import sys
import tempfile

import pytest

from tailspan_agent.process.systemd import keep_watchdog, notify, watchdog_interval_s


def test_a_state_arrives_at_the_socket():
    """The datagram is the state itself."""
    # tmp_path can be longer than the address of a socket
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        path = f"{directory}/notify"
        end.bind(path)
        assert notify("READY=1", {"NOTIFY_SOCKET": path})
        assert end.recv(100) == b"READY=1"


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_an_abstract_socket_is_reached():
    """A path that starts with @ is a name without a file."""
    name = f"tailspan-test-{os.getpid()}-{os.urandom(4).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0{name}")
        assert notify("WATCHDOG=1", {"NOTIFY_SOCKET": f"@{name}"})
        assert end.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("path", ["", "relative", "/nonexistent/socket", "/" + "x" * 300])
def test_without_systemd_nothing_happens(path):
    """An agent in a terminal has no socket to notify, which is not an error."""
    assert not notify("READY=1", {"NOTIFY_SOCKET": path})


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_notified_twice_per_deadline(environ, seconds):
    """Half of the deadline leaves time for a slow turn; the watchdog of another process does not count."""
    assert watchdog_interval_s(environ, pid=7) == seconds


def test_the_watchdog_is_notified_while_the_loop_turns():
    """Notifications repeat, and stop when the agent stops."""

    async def main(directory: str) -> list[bytes]:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.bind(f"{directory}/notify")
            end.setblocking(False)
            environ = {"NOTIFY_SOCKET": f"{directory}/notify", "WATCHDOG_USEC": "2000"}
            with keep_watchdog(environ):
                received = [await loop.sock_recv(end, 100) for _ in range(3)]
            with contextlib.suppress(BlockingIOError):
                while end.recv(100):
                    pass
            # five times the interval: long enough for a notification that must not come
            await asyncio.sleep(0.005)
            with pytest.raises(BlockingIOError):
                end.recv(100)
            return received

    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        assert asyncio.run(main(directory)) == [b"WATCHDOG=1"] * 3


def test_without_a_watchdog_no_loop_is_needed():
    """Nothing is set up where systemd runs no watchdog."""
    with keep_watchdog({}):
        pass
