"""Section 3: cancel and timeout end every descendant, and a job's end is its main process's."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fakes.local_jobs import LocalJobs, until
from tests.fakes.variants import Variants
from tests.integration.sdk.run.test_always_runs import ROOT_ONLY, tmpfs

PYTHON = sys.executable
ESCAPES = {
    "setsid": "setsid sleep 987 & wait",
    "timeout in a script": "timeout 900 sleep 987",
    "set -m": "set -m; sleep 987 & wait",
    "double fork": "(setsid sh -c 'sleep 987 & sleep 987' &) ; sleep 987",
    "start_new_session": f"'{PYTHON}' -c 'import subprocess as s; s.run([\"sleep\", \"987\"], start_new_session=True)'",
    "ignores SIGTERM": "trap '' TERM; setsid sleep 987 & sleep 987",
    "orphan": "(sleep 987 &); exec sleep 987",
    "only a descendant ignores SIGTERM": "setsid sh -c \"trap '' TERM; sleep 987\" & wait",
    "a daemon with its own output": "(setsid sleep 987 <&- >/dev/null 2>&1 &); sleep 987",
    "stopped": "sleep 987 & kill -STOP $!; wait",
    "a job within the job": f"'{PYTHON}' -c 'from tailspan.cli.start import main; main()' run -- setsid sleep 987",
}


def alive(mark: str) -> list[int]:
    """Return the processes of a job, by a variable of its environment."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and mark.encode() in Path(f"/proc/{name}/environ").read_bytes():
                state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
                found += [int(name)] if state != "Z" else []
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="a subreaper is Linux's")
@pytest.mark.parametrize("kind", ESCAPES)
def test_cancel_ends_every_descendant(tmp_path: Path, kind: str) -> None:
    """Also those in a process group or session of their own."""
    mark = f"MARK_{os.getpid()}={time.time_ns()}"
    name, _, value = mark.partition("=")
    with LocalJobs(tmp_path / "state", cancel_grace_s=0.5) as local:
        env = {name: value, "TAILSPAN_STATE_DIR": str(tmp_path / "inner")}
        job_id = local.start("bash", "-c", ESCAPES[kind], env=env)
        until(lambda: len(alive(mark)) >= 2)
        time.sleep(0.2)
        local.cancel(job_id)
        until(lambda: alive(mark) == [])
        assert local.complete(job_id).state == "CANCELED"


@pytest.mark.skipif(sys.platform != "linux", reason="a subreaper is Linux's")
@pytest.mark.parametrize("kind", ESCAPES)
def test_timeout_ends_what_cancel_ends(tmp_path: Path, kind: str) -> None:
    """Each way to escape is closed to it, too."""
    mark = f"MARK_{os.getpid()}={time.time_ns()}"
    name, _, value = mark.partition("=")
    with LocalJobs(tmp_path / "state", cancel_grace_s=0.2) as local:
        env = {name: value, "TAILSPAN_STATE_DIR": str(tmp_path / "inner")}
        job_id = local.start("bash", "-c", ESCAPES[kind], env=env, timeout_s=0.5)
        assert local.complete(job_id).state == "TIMED_OUT"
        until(lambda: alive(mark) == [])


@pytest.mark.skipif(sys.platform != "linux", reason="a subreaper is Linux's")
@pytest.mark.parametrize("kind", ["setsid", "double fork", "orphan"])
def test_timeout_ends_every_descendant(variants: Variants, kind: str) -> None:
    """In the foreground, too, where the process group is the caller's and is left alone."""
    mark = f"MARK_{os.getpid()}={time.time_ns()}"
    name, _, value = mark.partition("=")
    done = variants.run("tailspan", ["bash", "-c", ESCAPES[kind]], "--timeout", "1", env={**variants.env, name: value})
    assert done.returncode == 124
    until(lambda: [pid for pid in alive(mark) if b"supervisor" not in Path(f"/proc/{pid}/cmdline").read_bytes()] == [])


