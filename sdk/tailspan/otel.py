"""Nesting of an instrumented Python program below the job that runs it. Needs the program's own OpenTelemetry API.

The OpenTelemetry SDK for Python does not read ``TRACEPARENT``. `tailspan run` sets it, and where Tailspan is installed
in the program's environment it also sets ``OTEL_PYTHON_CONTEXT=tailspan``: then the SDK takes its context from
`JobContext`, and unchanged programs nest. Elsewhere `attach` is the one line to add.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from opentelemetry.context.context import Context
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext

from tailspan.local.environment import parent_of

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

__all__ = ["JobContext", "attach"]


def attach() -> bool:
    """Make the job that runs this program the parent of all spans that this thread starts from now on.

    Returns:
        Whether the environment names a job; without one, nothing changes.
    """
    from opentelemetry import context

    parent = _parent_context()
    if parent is None:
        return False
    context.attach(parent)
    return True


class JobContext(ContextVarsRuntimeContext):
    """The SDK's own context, except that it begins below the job that runs this program, in every thread.

    Announced by the entry point group ``opentelemetry_context``; see ``OTEL_PYTHON_CONTEXT``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begin: Context | None = None

    def get_current(self) -> Context:
        """Return the current context; where nothing was attached, that of the job."""
        current = super().get_current()
        if current:
            return current
        if self._begin is None:
            # Not at once: the API makes this object while it is itself being imported.
            self._begin = _parent_context() or Context()
        return self._begin


def _parent_context() -> Context | None:
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    parent = _parent()
    return None if parent is None else set_span_in_context(NonRecordingSpan(parent), Context())


def _parent() -> SpanContext | None:
    from opentelemetry.trace import SpanContext, TraceFlags

    given = parent_of(os.environ)
    if given is None:
        return None
    _, trace_id, span_id, flags = given.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
