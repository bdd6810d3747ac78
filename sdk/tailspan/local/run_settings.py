"""What `tailspan run` needs of the configuration: where local jobs are kept, and where their telemetry goes.

It reads these tables alone, without the configuration's classes, which take longer to import than most commands run;
mistakes elsewhere in the file are none of its business. `tailspan run --strict` reads all of it.
"""

from __future__ import annotations

import os
import sys

from tailspan.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["CANCEL_GRACE_S", "RunSettings", "default_agent_dir", "is_plain", "load_run_settings", "otlp_variables"]

CANCEL_GRACE_S = 10.0
"""How long a job that is cancelled has between SIGTERM and SIGKILL, in seconds."""

_PREFIX = "TAILSPAN_"
_KNOWN = ("type", "state_dir", "group", "keep_finished", "encoding")
_PLAIN = ("TAILSPAN_STATE_DIR", "TAILSPAN_SERVICES__LOCAL__STATE_DIR", "TAILSPAN_SERVICES__LOCAL__GROUP")
_SIGNALS = ("logs", "traces", "metrics")
_VARIABLES = {
    "endpoint": "ENDPOINT",
    "protocol": "PROTOCOL",
    "ca_file": "CERTIFICATE",
    "client_cert": "CLIENT_CERTIFICATE",
    "client_key": "CLIENT_KEY",
    "insecure": "INSECURE",
}


