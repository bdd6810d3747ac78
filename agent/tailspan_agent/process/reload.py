"""SIGHUP: load the configuration again and apply it; a bad file changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from tailspan._secrets import mask
from tailspan.config import load_settings
from tailspan.errors import TailspanError
from tailspan_agent.agent import Agent
from tailspan_agent.process.systemd import notify

__all__ = ["read_answer", "reload_on_hangup"]

_MAX_BYTES = 1 << 20

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
                result = await agent.reload(load_settings(config_path))
            except TailspanError as error:
                _log.error("the configuration was not reloaded; the old one stays in force: %s", error)
                _write_answer(agent.settings.agent.state_dir, {"error": str(error)})
            except Exception as error:
                _log.exception("the configuration was not reloaded: unexpected error (a bug in the agent)")
                _write_answer(agent.settings.agent.state_dir, {"error": f"unexpected error (a bug): {error!r}"})
            else:
                _write_answer(agent.settings.agent.state_dir, asdict(result))
            notify("READY=1")

    task = asyncio.create_task(reload())
    loop.add_signal_handler(signal.SIGHUP, requested.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()


def read_answer(state_dir: Path) -> dict[str, Any] | None:
    """Return the result of the agent's last reload, for ``tailspan agent reload``; None without one.

    It has the time of the reload (``unix_nano``), and either ``error`` or the fields of `ReloadResult`.

    Args:
        state_dir: The agent's state directory.
    """
    try:
        with (state_dir / "reload.json").open("rb") as file:
            answer = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _write_answer(state_dir: Path, answer: Mapping[str, Any]) -> None:
    text = mask(json.dumps({"unix_nano": time.time_ns(), **answer}))
    new = state_dir / "reload.json.new"
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        new.replace(state_dir / "reload.json")
    except OSError as error:
        _log.warning("the result of the reload could not be written for `tailspan agent reload`: %s", error)
