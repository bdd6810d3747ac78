"""Requests to one Fused API, and its own errors."""

from __future__ import annotations

from collections.abc import Mapping

from tailspan.errors import ConfigError, CursorExpiredError, ProtocolError, TailspanError
from tailspan.logs.page_wire import CURSOR_MARK, RESUME_HEADER, FrameError, read_cursor
from tailspan.services._json_stream import ReplyError
from tailspan.services._requests import ServiceRequests

__all__ = ["FusedHttp"]


class FusedHttp(ServiceRequests):
    """The requests of a Fused service."""

    reply_errors = (ReplyError, FrameError)

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
