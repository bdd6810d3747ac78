"""Tailspan: see every batch job. Read, tail, wait for and cancel jobs of any job service.

The public names belong here and are imported at their first use; nothing here may import OpenTelemetry or the agent.
"""

from __future__ import annotations

# Not from `typing`, whose import costs `tailspan run` a fifth of its start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from tailspan._rows import Rows
    from tailspan._version import __version__ as __version__
    from tailspan.client import AsyncJobClient, Client, RunResponse
    from tailspan.config import Settings, load_settings
    from tailspan.errors import (
        AuthError,
        ConfigError,
        CursorExpiredError,
        InProgressWarning,
        JobNotFoundError,
        ProtocolError,
        RequestRejectedError,
        ServiceError,
        ServiceUnavailableError,
        TailspanError,
        WaitTimeoutError,
    )
    from tailspan.jobs import (
        job_cancel,
        job_get_exec_time,
        job_get_logs,
        job_get_status,
        job_get_tasks,
        job_list,
        job_print_logs,
        job_submit,
        job_tail_logs,
        job_wait_for_job,
    )
    from tailspan.logs.follow import TailUpdate
    from tailspan.logs.page import Line, LogPage, Message, TaskRef
    from tailspan.models import CoerceableToJobId, JobState, JobStatus, ListedJob, TaskRun
    from tailspan.services import JobService, SubmitService, TaskService
    from tailspan.services.registry import open_service

__all__ = [
    "AsyncJobClient",
    "AuthError",
    "Client",
    "CoerceableToJobId",
    "ConfigError",
    "CursorExpiredError",
    "InProgressWarning",
    "JobNotFoundError",
    "JobService",
    "JobState",
    "JobStatus",
    "Line",
    "ListedJob",
    "LogPage",
    "Message",
    "ProtocolError",
    "RequestRejectedError",
    "Rows",
    "RunResponse",
    "ServiceError",
    "ServiceUnavailableError",
    "Settings",
    "SubmitService",
    "TailUpdate",
    "TailspanError",
    "TaskRef",
    "TaskRun",
    "TaskService",
    "WaitTimeoutError",
    "job_cancel",
    "job_get_exec_time",
    "job_get_logs",
    "job_get_status",
    "job_get_tasks",
    "job_list",
    "job_print_logs",
    "job_submit",
    "job_tail_logs",
    "job_wait_for_job",
    "load_settings",
    "open_service",
]

_MODULES = {
    "tailspan._rows": ("Rows",),
    "tailspan._version": ("__version__",),
    "tailspan.client": ("AsyncJobClient", "Client", "RunResponse"),
    "tailspan.config": ("Settings", "load_settings"),
    "tailspan.errors": tuple(name for name in __all__ if name.endswith(("Error", "Warning"))),
    "tailspan.logs.follow": ("TailUpdate",),
    "tailspan.jobs": tuple(name for name in __all__ if name.startswith("job_")),
    "tailspan.models": ("CoerceableToJobId", "JobState", "JobStatus", "ListedJob", "TaskRun"),
    "tailspan.logs.page": ("Line", "LogPage", "Message", "TaskRef"),
    "tailspan.services": ("JobService", "SubmitService", "TaskService"),
    "tailspan.services.registry": ("open_service",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562), so that ``import tailspan`` costs nothing."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
