"""`JobBook`: all jobs as Slurm's programs said last, asked for together and not more often than each half minute."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence

import anyio

from tailspan.errors import JobNotFoundError, ServiceError, ServiceUnavailableError
from tailspan.models import JobState, TaskRun
from tailspan.services.slurm.jobs import (
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    JobDetails,
    SlurmJob,
    details_of,
    listed_job,
    read_accounting,
    read_details,
)
from tailspan.services.slurm.options import SlurmOptions
from tailspan.services.slurm.programs import AccountingDisabledError, SlurmPrograms, new_delimiter, read_table

__all__ = ["JobBook"]

# Accounting learns of an end some seconds after the controller.
_OVERLAP_S = 600.0
_NO_ACCOUNTING_S = 600.0
_FEW = 8
_MOST_ALONE = 100
_FORGOTTEN_S = 300.0
_STALE_S = 900.0
_SOON_S = 2.0


class JobBook:
    """The jobs of a cluster.

    Attributes:
        jobs: The jobs by id.
        tasks: Their steps by id, as far as accounting has them.
        details: What only ``scontrol`` knows, by id; also of jobs that the controller has forgotten.
        keeps_accounting: Whether accounting answered; None before it was asked.
        accounting_problem: Why accounting does not answer; empty if it does.
        failure: Why the last question failed; None after one that succeeded.
        answers: How many questions were answered.
    """

    def __init__(self, programs: SlurmPrograms, options: SlurmOptions) -> None:
        """Ask nothing yet."""
        self.jobs: dict[str, SlurmJob] = {}
        self.tasks: dict[str, list[TaskRun]] = {}
        self.details: dict[str, JobDetails] = {}
        self.keeps_accounting: bool | None = None if options.accounting == "auto" else options.accounting
        self.accounting_problem = ""
        self.failure: ServiceError | None = None
        self.answers = 0
        self._programs = programs
        self._options = options
        self._lock = anyio.Lock()
        self._asked_at_s = self._answered_at_s = self._accounting_off_at_s = float("-inf")
        self._accounted_until_s = 0.0
        self._missed: dict[str, float] = {}

    @property
    def is_stale(self) -> bool:
        """Whether the last question failed, and this is what an earlier one said."""
        return self.failure is not None

    async def refresh(self, *, now: bool = False) -> None:
        """Ask for all jobs, if the last question is older than the configured time.

        While the controller does not answer, what it said before counts for a quarter of an hour: the jobs go on, and
        so does reading their logs.

        Args:
            now: Whether to ask in any case, for example after a cancel.

        Raises:
            ServiceError: The controller does not answer.
        """
        async with self._lock:
            if now or time.monotonic() - self._asked_at_s >= self._options.refresh:
                self._asked_at_s = time.monotonic()
                try:
                    await self._ask()
                    self.failure, self._answered_at_s = None, time.monotonic()
                    self.answers += 1
                except ServiceError as error:
                    self.failure = error
            if self.failure is not None and time.monotonic() - self._answered_at_s > _STALE_S:
                raise self.failure

    def expire(self) -> None:
        """Let Slurm be asked again within seconds: a file shows that a job has changed."""
        self._asked_at_s = min(self._asked_at_s, time.monotonic() - self._options.refresh + _SOON_S)

    async def find(self, job_id: str) -> SlurmJob:
        """Return a job; ``3_1`` is the element 1 of the array 3.

        Raises:
            JobNotFoundError: There is no such job, or it ended too long ago.
            ServiceError: The controller does not answer.
        """
        await self.refresh()
        job = self._get(job_id)
        if job is None and self.failure is not None:
            raise ServiceUnavailableError(str(self.failure)) from self.failure
        if job is None:
            raise JobNotFoundError(f"Slurm has no job {job_id}, or it ended longer ago than history")
        return job

    def _get(self, job_id: str) -> SlurmJob | None:
        if "_" in job_id:
            return next((job for job in self.jobs.values() if job.shown_id == job_id), None)
        return self.jobs.get(job_id)

    async def _ask(self) -> None:
        listed = await self._listed()
        accounted = await self._accounted()
        await self._ask_details(listed.values())
        now_s = time.time()
        oldest_s = now_s - self._options.history
        jobs = {job_id: job for job_id, job in self.jobs.items() if (job.ended_s or now_s) > oldest_s}
        jobs |= accounted
        for job_id, job in listed.items():
            known = accounted.get(job_id)
            if known is not None and known.submitted_s == job.submitted_s and known.state.is_terminal:
                job = known  # it has the exit code
            jobs[job_id] = self._with_details(job, known or self.jobs.get(job_id))
        for job_id in jobs.keys() - listed.keys():
            jobs[job_id] = self._unlisted(jobs[job_id])
        self._missed = {job_id: since_s for job_id, since_s in self._missed.items() if job_id not in listed}
        self.jobs = jobs
        self.tasks = {job_id: tasks for job_id, tasks in self.tasks.items() if job_id in jobs}
        self.details = {job_id: details for job_id, details in self.details.items() if job_id in jobs}

    async def _listed(self) -> dict[str, SlurmJob]:
        """Return the jobs that the controller has: those that have not ended, and for some minutes the others."""
        delimiter = new_delimiter()
        arguments = ["-a", "-h", "-t", "all", *self._filters("-u", "-p")]
        text = await self._programs.run("squeue", *arguments, "-o", delimiter.join(SQUEUE_FIELDS.values()))
        jobs = map(listed_job, read_table(text, delimiter, list(SQUEUE_FIELDS)))
        return {job.job_id: job for job in jobs if job is not None}

    async def _accounted(self) -> dict[str, SlurmJob]:
        """Return the jobs of accounting that may have changed since it was asked last; none without accounting."""
        now_s = time.time()
        if self.keeps_accounting is False and (
            self._options.accounting is False or time.monotonic() - self._accounting_off_at_s < _NO_ACCOUNTING_S
        ):
            return {}
        since_s = max(now_s - self._options.history, self._accounted_until_s - _OVERLAP_S)
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since_s))
        delimiter = new_delimiter()
        arguments = ["-P", "-D", "-n", "-S", since, f"--delimiter={delimiter}", *self._filters("-u", "-r")]
        if not self._options.users:
            arguments.append("-a")
        try:
            text = await self._programs.run("sacct", *arguments, "-o", ",".join(SACCT_FIELDS.values()))
        except AccountingDisabledError as error:
            self.keeps_accounting, self._accounting_off_at_s = False, time.monotonic()
            self.accounting_problem = str(error)
            return {}
        except ServiceError as error:
            # The database is away: what it knows comes later.
            self.accounting_problem = str(error)
            return {}
        self.keeps_accounting, self.accounting_problem = True, ""
        jobs, tasks = read_accounting(read_table(text, delimiter, list(SACCT_FIELDS)))
        # By Slurm's clock: an end that this machine's clock has already passed would be missed.
        newest_s = max((job.newest_s for job in jobs.values()), default=0)
        self._accounted_until_s = min(now_s, max(self._accounted_until_s, newest_s))
        self.tasks |= tasks
        for job_id, job in jobs.items():
            # Attempts that ended before this question began are not in its answer.
            known = self.jobs.get(job_id)
            if known is not None and known.attempt > job.attempt:
                jobs[job_id] = dataclasses.replace(job, attempt=known.attempt)
        return jobs

    def _filters(self, users: str, partitions: str) -> list[str]:
        options = self._options
        found = [users, ",".join(options.users)] if options.users else []
        return found + ([partitions, ",".join(options.partitions)] if options.partitions else [])

    async def _ask_details(self, listed: Iterable[SlurmJob]) -> None:
        """Ask for the log files, restarts and exit codes of jobs that are new, requeued or ended."""
        needed = {job.job_id: job for job in listed if self._needs_details(job)}
        if not needed:
            return
        alone: Iterable[str] = needed
        if len(needed) > _FEW:
            found, repeated = read_details(await self._programs.run("scontrol", "-o", "show", "job"))
            # The name of a job can look like the line of another one: only its own answer is certain then.
            certain = {
                job_id: details
                for job_id, details in found.items()
                if job_id in needed and job_id not in repeated and details.submitted_s == needed[job_id].submitted_s
            }
            self.details |= certain
            alone = sorted(needed.keys() - certain.keys())[:_MOST_ALONE]
        for job_id in alone:
            try:
                text = await self._programs.run("scontrol", "-o", "show", "job", job_id)
            except JobNotFoundError:
                continue
            if needed[job_id].array is None:
                self.details[job_id] = details_of(text)
            elif (details := read_details(text)[0].get(job_id)) is not None:
                self.details[job_id] = details

    def _needs_details(self, job: SlurmJob) -> bool:
        known = self.details.get(job.job_id)
        if known is None or known.submitted_s != job.submitted_s:
            return True
        before = self.jobs.get(job.job_id)
        return job.state.is_terminal and not self.keeps_accounting and (before is None or not before.state.is_terminal)

    def _with_details(self, job: SlurmJob, known: SlurmJob | None) -> SlurmJob:
        """Return a job of the controller's list with its attempt and exit code."""
        details = self.details.get(job.job_id)
        restarts = details.restarts if details is not None else 0
        # A job that waits for its next attempt still belongs to the last one: lines of that may be unread.
        attempt = max(1, restarts + (job.started_s is not None), known.attempt if known is not None else 1)
        code = job.exit_code
        if job.state.is_terminal and code is None and details is not None:
            code = details.exit_code
        return dataclasses.replace(job, attempt=attempt, exit_code=code)

    def _unlisted(self, job: SlurmJob) -> SlurmJob:
        """Return a job that the controller has forgotten; without an end for some minutes, it is lost."""
        if job.state.is_terminal:
            self._missed.pop(job.job_id, None)
            return job
        since_s = self._missed.setdefault(job.job_id, time.monotonic())
        if time.monotonic() - since_s < _FORGOTTEN_S:
            return job
        reason = "the controller forgot the job, and its end is not known"
        return dataclasses.replace(job, state=JobState.LOST, word="LOST", reason=reason, ended_s=int(time.time()))

    def newest_first(self) -> Sequence[SlurmJob]:
        """Return all jobs, those that were submitted last first."""
        return sorted(self.jobs.values(), key=lambda job: (job.submitted_s or 0, int(job.job_id)), reverse=True)
