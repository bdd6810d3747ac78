"""Faults of the agent as a process: stopped for a while, out of descriptors, signalled while it starts."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time

from tests.prove.configuration import Change, speak
from tests.prove.world import World


def stopped(world: World) -> None:
    """SIGSTOP and SIGCONT, again and again, as a laptop that sleeps or a paused container."""
    assert world.agent is not None
    for _ in range(5):
        os.kill(world.agent.pid, signal.SIGSTOP)
        speak(world)
        time.sleep(0.8)
        os.kill(world.agent.pid, signal.SIGCONT)
        time.sleep(0.3)


def no_descriptors(world: World) -> None:
    """No file descriptor is left for new jobs and new connections; then there is."""
    assert world.agent is not None
    pid = world.agent.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) - 2, hard))
    world.local_job("local-new", burst=5, pause_s=0.02)
    world.fused_job("fused-new")
    for _ in range(2):
        world.collector.close_connections()
        speak(world)
        time.sleep(2.0)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def state_taken_away(world: World) -> None:
    """The agent's directory is moved away and back: it reports that, sends nothing it cannot store, and resumes."""
    away = world.home / "elsewhere"
    world.state_dir.rename(away)
    speak(world)
    world.until(lambda: "was deleted or replaced while the agent runs" in world.log, "word of the missing store")
    speak(world)
    away.rename(world.state_dir)


def signalled_at_its_start(world: World) -> None:
    """SIGTERM, SIGHUP and both, at any moment of its start."""
    for number in range(12):
        world.terminate()
        world.ended()
        speak(world)
        world.start(strict=True)
        assert world.agent is not None
        time.sleep(world.random.uniform(0.1, 1.5))
        with contextlib.suppress(ProcessLookupError):
            if number % 3:
                world.agent.send_signal(signal.SIGHUP)
            if number % 3 != 1:
                world.agent.send_signal(signal.SIGTERM)
        if number % 3 == 1:
            time.sleep(1.0)
            if world.agent.poll() is None:
                continue
        world.ended()
        world.start(strict=True)


FAULTS = (
    Change("agent: stopped and continued (SIGSTOP)", stopped),
    Change("agent: no file descriptor left for a while", no_descriptors),
    Change("agent: its directory taken away and put back", state_taken_away),
    Change("agent: SIGTERM and SIGHUP while it starts", signalled_at_its_start),
)
