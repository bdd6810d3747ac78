"""What Slurm's programs say of jobs, as values: states, times, attempts, steps and log files. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from tailspan.models import JobState, TaskRun

__all__ = [
    "SACCT_FIELDS",
    "SQUEUE_FIELDS",
    "JobDetails",
    "SlurmJob",
    "attributes_of",
    "details_of",
    "exit_code_of",
    "expand_pattern",
    "listed_job",
    "read_accounting",
    "read_details",
    "steps_of",
]

SQUEUE_FIELDS = {
    "id": "%A",
    "shown_id": "%i",
    "array": "%F",
    "element": "%K",
    "state": "%T",
    "reason": "%r",
    "submit": "%V",
    "start": "%S",
    "end": "%e",
    "node": "%B",
    "user": "%u",
    "partition": "%P",
    "account": "%a",
    "directory": "%Z",
    "comment": "%k",
    "name": "%j",
    "uid": "%U",
}
"""The fields of ``squeue -o``; a field of free text is neither the first nor the last."""

SACCT_FIELDS = {
    "id": "JobIDRaw",
    "shown_id": "JobID",
    "state": "State",
    "exit": "ExitCode",
    "submit": "Submit",
    "start": "Start",
    "end": "End",
    "node": "NodeList",
    "user": "User",
    "partition": "Partition",
    "account": "Account",
    "reason": "Reason",
    "directory": "WorkDir",
    "comment": "Comment",
    "name": "JobName",
    "uid": "UID",
}
"""The fields of ``sacct -o``."""

_STATES: Mapping[str, JobState] = {
    **dict.fromkeys(
        ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"), JobState.PENDING
    ),
    **dict.fromkeys(
        ("CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STAGE_OUT", "STOPPED", "SIGNALING", "RESIZING"),
        JobState.RUNNING,
    ),
    "COMPLETED": JobState.SUCCEEDED,
    **dict.fromkeys(("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "LAUNCH_FAILED"), JobState.FAILED),
    **dict.fromkeys(("CANCELLED", "REVOKED"), JobState.CANCELED),
    "TIMEOUT": JobState.TIMED_OUT,
    **dict.fromkeys(("NODE_FAIL", "PREEMPTED"), JobState.LOST),
}
_RESULTS = {
    JobState.SUCCEEDED: "success",
    JobState.FAILED: "failure",
    JobState.CANCELED: "cancellation",
    JobState.TIMED_OUT: "timeout",
    JobState.LOST: "error",
}
_NEVER = "DependencyNeverSatisfied"
_UNKNOWN = ("", "None", "(null)", "N/A", "n/a", "NONE", "Unknown")
_SIGNALED = 128
_DETAILS_LINE = re.compile(r"^JobId=(\d+) ", re.MULTILINE)
_VALUE = re.compile(r"(.*?)(?= [A-Z][A-Za-z/:&_]*=|\s*$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """One attempt of a job.

    Attributes:
        job_id: Its id; an element of an array has one of its own.
        name: Its name.
        state: Its state.
        word: The same in Slurm's words.
        reason: Why it waits or ended, in Slurm's words; empty if Slurm has none.
        exit_code: 128 + n after signal n; None if it is not known.
        submitted_s: When it was submitted or requeued, in seconds since the epoch.
        started_s: When it began to execute; None before.
        ended_s: When it ended; None before.
        attempt: How often it has started, at least 1.
        array: The id of its array, and its number there, for example ``("3", "0")``; None outside of arrays.
        node: The node that runs its script.
        user: Its user's name.
        uid: Its user's id; -1 if it is not known.
        partition: Its partition.
        account: Its account.
        directory: Its working directory.
        comment: Its comment.
    """

    job_id: str
    name: str
    state: JobState
    word: str
    reason: str = ""
    exit_code: int | None = None
    submitted_s: int | None = None
    started_s: int | None = None
    ended_s: int | None = None
    attempt: int = 1
    array: tuple[str, str] | None = None
    node: str = ""
    user: str = ""
    uid: int = -1
    partition: str = ""
    account: str = ""
    directory: str = ""
    comment: str = ""

    @property
    def newest_s(self) -> int:
        """The time of the last change, in seconds since the epoch."""
        return max(self.submitted_s or 0, self.started_s or 0, self.ended_s or 0)

    @property
    def error(self) -> str | None:
        """Why it did not succeed, or never will."""
        if self.state is JobState.PENDING:
            return "DependencyNeverSatisfied: it waits for ever, cancel it" if self.reason == _NEVER else None
        if not self.state.is_terminal or self.state is JobState.SUCCEEDED:
            return None
        parts = [self.word, "" if self.reason in (self.word, "NonZeroExitCode") else self.reason]
        if self.exit_code:
            parts.append(f"exit code {self.exit_code}")
        return ", ".join(part for part in parts if part)

    @property
    def shown_code(self) -> int | None:
        """The exit code; Slurm reports 0 for jobs that it ended."""
        return None if self.exit_code == 0 and self.state is not JobState.SUCCEEDED else self.exit_code

    @property
    def shown_id(self) -> str:
        """The id as Slurm shows it to people: an element of an array has the array's id."""
        return self.job_id if self.array is None else "_".join(self.array)


