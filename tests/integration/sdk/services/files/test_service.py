"""Log files as jobs: how their runs end, and which run wrote what."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import pytest

from tailspan.config import validate_options
from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceUnavailableError
from tailspan.logs.page import LogPage
from tailspan.models import JobState, JobStatus, ListedJob
from tailspan.services.files import FilesOptions, FilesService
from tailspan.testing import ServiceConformance
from tests.fakes.json_api import pages_of

NOW = time.time()
LSF_END = """

------------------------------------------------------------
Sender: LSF System <lsfadmin@node1>
Subject: Job 7: <x> in cluster <c> Exited

{how}

Resource usage summary:

    CPU time :                                   1.75 sec.
    Run time :                                   2 sec.

The output (if any) is above this job summary.

"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory of the logs."""
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def service_of(root: Path, **keys: object) -> FilesService:
    """A service over the logs."""
    options = validate_options(FilesOptions, "services.files", {"root": str(root), "host": "node1", **keys})
    return FilesService("files", options, state_dir=root.parent / "state")


def write(path: Path, text: str, *, ago_s: float = 5.0) -> Path:
    """Write a file that was written some seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (NOW - ago_s, NOW - ago_s))
    return path


def append(path: Path, text: str, *, ago_s: float = 4.0) -> None:
    """Append to a file."""
    with path.open("a") as log:
        log.write(text)
    os.utime(path, (NOW - ago_s, NOW - ago_s))


def status_of(service: FilesService, job_id: str) -> JobStatus:
    """The status of a job as it is now."""
    service._jobs_at_s = float("-inf")
    return anyio.run(service.get_job, job_id)


def rows_of(service: FilesService) -> dict[str, ListedJob]:
    """The jobs as they are now."""

    async def rows() -> Sequence[ListedJob]:
        return [row async for page in service.list_jobs() for row in page]

    service._jobs_at_s = service._rows_until_s = float("-inf")
    return {row.job_id: row for row in anyio.run(rows)}


def lines_of(service: FilesService, job_id: str, cursor: bytes | None = None) -> list[str]:
    """The lines of a job."""
    return [line.decode() for page in pages_of(service, job_id, cursor) for line in page.lines]


class TestConformance(ServiceConformance):
    """The promises of every service, for a log with several pages."""

    @pytest.fixture(autouse=True)
    def _use(self, root: Path) -> None:
        self._root = root
        write(root / "a" / "nightly-1.log", "".join(f"line {number}\n" for number in range(12_000)), ago_s=9)
        write(root / "nightly-2.log", "x\ny\nexit 0\n")

    def make_service(self) -> FilesService:
        """A new service."""
        return service_of(self._root, end_marker=r"^exit (?P<exit_code>\d+)", silence="8s")


class TestConformanceOfRuns(ServiceConformance):
    """The promises of every service, for runs that follow each other in one file."""

    @pytest.fixture(autouse=True)
    def _use(self, root: Path) -> None:
        self._root = root
        write(root / "cron.log", "a\nend\nb\nb\nend\n")

    def make_service(self) -> FilesService:
        """A new service."""
        return service_of(self._root, runs="append", end_marker="^end$")


@pytest.mark.parametrize(
    ("end", "state", "code"),
    [
        ("exit 0\n", "SUCCEEDED", 0),
        ("exit 3\nbye\n", "FAILED", 3),
        ("signal 9\n", "FAILED", 137),
        ("it was stopped\n", "CANCELED", None),
        ("out of time\nexit 140\n", "TIMED_OUT", 140),
        ("broken: disk full\n", "FAILED", None),
        ("done\n", "SUCCEEDED", None),
        ("exit 99999999999999999999\n", "SUCCEEDED", None),
        ("no exit 0 here\n", "RUNNING", None),
        ("exit", "RUNNING", None),
    ],
)
def test_a_marker_ends_a_run(root: Path, end: str, state: str, code: int | None) -> None:
    """A line that matches ends the run, and its groups say how."""
    marker = (
        r"^exit (?P<exit_code>\d+)$|^signal (?P<signal>\d+)|(?P<canceled>^it was stopped)"
        r"|(?P<timed_out>^out of time)|(?P<failed>^broken.*)|^done$"
    )
    write(root / "etl.log", "x\n" * 100_000 + end)
    status = status_of(service_of(root, end_marker=marker), "etl.log")
    assert (status.state, status.exit_code) == (state, code)
    assert status.finished_at is None or abs(status.finished_at.timestamp() - (NOW - 5)) < 0.01
    assert (status.error is None) == (state in ("SUCCEEDED", "RUNNING"))


@pytest.mark.parametrize("nanos", [-(10**20), 10**20, 10**22])
def test_a_file_with_an_impossible_time_hides_no_other(root: Path, nanos: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may keep any time, such as one after the year 9999."""
    write(root / "good.log", "x\ndone\n")
    write(root / "bad.log", "x\ndone\n")
    lstat = os.lstat

    class Impossible:
        def __init__(self, real: os.stat_result) -> None:
            self._real = real
            self.st_mtime_ns, self.st_mtime = nanos, nanos / 1e9

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

    monkeypatch.setattr(os, "lstat", lambda path, **how: Impossible(lstat(path, **how)))
    service = service_of(root, end_marker="^done$", start_file="{name}")
    assert set(rows_of(service)) == {"good.log", "bad.log"}
    assert status_of(service, "bad.log").started_at is not None


