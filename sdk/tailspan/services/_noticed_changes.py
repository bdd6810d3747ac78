"""`NoticedChanges`: changed jobs on their way from tasks that notice them to the `ChangeFeed.wait` of their feed."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from tailspan.errors import ServiceError

__all__ = ["NoticedChanges"]


class NoticedChanges:
    """What a feed will report next; for feeds whose own tasks follow the service.

    Attributes:
        failure: Why no further change will come; None while the service is followed.
    """

    def __init__(self) -> None:
        self.failure: ServiceError | None = None
        self._jobs: set[str] = set()
        self._all = False
        self._noticed = asyncio.Event()

    def add(self, job_ids: Collection[str]) -> None:
        """Report these jobs."""
        self._jobs.update(job_ids)
        self._noticed.set()

    def add_all(self) -> None:
        """Report that every job may have changed."""
        self._all = True
        self._noticed.set()

    def fail(self, error: ServiceError) -> None:
        """Report that no further change will come."""
        self.failure = error
        self._noticed.set()

    async def take(self) -> Collection[str] | None:
        """Wait for changes and return them, as `tailspan.services.ChangeFeed.wait` does.

        Raises:
            ServiceError: No further change will come.
        """
        while True:
            if self.failure is not None:
                raise self.failure
            if self._all:
                self._all = False
                self._jobs.clear()
                return None
            if self._jobs:
                found, self._jobs = self._jobs, set()
                return found
            self._noticed.clear()
            await self._noticed.wait()