class JobDetails(NamedTuple):
    """What only ``scontrol show job`` has.

    Attributes:
        submitted_s: Distinguishes attempts: a requeued job has another one.
        stdout: The file of the output; empty without one.
        stderr: The file of the errors; empty if that is the same one.
        restarts: How often the job was requeued.
        exit_code: See `SlurmJob`.
    """

    submitted_s: int | None
    stdout: str
    stderr: str
    restarts: int
    exit_code: int | None


def listed_job(row: Mapping[str, str]) -> SlurmJob | None:
    """Return the job of a row of squeue; None for elements of an array that have no id yet."""
    element = _known(row["element"])
    if (element and not element.isdigit()) or not row["id"].isdigit():
        return None
    return _job(row, (row["array"], element) if element else None)


def read_accounting(rows: Iterable[Mapping[str, str]]) -> tuple[dict[str, SlurmJob], dict[str, list[TaskRun]]]:
    """Return the last attempt of each job that accounting has, and the steps of that attempt.

    Args:
        rows: Of ``sacct --duplicates``: an attempt that was requeued has a row of its own.
    """
    jobs: dict[str, SlurmJob] = {}
    starts: dict[str, set[int]] = {}
    steps: list[tuple[str, TaskRun]] = []
    for row in rows:
        job_id, _, step = row["id"].partition(".")
        if "[" in row["shown_id"] or not job_id.isdigit():
            continue
        if step:
            steps.append((job_id, _step(row, step)))
            continue
        array, _, element = row["shown_id"].partition("_")
        job = _job(row, (array, element) if element else None)
        if job.started_s is not None:
            starts.setdefault(job_id, set()).add(job.started_s)
        known = jobs.get(job_id)
        if known is None or (job.submitted_s or 0) >= (known.submitted_s or 0):
            jobs[job_id] = job
    tasks: dict[str, list[TaskRun]] = {}
    for job_id, run in steps:
        last, began = jobs.get(job_id), run.started_at
        if last is not None and began is not None and last.started_s is not None and began >= _utc(last.started_s):
            tasks.setdefault(job_id, []).append(run)
    counted = {
        job_id: dataclasses.replace(job, attempt=max(1, len(starts.get(job_id, ())))) for job_id, job in jobs.items()
    }
    return counted, tasks


