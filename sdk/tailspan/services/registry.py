"""Which class serves a service type: the built-in ones, and those that installed packages announce."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from tailspan.errors import ConfigError
from tailspan.services import JobService

if TYPE_CHECKING:
    from tailspan.config import Settings

__all__ = ["check_service_type", "open_service"]

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


def open_service(name: str, settings: Settings | None = None) -> JobService:
    """Make the configured service of that name. Sends no request.

    Args:
        name: The part after ``services.`` in the configuration; ``local`` exists without being configured.
        settings: The configuration; None loads it as the command line does (``TAILSPAN_CONFIG``, environment).

    Returns:
        A new service; the caller closes it.

    Raises:
        ConfigError: No such section, no such type, or options that do not fit the type.
    """
    if settings is None:
        from tailspan.config import load_settings

        settings = load_settings(telemetry=False)
    options = settings.services.get(name)
    if options is None:
        known = ", ".join(sorted(settings.services))
        raise ConfigError(f"no service named {name!r} is configured; there is: {known}", key=f"services.{name}")
    kind = _class_of(name, str(options.get("type", name)))
    return kind.from_options(name, options, settings)


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


def _class_of(name: str, kind: str) -> type[JobService]:
    # Built-in services come first: searching all installed packages takes longer than a request.
    if kind in _BUILT_IN:
        module, _, built_in = _BUILT_IN[kind].partition(":")
        known: type[JobService] = getattr(import_module(module), built_in)
        return known
    from importlib.metadata import entry_points

    key = f"services.{name}.type"
    found = next(iter(entry_points(group=_GROUP, name=kind)), None)
    if found is None:
        kinds = ", ".join(sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=_GROUP))}))
        raise ConfigError(f"{key} is {kind!r}, but no such service type is installed; there is: {kinds}", key=key)
    try:
        loaded = found.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} is {kind!r}, but {found.value} cannot be loaded: {error}", key=key) from error
    try:
        return check_service_type(loaded, f"{key} is {kind!r}")
    except ConfigError as error:
        error.key = key
        raise
