"""The configuration that SDK and agent share: one TOML file, environment variables, and defaults that need neither.

Precedence, key by key: command line > ``TAILSPAN_*`` > file > ``OTEL_*`` > default. Durations are float seconds and
sizes are bytes once loaded. Each service type validates its own table with `Options` and `validate_options`.
"""

from __future__ import annotations

import contextvars
import dataclasses
import ipaddress
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tailspan._config_errors import Loc, OptionsTable, Where, config_error
from tailspan._config_layers import Layer, below, environment_layer, file_layer
from tailspan._config_otel import otel_layer
from tailspan._config_units import (
    Duration,
    JsonList,
    Size,
    StrList,
    StrTable,
    UserPath,
    parse_duration_s,
    parse_size_bytes,
)
from tailspan.errors import ConfigError

__all__ = [
    "AgentSettings",
    "Duration",
    "Expect",
    "FilesSettings",
    "LinksSettings",
    "Options",
    "OtlpKeys",
    "OtlpSettings",
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

_Model = TypeVar("_Model", bound=BaseModel)
Signal = Literal["logs", "traces", "metrics"]
Protocol = Literal["http/protobuf", "grpc"]
Compression = Literal["gzip", "none", "zstd"]
Severity = Literal["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"]

_OTLP_TIMEOUT_S = 10.0
_OTLP_GRPC_PORT = 4317
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")
_SEVERITY_WORDS = {"WARNING": "WARN", "CRITICAL": "FATAL"}


class Options(BaseModel):
    """Base of every table of the configuration: unknown keys are errors, values are fixed once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def platform_state_dir() -> Path:
    """Return the directory for state of this user on this platform; it need not exist.

    Source: XDG Base Directory Specification 0.8; Apple's File System Programming Guide.

    Raises:
        ConfigError: The home directory is not known.
    """
    try:
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "tailspan"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tailspan"
        xdg = os.environ.get("XDG_STATE_HOME", "")
        return (Path(xdg) if xdg.startswith("/") else Path.home() / ".local" / "state") / "tailspan"
    except RuntimeError:
        raise ConfigError("the home directory is not known: set HOME, or a state_dir in the configuration") from None


def read_secret_file(path: Path, *, key: str) -> str:
    """Return the content of a file that holds one secret, without the space around it.

    Args:
        path: The file.
        key: The configuration key that names it, for messages.

    Raises:
        ConfigError: The file cannot be read, is empty, or is not one line of text.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{key}: cannot read {path}: {reason}", key=key) from None
    if not text or not text.isprintable():
        raise ConfigError(f"{key}: {path} must hold the token on one line, and nothing else", key=key)
    return text


class Watch(Options):
    """Which jobs of one service the agent follows, and how.

    Attributes:
        service: The configured service; the default service where the file names none.
        jobs: Ids of jobs to follow.
        discover: Follow every job that the service lists.
        name: Glob on the job's name.
        exclude: Globs on names to leave out.
        lookback: How old a finished job may be to be backfilled, in seconds.
        settle: After the end of a job, how long lines may still come, in seconds.
        late_window: How far back to look for lines that become visible late, in seconds.
        final_read: Read an ended job's log once more in full, where the service knows only times.
        min_severity: Drop (and count) lines below this; lines without a known severity stay.
        attributes: Put on the telemetry of these jobs.
    """

    service: str = ""
    jobs: StrList = []
    discover: bool = False
    name: str | None = None
    exclude: StrList = []
    lookback: Duration = 86400.0
    settle: Duration = 10.0
    late_window: Duration = 10.0
    final_read: bool = True
    min_severity: Severity | None = None
    attributes: StrTable = {}

    @field_validator("min_severity", mode="before")
    @classmethod
    def _severity_word(cls, value: object) -> object:
        return _SEVERITY_WORDS.get(value.upper(), value.upper()) if isinstance(value, str) else value


class Expect(Options):
    """A job that should run regularly; the agent tells when it did not.

    Attributes:
        name: The job's name.
        every: How often it should start, in seconds.
        grace: How late it may be, in seconds.
    """

    name: str
    every: Duration
    grace: Duration = 3600.0


class AgentSettings(Options):
    """The agent's own settings.

    Attributes:
        state_dir: Checkpoints, dead letters and files.
        listen: ``HOST:PORT`` of status page and metrics; empty: none.
        token: What the status page asks for.
        token_file: A file with that token, read when needed.
        allowed_hosts: Further names in the Host header that the status page answers to.
        allow_cancel: Whether the status page may cancel jobs.
        drain_timeout: How long to wait at the end for exports, in seconds.
        max_pipeline_names: How many names metrics tell apart; the rest is ``#other#``.
        run_id_on_metrics: Put the job id on gauges.
        service_name: ``service.name`` of the agent's own telemetry.
        watch: What to follow, first match wins.
        expect: Jobs that should run regularly.
    """

    state_dir: UserPath = Field(default_factory=lambda: platform_state_dir() / "agent")
    listen: str = "127.0.0.1:8797"
    token: SecretStr | None = None
    token_file: UserPath | None = None
    allowed_hosts: StrList = []
    allow_cancel: bool = False
    drain_timeout: Duration = 30.0
    max_pipeline_names: int = Field(default=200, ge=1)
    run_id_on_metrics: bool = False
    service_name: str = Field(default="tailspan-agent", min_length=1)
    watch: Annotated[list[Watch], JsonList] = []
    expect: Annotated[list[Expect], JsonList] = []

    @property
    def listen_address(self) -> tuple[str, int] | None:
        """Host and port to listen on, port 0 for a free one; None when there is nothing to listen on."""
        if not self.listen:
            return None
        parts = urlsplit(f"//{self.listen}")
        return parts.hostname or "0.0.0.0", parts.port or 0  # noqa: S104 - asked for by an empty host

    def read_token(self) -> str | None:
        """Return the token of the status page, from the file if it is there; None when there is none.

        Raises:
            ConfigError: The file cannot be read.
        """
        if self.token_file is not None:
            return read_secret_file(self.token_file, key="agent.token_file")
        return self.token.get_secret_value() if self.token else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            valid = not self.listen or urlsplit(f"//{self.listen}").port is not None
            address = self.listen_address
        except ValueError:
            valid, address = False, None
        if not valid or "/" in self.listen or "@" in self.listen:
            raise ConfigError('expected "HOST:PORT", or "" for no status page', key="agent.listen")
        if self.token is not None and self.token_file is not None:
            raise ConfigError("token and token_file are both set: keep one of them", key="agent.token")
        if address and not _is_loopback(address[0]) and self.token is None and self.token_file is None:
            raise ConfigError(
                f"{self.listen} can be reached from other machines: set agent.token_file, or listen on 127.0.0.1",
                key="agent.listen",
            )
        for number, watch in enumerate(self.watch):
            if not watch.jobs and not watch.discover:
                raise ConfigError("name jobs = [...], or set discover = true", key=f"agent.watch.{number}")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_headers(headers: dict[str, SecretStr] | None) -> dict[str, SecretStr] | None:
    for name, value in (headers or {}).items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value.get_secret_value()):
            raise ConfigError("a header needs a plain name and one line of ASCII text")
    return headers


