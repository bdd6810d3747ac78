"""Requests to one Fused API: replies of any size in parts, and its own errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TypeVar

from tailspan.errors import (
    ConfigError,
    CursorExpiredError,
    ProtocolError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.logs.page_wire import CURSOR_MARK, RESUME_HEADER, FrameError, read_cursor
from tailspan.services._requests import Params, Retries, ServiceRequests
from tailspan.services.fused.stream import ReplyError, Splitter

__all__ = ["FusedHttp"]

T = TypeVar("T")


class FusedHttp(ServiceRequests):
    """The requests of a Fused service."""

    async def parts(
        self,
        path: str,
        params: Params | None,
        make_splitter: Callable[[], Splitter[T]],
        expected: str,
        *,
        job_id: str | None,
        others: Mapping[str, Callable[[], Splitter[T]]] | None = None,
    ) -> AsyncGenerator[list[T], None]:
        """Yield the parts of a reply of any size as they arrive. Retries until the first part.

        Args:
            path: Below the base URL, escaped.
            params: The query.
            make_splitter: Makes the splitter of a JSON reply.
            expected: The expected reply, for errors.
            job_id: The job that the request is about; None for several.
            others: Makers of splitters for other accepted replies, by media type.
        """
        retries = Retries(self.tries)
        begun = False
        while True:
            try:
                async with (
                    self._reply("GET", path, params, job_id, also=tuple(others or ())) as response,
                    aclosing(self._pieces(response, "GET", path, job_id)) as pieces,
                ):
                    media_type = response.headers.get("content-type", "").partition(";")[0].strip()
                    splitter = (others or {}).get(media_type, make_splitter)()
                    async for piece in pieces:
                        if parts := splitter.feed(piece):
                            begun = True
                            yield parts
                    if parts := splitter.close():
                        yield parts
                return
            except (ReplyError, FrameError) as error:
                raise ProtocolError(
                    f"GET {path}: the reply should be {expected}, but {error}; check services.{self._service}.base_url "
                    f"({self._base_url})",
                    service=self._service,
                    job_id=job_id,
                ) from None
            except ServiceUnavailableError as error:
                if begun:
                    raise
                await retries.wait(error)

    def error_of(self, status: int, headers: Mapping[str, str], text: str, job_id: str | None) -> TailspanError | None:
        """Return the error for a cursor whose lines are gone."""
        resume = headers.get(RESUME_HEADER.lower())
        if status != 410 or resume is None:
            return None
        try:
            cursor = CURSOR_MARK + read_cursor(resume) if resume else None
        except ConfigError as error:
            return ProtocolError(f"{text}: {RESUME_HEADER}: {error}", service=self._service, job_id=job_id)
        return CursorExpiredError(text, resume_cursor=cursor, service=self._service, job_id=job_id)
