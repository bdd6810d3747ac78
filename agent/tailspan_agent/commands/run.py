"""``tailspan agent run``: one agent, from its start to its end. Without click; see `tailspan.cli.start`."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tailspan._durations import duration_text
from tailspan._plural import plural
from tailspan.cli.exit_codes import exit_code_of, report
from tailspan.errors import ConfigError
from tailspan_agent.process.logging_setup import keep_last_errors, set_up_logging
from tailspan_agent.process.signals import exit_on_stop_signals, hold_signals

if TYPE_CHECKING:
    from tailspan.config import Settings

__all__ = ["run_agent"]

_GARBAGE_OBJECTS = 20_000
_LARGEST_BUFFER_BYTES = 8 << 20
_REJECTED, _UNDELIVERED = 1, 3


def run_agent(*, config_path: Path | None, once: bool, timeout_s: float, log_level: str, no_token: bool) -> int:
    """Run an agent until a signal ends it, or for one pass.

    Args:
        config_path: The configuration file; None: the one that ``TAILSPAN_CONFIG`` names, if any.
        once: Whether to relay what is readable now, and return.
        timeout_s: The time limit of such a pass, in seconds.
        log_level: The lowest level of the agent's own log.
        no_token: Whether the page needs no token.

    Returns:
        The exit code.

    Raises:
        TailspanError: The agent cannot start.
    """
    with exit_on_stop_signals():
        _pause_garbage_collection()
        _keep_large_buffers()
        set_up_logging(log_level)
        from tailspan.config import load_settings

        settings = load_settings(config_path)
        if no_token and settings.agent.read_token() is not None:
            raise ConfigError("--no-token contradicts agent.token: remove one of them", key="agent.token")
    with hold_signals() as release:
        work = _run_once(settings, timeout_s, release) if once else _run(settings, config_path, release, no_token)
        return asyncio.run(work)


def _pause_garbage_collection() -> None:
    """Collect no garbage while modules are imported: it takes an eighth of the start."""
    gc.disable()


def _resume_garbage_collection() -> None:
    """Collect rarely from now on, since there is little garbage, and never what the start has loaded."""
    gc.freeze()
    gc.set_threshold(_GARBAGE_OBJECTS, 10, 10)
    gc.enable()


def _keep_large_buffers() -> None:
    """Let the allocator keep the memory of a request's buffers, which the next request uses again.

    glibc returns large blocks to the system, which clears them for the next request: a tenth of the cost of a line. It
    keeps blocks up to the size of the largest one that was freed. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    bytes(_LARGEST_BUFFER_BYTES)


async def _run(settings: Settings, config_path: Path | None, release: Callable[[], None], no_token: bool) -> int:
    from tailspan_agent.agent import Agent
    from tailspan_agent.process.reload import reload_on_hangup
    from tailspan_agent.process.systemd import keep_watchdog, notify

    loop = asyncio.get_running_loop()
    agent = Agent(settings, needs_page_token=not no_token)
    _resume_garbage_collection()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    with keep_last_errors(settings.agent.state_dir), reload_on_hangup(agent, config_path), keep_watchdog():
        release()
        await agent.run(on_ready=lambda: notify("READY=1"), on_stop=lambda: notify("STOPPING=1"))
    return 0


async def _run_once(settings: Settings, timeout_s: float, release: Callable[[], None]) -> int:
    from tailspan_agent.agent import Agent

    loop = asyncio.get_running_loop()
    agent = Agent(settings)
    _resume_garbage_collection()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    release()
    with keep_last_errors(settings.agent.state_dir):
        result = await agent.run_once(timeout_s)
    for failure in result.failures:
        report(failure)
    targets = ", ".join(dict.fromkeys(agent.endpoints.targets.values()))
    _say(
        f"{result.jobs} {plural(result.jobs, 'job')}:"
        f" {result.acked} log {plural(result.acked, 'record')} acknowledged, {result.rejected} rejected ({targets})"
    )
    if not result.delivered:
        when = "before the agent was stopped" if agent.stopping else f"within {duration_text(timeout_s)}"
        _say(f"tailspan: not everything was acknowledged {when}; the next run resumes after the last acknowledged line")
        return _UNDELIVERED
    if result.failures:
        return max(exit_code_of(failure) for failure in result.failures)
    return _REJECTED if result.rejected else 0


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{text}\n")
