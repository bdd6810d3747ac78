"""What Slurm's programs print, as recorded from Slurm 22.05.8, and as users with odd names can make it."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest

from tailspan.models import JobState
from tailspan.services.slurm.jobs import (
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    attributes_of,
    details_of,
    exit_code_of,
    expand_pattern,
    listed_job,
    read_accounting,
    read_details,
    steps_of,
)
from tailspan.services.slurm.programs import read_table

DATA = Path(__file__).parents[4] / "data" / "slurm"
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def in_seconds(text: str) -> str:
    """The recorded text as it is with ``SLURM_TIME_FORMAT=%s``."""
    return ISO.sub(lambda match: str(int(datetime.fromisoformat(match[0] + "+00:00").timestamp())), text)


def recorded_rows() -> list[dict[str, str]]:
    """The recorded rows of sacct, with the fields that were not recorded empty."""
    header, *lines = in_seconds((DATA / "sacct.txt").read_text()).splitlines()
    keys = {column: field for field, column in SACCT_FIELDS.items()}
    rows = []
    for line in lines:
        found = {
            keys[name]: value for name, value in zip(header.split("|"), line.split("|"), strict=True) if name in keys
        }
        rows.append(dict.fromkeys(SACCT_FIELDS, "") | found)
    return rows


def listed(**fields: str) -> dict[str, str]:
    """A row of squeue."""
    usual = {"id": "7", "shown_id": "7", "array": "7", "element": "N/A", "state": "RUNNING", "name": "x", "uid": "0"}
    return dict.fromkeys(SQUEUE_FIELDS, "") | usual | fields


def test_recorded_accounting() -> None:
    """States, exit codes, elements of an array, and steps, also a failed one of a job that succeeded."""
    jobs, tasks = read_accounting(recorded_rows())
    assert {job_id: (job.shown_id, job.name, job.state, job.exit_code) for job_id, job in jobs.items()} == {
        "9": ("9", "etl2", "SUCCEEDED", 0),
        "10": ("10", "tl", "RUNNING", None),
        "12": ("12", "rq", "SUCCEEDED", 0),
        "13": ("11_0", "arr2", "SUCCEEDED", 0),
        "11": ("11_1", "arr2", "FAILED", 1),
    }
    assert [(task.task_id, task.name, task.result, task.exit_code) for task in steps_of(tasks["9"])] == [
        ("9.batch", "batch", "success", 0),
        ("9.0", "prep", "success", 0),
        ("9.1", "load", "failure", 4),
    ]
    assert tasks["10"][0].finished_at is None
    assert tasks["9"][1].duration is not None
    assert tasks["9"][1].duration.total_seconds() == 2
    assert (jobs["9"].ended_s or 0) - (jobs["9"].started_s or 0) == 3


def test_recorded_details() -> None:
    """The files, of one job and of each element of an array; one file for both streams is one."""
    details = details_of(" ".join(in_seconds((DATA / "scontrol-job.txt").read_text()).split()))
    assert (details.stdout, details.stderr) == (
        "/srv/slurm/work/etl-nightly-1.out",
        "/srv/slurm/work/etl-nightly-1.err",
    )
    assert (details.restarts, details.exit_code, details.submitted_s) == (0, 0, 1_795_912_273)
    text = in_seconds((DATA / "scontrol-array.txt").read_text())
    found, repeated = read_details("\n".join(" ".join(job.split()) for job in text.split("\n\n")))
    assert not repeated
    assert {job_id: (one.stdout[-7:], one.stderr, one.exit_code) for job_id, one in found.items()} == {
        "3": ("3_2.out", "", 2),
        "8": ("3_1.out", "", 1),
        "7": ("3_0.out", "", 0),
    }


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("PENDING", "PENDING"), ("REQUEUED", "PENDING"), ("SPECIAL_EXIT", "PENDING"), ("CONFIGURING", "RUNNING"),
        ("SUSPENDED", "RUNNING"), ("COMPLETING", "RUNNING"), ("STAGE_OUT", "RUNNING"), ("COMPLETED", "SUCCEEDED"),
        ("OUT_OF_MEMORY", "FAILED"), ("BOOT_FAIL", "FAILED"), ("DEADLINE", "FAILED"), ("CANCELLED by 1000", "CANCELED"),
        ("CANCELLED+", "CANCELED"), ("TIMEOUT", "TIMED_OUT"), ("NODE_FAIL", "LOST"), ("PREEMPTED", "LOST"),
        ("SOMETHING_NEW", "UNKNOWN"),
    ],
)  # fmt: skip
def test_states(word: str, state: str) -> None:
    """Each word of Slurm is a state; one that is not known is no end."""
    job = listed_job(listed(state=word))
    assert job is not None
    assert job.state == state


def test_requeued_attempts_are_counted() -> None:
    """An attempt that was requeued has a row of its own; one that waits has not started."""
    rows = [
        dict.fromkeys(SACCT_FIELDS, "")
        | {"id": one_id, "shown_id": one_id, "state": state, "submit": submit, "start": start, "end": "", "name": "x"}
        for one_id, state, submit, start in [
            ("5", "REQUEUED", "100", "110"),
            ("5.batch", "CANCELLED", "110", "110"),
            ("5", "NODE_FAIL", "200", "210"),
            ("5", "RUNNING", "300", "310"),
            ("5.batch", "RUNNING", "310", "310"),
            ("6", "PENDING", "100", "999"),
        ]
    ]
    # An attempt that failed with its node has started, too; REQUEUED rows have a start of their own.
    jobs, tasks = read_accounting(rows)
    assert (jobs["5"].attempt, jobs["5"].state, jobs["5"].started_s) == (3, JobState.RUNNING, 310)
    assert [task.started_at.timestamp() for task in tasks["5"] if task.started_at] == [310]
    assert (jobs["6"].started_s, jobs["6"].attempt) == (None, 1)


def test_elements_without_an_id_are_no_jobs() -> None:
    """The rest of an array that waits has the id of its last element; it becomes a job when it is that one only."""
    assert listed_job(listed(id="3", shown_id="3_[1-2]", array="3", element="1-2", state="PENDING")) is None
    assert listed_job(listed(id="3", array="3", element="2-5%1", state="PENDING")) is None
    job = listed_job(listed(id="3", shown_id="3_2", array="3", element="2", state="PENDING"))
    assert job is not None
    assert (job.job_id, job.shown_id) == ("3", "3_2")
    jobs, _ = read_accounting(
        [dict.fromkeys(SACCT_FIELDS, "") | {"id": "11", "shown_id": "11_[0-1]", "state": "PENDING"}]
    )
    assert jobs == {}


def test_names_cannot_make_rows_or_paths() -> None:
    """A name with newlines that looks like another job's line neither hides nor changes that job."""
    name = "evil\nJobId=4 JobName=x UserId=root(0) SubmitTime=1 StdOut=/etc/shadow"
    text = "~".join(["9", name, "0"]) + "\n" + "~".join(["4", "etl", "1000"]) + "\n"
    assert list(read_table(text, "~", ["id", "name", "uid"])) == [
        {"id": "9", "name": name, "uid": "0"},
        {"id": "4", "name": "etl", "uid": "1000"},
    ]
    lines = (
        "JobId=4 JobName=etl SubmitTime=5 StdOut=/a/etl.out Power= \nJobId=9 JobName={} SubmitTime=6 StdOut=/o Power= "
    )
    _, repeated = read_details(lines.format(name))
    assert "4" in repeated
    own = details_of(
        "JobId=4 JobName=x StdOut=/etc/shadow Comment=a StdOut=/b  StdErr=/srv/a/e StdOut=/srv/a/b c.out Power= "
    )
    assert (own.stdout, own.stderr) == ("/srv/a/b c.out", "/srv/a/e")