def read_details(text: str) -> tuple[dict[str, JobDetails], set[str]]:
    """Return the details of jobs by id, and the ids that have more than one line.

    A job's name can have newlines, and what follows them can look like the line of another job.

    Args:
        text: What ``scontrol -o show job`` prints.
    """
    found: dict[str, JobDetails] = {}
    repeated: set[str] = set()
    starts = [match.start() for match in _DETAILS_LINE.finditer(text)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        line = text[start:end]
        job_id = line[len("JobId=") :].partition(" ")[0]
        if job_id in found:
            repeated.add(job_id)
            continue
        found[job_id] = details_of(line)
    return found, repeated


def details_of(line: str) -> JobDetails:
    """Return the details that the line of one job has."""
    stdout, stderr = _last(line, "StdOut"), _last(line, "StdErr")
    restarts = _last(line, "Restarts")
    return JobDetails(
        _seconds(_last(line, "SubmitTime")),
        stdout if stdout.startswith("/") else "",
        stderr if stderr.startswith("/") and stderr != stdout else "",
        int(restarts) if restarts.isdigit() else 0,
        exit_code_of(_last(line, "ExitCode")),
    )


def exit_code_of(text: str) -> int | None:
    """Return the exit code of ``code:signal``; None for another text."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None:
        return None
    return _SIGNALED + int(match[2]) if int(match[2]) else int(match[1])


def expand_pattern(pattern: str, job: SlurmJob) -> str:
    """Return the path of a log with the job's ids in place of ``%j`` and so on.

    Source: sbatch(1), "filename pattern". Numbers between ``%`` and the letter pad with zeros.
    """
    array, element = job.array or (job.job_id, "4294967294")
    values = {"j": job.job_id, "J": job.job_id, "A": array, "a": element, "x": job.name, "u": job.user, "%": "%"}
    values |= {"N": job.node.partition(".")[0], "n": "0", "t": "0", "s": "batch", "b": element[-1:]}

    def value(match: re.Match[str]) -> str:
        found = values.get(match[2], match[0])
        return found.zfill(min(int(match[1] or 0), 10)) if found.isdigit() else found

    path = re.sub(r"%(\d{0,2})([a-zA-Z%])", value, pattern)
    return path if path.startswith("/") else f"{job.directory}/{path}"


def attributes_of(comment: str) -> dict[str, str]:
    """Return the attributes that a job's comment has as ``key=value,key=value``; none for another text."""
    pairs = [pair.partition("=") for pair in comment.split(",")] if comment else []
    if not all(separator and re.fullmatch(r"[A-Za-z][\w.-]*", key) for key, separator, _ in pairs):
        return {}
    return {key: value for key, _, value in pairs}


def _job(row: Mapping[str, str], array: tuple[str, str] | None) -> SlurmJob:
    word = row["state"].partition(" ")[0].rstrip("+")  # CANCELLED by 1000
    state = _STATES.get(word, JobState.UNKNOWN)
    submitted_s, started_s, ended_s = _seconds(row["submit"]), _seconds(row["start"]), _seconds(row["end"])
    if state is JobState.PENDING and word != "REQUEUED":
        started_s = None  # when it is planned to start
    code = exit_code_of(row.get("exit", "")) if state.is_terminal else None
    uid = row["uid"].strip()
    return SlurmJob(
        job_id=row["id"],
        name=" ".join(row["name"].split()) or row["id"],
        state=state,
        word=word,
        reason=_known(row["reason"]),
        exit_code=code,
        submitted_s=submitted_s,
        started_s=started_s,
        ended_s=ended_s if state.is_terminal else None,
        array=array,
        node=_known(row["node"]),
        user=row["user"],
        uid=int(uid) if uid.isdigit() else -1,
        partition=row["partition"],
        account=_known(row["account"]),
        directory=row["directory"],
        comment=_known(row["comment"]),
    )


def _step(row: Mapping[str, str], step: str) -> TaskRun:
    word = row["state"].partition(" ")[0].rstrip("+")
    result = _RESULTS.get(_STATES.get(word, JobState.UNKNOWN))
    code = exit_code_of(row["exit"]) if result else None
    failed = result not in (None, "success")
    return TaskRun(
        task_id=row["id"],
        name=row["name"] or step,
        result=result,
        submitted_at=_time(row["submit"]),
        started_at=_time(row["start"]),
        finished_at=_time(row["end"]) if result else None,
        exit_code=code,
        error=f"{word}, exit code {code}" if failed and code else word if failed else None,
        instance_id=_known(row["node"]) or None,
    )


def _known(text: str) -> str:
    return "" if text in _UNKNOWN else text


def _seconds(text: str) -> int | None:
    return int(text) if text.isdigit() and len(text) <= len("1795976004") else None


def _utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _time(text: str) -> datetime | None:
    seconds = _seconds(text)
    return None if seconds is None else _utc(seconds)


def _last(line: str, key: str) -> str:
    """Return the last value of a key: what stands before it may be free text."""
    _, found, rest = line.rpartition(f" {key}=")
    if not found:
        return ""
    match = _VALUE.match(rest)
    return match[1] if match is not None else ""


def steps_of(tasks: Sequence[TaskRun]) -> Iterator[TaskRun]:
    """Yield the steps that people know: not the one that Slurm makes for its own processes."""
    return (task for task in tasks if not task.task_id.endswith(".extern"))
