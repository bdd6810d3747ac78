"""`FakeSlurm`: a cluster whose programs are doubles in a directory of their own, and whose jobs write real files.

Formats and texts are those of Slurm 22.05.8, as recorded. The programs are shell scripts that print what the test wrote
last: a question costs milliseconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

__all__ = ["FakeSlurm"]

_MARK = "@@"
_LOG_CALL = 'echo "${0##*/} $*" | tr "\\n" " " >>"$D/calls"; echo >>"$D/calls"'
_TABLE = 'sed "s/@@/$d/g" "$D/{name}.txt"'
_SCRIPTS = {
    "squeue": '[ -e "$D/away" ] && fail "squeue: error: Unable to contact slurm controller (connect failure)"\n'
    'for one; do case "$one" in %A*) d=${one#%A}; d=${d%%%i*};; esac; done\n' + _TABLE.format(name="squeue"),
    "sacct": '[ -e "$D/sacct.error" ] && fail "$(cat "$D/sacct.error")"\n'
    'for one; do case "$one" in --delimiter=*) d=${one#*=};; esac; done\n' + _TABLE.format(name="sacct"),
    "scontrol": '[ "$3" = job ] || exit 1\n'
    'file=$D/scontrol${4:+-$4}.txt; [ -e "$file" ] || fail "slurm_load_jobs error: Invalid job id specified"\n'
    'cat "$file"',
    "scancel": 'grep -qx "$1" "$D/foreign" && '
    'fail "scancel: error: Kill job error on job id $1: Access/permission denied"\n'
    'grep -q "@@$1@@.*@@COMPLETED@@" "$D/squeue.txt" && '
    'fail "scancel: error: Kill job error on job id $1: Invalid job id specified"\n'
    'sed -i "/@@$1@@/s/@@RUNNING@@/@@CANCELLED@@/" "$D/squeue.txt" "$D/sacct.txt"',
    "sbatch": 'cat >"$D/script"\ngrep -q fail "$D/script" && '
    'fail "sbatch: error: Batch job submission failed: Invalid account"\necho "77;tail"',
}
_SQUEUE = (
    "id", "shown_id", "array", "element", "state", "reason", "submit", "start", "end", "node", "user", "partition",
    "account", "directory", "comment", "name", "uid",
)  # fmt: skip
_SACCT = (
    "id", "shown_id", "state", "exit", "submit", "start", "end", "node", "user", "partition", "account", "reason",
    "directory", "comment", "name", "uid",
)  # fmt: skip


class FakeSlurm:
    """A cluster. Change the rows of its jobs, then `save`.

    Attributes:
        programs: The directory of its programs.
        work: Where its jobs write.
        jobs: The jobs as rows; a row with ``forgotten`` is known to accounting only.
        controller: Whether the controller answers.
        accounting: Whether there is accounting; or what sacct says instead.
        start_s: When jobs are submitted, in seconds since the epoch.
    """

    def __init__(self, directory: Path, *, accounting: bool = True, start_s: int | None = None) -> None:
        self.programs, self.work = directory / "bin", directory / "work"
        self.programs.mkdir(parents=True)
        self.work.mkdir()
        for program, script in _SCRIPTS.items():
            file = self.programs / program
            head = f'#!/bin/sh\nD={self.programs}\nfail() {{ echo "$1" >&2; exit 1; }}\n{_LOG_CALL}\n'
            file.write_text(f"{head}{script}\n")
            file.chmod(0o755)
        self.start_s = int(time.time()) - 100 if start_s is None else start_s
        self.jobs: list[dict[str, Any]] = []
        self.controller = True
        self.accounting: bool | str = accounting
        self._attempts: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self.save()

    def save(self) -> None:
        """Let the programs see the present state."""
        listed = [row for row in self.jobs if not row.get("forgotten")]
        self._write("squeue.txt", [_row(row, _SQUEUE, "N/A") for row in listed])
        rows = [*self._attempts, *self.jobs, *self._steps]
        self._write("sacct.txt", [_row(row, _SACCT, "Unknown") for row in rows])
        self._write("foreign", [row["shown_id"] for row in listed if row["user"] == "other"])
        for old in self.programs.glob("scontrol-*.txt"):
            old.unlink()
        self._write("scontrol.txt", list(map(_details, listed)))
        for row in listed if len(listed) < 100 else []:
            self._write(f"scontrol-{row['id']}.txt", [_details(row)])
        (self.programs / "away").unlink(missing_ok=True)
        (self.programs / "sacct.error").unlink(missing_ok=True)
        if not self.controller:
            (self.programs / "away").touch()
        if self.accounting is not True:
            self._write("sacct.error", [self.accounting or "Slurm accounting storage is disabled"])

    def _write(self, name: str, lines: list[str]) -> None:
        place = self.programs / f"{name}.new"
        place.write_text("".join(f"{line}\n" for line in lines))
        place.replace(self.programs / name)

    def add_job(self, job_id: str, name: str = "etl", state: str = "RUNNING", **fields: Any) -> dict[str, Any]:
        """Add a job that writes into a file of its own, and return its row."""
        started = None if state == "PENDING" else self.start_s + 10
        ended = None if state in ("PENDING", "RUNNING", "COMPLETING") else self.start_s + 40
        row = {
            "id": job_id, "shown_id": job_id, "array": job_id, "element": "N/A", "state": state, "reason": "None",
            "submit": self.start_s, "start": started, "end": ended, "node": "node1", "user": "me", "uid": os.getuid(),
            "partition": "main", "account": "(null)", "directory": str(self.work), "comment": "(null)", "name": name,
            "exit": "0:0", "restarts": 0, "stdout": str(self.work / f"slurm-{job_id}.out"),
        }  # fmt: skip
        row |= fields
        row.setdefault("stderr", row["stdout"])
        self.jobs.append(row)
        return row

    def add_step(self, step_id: str, name: str, state: str = "COMPLETED", **fields: Any) -> None:
        """Add a step of a job."""
        job = next(row for row in self.jobs if row["id"] == step_id.partition(".")[0])
        times = {"submit": job["start"], "start": job["start"], "end": job["start"] + 2}
        self._steps.append({**job, **times, "id": step_id, "shown_id": step_id, "name": name, "state": state, **fields})

    def requeue(self, row: dict[str, Any]) -> None:
        """Requeue a job: it waits, and accounting has its attempt as one of its own."""
        self._attempts.append({**row, "state": "REQUEUED", "end": row["start"] + 5})
        row.update(state="PENDING", reason="BeginTime", submit=row["submit"] + 20, restarts=row["restarts"] + 1)
        row.update(start=row["submit"] + 120)  # when it is planned to start
        self.save()

    def start(self, row: dict[str, Any]) -> None:
        """Start a job that waits."""
        row.update(state="RUNNING", reason="None", start=row["submit"] + 1)
        self.save()

    def end(self, row: dict[str, Any], state: str = "COMPLETED", code: str = "0:0", **fields: Any) -> None:
        """End a job."""
        row.update(state=state, exit=code, end=max(row["start"] or 0, int(time.time())), **fields)
        self.save()

    def calls(self) -> list[str]:
        """Return the programs that were called since the last call, with their arguments."""
        place = self.programs / "calls"
        found = place.read_text().splitlines() if place.exists() else []
        place.write_text("")
        return [call.strip() for call in found]


def _row(job: dict[str, Any], fields: tuple[str, ...], unknown: str) -> str:
    return _MARK.join(unknown if job[field] is None else str(job[field]) for field in fields)


def _details(job: dict[str, Any]) -> str:
    array = f"ArrayJobId={job['array']} ArrayTaskId={job['element']} " if job["element"] != "N/A" else ""
    submit, start, end = ("Unknown" if job[key] is None else job[key] for key in ("submit", "start", "end"))
    return (
        f"JobId={job['id']} {array}JobName={job['name']} UserId={job['user']}({job['uid']}) Priority=4294901759"
        f" JobState={job['state']} Reason={job['reason']} Dependency=(null) Requeue=1 Restarts={job['restarts']}"
        f" BatchFlag=1 Reboot=0 ExitCode={job['exit']} SubmitTime={submit} StartTime={start} EndTime={end}"
        f" Command=(null) WorkDir={job['directory']} Comment={job['comment']} StdErr={job['stderr']}"
        f" StdIn=/dev/null StdOut={job['stdout']} Power= "
    )
