"""Which class serves a service type: the built-in ones, and those that installed packages announce."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tailspan._caller import for_callers
from tailspan.errors import ConfigError
from tailspan.services import JobService

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from tailspan.config import Settings

__all__ = ["PluginError", "check_service_type", "open_service", "place_in_plugin", "plugin_fault"]

_GROUP = "tailspan.services"

_BUILT_IN: Mapping[str, str] = {
    "airflow": "tailspan.services.airflow:AirflowService",
    "aws_batch": "tailspan.services.aws:BatchService",
    "aws_ecs": "tailspan.services.aws:EcsService",
    "dagster": "tailspan.services.dagster:DagsterService",
    "docker": "tailspan.services.docker:DockerService",
    "files": "tailspan.services.files:FilesService",
    "fused": "tailspan.services.fused:FusedService",
    "kubernetes": "tailspan.services.kubernetes:KubernetesService",
    "local": "tailspan.services.local:LocalService",
    "prefect": "tailspan.services.prefect:PrefectService",
    "ray": "tailspan.services.ray:RayService",
    "slurm": "tailspan.services.slurm:SlurmService",
    "systemd": "tailspan.services.systemd:SystemdService",
}
"""The built-in service types: each with its module, which is imported at first use, and its class."""


@for_callers
def open_service(name: str, settings: Settings | None = None) -> JobService:
    """Make the configured service of that name. Sends no request.

    Args:
        name: The part after ``services.`` in the configuration; ``local`` exists without being configured.
        settings: The configuration; None loads it as the command line does (``TAILSPAN_CONFIG``, environment).

    Returns:
        A new service; the caller closes it.

    Raises:
        ConfigError: No such section, no such type, or options that do not fit the type.
        PluginError: The service is of an installed plugin, which failed or rejects its options.
    """
    if settings is None:
        from tailspan.config import load_settings

        settings = load_settings(telemetry=False)
    options = settings.services.get(name)
    if options is None:
        known = ", ".join(sorted(settings.services))
        raise ConfigError(f"no service named {name!r} is configured; there is: {known}", key=f"services.{name}")
    kind = str(options.get("type", name))
    # Built-in services come first: searching all installed packages takes longer than a request.
    if kind in _BUILT_IN:
        module, _, built_in = _BUILT_IN[kind].partition(":")
        found: type[JobService] = getattr(import_module(module), built_in)
        return found.from_options(name, options, settings)
    return _open_plugin(name, kind, options, settings)


def check_service_type(found: object, where: str) -> type[JobService]:
    """Return the class if services can be made of it.

    Args:
        found: What claims to be a service class.
        where: What the error message begins with.

    Raises:
        ConfigError: It is not a subclass of `JobService`, or lacks methods; names the class and the cure.
    """
    if not isinstance(found, type):
        raise ConfigError(f"{where}: {found!r} is not a class: announce a subclass of tailspan.services.JobService")
    shown = f"{found.__module__}.{found.__qualname__}"
    if not issubclass(found, JobService):
        raise ConfigError(f"{where}: {shown} is not a job service: subclass tailspan.services.JobService")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{where}: {shown} is incomplete: implement {missing}")
    return found


class PluginError(ConfigError):
    """The plugin of a service cannot be used; other services can."""


def place_in_plugin(error: BaseException) -> str:
    """Return where an error of a plugin was raised, as `` (file.py:12)``; nothing if that is not known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    import traceback

    ours = os.path.dirname(os.path.dirname(__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<")) and "tailspan_agent" not in frame.filename
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def plugin_fault(service: JobService, error: BaseException) -> str | None:
    """Return an unexpected error of a plugin in one sentence, with its file and line; None if it is not the plugin's.

    Args:
        service: The service whose method was called.
        error: What it raised.
    """
    import traceback

    kind = type(service)
    if kind.__module__.partition(".")[0] == "tailspan":
        return None
    file = inspect.getsourcefile(kind)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not frames:
        return None
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"its plugin {kind.__module__}.{kind.__qualname__} failed: {what} ({file}:{frames[-1].lineno})"


def _open_plugin(name: str, kind: str, options: Mapping[str, Any], settings: Settings) -> JobService:
    from importlib.metadata import entry_points

    key = f"services.{name}.type"
    entry = next(iter(entry_points(group=_GROUP, name=kind)), None)
    if entry is None:
        kinds = ", ".join(sorted({*_BUILT_IN, *(one.name for one in entry_points(group=_GROUP))}))
        raise PluginError(
            f"{_configured_at(options, key)}{key} is {kind!r}, but no such service type is installed;"
            f" there is: {kinds}",
            key=key,
            service=name,
        )
    found: object = None
    try:
        found = entry.load()
        return check_service_type(found, f"{key} is {kind!r}").from_options(name, options, settings)
    except ConfigError as error:
        text, key = str(error), error.key or key
        place = _configured_at(options, key)
        shown = text if place and text.startswith(place) else f"{place}{text}"
        raise PluginError(f"{shown} (plugin {_label(entry)})", key=key, service=name) from error
    except (Exception, SystemExit) as error:
        did = "failed" if found is not None else "cannot be loaded"
        where = place_in_plugin(error) or _definition(found)
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise PluginError(
            f"{_configured_at(options, key)}services.{name}: the plugin {_label(entry)} {did}: {text}{where}",
            key=key,
            service=name,
        ) from error


def _label(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}, {entry.value}" if entry.dist is not None else entry.value


def _definition(found: object) -> str:
    try:
        return f" ({inspect.getsourcefile(found)}:{inspect.getsourcelines(found)[1]})"  # type: ignore[arg-type]
    except (TypeError, OSError):
        return ""


def _configured_at(options: Mapping[str, Any], key: str) -> str:
    """Return where a key is configured, or else its section, as ``config.toml:12: ``; nothing if that is not known."""
    where = getattr(options, "where", None)
    place = where(tuple(key.split("."))) if where is not None else None
    return f"{place}: " if place else ""