@pytest.mark.parametrize(
    ("text", "code"), [("0:0", 0), ("3:0", 3), ("0:9", 137), ("0:15", 143), ("", None), ("x", None), ("9" * 99, None)]
)
def test_exit_codes(text: str, code: int | None) -> None:
    """The number after the colon is a signal."""
    assert exit_code_of(text) == code


def test_patterns_of_logs() -> None:
    """The usual patterns of sbatch, for a job and for an element of an array."""
    job = listed_job(listed(name="etl", user="me", node="n1.example", directory="/w"))
    element = listed_job(listed(id="8", array="3", element="11", directory="/w", name="a"))
    assert job is not None
    assert element is not None
    assert expand_pattern("slurm-%j.out", job) == "/w/slurm-7.out"
    assert expand_pattern("/l/%x-%u-%N-%4j-%%.log", job) == "/l/etl-me-n1-0007-%.log"
    assert expand_pattern("slurm-%A_%a.out", element) == "/w/slurm-3_11.out"


def test_attributes_in_comments() -> None:
    """A comment that consists of pairs has attributes; any other one has none."""
    assert attributes_of("team=geo,run.id=5=6") == {"team": "geo", "run.id": "5=6"}
    for comment in ("", "a comment", "team=geo, please", "=x"):
        assert attributes_of(comment) == {}