@pytest.mark.parametrize(
    ("how", "state", "code"),
    [
        ("Successfully completed.", "SUCCEEDED", None),
        ("Exited with exit code 120.", "FAILED", 120),
        ("TERM_RUNLIMIT: job killed after reaching LSF run time limit.\nExited with exit code 140.", "TIMED_OUT", 140),
        ("TERM_OWNER: job killed by owner.\nExited by signal 2.", "CANCELED", 130),
    ],
)
@pytest.mark.parametrize("follows", [False, True])
def test_lsf(root: Path, how: str, state: str, code: int | None, follows: bool) -> None:
    """The report of LSF, before or behind the output, says how a job ended."""
    report, output = LSF_END.format(how=how), "output\n" * 30_000
    before = report.replace("is above this job summary.", "follows:") + output
    write(root / "train.12.out", before if follows else output + report)
    service = service_of(root, preset="lsf")
    status = status_of(service, "train.12.out")
    assert (status.state, status.exit_code, status.job_name) == (state, code, "train")
    write(root / "train.13.out", "Successfully completed.\n")
    assert status_of(service, "train.13.out").state is JobState.RUNNING


def test_nextflow(root: Path) -> None:
    """A task directory of Nextflow: name, start, lines, exit code, and a task that was killed."""
    for number, (task, code, header) in enumerate(
        [("FASTQC", "0", "# NEXTFLOW TASK: FASTQC (s1)"), ("ALIGN:BWA", "137", "### ---\n### name: 'ALIGN:BWA (2)'")]
    ):
        work = root / "work" / "8d" / f"4e37{number}"
        write(work / ".command.run", f"#!/bin/bash\n{header}\nset -e\n")
        write(work / ".command.begin", "", ago_s=30)
        write(work / ".command.log", f"start {task}\nend")
        write(work / ".command.out", "not a job\n")
        write(work / ".exitcode", code, ago_s=1)
    killed = root / "work" / "9e" / "1"
    write(killed / ".command.log", "x\n", ago_s=90_000)
    (killed / ".exitcode").touch()
    service = service_of(root, preset="nextflow")
    rows = rows_of(service)
    found = {row.job_id: (row.job_name, row.state) for row in rows.values()}
    assert found == {
        "work/8d/4e370/.command.log": ("FASTQC", "SUCCEEDED"),
        "work/8d/4e371/.command.log": ("ALIGN:BWA", "FAILED"),
        "work/9e/1/.command.log": ("command", "LOST"),
    }
    status = status_of(service, "work/8d/4e371/.command.log")
    assert (status.exit_code, status.instance_id) == (137, "node1")
    assert status.duration is not None
    assert round(status.duration.total_seconds()) == 29
    assert lines_of(service, "work/8d/4e371/.command.log") == ["start ALIGN:BWA", "end"]
    assert "was not marked" in (status_of(service, "work/9e/1/.command.log").error or "")


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("[Sun] Finished job 0.\n1 of 1 steps (100%) done\nComplete log: .snakemake/log/x\n", "SUCCEEDED"),
        ("Nothing to be done (all requested files are present and up to date).\n", "SUCCEEDED"),
        (
            'MissingInputException in rule all in file "Snakefile", line 1:\nMissing input files for rule all:\n',
            "FAILED",
        ),
        ("MissingOutputException in rule a:\n1 of 1 steps (100%) done\nComplete log(s): /w/x\n", "SUCCEEDED"),
        ("Exiting because a job execution failed. Look below\nComplete log: .snakemake/log/x\n", "FAILED"),
        (
            "Terminating processes on user request, x\nComplete log(s): /w/x\nWorkflowError:\nAt least one job\n",
            "CANCELED",
        ),
        ("1 of 1 steps (100%) done\n", "RUNNING"),
    ],
)
def test_snakemake(root: Path, text: str, state: str) -> None:
    """The log of a Snakemake run: its name is that of its directory, its start is in the name of the file."""
    job_id = "rnaseq/.snakemake/log/2026-11-28T120000.123456.snakemake.log"
    write(root / job_id, "Building DAG of jobs...\n" + text)
    status = status_of(service_of(root, preset="snakemake"), job_id)
    assert (status.state, status.job_name) == (state, "rnaseq")
    assert status.started_at is not None
    assert status.started_at.astimezone().strftime("%H:%M") == "12:00"