class OtlpKeys(Options):
    """How to reach an OTLP endpoint: for all signals in ``[otlp]``, for one in ``[otlp.logs]`` and so on.

    Attributes:
        endpoint: For all signals: the base URL, ``/v1/logs`` and so on are appended for HTTP. For one signal: the
            URL as it is. For gRPC ``HOST:PORT`` will do.
        protocol: ``http/protobuf`` (the default) or ``grpc``.
        compression: ``gzip`` (the default), ``none`` or ``zstd``.
        headers: Sent with every request; for one signal, instead of those for all signals.
        timeout: Of one request, in seconds; 10 unless set.
        ca_file: PEM certificates to trust instead of the system's.
        client_cert: PEM certificate to show to the endpoint.
        client_key: Its key, where it is not in the same file.
        insecure: gRPC without TLS, for an endpoint without ``http://`` or ``https://``.
    """

    endpoint: str | None = None
    protocol: Protocol | None = None
    compression: Compression | None = None
    headers: dict[str, SecretStr] | None = None
    timeout: Duration | None = None
    ca_file: UserPath | None = None
    client_cert: UserPath | None = None
    client_key: UserPath | None = None
    insecure: bool | None = None

    _headers = field_validator("headers")(_check_headers)

    @field_validator("protocol", mode="before")
    @classmethod
    def _no_json(cls, value: object) -> object:
        if value == "http/json":
            raise ConfigError(
                'expected "http/protobuf" or "grpc"; every collector that takes http/json takes http/protobuf'
            )
        return value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SignalSettings:
    """Where one signal goes, with every default filled in.

    Attributes:
        signal: ``logs``, ``traces`` or ``metrics``.
        url: HTTP: the URL to post to. gRPC: ``http://HOST:PORT`` (no TLS) or ``https://HOST:PORT``. None: files.
        protocol: How to speak to it.
        compression: Of the request's body.
        headers: To send; metadata for gRPC.
        timeout: Of one request, in seconds.
        ca_file: PEM certificates to trust instead of the system's.
        client_cert: PEM certificate to show.
        client_key: Its key, where it is not in the same file.
    """

    signal: Signal
    url: str | None
    protocol: Protocol = "http/protobuf"
    compression: Compression = "gzip"
    headers: Mapping[str, SecretStr] = dataclasses.field(default_factory=dict)
    timeout: float = _OTLP_TIMEOUT_S
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


