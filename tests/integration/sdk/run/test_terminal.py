"""At a terminal nothing tells a job that it runs under `tailspan run`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time

import pytest

from tests.fakes.local_jobs import until
from tests.fakes.variants import VARIANTS, Terminal, Variants, process_state

PYTHON = sys.executable


def terminal(variants: Variants, variant: str, command: list[str], *options: str, **size: int) -> Terminal:
    """Start a variant on a terminal of its own."""
    return Terminal(variants.command(variant, command, *options), env=variants.env, cwd=variants.directory, **size)


# timeout(1) sends such a signal a second time.
@pytest.mark.parametrize("variant", ["plain", "tailspan"])
@pytest.mark.parametrize(
    ("keys", "program", "shown", "code"),
    [
        (b"\x03", "try:\n wait()\nexcept KeyboardInterrupt:\n print('caught'); sys.exit(5)", b"caught", 5),
        (b"\x03", "try:\n wait()\nfinally:\n print('finally')", b"finally", 130),
        (b"\x03", "import atexit; atexit.register(print, 'at exit')\nwait()", b"at exit", 130),
        (b"\x1c", "signal.signal(3, lambda *_: (print('quit'), sys.exit(6)))\nwait()", b"quit", 6),
    ],
)
def test_keys_reach_the_job_as_signals_once(variants, variant, keys, program, shown, code):
    """Ctrl-C is SIGINT and Ctrl-\\ is SIGQUIT; handlers and clean-up run, and the exit code is the job's own."""
    # Short sleeps: a signal just before a sleep begins does not end it.
    begin = "import signal, sys, time\ndef wait():\n print('ready')\n while True: time.sleep(0.02)\n"
    with terminal(variants, variant, [PYTHON, "-u", "-c", begin + program]) as at:
        at.until(b"ready\r\n")
        at.type(keys)
        assert at.end() == code
        assert at.shown.count(shown) == 1


def test_ctrl_c_arrives_once(variants):
    """The terminal sends it to the whole group; the runner does not send it again."""
    program = (
        "import signal, time\nn = []\nsignal.signal(2, lambda *_: n.append(1))\nprint('ready', flush=True)\n"
        "while not n: time.sleep(0.01)\ntime.sleep(0.3)\nprint('got', len(n))"
    )
    with terminal(variants, "tailspan", [PYTHON, "-c", program]) as at:
        at.until(b"ready\r\n")
        at.type(b"\x03")
        assert at.end() == 0
        assert b"got 1" in at.shown


@pytest.mark.parametrize("variant", VARIANTS)
def test_ctrl_z_stops_the_job_and_fg_goes_on(variants, variant):
    """An interactive shell sees a stopped job, and brings it back."""
    command = variants.command(variant, ["sh", "-c", "echo re''ady $$; read x; echo got $x"])
    line = shlex.join(command)
    with Terminal(["bash", "--norc", "-i"], env={**variants.env, "PS1": "$ "}, cwd=variants.directory) as at:
        at.until(b"$ ")
        at.type(line.encode() + b"\n")
        at.until(b"ready ")
        shown = at.until(b"\r\n")
        (pid,) = re.findall(rb"ready (\d+)\r\n", shown)
        at.type(b"\x1a")
        at.until(b"Stopped")
        # The shell waits for its own child only; the job under it may still take a key.
        until(lambda: process_state(int(pid)) == "T")
        at.until(b"\n")  # the shell repeats the command, here and after fg; keys before its prompt are lost
        at.until(b"$ ")
        at.type(b"fg\n")
        at.until(b"fg\r\n")
        at.until(b"got $x")
        at.until(b"\r\n")
        at.type(b"word\n")
        at.until(b"got word")
        at.type(b"exit\n")
        assert at.end() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_job_sees_a_terminal_of_the_right_size(variants, variant):
    """Colours and bars ask for isatty and the width; a new size is followed."""
    program = (
        "import os, signal, sys, time\n"
        "show = lambda *_: print([os.isatty(fd) for fd in (0, 1, 2)], tuple(os.get_terminal_size(1)), flush=True)\n"
        "new = []\nsignal.signal(signal.SIGWINCH, lambda *_: new.append(1))\nshow()\n"
        "while os.get_terminal_size(1).columns == 91: time.sleep(0.01)\n"
        "show(); print('told', bool(new))"
    )
    with terminal(variants, variant, [PYTHON, "-c", program], rows=33, columns=91) as at:
        at.until(b"[True, True, True] (91, 33)")
        at.resize(40, 120)
        assert at.end() == 0
        assert b"[True, True, True] (120, 40)" in at.shown
        assert b"told True" in at.shown


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_and_a_password(variants, variant):
    """A question without newline is shown at once, and a password is not echoed."""
    program = (
        "import getpass\nname = input('name? ')\nword = getpass.getpass('word? ')\nprint('hello', name, len(word))"
    )
    with terminal(variants, variant, [PYTHON, "-c", program]) as at:
        at.until(b"name? ")
        at.type(b"you\n")
        at.until(b"word? ")
        at.type(b"hunter2\n")
        assert at.end() == 0
        assert b"hello you 7" in at.shown
        assert b"hunter2" not in at.shown


