"""From what the API says of steps to tasks. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from urllib.parse import urlencode

import msgspec

from tailspan.models import JobState, TaskRun
from tailspan.services.dagster.log import step_name
from tailspan.services.dagster.wire import ErrorInfo, Event, Run, StepStats

__all__ = ["STATES", "Notes", "Plan", "read_plan", "state_of", "task_runs", "utc"]

Plan = Mapping[str, tuple[str, ...]]

STATES: Mapping[str, JobState] = {
    "NOT_STARTED": JobState.PENDING,
    "QUEUED": JobState.PENDING,
    "STARTING": JobState.PENDING,
    "MANAGED": JobState.PENDING,
    "STARTED": JobState.RUNNING,
    "CANCELING": JobState.RUNNING,
    "SUCCESS": JobState.SUCCEEDED,
    "FAILURE": JobState.FAILED,
    "CANCELED": JobState.CANCELED,
}
_RESULTS = {"SUCCESS": "success", "FAILURE": "failure", "SKIPPED": "skip"}
_STILL_RUNNING: Mapping[JobState, str] = {JobState.CANCELED: "cancellation"}
_INTERRUPTED = "DagsterExecutionInterruptedError"
_UNRESOLVED = "[?]"
_TOO_LONG = "Exceeded maximum runtime"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Notes(msgspec.Struct):
    """What only the events of a run say.

    Attributes:
        cursor: The cursor of the last one read.
        error: Why the run failed.
        retries: How many attempts of each step have ended for a retry.
        starts: When each attempt after the first began, in ms since the epoch.
        errors: Why each attempt failed, and whether it was interrupted.
    """

    cursor: str | None = None
    error: str | None = None
    retries: dict[str, int] = {}
    starts: dict[tuple[str, int], int] = {}
    errors: dict[tuple[str, int], tuple[str, bool]] = {}

    def add(self, event: Event) -> None:
        """Take in an event."""
        kind, step = event.event_type, event.step_key or ""
        attempt = self.retries.get(step, 0) + 1
        if kind == "STEP_RESTARTED":
            self.starts[step, attempt] = event.timestamp
        elif kind == "RUN_FAILURE":
            self.error = event.message or None
        elif kind in ("STEP_FAILURE", "STEP_UP_FOR_RETRY"):
            self.errors[step, attempt] = _error(event.error)
        if kind == "STEP_UP_FOR_RETRY":
            self.retries[step] = attempt

    def lacks(self, run: Run) -> bool:
        """Return whether events that were not read say more of a run."""
        if run.status == "FAILURE" and self.error is None:
            return True
        for stats in run.step_stats:
            step, ended, status = stats.step_key, len(stats.attempts), stats.status
            failed = 0 if status == "SKIPPED" else ended - (status == "SUCCESS")
            if any((step, attempt) not in self.errors for attempt in range(1, failed + 1)):
                return True
            if status == "IN_PROGRESS" and ended and (step, ended + 1) not in self.starts:
                return True
        return False


def read_plan(run: Run) -> Plan:
    """Return the steps of a run's plan, each with those that it waits for."""
    steps = run.execution_plan.steps if run.execution_plan is not None else []
    return {
        step.key: tuple(dict.fromkeys(one.key for source in step.inputs for one in source.depends_on)) for step in steps
    }


def state_of(run: Run, notes: Notes) -> JobState:
    """Return the state of a run."""
    state = STATES.get(run.status, JobState.UNKNOWN)
    if state is JobState.FAILED and ((notes.error or "").startswith(_TOO_LONG) or _tag(run) == "START_TIMEOUT"):
        return JobState.TIMED_OUT
    return state


def task_runs(run: Run, plan: Plan, notes: Notes, run_url: str) -> list[TaskRun]:
    """Return every attempt of every step, oldest first."""
    stats = {one.step_key: one for one in run.step_stats}
    state = STATES.get(run.status, JobState.UNKNOWN)
    steps = dict.fromkeys((*(step for step in plan if not step.endswith(_UNRESOLVED)), *stats))
    found = [
        task
        for step in steps
        for task in _attempts(stats.get(step) or StepStats(step), _after(step, plan, steps), state, notes, run_url)
    ]
    return sorted(found, key=lambda task: (_order(task), task.attempt))


def _attempts(
    stats: StepStats, after: tuple[str, ...], state: JobState, notes: Notes, run_url: str
) -> Iterator[TaskRun]:
    step, status, ended = stats.step_key, stats.status, stats.attempts
    launches = sorted(one.start_time for one in stats.markers if one.start_time is not None)
    page = f"{run_url}?{urlencode({'selection': step, 'logs': f'step:{step}'})}"

    def task(attempt: int, started: float | None, finished: float | None, result: str | None) -> TaskRun:
        before = (ended[attempt - 2].end_time or 0.0) if attempt > 1 else 0.0
        submitted = next((one for one in launches if before <= one and one <= (started or one)), None)
        error, interrupted = notes.errors.get((step, attempt), ("", False))
        return TaskRun(
            task_id=step,
            name=step_name(step),
            attempt=attempt,
            result="cancellation" if result == "failure" and interrupted else result,
            submitted_at=utc(submitted),
            started_at=utc(started),
            finished_at=utc(finished),
            error=(error or None) if result == "failure" else None,
            url=page,
            after=after,
        )

    for place, one in enumerate(ended):
        result = "failure" if place < len(ended) - 1 else _RESULTS.get(status or "", "failure")
        yield task(place + 1, one.start_time, one.end_time, result)
    if status in _RESULTS and ended:
        return
    attempt = len(ended) + 1
    first = stats.start_time if not ended else None
    again = notes.starts.get((step, attempt))
    started = first if first is not None else again and again / 1000
    if not state.is_terminal:
        yield task(attempt, started, None, None)
    elif started is not None:
        yield task(attempt, started, None, _STILL_RUNNING.get(state, "error"))
    elif not ended:
        yield task(attempt, None, None, "skip")


def _after(step: str, plan: Plan, steps: Iterable[str]) -> tuple[str, ...]:
    own = plan.get(step) or plan.get(f"{step_name(step)}{_UNRESOLVED}", ())
    found: dict[str, None] = {}
    for one in own:
        if not one.endswith(_UNRESOLVED):
            found[one] = None
            continue
        # A step of a dynamic output waits for the step with the same key; one that collects, for all.
        key = step[len(step_name(step)) :]
        same = f"{step_name(one)}{key}"
        found |= dict.fromkeys([same] if key else [each for each in steps if each.startswith(f"{step_name(one)}[")])
    return tuple(found)


def _error(error: ErrorInfo | None) -> tuple[str, bool]:
    """Return the message of an error's deepest cause, and whether it is an interruption."""
    chain = [] if error is None else list(error.chain())
    return chain[-1].text.strip() if chain else "", any(one.class_name == _INTERRUPTED for one in chain)


def _tag(run: Run) -> str | None:
    return next((tag.value for tag in run.tags if tag.key == "dagster/failure_reason"), None)


def _order(task: TaskRun) -> tuple[bool, datetime]:
    times = [one for one in (task.submitted_at, task.started_at, task.finished_at) if one is not None]
    return not times, min(times, default=_EPOCH)


def utc(seconds: float | None) -> datetime | None:
    """Return a time of the API, in seconds since the epoch, as a datetime; None for one that there cannot be."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None