class OtlpSettings(OtlpKeys):
    """Where telemetry goes.

    Attributes:
        signals: Which signals to send.
        resource: Attributes of all telemetry, below a job's own.
        dead_letter_max: How many bytes of refused batches to keep; then the agent waits.
        retry_server_errors: How often to try again after a 5xx other than 502, 503 and 504.
        disabled: The agent refuses to relay (``OTEL_SDK_DISABLED``).
        logs: Keys for logs only.
        traces: Keys for spans only.
        metrics: Keys for metrics only.
    """

    signals: Annotated[list[Signal], *StrList.__metadata__] = ["logs", "traces", "metrics"]
    resource: StrTable = {}
    dead_letter_max: Size = 10 * 2**30
    retry_server_errors: int = Field(default=10, ge=0)
    disabled: bool = False
    logs: OtlpKeys = OtlpKeys()
    traces: OtlpKeys = OtlpKeys()
    metrics: OtlpKeys = OtlpKeys()

    def for_signal(self, signal: Signal) -> SignalSettings | None:
        """Return where one signal goes, or None when it is not one of `signals`.

        Raises:
            ConfigError: The endpoint is not usable; `load_settings` has found that out before.
        """
        if signal not in self.signals:
            return None
        own: OtlpKeys = getattr(self, signal)
        one, key = (own, f"otlp.{signal}") if own.endpoint is not None else (self, "otlp")
        keys = {name: getattr(self if getattr(own, name) is None else own, name) for name in OtlpKeys.model_fields}
        protocol: Protocol = keys["protocol"] or "http/protobuf"
        if keys["client_key"] and not keys["client_cert"]:
            raise ConfigError("client_key needs client_cert", key=f"{key}.client_key")
        url = None
        if one.endpoint:
            path = "" if one is own else f"/v1/{signal}"
            url = _endpoint_url(one.endpoint, protocol, path, insecure=bool(keys["insecure"]), key=f"{key}.endpoint")
        return SignalSettings(
            signal=signal,
            url=url,
            protocol=protocol,
            compression=keys["compression"] or "gzip",
            headers=keys["headers"] or {},
            timeout=_OTLP_TIMEOUT_S if keys["timeout"] is None else keys["timeout"],
            ca_file=keys["ca_file"],
            client_cert=keys["client_cert"],
            client_key=keys["client_key"],
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for signal in self.signals:
            self.for_signal(signal)
        return self


def _endpoint_url(endpoint: str, protocol: Protocol, path: str, *, insecure: bool, key: str) -> str:
    """Source: OpenTelemetry specification, OTLP exporter, "Endpoint URLs for OTLP/HTTP" and `insecure`."""
    if protocol == "grpc" and "://" not in endpoint:
        endpoint = f"{'http' if insecure else 'https'}://{endpoint}"
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = SplitResult("", "", "", "", ""), None, None
    if parts.scheme not in {"http", "https"} or not host or not endpoint.isprintable() or " " in endpoint:
        raise ConfigError('expected a URL such as "http://localhost:4318"', key=key)
    if "@" in parts.netloc:
        raise ConfigError("credentials do not belong in the URL: send them with otlp.headers", key=key)
    if protocol == "grpc":
        shown = f"[{host}]" if ":" in host else host
        return f"{parts.scheme}://{shown}:{port or (443 if parts.scheme == 'https' else _OTLP_GRPC_PORT)}"
    return parts._replace(path=parts.path.rstrip("/") + path if path else parts.path or "/", fragment="").geturl()


class FilesSettings(Options):
    """Files of OTLP JSON lines, for signals without endpoint.

    Attributes:
        max_size: Of one file in bytes, then the next is begun.
        keep: How many files per signal.
    """

    max_size: Size = 100 * 2**20
    keep: int = Field(default=10, ge=1)


class RedactPattern(Options):
    """A pattern whose matches are redacted.

    Attributes:
        literal: Text that every match contains; searched first because that is fast.
        regex: The pattern.
        slow: Allow a pattern without literal.
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
        return self


class RedactSettings(Options):
    """What must not leave this machine.

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
    """Where people look at telemetry.

    Attributes:
        trace: URL of a trace, with ``{trace_id}``.
        logs: URL of a trace's logs, with ``{trace_id}``.
    """

    trace: Annotated[str | None, BeforeValidator(_check_link)] = None
    logs: Annotated[str | None, BeforeValidator(_check_link)] = None


class Settings(BaseSettings):
    """The loaded configuration; `load_settings` makes it. ``Settings()`` is all defaults, without any environment.

    Attributes:
        default_service: The service that the verbs ask when none is named.
        services: Each service's raw options by name; ``local`` is always there. Every table has ``type``.
        agent: The agent's own settings.
        otlp: Where telemetry goes.
        files: Files for signals without endpoint.
        redact: What must not leave this machine.
        links: Where people look at telemetry.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    default_service: str = "local"
    services: dict[str, dict[str, Any]] = Field(default={}, repr=False, validate_default=True)
    agent: AgentSettings = Field(default_factory=AgentSettings)
    otlp: OtlpSettings = Field(default_factory=OtlpSettings)
    files: FilesSettings = FilesSettings()
    redact: RedactSettings = RedactSettings()
    links: LinksSettings = LinksSettings()
    _path: Path | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The file that was loaded; None when there was none."""
        return self._path

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the layers that `load_settings` has read; see there for their order."""
        return (init_settings, *(_LayerSource(settings_cls, layer) for layer in _LAYERS.get()))

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
        # An agent that was told nothing watches what there is.
        watches = self.agent.watch or [Watch(discover=True)]
        watches = [
            watch if watch.service else watch.model_copy(update={"service": self.default_service}) for watch in watches
        ]
        for number, watch in enumerate(watches):
            if watch.service not in self.services:
                raise ConfigError(
                    f"no service {watch.service!r} is configured; there is: {known}",
                    key=f"agent.watch.{number}.service",
                )
        object.__setattr__(self, "agent", self.agent.model_copy(update={"watch": watches}))
        return self


class _LayerSource(PydanticBaseSettingsSource):
    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._layer.table.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return below(self.current_state, self._layer.table)


_LAYERS: contextvars.ContextVar[Sequence[Layer]] = contextvars.ContextVar("layers", default=())


def load_settings(path: Path | None = None, *, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Load the configuration.

    Args:
        path: The TOML file; None: the file that ``TAILSPAN_CONFIG`` names, and without that, none.
        overrides: What the command line says, shaped like the TOML file; wins over everything.

    Returns:
        The settings, with every default filled in; the service tables are as written.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value does not fit; the message names the key
            and where it was written, and shows no secret.
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
    layers = (given, in_environment, in_file, otel_layer(environ))

    def where(loc: Loc) -> str | None:
        for length in range(len(loc), 0, -1):
            for layer in layers:
                if place := layer.where(loc[:length]):
                    return place
        return None

    reset = _LAYERS.set(layers)
    try:
        settings = Settings()
    except ValidationError as error:
        raise config_error(error, Settings, (), where) from None
    finally:
        _LAYERS.reset(reset)
    for name, options in settings.services.items():
        settings.services[name] = OptionsTable(options, lambda loc, name=name: where(("services", name, *loc)))
    settings._path = path
    return settings


def validate_options(model: type[_Model], key_prefix: str, table: Mapping[str, Any]) -> _Model:
    """Validate one service's table, so that errors name ``KEY_PREFIX.KEY`` and where it was written.

    Args:
        model: The type's options, best a subclass of `Options`. It need not have the key ``type``.
        key_prefix: Path of the table, such as ``services.fused``.
        table: The raw options, as in `Settings.services`.

    Raises:
        ConfigError: A key is unknown or a value does not fit.
    """
    prefix: Loc = (
        tuple(key_prefix.split(".", 1)) if key_prefix.startswith("services.") else tuple(key_prefix.split("."))
    )
    where: Where = (lambda loc: table.where(loc[len(prefix) :])) if isinstance(table, OptionsTable) else lambda _: None
    options = {key: value for key, value in table.items() if key != "type" or "type" in model.model_fields}
    try:
        return model.model_validate(options)
    except ValidationError as error:
        raise config_error(error, model, prefix, where) from None
