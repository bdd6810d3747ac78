"""The signals of OpenTelemetry that Tailspan sends."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["SIGNALS", "Signal"]

Signal = Literal["logs", "traces", "metrics"]

SIGNALS: Final[tuple[Signal, ...]] = ("logs", "traces", "metrics")
