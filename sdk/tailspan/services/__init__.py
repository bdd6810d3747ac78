"""Job services: where jobs run, behind one small protocol.

To add a service, copy `local.py`, implement `JobService`, and announce the class by the entry point group
``tailspan.services``; the entry's name is the ``type`` in the configuration. Built-in services are announced the
same way. A service class is made by ``Service.from_options(name, options)``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tailspan.errors import ConfigError
from tailspan.logs.page import LogPage, Message
from tailspan.models import ListedJob, RunResponse

if TYPE_CHECKING:
    from tailspan.config import Settings

__all__ = [
    "LATE_WINDOW_S",
    "ChangeFeed",
    "ChangeFeedService",
    "JobService",
    "MergingService",
    "SubmitService",
    "open_service",
]

LATE_WINDOW_S = 10.0


@runtime_checkable
class JobService(Protocol):
    """Where jobs run. All methods translate foreign errors into the tree of `tailspan.errors`.

    Attributes:
        name: The configured name (``services.NAME``).
        identity: The same for every configuration of the same service.
        poll_min_s: How soon a busy job may be asked again, in seconds.
        poll_max_s: How rarely a silent job is asked, in seconds.
        final_read: Whether a job's log must be read once more from its start when it has ended, because lines may
            have become visible late (services that know only times).
    """

    name: str
    poll_min_s: float
    poll_max_s: float
    final_read: bool

    @property
    def identity(self) -> str:
        """What checkpoints and ids are keyed by; a plain attribute will do, a property may read it when first asked."""
        ...

    async def get_job(self, job_id: str) -> RunResponse:
        """Return the job's status.

        Raises:
            JobNotFoundError: The service knows no such job.
        """
        ...

    def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
    ) -> AsyncIterator[LogPage]:
        """Yield the lines that are readable now, after the cursor, page by page, and then stop.

        Closing the iterator is legal at any page; backpressure is not pulling.

        Args:
            job_id: The job.
            cursor: A page's cursor: go on after that page. None: from the start.
            since_ms: Only without cursor: lines whose time is at or after this, in ms since the epoch.
            late_window_s: How far before the cursor to look for lines that became visible late, in seconds; services
                with offsets have none.

        Yields:
            Pages that are not empty, in the order in which the service returns lines.

        Raises:
            CursorExpiredError: Lines before the cursor are gone.
            JobNotFoundError: The service knows no such job.
        """
        ...

    async def cancel(self, job_id: str) -> RunResponse:
        """Ask the job to end and return its new status; an ended job stays as it is."""
        ...

    def list_jobs(self) -> AsyncIterator[Sequence[ListedJob]]:
        """Yield the service's jobs, newest first, page by page, each once. Closing it at any page is legal."""
        ...

    async def log_times_ms(self, job_id: str) -> tuple[int, int] | None:
        """Return the times of the first and the last line in ms since the epoch, or None without lines.

        Reads as little as the service allows; memory stays bounded.
        """
        ...

    def read_messages(self, job_id: str, since_ms: int | None = None) -> AsyncIterator[Sequence[Message]]:
        """Yield the lines as messages with all the keys that the service has, oldest first."""
        ...

    async def aclose(self) -> None:
        """Release connections and files."""
        ...


@runtime_checkable
class SubmitService(JobService, Protocol):
    """A service that can also be given jobs."""

    async def submit(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> RunResponse:
        """Start a command as a job and return its first status; see `tailspan.job_submit`."""
        ...


@runtime_checkable
class MergingService(JobService, Protocol):
    """A service that reads on, after a cursor, in many jobs by one request: ask for all of them at once."""

    @property
    def gather_s(self) -> float:
        """For how long, at most, such a read waits for those of other jobs at present, in seconds; 0: not at all."""
        ...

    def merges(self, cursor: bytes | None) -> bool:
        """Return whether a read after this cursor is one of these; then no line becomes visible late behind it."""
        ...

    def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
        long_reads: AbstractAsyncContextManager[object] | None = None,
    ) -> AsyncIterator[LogPage]:
        """Yield the lines that are readable now; see `JobService.read_logs`.

        Args:
            job_id: The job.
            cursor: See there.
            since_ms: See there.
            late_window_s: See there.
            long_reads: Entered, once at most, while a job has a reply of its own, which can be long: limits how many at
                a time.
        """
        ...


class ChangeFeed(Protocol):
    """Word of what happens to jobs. It makes looking for it cheaper and is never relied on: some may be lost."""

    def follow(self, job_id: str) -> bool:
        """Begin to tell of a job; False where that is not possible and the job has to be asked for."""
        ...

    def leave(self, job_id: str) -> None:
        """Tell no more of a job; one that was not followed is fine."""
        ...

    async def wait(self) -> Collection[str] | None:
        """Wait for news and return the ids of the jobs that have some: followed ones, and ones that are new.

        Returns:
            The ids; None when some news were lost and every job may have some.

        Raises:
            ServiceError: There will be no more news: close it and open another.
        """
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


@runtime_checkable
class ChangeFeedService(JobService, Protocol):
    """A service that can tell when a job has news, so that silent jobs need not be asked."""

    def open_changes(self) -> ChangeFeed | None:
        """Begin to tell; None where that is not possible now."""
        ...


def open_service(name: str, settings: Settings) -> JobService:
    """Make the configured service of that name. Does not reach out to it.

    Args:
        name: The part after ``services.`` in the configuration; ``local`` exists without being configured.
        settings: The loaded configuration.

    Returns:
        A new service object; the caller closes it.

    Raises:
        ConfigError: No such section, no such type, or options that do not fit the type.
    """
    options: Mapping[str, Any] | None = settings.services.get(name)
    if options is None:
        known = ", ".join(sorted(settings.services))
        raise ConfigError(f"no service named {name!r} is configured; there is: {known}", key=f"services.{name}")
    kind = options.get("type", name)
    # Without a look at all installed packages for those that everybody uses.
    match kind:
        case "fused":
            from tailspan.services.fused import FusedService

            return FusedService.from_options(name, options, settings)
        case "local":
            from tailspan.services.local import LocalService

            return LocalService.from_options(name, options, settings)
    from importlib.metadata import entry_points

    found = entry_points(group="tailspan.services", name=str(kind))
    if not found:
        kinds = ", ".join(sorted(entry.name for entry in entry_points(group="tailspan.services")))
        raise ConfigError(
            f"services.{name}.type is {kind!r}, but no such service type is installed; there is: {kinds}",
            key=f"services.{name}.type",
        )
    service: JobService = next(iter(found)).load().from_options(name, options, settings)
    return service
