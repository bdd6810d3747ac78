"""The ``OTEL_*`` variables as a layer of the configuration. Standard library only.

Source: OpenTelemetry specification 1.5x, "OpenTelemetry Protocol Exporter" and "Environment Variable Specification".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tailspan.config.layers import Layer, Loc, parse_pairs, set_in
from tailspan.config.signals import SIGNALS
from tailspan.errors import ConfigError

__all__ = ["otel_layer"]

_KEYS = {
    "ENDPOINT": "endpoint",
    "PROTOCOL": "protocol",
    "COMPRESSION": "compression",
    "HEADERS": "headers",
    "TIMEOUT": "timeout",
    "CERTIFICATE": "ca_file",
    "CLIENT_CERTIFICATE": "client_cert",
    "CLIENT_KEY": "client_key",
    "INSECURE": "insecure",
}


def otel_layer(environ: Mapping[str, str]) -> Layer:
    """Return the settings of the ``OTEL_*`` variables; an empty variable counts as unset, by the specification.

    Raises:
        ConfigError: A variable's value is not valid.
    """
    table: dict[str, Any] = {}
    places: dict[Loc, str] = {}

    def put(path: tuple[str, ...], variable: str, value: object) -> None:
        set_in(table, path, value)
        places[path] = variable

    for signal in ("", *SIGNALS):
        for name, key in _KEYS.items():
            variable = f"OTEL_EXPORTER_OTLP_{signal.upper() + '_' if signal else ''}{name}"
            if text := environ.get(variable, "").strip():
                put(("otlp", signal, key) if signal else ("otlp", key), variable, _value(key, text, variable))
    for variable, path in (
        ("OTEL_RESOURCE_ATTRIBUTES", ("otlp", "resource")),
        ("OTEL_SERVICE_NAME", ("agent", "service_name")),
        ("OTEL_SDK_DISABLED", ("otlp", "disabled")),
    ):
        if text := environ.get(variable, "").strip():
            put(path, variable, _value(path[-1], text, variable))
    return Layer(table, places)


def _value(key: str, text: str, variable: str) -> object:
    if key in {"headers", "resource"}:
        return parse_pairs(text, variable=variable)
    if key in {"insecure", "disabled"}:
        return text.lower() == "true"  # by the specification, any other value means false
    if key == "timeout":
        # Milliseconds, by the specification; the Python exporters read seconds here.
        if not text.isascii() or not text.isdigit() or len(text) > 12:
            raise ConfigError(
                f"{variable}: expected a whole number of milliseconds, got {text[:60]!r}", key="otlp.timeout"
            )
        return int(text) / 1000
    return text
