"""Section 2: what a job inherits and sees is what it would inherit and see without us."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.fakes.local_jobs import until
from tests.fakes.variants import TAILSPAN, VARIANTS, Variants

PYTHON = sys.executable
# Signal 32, which only glibc uses: posix_spawn ignores it in a child, and Python 3.13 starts processes by that.
_INTERNAL = re.compile(rb"(SigIgn:\t[0-9a-f]{8})8(?=[0-9a-f]{7}\n)")
WAIT = "until [ -e go ]; do sleep 0.05; done"


@pytest.mark.parametrize(
    "script",
    [
        "nohup RUN grep -E 'Sig(Ign|Blk)' /proc/self/status 2>/dev/null",
        "trap '' INT QUIT USR1; RUN grep -E 'Sig(Ign|Blk)' /proc/self/status",
        "trap '' PIPE; RUN grep -E 'Sig(Ign|Blk)' /proc/self/status; true",
        "RUN grep -E 'Sig(Ign|Blk)' /proc/self/status",
        "umask 027; RUN sh -c umask",
        "nice -n 5 RUN nice",
        "ulimit -n 100; RUN sh -c 'ulimit -n'",
        "ulimit -c 0; RUN sh -c 'ulimit -c'",
        "cd /usr; RUN pwd",
        "mkdir gone; cd gone; rmdir ../gone; RUN sh -c 'echo here'",
        "diff <(echo a) <(echo b) > /dev/null; RUN diff <(echo a) <(echo a) && echo same",
        "RUN cat <(echo from a file descriptor)",
        "exec 7> seven; RUN sh -c 'echo seven >&7'; cat seven",
        "exec 5<<< five; RUN sh -c 'cat <&5'",
        "echo in | RUN cat",
        "RUN cat < /etc/hostname",
        "RUN sh -c 'test -e /dev/stdout && echo x > /dev/stdout'",
        "RUN sh -c 'echo a | tee /dev/stderr' 2>&1 | sort",
        "RUN sh -c 'kill -9 $$'; echo $?",
        "RUN sh -c 'kill -TERM $$'; echo $?",
        "RUN sh -c 'exit 200'; echo $?",
        "RUN yes | head -n 1; echo ${PIPESTATUS[0]}",
        "printf 'echo no first line $1\\n' > script; chmod +x script; RUN ./script x",
        "RUN ./no-such-script 2>/dev/null; echo $?",
        "RUN no-such-command 2>/dev/null; echo $?",
        "RUN /etc 2>/dev/null; echo $?",
        "RUN sh -c 'echo a; sleep 0.1; echo b' | while read x; do echo got $x; done",
        "RUN sh -c 'exec 1>&-; until [ -e go ]; do sleep 0.05; done' | (cat; touch go; echo early)",
        "for i in 1 2 3; do echo $i; done | while read x; do echo got $x; RUN true; done",
        "printf 'all:\\n\\t+@echo $(MAKEFLAGS) | grep -o jobserver | head -n 1\\n' > Makefile; RUN make -s -j2 2>&1",
        "RUN env -i /bin/sh -c 'echo $0'",
        "X='a b' RUN sh -c 'echo \"$X\"'",
        "RUN printf '%s|' '' 'a  b' '*' '$HOME' 'ü'",
    ],
)
def test_shell_lines(variants: Variants, script: str) -> None:
    """Each line prints and returns the same under the three variants."""
    results = {}
    for variant in VARIANTS:
        if variant == "timeout" and "exec 1>&-" in script:
            continue
        words = " ".join(f"'{word}'" for word in variants.command(variant, ["X"])[:-1])
        directory = variants.directory / variant
        directory.mkdir()
        done = subprocess.run(
            ["bash", "-c", script.replace("RUN", words)],
            env=variants.env,
            cwd=directory,
            capture_output=True,
            timeout=60,
        )
        results[variant] = done.returncode, _INTERNAL.sub(rb"\g<1>0", done.stdout)
    assert results["tailspan"] == results["plain"]
    if "Sig(" not in script and "exec 1>&-" not in script:
        # timeout(1) sets dispositions of its own, and keeps an output open that its command closes.
        assert results["tailspan"] == results["timeout"]


def test_a_lock_is_held_as_long_as_a_detached_job(variants: Variants) -> None:
    """`flock -n L tailspan run --detach`: the job inherits the lock's file descriptor."""
    lock = variants.directory / "lock"
    started = variants.run("plain", ["flock", "-n", str(lock), *TAILSPAN, "run", "--detach", "--", "sh", "-c", WAIT])
    assert started.returncode == 0
    assert variants.run("plain", ["flock", "-n", str(lock), "true"]).returncode == 1
    (variants.directory / "go").touch()
    until(lambda: variants.run("plain", ["flock", "-n", str(lock), "true"]).returncode == 0)