class RunSettings:
    """Where a local job goes.

    Attributes:
        state_dir: Its directory.
        group: The name of the group that may read it; None: only its user.
        gid: Its number.
        encoding: The codec of its output; None: captured as it is.
        otlp: ``OTEL_*`` variables for its command.
        keep_finished: How long it is kept after its end, as configured, unchecked; None: the default time.
        agent_dir: The state directory of the agent, as configured; None: the default one.
    """

    def __init__(
        self,
        state_dir: str,
        group: str | None,
        gid: int | None,
        encoding: str | None,
        otlp: dict[str, str],
        keep_finished: object = None,
        agent_dir: str | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.group = group
        self.gid = gid
        self.encoding = encoding
        self.otlp = otlp
        self.keep_finished = keep_finished
        self.agent_dir = agent_dir


def is_plain(environ: Mapping[str, str]) -> bool:
    """Return whether there is no configuration beyond the state directory of local jobs and its group.

    Args:
        environ: The environment.
    """
    return all(name in _PLAIN for name, value in environ.items() if value and name.upper().startswith(_PREFIX))


def load_run_settings(path: str | None, service: str, environ: Mapping[str, str]) -> RunSettings:
    """Return where the jobs of a local service go.

    Args:
        path: The configuration file; None: the one that ``TAILSPAN_CONFIG`` names, if any.
        service: The service's name.
        environ: The environment, whose ``TAILSPAN_*`` variables win over the file.

    Raises:
        ConfigError: The file cannot be read, or what it says of local jobs is not usable.
    """
    path = path or environ.get("TAILSPAN_CONFIG") or None
    table: dict[str, Any] = {} if path is None else _read(path)
    options, otlp = _table(table, f"services.{service}"), _table(table, "otlp")
    key = f"services.{service}"
    _overlay(options, environ, f"{_PREFIX}SERVICES__{service.upper()}__")
    if service == "local" and "TAILSPAN_SERVICES__LOCAL__STATE_DIR" not in environ:
        _overlay(options, {f"X_{_PREFIX}STATE_DIR": environ.get(f"{_PREFIX}STATE_DIR", "")}, f"X_{_PREFIX}")
    _overlay(otlp, environ, f"{_PREFIX}OTLP__")
    for signal in _SIGNALS:
        own = _table(otlp, signal)
        _overlay(own, environ, f"{_PREFIX}OTLP__{signal.upper()}__")
        otlp[signal] = own
    if not options and service != "local":
        raise ConfigError(f"no service named {service!r} is configured", key=key)
    kind = options.get("type", service)
    if kind != "local":
        raise ConfigError(
            f"the service {service!r} is not on this machine: add --detach to submit a job to it", key=key
        )
    unknown = sorted(set(options) - set(_KNOWN))
    if unknown:
        raise ConfigError(f"{key}.{unknown[0]}: unknown key; known: {', '.join(_KNOWN)}", key=f"{key}.{unknown[0]}")
    for name in ("state_dir", "group", "encoding"):
        if name in options and not isinstance(options[name], str):
            raise ConfigError(f"{key}.{name}: expected text in quotes", key=f"{key}.{name}")
    group, encoding = options.get("group"), options.get("encoding")
    return RunSettings(
        _state_dir(options.get("state_dir"), environ, key),
        group,
        None if group is None else _gid(group, key),
        encoding,
        otlp_variables(otlp, service),
        options.get("keep_finished"),
        _agent_dir(table, environ),
    )


def default_agent_dir(environ: Mapping[str, str]) -> str:
    """Return the state directory of an agent that names none.

    Args:
        environ: The environment.

    Raises:
        ConfigError: The home directory is not known.
    """
    return os.path.join(_state_dir(None, environ, "agent"), "agent")


def _agent_dir(table: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    agent = _table(table, "agent")
    _overlay(agent, environ, f"{_PREFIX}AGENT__")
    given = agent.get("state_dir")
    return os.path.expanduser(given) if isinstance(given, str) and given else None


def otlp_variables(otlp: Mapping[str, Any], service: str) -> dict[str, str]:
    """Return the ``OTEL_*`` variables that send a program's telemetry where the agent sends the job's.

    Headers are left out: they hold credentials, which an environment shows to other processes.

    Args:
        otlp: The table ``[otlp]``.
        service: The name of the job's service, which is the namespace of its telemetry.
    """
    variables: dict[str, str] = {}
    for signal in ("", *_SIGNALS):
        keys = _table(otlp, signal) if signal else otlp
        infix = f"{signal.upper()}_" if signal else ""
        for name, suffix in _VARIABLES.items():
            value = keys.get(name)
            if value is not None and not isinstance(value, dict | list):
                text = str(value).lower() if isinstance(value, bool) else str(value)
                variables[f"OTEL_EXPORTER_OTLP_{infix}{suffix}"] = text
        if keys.get("endpoint") and not otlp.get("protocol"):
            variables.setdefault(f"OTEL_EXPORTER_OTLP_{infix}PROTOCOL", "http/protobuf")
    if not any(name.endswith("ENDPOINT") for name in variables):
        variables.clear()
    resource = otlp.get("resource")
    pairs = dict(resource) if isinstance(resource, dict) else {}
    pairs = {"service.namespace": service, **pairs}
    from tailspan.local.environment import quoted

    variables["OTEL_RESOURCE_ATTRIBUTES"] = ",".join(
        [f"{quoted(str(key))}={quoted(_text(value))}" for key, value in pairs.items()]
    )
    return variables


def _text(value: object) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _read(path: str) -> dict[str, Any]:
    from tailspan._config_file import read_config_text

    text = read_config_text(path)
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: broken TOML: {error}") from None


def _table(table: Mapping[str, Any], path: str) -> dict[str, Any]:
    inner: Any = table
    for part in path.split("."):
        inner = inner.get(part, {}) if isinstance(inner, dict) else {}
    return dict(inner) if isinstance(inner, dict) else {}


def _overlay(table: dict[str, Any], environ: Mapping[str, str], prefix: str) -> None:
    for variable, value in environ.items():
        name = variable.upper()
        if name.startswith(prefix) and value and "__" not in name[len(prefix) :]:
            key = name[len(prefix) :].lower()
            table[key] = _pairs(value) if key == "resource" else value


def _pairs(text: str) -> dict[str, str]:
    from urllib.parse import unquote

    pairs = [pair.split("=", 1) for pair in text.split(",") if "=" in pair]
    return {unquote(key.strip()): unquote(value.strip()) for key, value in pairs}


def _state_dir(given: str | None, environ: Mapping[str, str], key: str) -> str:
    if given is not None and (not given or "\0" in given):
        raise ConfigError(f"{key}.state_dir: expected the path of a directory", key=f"{key}.state_dir")
    if given is None and sys.platform != "darwin" and environ.get("XDG_STATE_HOME", "").startswith("/"):
        return os.path.join(environ["XDG_STATE_HOME"], "tailspan")
    below_home = "~/Library/Application Support/tailspan" if sys.platform == "darwin" else "~/.local/state/tailspan"
    path = os.path.expanduser(below_home if given is None else given)
    if path.startswith("~"):
        raise ConfigError("the home directory is not known: set HOME, or a state_dir in the configuration", key=key)
    return path


def _gid(group: str, key: str) -> int:
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {group!r} on this machine", key=f"{key}.group") from None
