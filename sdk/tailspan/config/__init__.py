"""The configuration that SDK and agent share: one TOML file, environment variables, and defaults.

Models, layers and units of settings belong here; nothing here may open a service or read a job.
"""

from tailspan._net import read_secret_file
from tailspan.config.agent import (
    AgentSettings,
    Expect,
    Watch,
)
from tailspan.config.options import (
    Options,
    validate_options,
)
from tailspan.config.otlp import (
    OtlpKeys,
    OtlpSettings,
    SignalSettings,
)
from tailspan.config.settings import (
    FilesSettings,
    LinksSettings,
    RedactPattern,
    RedactSettings,
    Settings,
    load_settings,
)
from tailspan.config.units import (
    Duration,
    PositiveDuration,
    Size,
    UserPath,
    parse_duration_s,
    parse_size_bytes,
    platform_state_dir,
)

__all__ = [
    "AgentSettings",
    "Duration",
    "Expect",
    "FilesSettings",
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
