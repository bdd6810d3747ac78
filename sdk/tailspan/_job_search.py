"""Finds the job that a user means: by its id, its name, or the beginning of its id."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing

from tailspan._identity import check_job_id
from tailspan._plural import plural
from tailspan._polling import stamped
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, RequestRejectedError, ServiceError
from tailspan.models import JobStatus, ListedJob
from tailspan.services import JobService

__all__ = ["find_job", "statuses_of", "with_names"]

_REQUESTS = 8
_NAMES_REQUESTED = 50
_SHOWN = 5
_KNOWN = 500


async def find_job(service: JobService, text: str | None) -> JobStatus:
    """Return the status of the job that a text names.

    The first of these that matches counts: an id; a name (its newest run); the beginning of one id; the
    beginning of the last part of one id, after its last hyphen.

    Args:
        service: Where the job runs.
        text: The text; None: the newest job.

    Raises:
        ConfigError: The text cannot name a job, or it is the beginning of several ids.
        JobNotFoundError: No job matches.
        ServiceError: The service failed.
    """
    if text is None:
        return stamped(await service.get_job((await _newest(service)).job_id), service)
    try:
        return stamped(await service.get_job(check_job_id(text)), service)
    except (JobNotFoundError, RequestRejectedError) as error:
        unknown = error
    try:
        row = await _search(service, text, unknown)
    except ServiceError as error:
        # What it says of the list is of no use to a user who gave an id.
        raise (error if isinstance(error, JobNotFoundError) else unknown) from None
    return stamped(await service.get_job(row.job_id), service)


async def with_names(rows: Sequence[ListedJob], service: JobService) -> list[ListedJob]:
    """Return the rows with their names; of each row without one, request the status."""
    named = list(rows)

    async def request_name(position: int) -> None:
        status = await service.get_job(rows[position].job_id)
        named[position] = dataclasses.replace(rows[position], job_name=status.job_name)

    await _for_each([position for position, row in enumerate(rows) if row.job_name is None], request_name)
    return named


async def statuses_of(rows: Sequence[ListedJob], service: JobService) -> list[tuple[ListedJob, JobStatus | None]]:
    """Return each row with its job's status; without the rows whose job is gone.

    The status is None where this user may not read it.

    Raises:
        ServiceError: The service failed.
    """
    found: list[JobStatus | None] = [None] * len(rows)
    gone: set[int] = set()

    async def request(position: int) -> None:
        try:
            found[position] = stamped(await service.get_job(rows[position].job_id), service)
        except JobNotFoundError:
            gone.add(position)
        except (AuthError, RequestRejectedError):
            pass

    if service.polls_are_free:
        for position in range(len(rows)):
            await request(position)
    else:
        await _for_each(range(len(rows)), request)
    return [
        (row, status) for position, (row, status) in enumerate(zip(rows, found, strict=True)) if position not in gone
    ]


async def _for_each(positions: Sequence[int], request: Callable[[int], Awaitable[None]]) -> None:
    """Make a request for each position, at most `_REQUESTS` at a time."""
    if not positions:
        return
    import anyio

    limit = anyio.CapacityLimiter(_REQUESTS)

    async def request_in_turn(position: int) -> None:
        async with limit:
            await request(position)

    async with anyio.create_task_group() as group:
        for position in positions:
            group.start_soon(request_in_turn, position)


async def _newest(service: JobService) -> ListedJob:
    async with aclosing(service.list_jobs()) as pages:
        async for page in pages:
            if page:
                return page[0]
    raise JobNotFoundError(f"the service {service.name!r} has no jobs yet", service=service.name)


async def _search(service: JobService, text: str, unknown: ServiceError) -> ListedJob:
    """Return the row of the job with this name, or of the only one whose id begins with the text.

    Raises:
        ConfigError: Several ids begin with it.
        JobNotFoundError: None does.
        ServiceError: The service failed; or the error that is given, if that is not a `JobNotFoundError`.
    """
    starts: list[ListedJob] = []
    last_parts: list[ListedJob] = []
    known: dict[str, None] = {}
    requested = 0
    async with aclosing(service.list_jobs()) as pages:
        async for page in pages:
            unnamed = sum(row.job_name is None for row in page)
            rows = page
            if unnamed and requested < _NAMES_REQUESTED:
                requested += unnamed
                rows = [*await with_names(page[:_NAMES_REQUESTED], service), *page[_NAMES_REQUESTED:]]
            for row in rows:
                if row.job_name == text:
                    return row
                if row.job_id.startswith(text):
                    starts.append(row)
                elif row.job_id.rpartition("-")[2].startswith(text):
                    last_parts.append(row)
                if len(known) < _KNOWN:
                    known[row.job_name or row.job_id] = None
    matching = starts or last_parts
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise ConfigError(
            f"{text!r} is the beginning of {len(matching)} job ids: {_listed(matching)};"
            " give more of the id, or a name",
            service=service.name,
        )
    if not isinstance(unknown, JobNotFoundError):
        raise unknown
    raise JobNotFoundError(
        f"{unknown}; no job has this name, and no id begins with it{_suggestion(text, known)}",
        service=service.name,
        job_id=text,
    )


def _listed(rows: Sequence[ListedJob]) -> str:
    shown = ", ".join(f"{row.job_id} ({row.job_name or 'no name'}, {row.state})" for row in rows[:_SHOWN])
    more = len(rows) - _SHOWN
    return f"{shown} and {more} more {plural(more, 'job')}" if more > 0 else shown


def _suggestion(text: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(text, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
