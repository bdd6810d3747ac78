"""A signal that arrives while the agent starts is handled, and never ends it as a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prove.world import TAILSPAN

HOLDING = """
import os, signal
from tailspan_agent.process.signals import hold_signals
got = []
with hold_signals() as release:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(os.getpid(), number)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, frame: got.append(number))
    assert got == []
    release()
    assert sorted(got) == [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
os.kill(os.getpid(), signal.SIGHUP)
assert len(got) == 4
"""

DROPPED = """
import os, signal
from tailspan_agent.process.signals import exit_on_stop_signals
class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass
with exit_on_stop_signals():
    Closing()
    print("the exception of the handler was dropped", flush=True)
print("the start went on", flush=True)
"""


def test_signals_wait_for_their_handlers() -> None:
    """Signals that arrive before the handlers reach them later; afterwards the mask is as before."""
    subprocess.run([sys.executable, "-c", HOLDING], check=True)


def test_a_stop_during_a_destructor_is_not_lost() -> None:
    """Python ignores an exception there, so the one that the handler raises does not end the start."""
    done = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "the exception of the handler was dropped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("read", [False, True], ids=["before its file is read", "just after that"])
def test_an_agent_that_is_stopped_while_it_starts_exits_with_0(tmp_path: Path, number: int, read: bool) -> None:
    """Nothing is lost, so it is not a failure; SIGHUP does not end it either."""
    config = tmp_path / "config.toml"
    os.mkfifo(config)
    command = [TAILSPAN, "agent", "run", "--config", str(config)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    ) as agent:
        with config.open("w") as writer:  # opens when the agent reads
            agent.send_signal(signal.SIGHUP)
            if read:
                writer.write(f'[agent]\nstate_dir = "{tmp_path}/agent"\nlisten = ""\n')
            else:
                agent.send_signal(number)
        if read:
            agent.send_signal(number)
        _, log = agent.communicate(timeout=30)
    assert (agent.returncode, b"Traceback" in log) == (0, False), log
