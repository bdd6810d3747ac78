"""The configuration that SDK and agent share: one TOML file, environment variables, and defaults.

Precedence, key by key: command line > ``TAILSPAN_*`` > file > ``OTEL_*`` > default. Durations are float seconds and
sizes are bytes once loaded. Each service type validates its own table with `Options` and `validate_options`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self
from urllib.parse import quote

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from tailspan._caller import for_callers
from tailspan.config.agent import AgentSettings, Watch
from tailspan.config.fields import JsonList, Size, StrList, UserPath
from tailspan.config.fleet import FleetSettings
from tailspan.config.layers import Layer, Loc, environment_layer, file_layer, merged
from tailspan.config.options import Options, OptionsTable, config_error
from tailspan.config.otel_env import otel_layer
from tailspan.config.otlp import OtlpSettings
from tailspan.config.regex_literal import can_contain
from tailspan.errors import ConfigError

if TYPE_CHECKING:
    from tailspan.models import JobStatus

__all__ = ["FilesSettings", "LinksSettings", "RedactPattern", "RedactSettings", "Settings", "load_settings"]


_PLACEHOLDER = re.compile(r"\{(trace_id|job_id|job_name|service|start_ms|end_ms)\}")
_AROUND_MS = 300_000


class FilesSettings(Options):
    """Files of OTLP JSON lines, for signals without an endpoint.

    Attributes:
        max_size: Size in bytes at which the next file begins.
        keep: Number of files for each signal.
    """

    max_size: Size = 100 * 2**20
    keep: int = Field(default=10, ge=1)


class RedactPattern(Options):
    """A pattern whose matches are redacted.

    Attributes:
        literal: Text that every match contains; it is searched first, which is fast.
        regex: The pattern.
        slow: Whether the pattern may have no `literal`.
    """

    literal: str | None = Field(default=None, min_length=1)
    regex: str
    slow: bool = False

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _has_literal(self) -> Self:
        if self.literal is None and not self.slow:
            raise ConfigError("set literal to text that every match contains, or slow = true")
        if self.literal is not None and not can_contain(self.regex, self.literal):
            raise ConfigError(
                "no match of regex can contain literal, so nothing would ever be redacted: correct one of them"
            )
        return self


class RedactSettings(Options):
    """Secrets that must not leave this machine.

    Attributes:
        env: Environment variables of the agent whose values are redacted.
        files: Files whose content is redacted (one secret each).
        patterns: Patterns whose matches are redacted.
    """

    env: StrList = []
    files: Annotated[list[UserPath], *StrList.__metadata__] = []
    patterns: Annotated[list[RedactPattern], JsonList] = []


def _check_link(value: object) -> object:
    if isinstance(value, str) and value and not value.startswith(("http://", "https://")):
        raise ConfigError("expected a URL that starts with http:// or https://")
    return value or None


class LinksSettings(Options):
    """Links to a job's telemetry: URLs with placeholders that `of` fills in.

    Attributes:
        trace: URL of a job's trace.
        logs: URL of a job's lines.
    """

    trace: Annotated[str | None, BeforeValidator(_check_link)] = None
    logs: Annotated[str | None, BeforeValidator(_check_link)] = None

    def of(self, job: JobStatus) -> dict[str, str]:
        """Return the configured links of one job, by ``trace`` and ``logs``.

        Placeholders, escaped for a URL: ``{trace_id}``, ``{job_id}``, ``{job_name}``, ``{service}``, ``{start_ms}``
        and ``{end_ms}``. The last two are a time range of Grafana: five minutes around the job in ms since the epoch
        (``now`` while it runs). Other braces are kept, because Grafana's own URLs have some.

        Args:
            job: The job's status.
        """
        begun, ended = job.submitted_at or job.started_at, job.finished_at
        values = {
            "trace_id": job.trace_id,
            "job_id": job.job_id,
            "job_name": job.job_name,
            "service": job.service or "",
            "start_ms": str(int(begun.timestamp() * 1000) - _AROUND_MS) if begun is not None else "now-24h",
            "end_ms": str(int(ended.timestamp() * 1000) + _AROUND_MS) if ended is not None else "now",
        }

        def fill(found: re.Match[str]) -> str:
            return quote(values[found[1]], safe="", errors="replace")

        templates = {"trace": self.trace, "logs": self.logs}
        return {name: _PLACEHOLDER.sub(fill, template) for name, template in templates.items() if template}


class Settings(Options):
    """The loaded configuration, made by `load_settings`. ``Settings()`` has all defaults and reads no environment.

    Attributes:
        default_service: The service that the verbs use if none is named.
        services: Each service's raw options by name; ``local`` is always there. Every table has ``type``.
        agent: The agent's own settings.
        fleet: The database that several agents share.
        otlp: Where telemetry goes.
        files: Files for signals without an endpoint.
        redact: Secrets that must not leave this machine.
        links: Links to a job's telemetry.
    """

    default_service: str = "local"
    services: dict[str, dict[str, Any]] = Field(default={}, repr=False, validate_default=True)
    # A missing table is an empty one. A model as its default would be built apart from this one.
    agent: AgentSettings = Field(default_factory=dict, validate_default=True)
    fleet: FleetSettings = Field(default_factory=dict, validate_default=True)
    otlp: OtlpSettings = Field(default_factory=dict, validate_default=True)
    files: FilesSettings = Field(default_factory=dict, validate_default=True)
    redact: RedactSettings = Field(default_factory=dict, validate_default=True)
    links: LinksSettings = Field(default_factory=dict, validate_default=True)
    _path: Path | None = PrivateAttr(default=None)
    _layers: Sequence[Layer] = PrivateAttr(default=())

    @property
    def path(self) -> Path | None:
        """The loaded file; None without one."""
        return self._path

    def source_of(self, *loc: str | int) -> str | None:
        """Return where a key was written: ``config.toml:12`` or a variable's name; None where it is a default.

        Args:
            *loc: The key's path, such as ``"agent", "watch", 0, "name"``.
        """
        return next((place for layer in self._layers if (place := layer.where(loc))), None)

    @field_validator("services")
    @classmethod
    def _name_types(cls, services: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        named = {name: {"type": name, **options} for name, options in services.items()}
        for name, options in named.items():
            if not isinstance(options["type"], str):
                raise ConfigError("expected text in quotes", key=f"services.{name}.type")
        return {"local": {"type": "local"}, **named}

    @model_validator(mode="after")
    def _check_services(self) -> Self:
        known = ", ".join(sorted(self.services))
        if self.default_service not in self.services:
            raise ConfigError(
                f"no service {self.default_service!r} is configured; there is: {known}", key="default_service"
            )
        # Without a watch the agent follows all jobs of the default service.
        watches = self.agent.watch or [Watch(discover=True)]
        watches = [
            watch if watch.service else watch.model_copy(update={"service": self.default_service}) for watch in watches
        ]
        for number, watch in enumerate(watches):
            if watch.service not in self.services:
                raise ConfigError(
                    f"no service {watch.service!r} is configured; there is: {known}",
                    key=f"agent.watch[{number}].service",
                )
        object.__setattr__(self, "agent", self.agent.model_copy(update={"watch": watches}))
        return self


@for_callers
def load_settings(
    path: Path | None = None, *, overrides: Mapping[str, Any] | None = None, telemetry: bool = True
) -> Settings:
    """Load the configuration.

    Args:
        path: The TOML file; None: the file that ``TAILSPAN_CONFIG`` names, if any.
        overrides: Settings from the command line, shaped like the TOML file; they win over everything.
        telemetry: Whether to read the ``OTEL_*`` variables. Commands that only run and read jobs send nothing, so a
            wrong variable of another program must not make them fail.

    Returns:
        The settings with all defaults filled in; service tables stay as written.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value is not valid; the message names the key
            and its place, and contains no secret.
    """
    environ = os.environ
    if path is None and environ.get("TAILSPAN_CONFIG"):
        path = Path(environ["TAILSPAN_CONFIG"])
    in_file = file_layer(path)
    services = in_file.table.get("services")
    in_environment = environment_layer(
        environ, list(Settings.model_fields), list(services) if isinstance(services, dict) else []
    )
    given = Layer(dict(overrides or {}), {(key,): "command line" for key in overrides or {}})
    layers = (given, in_environment, in_file, otel_layer(environ if telemetry else {}))

    def where(loc: Loc) -> str | None:
        for length in range(len(loc), 0, -1):
            for layer in layers:
                if place := layer.where(loc[:length]):
                    return place
        return None

    try:
        settings = Settings(**merged(layer.table for layer in layers))
    except ValidationError as error:
        raise config_error(error, Settings, (), where) from None
    for name, options in settings.services.items():
        settings.services[name] = OptionsTable(options, ("services", name), where)
    settings._path, settings._layers = path, layers
    return settings
