"""What a job finds, and how its runner ends, are the same as for the plain command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.fakes.local_jobs import until
from tests.fakes.variants import TAILSPAN, VARIANTS, process_state


def quoted(words: list[str]) -> str:
    """Return a command for a shell."""
    return " ".join(f"'{word}'" for word in words)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("program", "closed", "code"),
    [
        ("echo hi", ">&-", 1),
        ("cat", "<&-", 1),
        ("ls /nope", "2>&-", 2),
        ("echo hi", "<&- >&- 2>&-", 1),
        ("true", "<&- >&- 2>&-", 0),
    ],
)
def test_closed_standard_streams_stay_closed(variants, variant, program, closed, code):
    """A job that writes to a closed output or reads a closed input fails as it does without Tailspan."""
    command = variants.command(variant, ["/usr/bin/env", *program.split()])
    ended = subprocess.run(
        ["bash", "-c", f"{quoted(command)} {closed}"], env=variants.env, cwd=variants.directory, timeout=60, check=False
    )
    assert ended.returncode == code


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("broken", [False, True], ids=["captured", "not captured"])
@pytest.mark.parametrize("given", [{}, {"LC_CTYPE": "C"}, {"LC_CTYPE": "C.UTF-8"}], ids=str)
def test_the_locale_of_the_interpreter_is_not_passed_on(variants, variant, broken, given):
    """Python sets LC_CTYPE in the C locale, as under cron; a job must not find that."""
    env = {key: value for key, value in variants.env.items() if key != "LANG" and not key.startswith("LC_")} | given
    if broken:
        env["TAILSPAN_CONFIG"] = "/nope"
    ended = variants.run(variant, ["sh", "-c", "echo ${LC_CTYPE-unset}"], env=env)
    assert ended.stdout.decode().strip() == given.get("LC_CTYPE", "unset")


@pytest.mark.parametrize("variant", ["plain", "tailspan"])
@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [("''", 127, ": command not found"), ("/etc/passwd/x", 126, "/etc/passwd/x: Not a directory")],
)
def test_what_a_shell_cannot_run(variants, variant, command, code, sentence):
    """An empty command, such as an unset variable in quotes, and a path through a file."""
    run = "" if variant == "plain" else f"{quoted(TAILSPAN)} run --"
    ended = subprocess.run(
        ["bash", "-c", f"{run} {command}; exit $?"], env=variants.env, capture_output=True, timeout=60, check=False
    )
    assert ended.returncode == code
    assert ended.stderr.decode().strip().endswith(sentence)


FILES = {
    "damaged": b"\x7fELF\x02\x01",
    "for another machine": b"\x7fELF\x02\x01\x01" + bytes(11) + b"\xb7\0" + bytes(44),
    "binary": b"\0\1\2",
    "script without a first line": b"echo hi; exit 3\n",
    "script with a payload": b"echo hi; exit 4\n\0\1",
    "script of DOS": b"#!/bin/sh\r\necho hi\r\n",
    "script without interpreter": b"#!/nope\n",
    "empty interpreter": b"#!\necho hi; exit 5\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", [*FILES, "not executable", "directory", "dangling", "loop"])
def test_what_the_shell_makes_of_a_file(variants, kind):
    """Exit code, output and sentence are those of bash, and the sentence is in the log."""
    path = variants.directory / "file"
    if kind == "directory":
        path.mkdir()
    elif kind in ("dangling", "loop"):
        path.symlink_to("file" if kind == "loop" else "nope")
    else:
        path.write_bytes(FILES.get(kind, b"echo hi"))
        path.chmod(0o644 if kind == "not executable" else 0o755)
    plain = variants.run("plain", ["bash", "-c", "./file; exit $?"])
    ended = variants.run("tailspan", ["./file"])
    assert (ended.returncode, ended.stdout) == (plain.returncode, plain.stdout)
    sentence = plain.stderr.rpartition(b"./file: ")[2]
    assert ended.stderr.endswith(sentence)
    assert (variants.jobs()[0] / "log").read_bytes().endswith(sentence or plain.stdout)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
def test_a_runner_that_was_stopped_goes_on(variants, number):
    """A stop of more than a second reaches the job as no other signal, and the exit code is the job's own."""
    program = (
        "import os, signal, sys, time\n"
        "for number in {*signal.valid_signals()} - {9, 19, 20}:\n"
        "    try: signal.signal(number, lambda number, _: print('got', number))\n"
        "    except (OSError, ValueError): pass\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists('go'): time.sleep(0.02)\n"
        "sys.exit(7)"
    )
    command = variants.command("tailspan", [sys.executable, "-u", "-c", program])
    # In a group of its own, see `test_a_stop_by_another_process_stops_the_job`.
    with subprocess.Popen(
        command, env=variants.env, cwd=variants.directory, stdout=subprocess.PIPE, process_group=0
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        os.kill(running.pid, number)
        until(lambda: process_state(running.pid) == "T")
        time.sleep(1.1)
        os.kill(running.pid, signal.SIGCONT)
        time.sleep(0.2)
        (variants.directory / "go").touch()
        assert running.wait(60) == 7
        # SIGTSTP also stopped the job, which had to be continued.
        assert running.stdout.read() == (b"got 18\n" if number == signal.SIGTSTP else b"")


@pytest.mark.parametrize("options", [("plain",), ("tailspan",), ("tailspan", "--timeout", "50")], ids=str)
@pytest.mark.parametrize("broken", [False, True], ids=["captured", "not captured"])
def test_a_stop_by_another_process_stops_the_job(variants, options, broken):
    """`kill -TSTP` of the runner stops both, as it would stop the job; `kill -CONT` continues both."""
    variant, *given = options
    command = variants.command(variant, ["sh", "-c", "echo $$; while ! [ -e go ]; do sleep 0.05; done; exit 7"], *given)
    env = {**variants.env, "TAILSPAN_CONFIG": "/nope"} if broken else variants.env
    # In a group of its own: in one whose parents are of other sessions, as in a container, the kernel discards SIGTSTP.
    with subprocess.Popen(
        command,
        env=env,
        cwd=variants.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    ) as running:
        try:
            assert running.stdout is not None
            pids = {int(running.stdout.readline()), running.pid}
            os.kill(running.pid, signal.SIGTSTP)
            until(lambda: all(process_state(pid) == "T" for pid in pids))
            os.kill(running.pid, signal.SIGCONT)
            until(lambda: all(process_state(pid) != "T" for pid in pids))
            (variants.directory / "go").touch()
            assert running.wait(60) == 7
        finally:
            (variants.directory / "go").touch()
            running.send_signal(signal.SIGCONT)


def test_a_job_that_ends_while_its_runner_is_stopped(variants):
    """The report of the end is a signal of ours, which must not end the runner."""
    command = variants.command("tailspan", ["sh", "-c", "echo ready; read x; exit 7"])
    with subprocess.Popen(
        command, env=variants.env, cwd=variants.directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        os.kill(running.pid, signal.SIGSTOP)
        running.stdin.close()
        state = variants.jobs()[0] / "state.json"
        deadline = time.monotonic() + 60
        while b"FAILED" not in state.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGCONT)
        assert running.wait(60) == 7


@pytest.mark.parametrize("files", range(8, 22))
def test_the_command_runs_whatever_the_limit_of_open_files(variants, files):
    """Where too few files can be open, the command is not captured, but it runs, once, with its own exit code."""
    command = variants.command("tailspan", ["sh", "-c", "echo ran; exit 5"])
    script = f"ulimit -n {files}; exec {quoted(command)}"
    ended = subprocess.run(["bash", "-c", script], env=variants.env, capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (5, b"ran\n")
    assert ended.stderr.count(b"\n") <= 1
    assert b"Traceback" not in ended.stderr
    assert len(variants.jobs()) == (0 if ended.stderr else 1)  # what ran must not be recorded as not started


def test_no_secret_of_a_command_is_recorded(variants):
    """Neither in the job's files nor in what telemetry gets; the command itself is unchanged."""
    script = "echo $1 $DB_PASS; env | grep ^OTEL_"
    options = ("--name", "load --token hunter2", "--attr", "password=hunter2", "--attr", "team=geo")
    command = ["env", "DB_PASS=hunter2", "sh", "-c", script, "mysql", "-phunter2"]
    ended = variants.run("tailspan", command, *options)
    shown, _, telemetry = ended.stdout.partition(b"\n")
    assert shown == b"-phunter2 hunter2"
    assert b"team=geo" in telemetry
    (job,) = variants.jobs()
    recorded = b"".join((job / name).read_bytes() for name in ("job.json", "state.json"))
    assert b"hunter2" not in recorded + telemetry
    assert b"load --token ***" in recorded


def test_a_codec_of_bytes_is_not_an_encoding(variants):
    """`hex` is a codec of Python, but not one of text."""
    ended = variants.run("tailspan", ["true"], "--encoding", "hex")
    assert ended.returncode == 2
    assert b"'hex' is not a known encoding" in ended.stderr