@pytest.mark.parametrize(
    ("keys", "state"),
    [
        ({}, "SUCCEEDED"),
        ({"end_marker": "^end"}, "LOST"),
        ({"exit_file": "{stem}.rc"}, "LOST"),
        ({"silence_state": "FAILED"}, "FAILED"),
        ({"silence": "2h"}, "RUNNING"),
        ({"silence": 0}, "RUNNING"),
    ],
)
def test_silence_ends_a_run(root: Path, keys: dict[str, object], state: str) -> None:
    """A file that is not written any more is a success, unless its end should have been marked."""
    write(root / "a.log", "x\nlast", ago_s=5000)
    service = service_of(root, **{"silence": "1h", **keys})
    assert status_of(service, "a.log").state == state
    assert lines_of(service, "a.log") == (["x"] if state == "RUNNING" else ["x", "last"])


def test_names_and_attributes_from_paths(root: Path) -> None:
    """Without an expression, the name is that of the file without numbers; groups become name and attributes."""
    for path in ("backup-2026-11-29.log", "sub/etl_7.log", "2026.log", "x.log"):
        write(root / path, "x\n")
    assert {row.job_name for row in rows_of(service_of(root)).values()} == {"backup", "etl", "2026", "x"}
    write(root / "prod" / "load.o12", "x\n")
    service = service_of(root, glob="*/*.o*", name=r"(?P<stage>[^/]+)/(?P<name>.+)\.o(?P<pbs_id>\d+)$")
    status = status_of(service, "prod/load.o12")
    assert (status.job_name, status.attributes) == ("load", {"stage": "prod", "pbs_id": "12"})


def test_a_truncated_file_is_a_new_run(root: Path) -> None:
    """Each truncation of a file by cron is a run of its own, also if the runs print the same."""
    log = write(root / "backup.log", "start\nexit 0\n", ago_s=90)
    keys = {"runs": "truncate", "end_marker": r"^exit (?P<exit_code>\d+)"}
    service = service_of(root, **keys)
    assert rows_of(service)["backup.log"].state is JobState.SUCCEEDED
    write(log, "start\nexit 0\n", ago_s=60)
    (second,) = rows_of(service).keys()
    assert re.fullmatch(r"backup\.log@\d{8}T\d{6}Z", second)
    write(log, "", ago_s=50)
    (third,) = rows_of(service).keys()
    assert third not in (second, "backup.log")
    append(log, "start\nhalf")
    # Another process finds the same runs.
    other = service_of(root, **keys)
    assert rows_of(other).keys() == {third}
    assert status_of(other, third).state is JobState.RUNNING
    (page,) = pages_of(other, third)
    append(log, " line\nexit 4\n")
    assert (status_of(service, third).state, status_of(service, third).exit_code) == (JobState.FAILED, 4)
    assert lines_of(service, third, page.cursor) == ["half line", "exit 4"]
    assert status_of(service, third).job_name == "backup"
    with pytest.raises(JobNotFoundError):
        status_of(service, second)
    log.rename(root / "backup.log.1")
    write(log, "start\n")
    states = {row.job_id: row.state for row in rows_of(service).values()}
    assert states.pop(third) is JobState.FAILED
    assert list(states.values()) == [JobState.RUNNING]
    assert lines_of(service, third)[-1] == "exit 4"


