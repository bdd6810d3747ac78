"""Records of open lines: what a job has written of a line whose newline has not come. Pure.

Such a record is an event, not a line: it has a uid of its own, and the line comes as a whole once it is complete. So
neither a restart nor a crash can lose, repeat or split a line.
"""

from __future__ import annotations

from tailspan.logs.page import LogPage, OpenLine
from tailspan.models import JobStatus
from tailspan_agent.otlp.log_record import LogRecordData
from tailspan_agent.records.encode import span_id_of

__all__ = ["OPEN_LINE", "OpenLineLimit", "open_line_record"]

OPEN_LINE = "tailspan.line.open"
"""Name of the event, and of the attribute that stores without event names keep."""
_BURST = 10
_INTERVAL_S = 10.0


class OpenLineLimit:
    """Limits the records of a job's open lines: dots and progress bars grow for hours.

    Ten may come at once, and one every 10 s.
    """

    def __init__(self) -> None:
        self._text = b""
        self._left = float(_BURST)
        self._filled_at_s = 0.0

    def wait_s(self, line: OpenLine, now_s: float) -> float | None:
        """Return how long to wait until the line may be sent, in seconds; None if its text was sent already.

        Args:
            line: The open line.
            now_s: The present moment on a monotonic clock.
        """
        if line.text == self._text:
            return None
        self._left = min(_BURST, self._left + (now_s - self._filled_at_s) / _INTERVAL_S)
        self._filled_at_s = now_s
        return max(0.0, (1 - self._left) * _INTERVAL_S)

    def on_sent(self, line: OpenLine) -> None:
        """Note that the line is sent."""
        self._text = line.text
        self._left -= 1

    def on_page(self, page: LogPage) -> None:
        """Note complete lines: another open line may have the same text as the last one."""
        if self._text and any(line.startswith(self._text) for line in page.lines):
            self._text = b""


def open_line_record(line: OpenLine, text: str, job: JobStatus) -> LogRecordData:
    """Return the log record of an open line.

    Args:
        line: The open line.
        text: Its text, cleaned and redacted.
        job: The status of the job.
    """
    return LogRecordData(
        time_unix_nano=line.time_unix_nano,
        body=text,
        attributes={"log.record.uid": line.uid, OPEN_LINE: True},
        trace_id=bytes.fromhex(job.trace_id),
        span_id=bytes.fromhex(span_id_of(job, "run")),
        event_name=OPEN_LINE,
    )
