"""Jobs in the foreground: output at once, signals cancel, standard input arrives, the exit code is the command's."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tailspan.local.attached import OUR_ERROR, TIMED_OUT, exit_code_of
from tailspan.models import JobState, JobStatus
from tests.fakes.local_jobs import LocalJobs, until

PROGRAM = """
import sys
from pathlib import Path
from tailspan.local.attached import exit_code_of, run_attached
from tailspan.services.local import LocalService
service = LocalService(state_dir=Path(sys.argv[1]), cancel_grace_s=600)
sys.exit(exit_code_of(run_attached(service, sys.argv[2:])))
"""
# Not by print: a signal that comes before print has returned from the write of "ready" finds its buffer in use, and
# the program would end with a RuntimeError (reentrant call) instead of refusing.
REFUSE = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"no\\n"))
print("ready", flush=True)
while True:
    time.sleep(600)
"""


@pytest.fixture
def local(tmp_path):
    """Return the jobs of the directory that the runner uses."""
    with LocalJobs(tmp_path / "state") as jobs:
        yield jobs


@pytest.fixture
def runner(local):
    """Return a function that starts a runner; those that are left at the end are killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, **options: object) -> subprocess.Popen[bytes]:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        # Whoever runs the tests under nohup must not have SIGHUP ignored in what they start.
        hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(local.state_dir), *command], **options)
        signal.signal(signal.SIGHUP, hangup)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()


def the_job(local: LocalJobs) -> str:
    """Return the id of the only job, once it runs."""
    (path,) = until(lambda: list(local.state_dir.glob("jobs/2*/state.json")))
    return path.parent.name


def test_output_appears_at_once_and_unchanged(runner, local):
    """Both streams, also a line that is not finished, and the same bytes in the log."""
    running = runner(
        "sh", "-c", "printf 'name? '; read name; echo hello $name; echo oops >&2; exit 4", stdin=subprocess.PIPE
    )
    assert running.stdout.read(6) == b"name? "
    out, err = running.communicate(b"you\n")
    assert (running.returncode, out, err) == (4, b"hello you\n", b"oops\n")
    job_id = the_job(local)
    assert sorted(local.lines(job_id)) == [b"name? hello you", b"oops"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_job_and_its_end_is_reported(runner, local, number):
    """What the job prints while it ends is still shown, and the exit code is its own."""
    running = runner("sh", "-c", "trap 'echo bye; exit 9' TERM; echo ready; while :; do sleep 0.01; done")
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(number)
    out, _ = running.communicate()
    assert (running.returncode, out) == (9, b"bye\n")
    assert local.complete(the_job(local)).state is JobState.CANCELED


def test_a_second_signal_kills(runner, local):
    """Whoever presses Ctrl-C twice does not want to wait for the grace time."""
    running = runner(sys.executable, "-c", REFUSE)
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(signal.SIGINT)
    assert running.stdout.readline() == b"no\n"
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 137
    assert local.complete(the_job(local)).state is JobState.CANCELED


def test_a_reader_that_leaves_does_not_end_the_job(runner, local):
    """`tailspan run ... | head -1`: the job goes on, its log is complete."""
    running = runner("sh", "-c", "echo first; read go; seq 100000", stdin=subprocess.PIPE)
    assert running.stdout.readline() == b"first\n"
    running.stdout.close()
    running.stdin.write(b"\n")
    running.stdin.close()
    assert running.wait(60) == 0
    job = local.complete(the_job(local))
    assert len(local.lines(job.job_id)) == 100_001


def test_a_killed_runner_leaves_the_job_running(runner, local):
    """Nobody can catch SIGKILL: the job goes on, its output is kept."""
    running = runner("sh", "-c", "echo ready; read x; echo after", stdin=subprocess.PIPE)
    assert running.stdout.readline() == b"ready\n"
    running.kill()
    running.wait()
    job_id = the_job(local)
    assert local.service.status(job_id).state is JobState.RUNNING
    running.stdin.close()
    assert local.complete(job_id).exit_code == 0
    assert local.lines(job_id) == [b"ready", b"after"]


def test_a_background_process_does_not_hold_up_the_runner(runner, local, tmp_path):
    """The runner returns with the main process, and closes what the next in a pipeline waits for."""
    os.mkfifo(tmp_path / "go")
    running = runner("sh", "-c", f"(read x < {tmp_path}/go; echo late) & echo early")
    out, _ = running.communicate()
    assert (running.returncode, out) == (0, b"early\n")
    (tmp_path / "go").write_text("\n")
    job = local.complete(the_job(local))
    assert local.lines(job.job_id) == [b"early", b"late"]


def test_a_killed_supervisor_is_our_error(runner, local):
    """The runner notices, and does not wait for ever."""
    running = runner("sh", "-c", "echo ready; exec sleep 600")
    assert running.stdout.readline() == b"ready\n"
    os.kill(local.state(the_job(local))["supervisor_pid"], signal.SIGKILL)
    assert running.wait(60) == OUR_ERROR


def test_closed_standard_streams_do_no_harm(runner, local):
    """Daemons close them; a job runs all the same."""
    close = "import os, sys; [os.close(fd) for fd in (0, 1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
    running = subprocess.run(
        [sys.executable, "-c", close, sys.executable, "-c", PROGRAM, str(local.state_dir), "echo", "hi"], check=False
    )
    assert running.returncode == 0
    assert local.lines(the_job(local)) == [b"hi"]


def test_what_is_typed_at_a_terminal_arrives(local, tmp_path):
    """A job in the foreground reads the terminal, its output is shown there, and Ctrl-D ends its input."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable, [sys.executable, "-c", PROGRAM, str(local.state_dir), "sh", "-c", "echo ready; cat; exit 6"]
        )
    attributes = termios.tcgetattr(terminal)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, b"typed\n")
    while b"typed" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 6
    assert shown.split() == [b"ready", b"typed"]
    assert local.lines(the_job(local)) == [b"ready", b"typed"]


def test_ctrl_c_at_a_terminal_cancels(local):
    """The key, not only the signal: the job is not in the terminal's session, and ends all the same."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [sys.executable, "-c", PROGRAM, str(local.state_dir), "sh", "-c", "echo ready; exec sleep 600"],
        )
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 143
    assert local.complete(the_job(local)).state is JobState.CANCELED


@pytest.mark.parametrize(
    ("state", "exit_code", "expected"),
    [
        (JobState.SUCCEEDED, 0, 0),
        (JobState.FAILED, 3, 3),
        (JobState.CANCELED, 143, 143),
        (JobState.TIMED_OUT, 143, TIMED_OUT),
        (JobState.LOST, None, OUR_ERROR),
    ],
)
def test_exit_codes(state, exit_code, expected):
    """The contract of `tailspan run`."""
    job = JobStatus.from_state(state, job_id="j", job_name="n", identity="i", trace_id="t", exit_code=exit_code)
    assert exit_code_of(job) == expected


def test_the_command_is_told_to_process_listers(local):
    """`ps` shows which job a supervisor belongs to, and no argument of the command."""
    job_id = local.start("sleep", "600", name="nightly")
    if sys.platform == "linux":
        shown = Path(f"/proc/{local.state(job_id)['supervisor_pid']}/cmdline").read_bytes().split(b"\0")
        assert shown[-3:-1] == [job_id.encode(), b"nightly"]
        assert b"600" not in shown
    assert json.loads((local.directory(job_id) / "job.json").read_text())["id"] == job_id
