"""What the supervisor does when its runner ends, at whatever moment the signal of that comes."""

from __future__ import annotations

import os
import socket

import pytest

from tailspan.local import supervisor


def test_the_end_of_the_runner_may_be_noticed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGIO calls the handler within itself, before or after the inner call has closed the descriptor: no error."""
    ours, runners = socket.socketpair()
    watched = object.__new__(supervisor._Supervisor)
    watched._status_fd, watched._streams = ours.detach(), {}
    runners.close()
    read, calls = os.read, []

    def read_and_interrupt(fd: int, size: int) -> bytes:
        found = read(fd, size)
        calls.append(found)
        if len(calls) == 1:
            watched._on_command()
        return found

    monkeypatch.setattr(supervisor.os, "read", read_and_interrupt)
    watched._on_command()
    assert (calls, watched._status_fd) == ([b"", b""], -1)
