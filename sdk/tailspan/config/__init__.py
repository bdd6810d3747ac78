"""The configuration that SDK and agent share: one TOML file, environment variables, and defaults.

Models, layers and units of settings belong here; nothing here may open a service or read a job.
`layers`, `otel_env`, `signals` and `units` are standard library only; pydantic is imported with the first model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tailspan._net import read_secret_file
    from tailspan.config.agent import AgentSettings, Expect, Watch
    from tailspan.config.fields import Duration, PositiveDuration, Size, UserPath
    from tailspan.config.fleet import FleetSettings
    from tailspan.config.options import Options, validate_options
    from tailspan.config.otlp import OtlpKeys, OtlpSettings, SignalSettings
    from tailspan.config.settings import (
        FilesSettings,
        LinksSettings,
        RedactPattern,
        RedactSettings,
        Settings,
        load_settings,
    )
    from tailspan.config.units import parse_duration_s, parse_size_bytes, platform_state_dir

__all__ = [
    "AgentSettings",
    "Duration",
    "Expect",
    "FilesSettings",
    "FleetSettings",
    "LinksSettings",
    "Options",
    "OtlpKeys",
    "OtlpSettings",
    "PositiveDuration",
    "RedactPattern",
    "RedactSettings",
    "Settings",
    "SignalSettings",
    "Size",
    "UserPath",
    "Watch",
    "load_settings",
    "parse_duration_s",
    "parse_size_bytes",
    "platform_state_dir",
    "read_secret_file",
    "validate_options",
]

_MODULES = {
    "tailspan._net": ("read_secret_file",),
    "tailspan.config.agent": ("AgentSettings", "Expect", "Watch"),
    "tailspan.config.fields": ("Duration", "PositiveDuration", "Size", "UserPath"),
    "tailspan.config.fleet": ("FleetSettings",),
    "tailspan.config.options": ("Options", "validate_options"),
    "tailspan.config.otlp": ("OtlpKeys", "OtlpSettings", "SignalSettings"),
    "tailspan.config.settings": (
        "FilesSettings",
        "LinksSettings",
        "RedactPattern",
        "RedactSettings",
        "Settings",
        "load_settings",
    ),
    "tailspan.config.units": ("parse_duration_s", "parse_size_bytes", "platform_state_dir"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a name when it is first used (PEP 562): pydantic takes longer to import than a short command runs."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