def test_a_detached_job_within_a_job_goes_on(variants: Variants) -> None:
    """It is a job of its own: the cancel of the outer one leaves it alone."""
    inner = " ".join(f"'{word}'" for word in variants.command("tailspan", ["sleep", "3"], "--detach"))
    done = variants.run("tailspan", ["bash", "-c", f"{inner}; sleep 60"], "--timeout", "2")
    assert done.returncode == 124
    job = variants.state_dir / "jobs" / done.stdout.decode().strip()
    until(lambda: '"end": "' in (job / "state.json").read_text())
    assert '"SUCCEEDED"' in (job / "state.json").read_text()


def test_a_background_process_does_not_hold_up_the_runner(variants: Variants) -> None:
    """The job has ended; what is printed later is in the log."""
    script = "(until [ -e go ]; do sleep 0.05; done; echo late) & echo early"
    done = variants.run("tailspan", ["sh", "-c", script])
    assert (done.returncode, done.stdout) == (0, b"early\n")
    (variants.directory / "go").touch()
    until(lambda: (variants.jobs()[0] / "log").read_bytes() == b"early\nlate\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a process id namespace")
def test_as_the_first_process_of_a_container(variants: Variants) -> None:
    """Zombies are collected, and what a background process printed before the end is in the log."""
    zombies = "cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') Z '"
    script = f"""
        for i in 1 2 3; do (sh -c 'sleep 0.1' &); done
        sleep 0.5
        while {zombies}; do sleep 0.05; done
        (setsid sh -c 'echo background; touch printed; exec sleep 987' &)
        until [ -e printed ]; do sleep 0.05; done
        echo last
    """
    command = ["unshare", "--pid", "--fork", "--mount-proc", *variants.command("tailspan", ["sh", "-c", script])]
    done = subprocess.run(
        command, env=variants.env, cwd=variants.directory, capture_output=True, timeout=60, check=False
    )
    if b"unshare:" in done.stderr:
        pytest.skip("no namespaces here")
    assert (done.returncode, done.stdout) == (0, b"background\nlast\n")
    (job,) = variants.jobs()
    assert (job / "log").read_bytes() == b"background\nlast\n"
    assert '"end": "' in (job / "state.json").read_text()


def test_a_second_signal_is_passed_on_too(variants: Variants) -> None:
    """Nothing is escalated: the job decides."""
    process = subprocess.Popen(
        variants.command("tailspan", ["bash", "-c", "trap 'echo no' TERM; echo ready; while :; do sleep 0.05; done"]),
        env=variants.env, cwd=variants.directory, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"no\n"
    (job,) = variants.jobs()
    os.kill(int((job / "state.json").read_text().partition('"pid": ')[2].partition(",")[0]), signal.SIGKILL)
    assert process.wait(30) == 137
    process.stdout.close()


@ROOT_ONLY
@pytest.mark.parametrize("full_of", ["text", "files"])
def test_cancel_and_timeout_end_a_job_while_the_disk_is_full(tmp_path: Path, full_of: str) -> None:
    """The processes are gone at once; the end is recorded when there is room again."""
    disk = tmp_path / "disk"
    if not tmpfs(disk, "400k,nr_inodes=60"):
        pytest.skip("cannot mount")
    mark = f"MARK_{os.getpid()}={time.time_ns()}"
    name, _, value = mark.partition("=")
    try:
        with LocalJobs(disk / "state", cancel_grace_s=0.2) as local:
            script = "setsid sleep 987 & while :; do echo line; sleep 0.05; done"
            common = {"env": {name: value}, "cwd": str(tmp_path)}
            canceled = local.start("sh", "-c", script, **common)
            timed_out = local.start("sh", "-c", script, timeout_s=2, **common)
            until(lambda: len(alive(mark)) >= 4)
            fill(disk, full_of)
            local.cancel(canceled)
            until(lambda: alive(mark) == [])
            for path in disk.glob("fill*"):
                path.unlink()
            assert local.complete(canceled).state == "CANCELED"
            assert local.complete(timed_out).state == "TIMED_OUT"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def fill(disk: Path, full_of: str) -> None:
    """Leave room neither for text nor, of `full_of`, for another file."""
    with suppress(OSError):
        for number in itertools.count():
            (disk / f"fill{number}").write_bytes(b"x" * 4096 if full_of == "text" else b"")
