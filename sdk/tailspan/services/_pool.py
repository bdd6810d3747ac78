"""The services that one client has opened, by name and by job."""

from __future__ import annotations

import os
import sys
import weakref
from typing import TYPE_CHECKING

from tailspan.errors import ConfigError
from tailspan.local.run_settings import is_plain, load_run_settings
from tailspan.models import CoerceableToJobId, job_id_of
from tailspan.services import JobService
from tailspan.services.registry import check_service_type, open_service

if TYPE_CHECKING:
    from tailspan.config import Settings

__all__ = ["OpenedServices"]

_opened_by_name: weakref.WeakSet[JobService] = weakref.WeakSet()


class OpenedServices:
    """Opens configured services at first use, keeps them, and closes them in the end."""

    def __init__(self, settings: Settings | None, default: str | JobService | None) -> None:
        """Open nothing yet.

        Args:
            settings: The configuration; None loads it at first use, and again when ``TAILSPAN_*`` has changed.
            default: The service of calls that name none; None is ``default_service`` of the configuration.
        """
        self._settings = settings
        self._loads_settings = settings is None
        self._loaded_from: list[tuple[str, str]] = []
        self._default = default
        self._services: dict[str, JobService] = {}
        self._retired: list[JobService] = []

    @property
    def settings(self) -> Settings:
        """The configuration.

        Raises:
            ConfigError: It cannot be read, or a key is wrong.
        """
        if self._loads_settings:
            found = _variables()
            if self._settings is None or found != self._loaded_from:
                from tailspan.config import load_settings

                # A notebook may set TAILSPAN_CONFIG after its first call.
                self._settings, self._loaded_from = load_settings(telemetry=False), found
                self._retired.extend(self._services.values())
                self._services = {}
        assert self._settings is not None
        return self._settings

    def service(self, which: str | JobService | None) -> JobService:
        """Return the service of that name, opened at first use; an object is returned as it is.

        Raises:
            ConfigError: No such service is configured, or its options are wrong.
        """
        if which is None:
            which = self._default
        if which is not None and not isinstance(which, str):
            # Without a type checker, objects written to the protocol of earlier versions arrive here.
            check_service_type(type(which), "service")
            return which
        if which in (None, "local") and (plain := self._without_configuration()) is not None:
            return plain
        settings = self.settings
        name = which or settings.default_service
        if name not in self._services:
            self._services[name] = open_service(name, settings)
            _opened_by_name.add(self._services[name])
        return self._services[name]

    def _without_configuration(self) -> JobService | None:
        """Return the local service where nothing is configured: loading that would take most of a command's time."""
        if not self._loads_settings or not is_plain(os.environ):
            return None
        found = _variables()
        service = self._services.get("local")
        if found != self._loaded_from or service is None:
            from tailspan.services.local import LocalService

            service = LocalService.from_run_settings("local", load_run_settings(None, "local", os.environ))
            _opened_by_name.add(service)
            self._retired.extend(self._services.values())
            self._settings, self._loaded_from, self._services = None, found, {"local": service}
        return service

    def reads_directly(self, job: CoerceableToJobId | None, service: str | JobService | None) -> bool:
        """Return whether reads wait for nothing: those of local jobs.

        Args:
            job: The job; None: all of them.
            service: The service of the call.

        Raises:
            ConfigError: The argument names no job, or the configuration cannot be read.
        """
        which = service or self._default
        if job is not None and not isinstance(job, str) and service is None:
            # It may be of a service that another client opened.
            which = self.find(job, None)[0]
        if which is None or isinstance(which, str):
            return self._is_local(which)
        local = sys.modules.get("tailspan.services.local")
        return local is not None and type(which) is local.LocalService

    def _is_local(self, which: str | None) -> bool:
        if which in (None, "local") and self._loads_settings and is_plain(os.environ):
            return True
        name = which or self.settings.default_service
        # An unknown name is an error of the call that follows.
        return self.settings.services.get(name, {}).get("type") == "local"

    def find(self, job: CoerceableToJobId, service: str | JobService | None) -> tuple[JobService, str]:
        """Return the service of a job, and the job's id there.

        Raises:
            ConfigError: The argument names no job, or no such service is configured.
        """
        job_id = job_id_of(job)
        if service is not None or isinstance(job, str):
            return self.service(service), job_id
        if isinstance(job._origin, JobService):
            return self._own(job._origin), job_id
        return self.service(job.service), job_id

    async def aclose(self) -> None:
        """Close the services that were opened here; service objects given by the caller stay open."""
        services, self._services, self._retired = [*self._services.values(), *self._retired], {}, []
        for service in services:
            await service.aclose()

    def _own(self, origin: JobService) -> JobService:
        # A service that another client opened by name belongs to that client's loop, which may be closed or, after a
        # fork, gone.
        if origin not in _opened_by_name or origin in self._services.values():
            return origin
        try:
            ours = self.service(origin.name)
        except ConfigError:
            return origin
        return ours if ours.identity == origin.identity else origin


def _variables() -> list[tuple[str, str]]:
    return sorted((key, value) for key, value in os.environ.items() if key.startswith("TAILSPAN_"))
