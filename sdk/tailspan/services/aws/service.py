"""`AwsService`: what the services of AWS share: descriptions of many jobs at once, and lines from CloudWatch Logs."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import quote

from tailspan._identity import check_job_id
from tailspan.config import Settings, validate_options
from tailspan.errors import ConfigError, JobNotFoundError, ProtocolError, TailspanError
from tailspan.logs.page import LogPage
from tailspan.models import JobStatus, TaskRun
from tailspan.services import LATE_WINDOW_S, MergingService, TaskService
from tailspan.services._gathering import Gathering, Waiting
from tailspan.services._http_service import drop_oldest
from tailspan.services.aws.logs import CloudWatchReader, LogStream
from tailspan.services.aws.requests import LOGS, Api, AwsAccount, AwsOptions, AwsRequests, console_of, region_of

__all__ = ["AwsService", "Described", "stream_url"]

_TRIES = 3
_GATHER_S = 0.5
_MOST_IDS = 100
_FRESH_S = 5.0
_MOST_KNOWN = 10_000


class Described(NamedTuple):
    """A job as its API describes it.

    Attributes:
        status: Its status.
        tasks: Every attempt of every task, oldest first.
        streams: Where its lines are.
    """

    status: JobStatus
    tasks: tuple[TaskRun, ...] = ()
    streams: tuple[LogStream, ...] = ()


class AwsService(MergingService, TaskService):
    """Base class of services of one region of AWS.

    Jobs are described up to a hundred at a time, and lines of jobs of one log group are read with one request: quotas
    are 5 to 25 requests a second for the whole account.

    Attributes:
        Options: The model of the section's keys.
        api: The API that has the jobs.
        region: The region.
    """

    Options: ClassVar[type[AwsOptions]] = AwsOptions
    api: ClassVar[Api]
    final_read = True  # events become visible seconds late, in any order
    merged_late = True
    poll_min_s = 2.0

    def __init__(self, name: str, options: AwsOptions, *, region: str, environ: Mapping[str, str] = os.environ) -> None:
        """Send nothing yet.

        Args:
            name: The configured name.
            options: The section's keys.
            region: The region.
            environ: The environment; botocore reads the environment of the process.
        """
        self.name = name
        self.options = options
        self.region = region
        self.identity = f"aws-{self.api.name}:{region}"
        self._tries = _TRIES
        self._account = AwsAccount(name, options, environ)
        self._requests: dict[tuple[Api, str], AwsRequests] = {}
        self._reader = CloudWatchReader(name, self.identity, self._logs_of)
        self._describing: Gathering[str, Described | JobNotFoundError] = Gathering(
            lambda first, others: [first, *others][: self._most_described], self._describe_all, _GATHER_S, str
        )
        # By job: when it was described, by the monotonic clock, and the result.
        self._known: dict[str, tuple[float, Described]] = {}

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any], settings: Settings) -> Self:
        """Make the service of a section ``services.NAME``.

        Raises:
            ConfigError: An option is unknown or not valid, there is no region, or botocore is not installed.
        """
        key = f"services.{name}"
        found = validate_options(cls.Options, key, options)
        try:
            region = region_of(found, os.environ)
        except ConfigError as error:
            raise ConfigError(f"{key}.{error.key}: {error}", key=f"{key}.{error.key}", service=name) from None
        if not region:
            text = "is missing, and neither AWS_REGION nor the profile has one"
            raise ConfigError(f"{key}.region: {text}", key=f"{key}.region", service=name)
        return cls(name, found, region=region)

    @property
    def tries(self) -> int:
        """How often a request that only reads is sent before its error is raised."""
        return self._tries

    @tries.setter
    def tries(self, tries: int) -> None:
        self._tries = tries
        for requests in self._requests.values():
            requests.tries = tries

    @property
    def gather_s(self) -> float:
        """See `tailspan.services.MergingService`."""
        return self._reader.gather_s

    def merges(self, cursor: bytes | None) -> bool:
        """See `tailspan.services.MergingService`: reads of the last minutes share requests."""
        return True

    async def get_job(self, job_id: str) -> JobStatus:
        """Return the job's status."""
        return (await self._describe(job_id, fresh=True)).status

    async def list_tasks(self, job_id: str) -> Sequence[TaskRun]:
        """Return the attempts of the job's containers."""
        return (await self._describe(job_id)).tasks

    async def read_logs(
        self,
        job_id: str,
        cursor: bytes | None = None,
        *,
        since_ms: int | None = None,
        late_window_s: float = LATE_WINDOW_S,
        long_reads: AbstractAsyncContextManager[object] | None = None,
    ) -> AsyncGenerator[LogPage, None]:
        """Yield the lines of the job's containers; see `tailspan.services.MergingService.read_logs`."""
        described = await self._describe(job_id)
        pages = self._reader.read(
            job_id,
            described.streams,
            cursor,
            since_ms=since_ms,
            late_window_s=late_window_s,
            long_reads=long_reads or nullcontext(),
        )
        async with aclosing(pages):
            async for page in pages:
                yield page

    async def aclose(self) -> None:
        """Close the connections."""
        for requests in self._requests.values():
            await requests.aclose()

    @property
    def _most_described(self) -> int:
        return _MOST_IDS

    @abstractmethod
    async def _describe_ids(self, job_ids: Sequence[str]) -> Mapping[str, Described]:
        """Return what the API describes of at most a hundred jobs; unknown ones are absent."""

    async def _describe(self, job_id: str, *, fresh: bool = False) -> Described:
        """Return a job's description, not older than some seconds, or requested now."""
        known = self._known.get(job_id)
        if known is not None and not fresh and time.monotonic() - known[0] < _FRESH_S:
            return known[1]
        found = await self._describing.ask(check_job_id(job_id))
        if isinstance(found, JobNotFoundError):
            raise found
        self._known.pop(job_id, None)
        self._known[job_id] = time.monotonic(), found
        drop_oldest(self._known, _MOST_KNOWN)
        return found

    async def _describe_all(self, batch: list[Waiting[str, Described | JobNotFoundError]]) -> None:
        with self._reading("a description"):
            found = await self._describe_ids(list(dict.fromkeys(one.question for one in batch)))
        for one in batch:
            job_id = one.question
            text = f"service {self.name} knows no job {job_id}"
            one.answer = found.get(job_id) or JobNotFoundError(text, service=self.name, job_id=job_id)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Raise the error for a reply of another form than the API's."""
        try:
            yield
        except TailspanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = (
                f"{what} does not have the form that AWS gives it ({error!r}): check services.{self.name}.endpoint_url"
            )
            raise ProtocolError(text, service=self.name) from error

    async def _open(self, api: Api | None = None, region: str | None = None) -> AwsRequests:
        """Return the requests to an API in a region; by default to that of the jobs."""
        key = api or self.api, region or self.region
        if key not in self._requests:
            endpoint = await self._account.endpoint(*key)
            made = AwsRequests(self.name, *key, endpoint, self._account, self.options, self._tries)
            self._requests.setdefault(key, made)
        return self._requests[key]

    async def _logs_of(self, region: str) -> AwsRequests:
        return await self._open(LOGS, region)


def stream_url(region: str, group: str, stream: str) -> str:
    """Return the page of a log stream in the AWS console."""
    names = [quote(quote(name, safe=""), safe="").replace("%", "$") for name in (group, stream)]
    place = f"{console_of(region)}/cloudwatch/home?region={region}"
    return f"{place}#logsV2:log-groups/log-group/{names[0]}/log-events/{names[1]}"