def test_an_exit_file_of_the_run_before_is_not_of_this_run(root: Path) -> None:
    """The exit file that an earlier run left does not end the run that writes now."""
    log = write(root / "a.log", "x\n", ago_s=90)
    write(root / "a.rc", "1\n", ago_s=89)
    service = service_of(root, runs="truncate", exit_file="{stem}.rc")
    assert rows_of(service)["a.log"].state is JobState.FAILED
    write(log, "y\n", ago_s=10)
    (row,) = rows_of(service).values()
    assert row.state is JobState.RUNNING
    write(root / "a.rc", "0\n", ago_s=9)
    (row,) = rows_of(service).values()
    assert row.state is JobState.SUCCEEDED


def test_runs_that_are_appended(root: Path) -> None:
    """In a file that cron appends to, each end marker ends a run; what was there at first is the past."""
    log = write(root / "sync.log", "old\nend 0\nolder\nend 1\n", ago_s=500)
    keys = {"runs": "append", "end_marker": r"^end (?P<exit_code>\d+)$"}
    service = service_of(root, **keys)
    assert {row.job_id: row.state for row in rows_of(service).values()} == {"sync.log@10": JobState.FAILED}
    append(log, "one\nen", ago_s=400)
    assert rows_of(service)["sync.log@22"].state is JobState.RUNNING
    append(log, "d 0\ntwo\nend 2\nthree\n", ago_s=300)
    again = service_of(root, **keys)
    for one in (again, service):
        states = {row.job_id: (row.state, row.job_name) for row in rows_of(one).values()}
        assert states == {
            "sync.log@10": (JobState.FAILED, "sync"),
            "sync.log@22": (JobState.SUCCEEDED, "sync"),
            "sync.log@32": (JobState.FAILED, "sync"),
            "sync.log@42": (JobState.RUNNING, "sync"),
        }
        texts = [lines_of(one, job_id) for job_id in ("sync.log@10", "sync.log@22", "sync.log@32", "sync.log@42")]
        assert texts == [["older", "end 1"], ["one", "end 0"], ["two", "end 2"], ["three"]]
    uids = [uid for job_id in states for page in pages_of(service, job_id) for uid in page.uids()]
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize("copies", [False, True])
def test_rotation_between_appended_runs(root: Path, copies: bool) -> None:
    """Rotated before the last lines of a run were seen: the run has them, and the next one is another job."""
    log = write(root / "sync.log", "one\n", ago_s=50)
    service = service_of(root, runs="append", end_marker="^end$")
    assert list(rows_of(service)) == ["sync.log@0"]
    append(log, "end\n", ago_s=40)
    if copies:
        write(root / "sync.log.1", log.read_text(), ago_s=39)
        write(log, "", ago_s=38)
    else:
        log.rename(root / "sync.log.1")
    write(log, "two\nand more\n", ago_s=30)
    states = {row.job_id: row.state for row in rows_of(service).values()}
    second = next(job_id for job_id in states if job_id != "sync.log@0")
    assert states == {"sync.log@0": JobState.SUCCEEDED, second: JobState.RUNNING}
    assert re.fullmatch(r"sync\.log@\d{8}T\d{6}Z\+0", second)
    assert lines_of(service, "sync.log@0") == ["one", "end"]
    assert lines_of(service, second) == ["two", "and more"]


def test_a_run_that_is_rotated_goes_on(root: Path) -> None:
    """A log that is rotated while its run goes on is one job."""
    log = write(root / "long.log", "one\ntwo\n", ago_s=50)
    service = service_of(root, end_marker="^end$")
    (page,) = pages_of(service, "long.log")
    append(log, "three\n", ago_s=45)
    log.rename(root / "long.log.1")
    write(log, "four\n", ago_s=40)
    assert lines_of(service, "long.log", page.cursor) == ["three", "four"]
    assert list(rows_of(service)) == ["long.log"]


def test_a_program_that_writes_to_the_rotated_file(root: Path) -> None:
    """The program did not open the new log: the end of the run is in the rotated one, which is not silent."""
    log = write(root / "long.log.1", "one\n", ago_s=5000)
    write(root / "long.log", "", ago_s=5000)
    service = service_of(root, end_marker="^end$", silence="1h")
    append(log, "two\n", ago_s=10)
    assert rows_of(service)["long.log"].state is JobState.RUNNING
    append(log, "end\n", ago_s=5)
    assert rows_of(service)["long.log"].state is JobState.SUCCEEDED


