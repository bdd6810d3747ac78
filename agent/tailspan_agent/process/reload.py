"""SIGHUP: load the configuration again and apply it; a bad file changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tailspan.config import load_settings
from tailspan.errors import TailspanError
from tailspan_agent.agent import Agent
from tailspan_agent.process.systemd import notify

__all__ = ["reload_on_hangup"]

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def reload_on_hangup(agent: Agent, config_path: Path | None) -> Iterator[None]:
    """Reload on each SIGHUP, one reload at a time, until the context ends.

    Args:
        agent: The running agent.
        config_path: The file that it was started with; None takes it from the environment.
    """
    loop = asyncio.get_running_loop()
    requested = asyncio.Event()

    async def reload() -> None:
        while True:
            await requested.wait()
            requested.clear()
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await agent.reload(load_settings(config_path))
            except TailspanError as error:
                _log.error("the configuration was not reloaded; the old one stays in force: %s", error)
            except Exception:
                _log.exception("the configuration was not reloaded: unexpected error (a bug in the agent)")
            notify("READY=1")

    task = asyncio.create_task(reload())
    loop.add_signal_handler(signal.SIGHUP, requested.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()
