"""A signal that comes while the agent starts is obeyed, and never ends it as a crash would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prove.world import TAILSPAN

HELD = """
import os, signal
from tailspan_agent.process.signals import held
got = []
with held() as release:
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


def test_signals_wait_for_somebody_to_take_them() -> None:
    """What came before the handlers is handed to them; afterwards all is as it was."""
    subprocess.run([sys.executable, "-c", HELD], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("read", [False, True], ids=["before its file is read", "when it was just read"])
def test_an_agent_that_is_stopped_at_its_start_ends_well(tmp_path: Path, number: int, read: bool) -> None:
    """Nothing is lost then, so it is no failure; a reload that comes so early is no end either."""
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
        _, said = agent.communicate(timeout=30)
    assert (agent.returncode, b"Traceback" in said) == (0, False), said