def test_other_paths_are_no_jobs(root: Path) -> None:
    """A job id never leads out of the root or to a file that no pattern matches."""
    write(root.parent / "secret.log", "s\n")
    write(root / "other.txt", "s\n")
    (root / "link.log").symlink_to(root.parent / "secret.log")
    (root / "dir").symlink_to(root.parent)
    os.mkfifo(root / "fifo.log")
    (root / "directory.log").mkdir()
    service = service_of(root)
    for job_id in ("../secret.log", "/etc/passwd", "other.txt", "link.log", "dir/secret.log", "fifo.log", "x\0.log",
                   "directory.log", "a/../other.log", "./x.log", "x.log/y.log"):  # fmt: skip
        with pytest.raises(JobNotFoundError):
            status_of(service, job_id)
        with pytest.raises(JobNotFoundError):
            lines_of(service, job_id)
    assert rows_of(service) == {}


def test_check_names_what_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No directory, no file, no right: the check says which."""
    with pytest.raises(ServiceUnavailableError, match=r"services\.files\.root: .*missing: No such file"):
        rows_of(service_of(root / "missing"))
    (problem,) = anyio.run(service_of(root).find_problems)
    assert (problem.is_fatal, "no file below" in problem.text) == (False, True)
    write(root / "a.log", "x\n")
    assert anyio.run(service_of(root).find_problems) == []
    monkeypatch.setattr(os, "access", lambda *_: False)
    (problem,) = anyio.run(service_of(root).find_problems)
    assert re.search(r"1 of 1 logs, for example .*a\.log, are not readable", problem.text)

    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AuthError, match="not readable for this user"):
        rows_of(service_of(root))


@pytest.mark.parametrize("runs", ["file", "truncate", "append"])
def test_a_name_that_is_no_text_hides_no_other_file(root: Path, runs: str) -> None:
    """A file system keeps any bytes as a name: such files are no jobs, which the check reports."""
    for name in ("one.log", os.fsdecode(b"\xff.log"), "a\nb.log"):
        write(root / name, "x\nend\n")
    service = service_of(root, runs=runs, end_marker="^end$")
    assert [job_id.partition("@")[0] for job_id in rows_of(service)] == ["one.log"]
    (problem,) = anyio.run(service.find_problems)
    assert problem.text.startswith("2 of the files that match, for example '")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"runs": "append"}, "needs end_marker"),
        ({"runs": "append", "end_marker": "x", "exit_file": "y"}, "takes no exit_file"),
        ({"end_marker": "(?P<code>x)"}, "has the group code; known are exit_code"),
        ({"end_marker": "("}, "services.files.end_marker: not a regular expression"),
        ({"glob": "/var/log/*.log"}, "expected a pattern of paths below root"),
        ({"glob": "../*.log"}, "expected a pattern of paths below root"),
        ({"glob": []}, "expected at least one"),
        ({"name_file": "x"}, "name_file needs name"),
        ({"preset": "slurm"}, "services.files.preset: expected 'nextflow', 'snakemake' or 'lsf'"),
    ],
)
def test_options_that_do_not_fit(root: Path, keys: dict[str, object], text: str) -> None:
    """Each wrong key is named."""
    with pytest.raises(ConfigError, match=re.escape(text)):
        service_of(root, **keys)


def test_what_did_not_change_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of silent logs reads neither them nor their directories."""
    for number in range(50):
        directory = root / f"{number}"
        write(directory / "a.log", "x\nend\n")
        os.utime(directory, (NOW - 100, NOW - 100))
    service = service_of(root, end_marker="^end$")
    assert len(rows_of(service)) == 50
    calls: list[object] = []

    def count(real: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **keys: object) -> object:
            calls.append(args)
            return real(*args, **keys)

        return counted

    monkeypatch.setattr(os, "open", count(os.open))
    monkeypatch.setattr(os, "scandir", count(os.scandir))
    assert len(rows_of(service)) == 50
    assert len(calls) <= 1  # the root is new
    append(root / "7" / "a.log", "more\nend\n", ago_s=1)
    rows_of(service)
    assert len(calls) <= 3


def test_pages_have_cursors(root: Path) -> None:
    """Reading can stop at any page, and a strange cursor is an error."""
    write(root / "a.log", "x\n" * 11_000)
    service = service_of(root)
    first: LogPage = pages_of(service, "a.log", most=1)[0]
    assert len(lines_of(service, "a.log", first.cursor)) == 11_000 - first.line_count
    for cursor in (b"1", b"\x81\xa1p\x90", b""):
        with pytest.raises(ConfigError):
            pages_of(service, "a.log", cursor)