def test_a_full_disk_of_the_caller(variants: Variants) -> None:
    """A job sees the error itself where each write fails; `tailspan run -- dump > full` does not exit with 0."""
    with open("/dev/full", "wb") as full:
        for count in ("1", "100000"):
            results = [
                variants.run(variant, ["seq", count], stdout=full, capture_output=False, stderr=subprocess.PIPE)
                for variant in VARIANTS
            ]
            assert [done.returncode for done in results] == [1, 1, 1]
            assert {done.stderr for done in results} == {b"seq: write error: No space left on device\n"}


def test_a_runner_under_nohup_survives_a_hangup(variants: Variants) -> None:
    """Ignored signals stay ignored, in the runner too."""
    process = subprocess.Popen(
        variants.command("tailspan", ["sh", "-c", "echo ready; sleep 0.5; echo done"]),
        env=variants.env, cwd=variants.directory, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate()[0] == b"done\n"
    assert process.returncode == 0


def test_ctrl_c_ends_a_loop_of_the_shell(variants: Variants) -> None:
    """A shell's loop ends with the command that SIGINT ended."""
    run = " ".join(f"'{word}'" for word in variants.command("tailspan", ["sleep", "5"]))
    process = subprocess.Popen(
        ["bash", "-c", f"while :; do echo round; {run}; done"],
        env=variants.env, cwd=variants.directory, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"round\n"
    until(lambda: variants.jobs() and (variants.jobs()[0] / "state.json").exists())
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    process.stdout.close()


def test_lines_of_one_destination_keep_their_order(variants: Variants) -> None:
    """`2>&1` is one pipe: alternating lines stand in the log as they were printed."""
    program = "import os\nfor i in range(3000):\n os.write(1 + i % 2, b'%d\\n' % i)"
    done = variants.run(
        "tailspan", [PYTHON, "-c", program], capture_output=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    expected = b"".join(b"%d\n" % number for number in range(3000))
    assert done.stdout == expected
    assert (variants.jobs()[0] / "log").read_bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports writes into pipes")
@pytest.mark.parametrize("distance_us", [0, 20, 200])
def test_lines_of_two_pipes_keep_their_order(variants: Variants, distance_us: int) -> None:
    """Standard output and standard error go to two places: the kernel reports the order of the writes."""
    program = (
        "import os, time\nfor i in range(2000):\n os.write(1 + i % 2, b'%d\\n' % i)\n"
        f" end = time.perf_counter() + {distance_us} / 1e6\n"
        " while time.perf_counter() < end: pass"
    )
    done = variants.run("tailspan", [PYTHON, "-c", program])
    assert len(done.stdout.split()) == len(done.stderr.split()) == 1000
    lines = [int(line) for line in (variants.jobs()[0] / "log").read_bytes().split()]
    assert sorted(lines) == list(range(2000))
    assert sum(after != before + 1 for before, after in itertools.pairwise(lines)) <= 20


def test_five_alternating_lines_of_a_shell(variants: Variants) -> None:
    """What a script prints is read as a person would have seen it."""
    script = "echo 1; echo 2 >&2; echo 3; echo 4 >&2; echo 5"
    variants.run("tailspan", ["sh", "-c", script])
    assert (variants.jobs()[0] / "log").read_bytes() == b"1\n2\n3\n4\n5\n"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", "Größe"),
        ("cp1252", "Preis: 5 €"),
        ("shift_jis", "日本語"),
        ("gbk", "中文"),
        ("utf-16", "Größe €\nzwei"),
    ],
)
def test_other_encodings_are_captured_as_utf_8(variants: Variants, encoding: str, text: str) -> None:
    """The terminal output is untouched."""
    data = (text + "\n").encode(encoding)
    (variants.directory / "data").write_bytes(data)
    done = variants.run("tailspan", ["cat", "data"], "--encoding", encoding)
    assert done.stdout == data
    assert (variants.jobs()[0] / "log").read_text("utf-8") == text + "\n"


def test_a_question_is_in_the_log_within_two_seconds(variants: Variants) -> None:
    """Text without newline is written to the log, and is one line when it is complete."""
    process = subprocess.Popen(
        variants.command("tailspan", ["sh", "-c", "printf 'name? '; read x; echo hello $x"]),
        env=variants.env, cwd=variants.directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    until(lambda: variants.jobs() and (variants.jobs()[0] / "log").read_bytes() == b"name? ")
    process.communicate(b"you\n")
    log = variants.jobs()[0]
    assert (log / "log").read_bytes() == b"name? hello you\n"
    assert (log / "log.idx").stat().st_size == 64


def test_a_report_reaches_the_thread_that_waits(variants):
    """A program with other threads runs jobs, too: the signal of a report must not end it."""
    program = (
        "import sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "from click.testing import CliRunner\n"
        "from tailspan.cli.group import main\n"
        "for number in range(20):\n"
        "    result = CliRunner().invoke(main, ['run', '--', 'sh', '-c', f'exit {number}'])\n"
        "    assert result.exit_code == number, result.output\n"
        "print('all ran')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=variants.env, cwd=variants.directory, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"all ran\n"), done.stderr
