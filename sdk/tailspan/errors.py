"""Everything Tailspan raises, as one tree.

TailspanError                      service, job_id, retryable
  ConfigError(ValueError)          names the key
  ServiceError
    JobNotFoundError               404
    AuthError                      401, 403
    RequestRejectedError           other 4xx
    ServiceUnavailableError        connect, timeout, 429, 5xx; retryable; retry_after_s
    ProtocolError                  a reply that does not match the wire format
  CursorExpiredError               lines before the cursor are gone (a gap)
  WaitTimeoutError(TimeoutError)   last status attached
  AgentError -> CheckpointError, ExportRejectedError   (in `tailspan_agent.errors`)

and one warning, InProgressWarning(UserWarning)

A failed job is a state, not an exception. Each service translates foreign errors (httpx, OSError, JSON) into
this tree at one boundary, so callers never see them.
"""

from __future__ import annotations

from tailspan._secrets import mask

# Not from `typing`, whose import costs `tailspan run` a fifth of its start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from tailspan.models import JobStatus

__all__ = [
    "AuthError",
    "ConfigError",
    "CursorExpiredError",
    "InProgressWarning",
    "JobNotFoundError",
    "ProtocolError",
    "RequestRejectedError",
    "ServiceError",
    "ServiceUnavailableError",
    "TailspanError",
    "WaitTimeoutError",
]


class TailspanError(Exception):
    """Base of all errors that Tailspan raises. Their messages have none of the tokens of this process.

    Attributes:
        service: Name of the configured service, if the error is about one.
        job_id: Id of the job, if the error is about one.
        retryable: Whether the same call may succeed later.
    """

    retryable = False

    def __init__(self, message: str, *, service: str | None = None, job_id: str | None = None) -> None:
        super().__init__(mask(message))
        self.service = service
        self.job_id = job_id


class ConfigError(TailspanError, ValueError):
    """The configuration, an argument or a job id is not usable.

    Attributes:
        key: Path of the key at fault, for example ``otlp.endpoint``; None when no single key is.
    """

    def __init__(
        self, message: str, *, key: str | None = None, service: str | None = None, job_id: str | None = None
    ) -> None:
        super().__init__(message, service=service, job_id=job_id)
        self.key = key


class ServiceError(TailspanError):
    """A job service failed."""


class JobNotFoundError(ServiceError):
    """The service has no such job."""


class AuthError(ServiceError):
    """The service rejects the credentials, or there are none."""


class RequestRejectedError(ServiceError):
    """The service understood the request and rejects it.

    Attributes:
        status_code: The HTTP status of the reply, if it came over HTTP.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        service: str | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message, service=service, job_id=job_id)
        self.status_code = status_code


class ServiceUnavailableError(ServiceError):
    """The service cannot be reached, or cannot answer now: retry later.

    Attributes:
        retry_after_s: Delay that the service demands before a retry, in seconds, if it does.
    """

    retryable = True

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        service: str | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message, service=service, job_id=job_id)
        self.retry_after_s = retry_after_s


class ProtocolError(ServiceError):
    """The reply does not match the service's wire format."""


class CursorExpiredError(TailspanError):
    """The lines before the cursor are gone at the service: a gap, which the agent counts.

    Attributes:
        resume_cursor: Where reading can continue; None: from the oldest line that is left.
    """

    def __init__(
        self,
        message: str,
        *,
        resume_cursor: bytes | None = None,
        service: str | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message, service=service, job_id=job_id)
        self.resume_cursor = resume_cursor


class WaitTimeoutError(TailspanError, TimeoutError):
    """The job had not ended at the caller's timeout.

    Attributes:
        last_status: The last status, or None when no status request was answered in time.
    """

    def __init__(
        self,
        message: str,
        *,
        last_status: JobStatus | None = None,
        service: str | None = None,
        job_id: str | None = None,
    ) -> None:
        super().__init__(message, service=service, job_id=job_id)
        self.last_status = last_status


class InProgressWarning(UserWarning):
    """The job still runs: its execution time is the time so far."""
