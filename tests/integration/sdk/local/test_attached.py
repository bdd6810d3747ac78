"""Jobs in the foreground: output at once, signals passed on, standard input, the exit code of the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tailspan.local.attached import OUR_ERROR, TIMED_OUT, exit_code_of
from tailspan.local.supervisor_events import Ended
from tailspan.models import JobState
from tests.fakes.local_jobs import LocalJobs, until
from tests.fakes.variants import TAILSPAN


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
        env = {**os.environ, "TAILSPAN_STATE_DIR": str(local.state_dir)}
        process = subprocess.Popen([*TAILSPAN, "run", "--", *command], env=env, **options)
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


def test_the_first_line_does_not_wait_for_the_disk(local, tmp_path):
    """The runner makes `job.json` durable while the supervisor starts the command and relays what it prints."""
    asked, done = tmp_path / "asked", tmp_path / "done"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "def slow_fsync(fd):\n"
        f"    open({str(asked)!r}, 'w').write(str(os.fstat(fd).st_ino))\n"
        f"    while not os.path.exists({str(done)!r}): time.sleep(0.01)\n"
        "os.fsync = slow_fsync\n"
    )
    # The supervisor's interpreter is isolated, so its disk is not slow.
    env = {**os.environ, "TAILSPAN_STATE_DIR": str(local.state_dir), "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([*TAILSPAN, "run", "--", "echo", "out"], env=env, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout.readline() == b"out\n"
            assert running.poll() is None
        finally:
            done.touch()
        assert running.wait() == 0
    assert int(asked.read_text()) == (local.directory(the_job(local)) / "job.json").stat().st_ino


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_end_is_reported(runner, local, number):
    """What the job prints while it ends is still shown, the exit code is its own, and it counts as canceled."""
    running = runner("sh", "-c", "trap 'echo bye; exit 9' INT TERM HUP; echo ready; while :; do sleep 0.01; done")
    assert running.stdout.readline() == b"ready\n"
    running.send_signal(number)
    out, _ = running.communicate()
    assert (running.returncode, out) == (9, b"bye\n")
    assert local.complete(the_job(local)).state is JobState.CANCELED


def test_every_signal_is_passed_on_each_time(runner, local):
    """A job that handles a signal goes on, and its success is a success."""
    program = (
        "import os, signal, time\nn = []\n"
        "for s in (1, 2, 3, 10, 12, 15, 28): signal.signal(s, lambda s, _: (n.append(s), os.write(1, b'%d\\n' % s)))\n"
        "os.write(1, b'ready\\n')\n"
        "while len(n) < 8: time.sleep(0.01)"
    )
    running = runner(sys.executable, "-c", program)
    assert running.stdout.readline() == b"ready\n"
    for number in (1, 2, 3, 10, 12, 15, 28, 2):
        running.send_signal(number)
        assert int(running.stdout.readline()) == number
    assert running.wait(60) == 0
    assert local.complete(the_job(local)).state is JobState.SUCCEEDED


def test_a_reader_that_leaves_ends_the_job_as_without_us(runner, local):
    """`tailspan run ... | head -1`: the job gets SIGPIPE, and what it printed until then is in the log."""
    running = runner("sh", "-c", "echo first; read go; exec yes", stdin=subprocess.PIPE)
    assert running.stdout.readline() == b"first\n"
    running.stdout.close()
    running.stdin.write(b"\n")
    running.stdin.close()
    assert running.wait(60) == 128 + signal.SIGPIPE
    assert local.lines(the_job(local))[0] == b"first"


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


def test_closed_standard_streams_do_no_harm(local):
    """Daemons close them; a job runs all the same, and finds them closed."""
    close = "import os, sys; [os.close(fd) for fd in (0, 1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
    env = {**os.environ, "TAILSPAN_STATE_DIR": str(local.state_dir)}
    running = subprocess.run(
        [sys.executable, "-c", close, *TAILSPAN, "run", "sh", "-c", "exit 3"], env=env, check=False
    )
    assert running.returncode == 3
    assert local.state(the_job(local))["exit_code"] == 3


@pytest.mark.parametrize(
    ("state", "exit_code", "failures", "expected"),
    [
        ("SUCCEEDED", 0, [], 0),
        ("FAILED", 3, [], 3),
        ("CANCELED", 143, [], 143),
        ("TIMED_OUT", 143, [], TIMED_OUT),
        ("SUCCEEDED", 0, [32], 141),
        ("SUCCEEDED", 0, [28], 1),
        ("FAILED", 3, [28], 3),
    ],
)
def test_exit_codes(state, exit_code, failures, expected):
    """The contract of `tailspan run`."""
    event = {"state": state, "exit_code": exit_code, "signal": 0, "relay_failures": failures}
    assert exit_code_of(Ended(event, {}), "j") == expected
    assert exit_code_of(None, "j") == OUR_ERROR


def test_process_listers_see_the_job_and_not_its_arguments(local):
    """`ps` shows which job a supervisor belongs to, and no argument of the command."""
    job_id = local.start("sleep", "600", name="nightly")
    if sys.platform == "linux":
        shown = Path(f"/proc/{local.state(job_id)['supervisor_pid']}/cmdline").read_bytes().split(b"\0")
        assert shown[-3:-1] == [job_id.encode(), b"nightly"]
        assert b"600" not in shown
    assert json.loads((local.directory(job_id) / "job.json").read_text())["id"] == job_id
