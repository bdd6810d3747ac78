"""What of a changed configuration a running agent does not take up. Pure."""

from __future__ import annotations

from tailspan.config import Settings
from tailspan_agent.outlets import SIGNALS

__all__ = ["changes_that_wait"]

_KEYS = ("state_dir", "listen", "token", "token_file", "max_pipeline_names", "run_id_on_metrics", "service_name")


def changes_that_wait(old: Settings, new: Settings) -> list[str]:
    """Return the changed keys that take effect at the next start only.

    Args:
        old: As the agent runs now.
        new: As newly loaded.
    """
    waiting = [f"agent.{key}" for key in _KEYS if getattr(new.agent, key) != getattr(old.agent, key)]
    if any((new.otlp.for_signal(name) is None) != (old.otlp.for_signal(name) is None) for name in SIGNALS):
        waiting.append("otlp.signals")
    return waiting
