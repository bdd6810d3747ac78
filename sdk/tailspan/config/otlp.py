"""Where telemetry is sent: the tables ``[otlp]`` and ``[otlp.logs|traces|metrics]``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from tailspan._net import host_port
from tailspan.config.fields import PositiveDuration, Size, StrList, StrTable, UserPath
from tailspan.config.options import Options
from tailspan.config.signals import Signal
from tailspan.errors import ConfigError

__all__ = ["OtlpKeys", "OtlpSettings", "SignalSettings"]

OtlpProtocol = Literal["http/protobuf", "grpc"]
Compression = Literal["gzip", "none", "zstd"]

_OTLP_TIMEOUT_S = 10.0
_OTLP_GRPC_PORT = 4317
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*")


def _check_headers(headers: dict[str, SecretStr] | None) -> dict[str, SecretStr] | None:
    for name, value in (headers or {}).items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value.get_secret_value()):
            raise ConfigError("a header needs a plain name and one line of ASCII text")
    return headers


class OtlpKeys(Options):
    """How to reach an OTLP endpoint: for all signals in ``[otlp]``, for one in ``[otlp.logs]`` and so on.

    Attributes:
        endpoint: For all signals: the base URL; ``/v1/logs`` and so on are appended for HTTP. For one signal: the
            full URL. For gRPC ``HOST:PORT`` is enough.
        protocol: ``http/protobuf`` (the default) or ``grpc``.
        compression: ``gzip`` (the default), ``none`` or ``zstd``.
        headers: Sent with every request; headers of one signal replace those for all signals.
        timeout: Time limit of a request, in seconds; 10 by default.
        ca_file: PEM certificates to trust instead of the system's.
        client_cert: PEM certificate to show to the endpoint.
        client_key: Its key, where it is not in the same file.
        insecure: gRPC without TLS, for an endpoint without ``http://`` or ``https://``.
    """

    endpoint: str | None = None
    protocol: OtlpProtocol | None = None
    compression: Compression | None = None
    headers: dict[str, SecretStr] | None = None
    timeout: PositiveDuration | None = None
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
                'expected "http/protobuf" or "grpc"; every collector that accepts http/json accepts http/protobuf'
            )
        return value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SignalSettings:
    """Where one signal is sent, with all defaults filled in.

    Attributes:
        signal: ``logs``, ``traces`` or ``metrics``.
        url: HTTP: the URL to post to. gRPC: ``http://HOST:PORT`` (no TLS) or ``https://HOST:PORT``. None: files.
        protocol: ``http/protobuf`` or ``grpc``.
        compression: Compression of the request body.
        headers: Headers of each request; metadata for gRPC.
        timeout: Time limit of a request, in seconds.
        ca_file: PEM certificates to trust instead of the system's.
        client_cert: PEM certificate to show.
        client_key: Its key, where it is not in the same file.
    """

    signal: Signal
    url: str | None
    protocol: OtlpProtocol = "http/protobuf"
    compression: Compression = "gzip"
    headers: Mapping[str, SecretStr] = dataclasses.field(default_factory=dict)
    timeout: float = _OTLP_TIMEOUT_S
    ca_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


class OtlpSettings(OtlpKeys):
    """Where telemetry is sent.

    Attributes:
        signals: Which signals to send.
        lines_on_spans: Whether the span of a job's execution carries its last lines and its warnings. ``auto``: only if
            no endpoint takes the lines as logs.
        resource: Attributes of all telemetry; a job's own attributes win.
        dead_letter_max: Limit of the dead-letter files, in bytes; at the limit the agent stops sending.
        retry_server_errors: Number of retries after a 5xx other than 502, 503 and 504.
        disabled: Whether the agent refuses to run (``OTEL_SDK_DISABLED``).
        logs: Keys for logs only.
        traces: Keys for spans only.
        metrics: Keys for metrics only.
    """

    signals: Annotated[list[Signal], *StrList.__metadata__, Field(min_length=1)] = ["logs", "traces", "metrics"]
    lines_on_spans: bool | Literal["auto"] = "auto"
    resource: StrTable = {}
    dead_letter_max: Size = 10 * 2**30
    retry_server_errors: int = Field(default=10, ge=0)
    disabled: bool = False
    logs: OtlpKeys = Field(default_factory=dict, validate_default=True)
    traces: OtlpKeys = Field(default_factory=dict, validate_default=True)
    metrics: OtlpKeys = Field(default_factory=dict, validate_default=True)

    @property
    def puts_lines_on_spans(self) -> bool:
        """Whether the span of a job's execution carries lines; see `lines_on_spans`."""
        if self.lines_on_spans != "auto":
            return self.lines_on_spans
        traces, logs = self.for_signal("traces"), self.for_signal("logs")
        return traces is not None and (logs is None or (logs.url is None and traces.url is not None))

    def for_signal(self, signal: Signal) -> SignalSettings | None:
        """Return where one signal is sent, or None if it is not one of `signals`.

        Raises:
            ConfigError: The endpoint is not usable; `load_settings` has already checked that.
        """
        if signal not in self.signals:
            return None
        own: OtlpKeys = getattr(self, signal)
        one, key = (own, f"otlp.{signal}") if own.endpoint is not None else (self, "otlp")
        keys = {name: getattr(self if getattr(own, name) is None else own, name) for name in OtlpKeys.model_fields}
        protocol: OtlpProtocol = keys["protocol"] or "http/protobuf"
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


def _endpoint_url(endpoint: str, protocol: OtlpProtocol, path: str, *, insecure: bool, key: str) -> str:
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
        port = port or (443 if parts.scheme == "https" else _OTLP_GRPC_PORT)
        return f"{parts.scheme}://{host_port(host, port)}"
    return parts._replace(path=parts.path.rstrip("/") + path if path else parts.path or "/", fragment="").geturl()
