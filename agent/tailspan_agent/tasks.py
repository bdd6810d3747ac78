"""Ending tasks."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

__all__ = ["cancelled"]

_log = logging.getLogger(__name__)


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end. What it failed with is logged: whoever ends it has other things to end."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a task had failed", exc_info=error)
