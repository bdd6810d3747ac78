"""The command line as people and scripts use it: real processes, real local jobs, signals, pipes and terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tailspan.local.agent_page import announce_page

TAILSPAN = [sys.executable, "-c", "from tailspan.cli import main; main(prog_name='tailspan')"]


@pytest.fixture
def environment(tmp_path: Path):
    """Return an environment whose local jobs live in the test's own directory."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TAILSPAN_", "OTEL_"))}
    return {**kept, "TAILSPAN_STATE_DIR": str(tmp_path / "state"), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def tailspan(environment, tmp_path):
    """Return a function that runs the command to its end."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 60, "env": environment, "cwd": tmp_path, **options}
        return subprocess.run([*TAILSPAN, *arguments], **options)

    return run


def test_run_passes_everything_through(tailspan, tmp_path):
    """Output, input, directory and exit code are the command's own, and nothing is added."""
    script = "import sys, os; print(sys.stdin.read().upper()); print(os.getcwd(), file=sys.stderr); sys.exit(7)"
    done = tailspan("run", "--", sys.executable, "-c", script, input="from stdin")
    assert (done.returncode, done.stdout, done.stderr) == (7, "FROM STDIN\n", f"{tmp_path}\n")


def test_run_exits_like_the_command(tailspan):
    """Signals, timeouts and commands that do not exist have the codes of the contract."""
    assert tailspan("run", "true").returncode == 0
    assert tailspan("run", "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert tailspan("run", "--timeout", "0.2", "--", "sleep", "60").returncode == 124
    assert tailspan("run", "--", "/no/such/command").returncode in (125, 126, 127)


def test_a_detached_job_is_followed_by_its_id(tailspan):
    """`run --detach` prints the id alone; the other commands take it."""
    done = tailspan(
        "run",
        "--detach",
        "--name",
        "etl",
        "--attr",
        "team=geo",
        "--attr",
        "a=b=c",
        "--",
        "sh",
        "-c",
        "echo one; exit 3",
    )
    job = done.stdout.strip()
    assert re.fullmatch(r"\S+\n", done.stdout)
    assert done.stderr == ""
    tailed = tailspan("tail", job, "--refresh", "0.05")
    assert (tailed.returncode, tailed.stdout) == (1, "one\n")
    assert "code 3" in tailed.stderr
    assert tailspan("wait", job).returncode == 1
    status = json.loads(tailspan("status", job, "--json").stdout)
    assert (status["state"], status["exit_code"], status["job_name"]) == ("FAILED", 3, "etl")
    assert status["attributes"] == {"team": "geo", "a": "b=c"}
    assert tailspan("logs", job).stdout == "one\n"
    (row,) = json.loads(tailspan("jobs", "--json").stdout)
    assert row["job_id"] == job
    assert tailspan("exec-time", job).returncode == 0


def test_cancel_ends_a_running_job(tailspan):
    """Cancel, then wait: the job is CANCELED, and waiting for it exits 1."""
    job = tailspan("run", "--detach", "--", "sleep", "600").stdout.strip()
    assert tailspan("cancel", job).returncode == 0
    waited = tailspan("wait", job, "--poll", "0.05", "--json")
    assert waited.returncode == 1
    assert json.loads(waited.stdout)["state"] == "CANCELED"


def test_prune_removes_ended_jobs_only(tailspan):
    """What runs is never touched; what ended is gone, with its log."""
    ended = tailspan("run", "--detach", "--", "true").stdout.strip()
    tailspan("wait", ended, "--poll", "0.05")
    running = tailspan("run", "--detach", "--", "sleep", "600").stdout.strip()
    try:
        assert json.loads(tailspan("jobs", "prune", "--older-than", "0s", "--json").stdout) == {"pruned": [ended]}
        assert tailspan("status", ended).returncode == 4
        assert tailspan("status", running).returncode == 0
    finally:
        tailspan("cancel", running)


def test_ctrl_c_while_waiting_leaves_the_job_alone(tailspan, environment):
    """SIGINT ends `tail` and `wait` at once with 130 and no traceback; the job continues."""
    job = tailspan("run", "--detach", "--", "sh", "-c", "echo ready; exec sleep 600").stdout.strip()
    try:
        tail = subprocess.Popen(
            [*TAILSPAN, "tail", job], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert tail.stdout is not None
        assert tail.stdout.readline() == "ready\n"
        tail.send_signal(signal.SIGINT)
        _, errors = tail.communicate(timeout=30)
        assert tail.returncode == 130
        assert "Traceback" not in errors
        assert json.loads(tailspan("status", job, "--json").stdout)["state"] == "RUNNING"
    finally:
        tailspan("cancel", job)


def test_a_reader_that_leaves_ends_the_command_quietly(tailspan, environment):
    """`tailspan logs JOB | head -1` prints one line and no error."""
    job = tailspan("run", "--detach", "--", "seq", "200000").stdout.strip()
    tailspan("wait", job, "--poll", "0.05")
    logs = subprocess.Popen([*TAILSPAN, "logs", job], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert logs.stdout is not None
    assert logs.stderr is not None
    assert logs.stdout.readline() == b"1\n"
    logs.stdout.close()
    assert logs.stderr.read() == b""
    logs.stderr.close()
    logs.wait(30)


def on_terminal(environment, *arguments: str, when: dict[str, Path] | None = None) -> tuple[int, str]:
    """Run the command on a terminal of its own; return its exit code and all that the terminal got.

    Once it has shown a text of ``when``, the file there is made.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*TAILSPAN, *arguments], env={**environment, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
            for text, path in (when or {}).items():
                if text.encode() in shown:
                    path.touch()
    except OSError:
        pass  # Linux reports EIO when the last writer has closed
    finally:
        os.close(ours)
    return process.wait(60), shown.decode()


@pytest.mark.parametrize("command", ["tail", "wait"])
def test_a_person_sees_a_live_state_line(tailspan, environment, tmp_path, command):
    """While the job runs the terminal's last line shows it; the line is erased before any other output."""
    script = "echo hi; until [ -e go ]; do sleep 0.02; done; exit 3"
    job = tailspan("run", "--detach", "--name", "etl", "--", "sh", "-c", script).stdout.strip()
    code, shown = on_terminal(environment, command, job, when={"RUNNING": tmp_path / "go"})
    assert code == 1
    assert re.search(r"\x1b\[2KRUNNING  \d.*  etl", shown)
    _before, _, after = shown.rpartition("\x1b[2K")
    assert "code 3" in after
    assert ("hi\r\n" in shown) is (command == "tail")


def test_people_get_tables_that_no_job_can_garble(tailspan, environment):
    """On a terminal: a table of jobs, a panel; names and lines with escape sequences stay text."""
    script = r"printf 'a\033]0;pwned\007b\033[2Jc\n'"
    job = tailspan("run", "--detach", "--name", "etl [bold]x[/bold]", "--attr", "k=\x1b[2J", "--", "sh", "-c", script)
    job_id = job.stdout.strip()
    assert tailspan("wait", job_id, "--poll", "0.05").returncode == 0
    for command in (["jobs"], ["status", job_id], ["wait", job_id], ["tail", job_id], ["logs", job_id]):
        _, shown = on_terminal(environment, *command)
        assert shown.strip()
        assert "\x1b]0;" not in shown
        assert "\x1b[2J" not in shown
    assert "[bold]" in on_terminal(environment, "jobs")[1]


def test_output_that_cannot_be_written_is_one_line(tailspan, environment):
    """A full disk is reported once; a closed standard output is ignored."""
    job = tailspan("run", "--detach", "--", "echo", "hi").stdout.strip()
    tailspan("wait", job, "--poll", "0.05")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = tailspan("logs", job, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert re.fullmatch(r"tailspan: .*No space left on device\n", done.stderr)
    shell = f"{' '.join(map(shlex.quote, TAILSPAN))} logs {job} >&-"
    closed = subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_person_is_shown_how_a_run_ended(tailspan, environment, tmp_path):
    """One dim line at the end, on a line of its own: state, exit code, duration, the log's command, the page."""
    agent = tmp_path / "agent"
    agent.mkdir()
    environment = {**environment, "TAILSPAN_AGENT__STATE_DIR": str(agent)}
    code, shown = on_terminal(environment, "run", "--name", "etl", "--", "sh", "-c", "printf half; exit 3")
    end = r"tailspan: failed  exit code 3  \d+\S* \S+  tailspan logs (\S+)"
    found = re.search(rf"half\r\n\x1b\[2m{end}\x1b\[0m\r\n$", shown)
    assert code == 3
    assert found, shown
    with (agent / "agent.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        announce_page(str(agent), "http://127.0.0.1:1/x")
        plain = {**environment, "NO_COLOR": "1"}
        page = r"  http://127\.0\.0\.1:1/x/job\?service=local&id=\1"
        assert re.search(rf"\r\n{end}{page}\r\n$", on_terminal(plain, "run", "--", "sh", "-c", "echo x; exit 3")[1])
        status = json.loads(tailspan("status", "etl", "--json", env=environment).stdout)
        assert status["links"] == {"agent page": f"http://127.0.0.1:1/x/job?service=local&id={found[1]}"}
        opened = tailspan("open", found[1], "--print", env=environment)
        assert opened.stdout == status["links"]["agent page"] + "\n"
    retried = tailspan("retry", "etl", env=environment).stdout.strip()
    assert tailspan("wait", retried, env=environment).returncode == 1
    again = json.loads(tailspan("status", retried, "--json", env=environment).stdout)
    assert (again["retry_of"], again["exit_code"], again["attempt"]) == (found[1], 3, 2)
    nowhere = tailspan("open", "-1", env=environment)
    assert (nowhere.returncode, "no page has job" in nowhere.stderr) == (2, True)