SINGLE_KEYS = {
    "standard input": "tty.setcbreak(0); os.write(1, b'ready'); k = os.read(0, 1)",
    "modes by standard output": "tty.setraw(1); os.write(1, b'ready'); k = os.read(0, 1)",
    "keys from standard error": "tty.setraw(2); os.write(1, b'ready'); k = os.read(2, 1)",
    "keys by poll": "tty.setraw(2); p = select.poll(); p.register(2, 1); os.write(1, b'ready'); p.poll()\n"
    "k = os.read(2, 1)",
    "the terminal's own name": "f = os.open(os.ttyname(2), 0); tty.setraw(f); os.write(1, b'ready'); k = os.read(f, 1)",
    "curses": "s = curses.initscr(); curses.cbreak(); s.addstr('ready'); s.refresh()\n"
    "k = bytes([s.getch()]); curses.endwin()",
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows what a process waits for")
@pytest.mark.parametrize("variant", ["plain", "tailspan"])
@pytest.mark.parametrize("kind", SINGLE_KEYS)
def test_a_full_screen_program_gets_single_keys(variants, variant, kind):
    """Whatever file descriptor it sets its modes and reads through."""
    program = f"import curses, os, select, tty\n{SINGLE_KEYS[kind]}\nos.write(1, b' got ' + k)"
    with terminal(variants, variant, [PYTHON, "-c", program]) as at:
        at.until(b"ready")
        at.type(b"q")
        at.until(b" got q")
        assert at.end() == 0


@pytest.mark.parametrize("variant", ["plain", "tailspan"])
@pytest.mark.parametrize("program", ["less", "more"])
def test_a_pager_gets_keys(variants, variant, program):
    """`less` and `more` read from their output's terminal."""
    if not shutil.which(program):
        pytest.skip(f"needs {program}")
    (variants.directory / "text").write_text("".join(f"line {number}\n" for number in range(99)))
    with terminal(variants, variant, [program, "text"]) as at:
        at.until(b"line 20\r")
        at.type(b" ")
        at.until(b"line 40\r")
        at.type(b"q")
        assert at.end() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_typed_ahead_lines_stay_for_the_shell(variants, variant):
    """A job that reads nothing takes nothing of what was pasted after it."""
    line = " ".join(f"'{word}'" for word in variants.command(variant, ["sleep", "1"]))
    with Terminal(["bash", "--norc", "-i"], env={**variants.env, "PS1": "$ "}, cwd=variants.directory) as at:
        at.until(b"$ ")
        at.type(line.encode() + b"\necho pas''ted\nexit\n")
        assert at.end() == 0
        assert b"pasted" in at.shown


def test_output_is_byte_for_byte_the_same(variants):
    """Newlines, carriage returns and colours reach the terminal as they would without us, and the log as printed."""
    script = r"printf 'a\nb\r\n\033[31mred\033[0m\n'; printf 'no newline' >&2"
    shown = {}
    for variant in VARIANTS:
        with terminal(variants, variant, ["sh", "-c", script]) as at:
            assert at.end() == 0
            shown[variant] = at.shown
    _, _, ours = shown["tailspan"].partition(b"\n")  # after the line that names the job
    ours, _, end = ours.rpartition(b"\r\n\x1b[2m")
    assert end.startswith(b"tailspan: succeeded  exit code 0  ")
    assert shown["plain"] == shown["timeout"] == ours
    assert (variants.jobs()[0] / "log").read_bytes() == b"a\nb\r\n\x1b[31mred\x1b[0m\nno newline"


def test_without_a_terminal_on_request(variants):
    """--no-tty gives pipes."""
    with terminal(
        variants, "tailspan", ["sh", "-c", "test -t 1 || echo pipe; test -t 0 && echo tty"], "--no-tty"
    ) as at:
        assert at.end() == 0
        assert b"pipe" in at.shown
        assert b"tty" in at.shown


def test_only_the_redirected_output_is_a_pipe(variants):
    """`tailspan run -- x > file` at a terminal: stderr is a terminal all the same."""
    script = "tailspan_run -- sh -c 'test -t 1 && echo out; test -t 2 && echo err >&2' > out.txt"
    run = " ".join(f"'{word}'" for word in variants.command("tailspan", [])[:-1])
    with Terminal(
        ["bash", "-c", f'tailspan_run() {{ {run} "$@"; }}; {script}'], env=variants.env, cwd=variants.directory
    ) as at:
        assert at.end() == 0
        assert b"err" in at.shown
    assert (variants.directory / "out.txt").read_bytes() == b""


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_end_of_the_terminal_is_a_hangup(variants, variant):
    """A closed window sends SIGHUP, and the job can clean up."""
    program = (
        "import signal, sys, time\n"
        "def on(*_):\n open('hup', 'w').close()\n sys.exit(0)\n"
        "signal.signal(signal.SIGHUP, on)\nprint('ready', flush=True)\nwhile True: time.sleep(0.02)"
    )
    at = terminal(variants, variant, [PYTHON, "-c", program])
    at.until(b"ready\r\n")
    os.close(at.ours)
    os.waitpid(at.pid, 0)
    deadline = time.monotonic() + 30
    while not (variants.directory / "hup").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
