"""Section 2: output without newline is visible in `logs` and `tail` before its line is complete."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.fakes.local_jobs import LocalJobs, until
from tests.fakes.variants import TAILSPAN, Terminal, Variants

GATE = "gate() { until [ -e $1 ]; do sleep 0.05; done; }; "


@pytest.fixture
def jobs(variants: Variants) -> Iterator[LocalJobs]:
    """Return local jobs in the state directory of the variants; ends those that are left."""
    with LocalJobs(variants.state_dir) as local:
        yield local


def start(jobs: LocalJobs, variants: Variants, script: str) -> str:
    """Start a script as a job in the test's directory."""
    return jobs.start("sh", "-c", GATE + script, cwd=str(variants.directory))


def logs(variants: Variants, job_id: str, *options: str) -> bytes:
    """Return what `tailspan logs` prints."""
    command = [*TAILSPAN, "logs", job_id, *options]
    return subprocess.run(command, env=variants.env, capture_output=True, timeout=60, check=True).stdout


def open_text(jobs: LocalJobs, job_id: str) -> bytes:
    """Return the text of the open line."""
    import anyio

    line = anyio.run(jobs.service.open_line, job_id)
    return line.text if line is not None else b""


def test_logs_show_the_open_line(variants: Variants, jobs: LocalJobs) -> None:
    """As `cat` of the log would; in JSON it is marked. Once complete it is one line, and the functions return it."""
    job_id = start(jobs, variants, "echo first; printf 'Continue? '; gate a; echo yes; gate b")
    until(lambda: open_text(jobs, job_id))
    assert logs(variants, job_id) == b"first\nContinue? "
    *lines, last = (json.loads(line) for line in logs(variants, job_id, "--json").splitlines())
    assert [line["message"] for line in lines] == ["first"]
    assert (last["message"], last["open"]) == ("Continue? ", True)
    assert jobs.lines(job_id) == [b"first"]
    (variants.directory / "a").touch()
    until(lambda: len(jobs.lines(job_id)) == 2)
    assert logs(variants, job_id) == b"first\nContinue? yes\n"
    assert open_text(jobs, job_id) == b""


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("printf 'Continue? '; gate a; echo yes", b"Continue? "),
        ("printf '...'; gate a; printf '..'; gate b; printf '.'", b"..."),
        ("printf 'Loading... '; gate a; printf 'done\\nnext'; gate b; echo", b"Loading... "),
        ("printf '10%%\\r20%%\\r'; gate a; echo done", b"10%\r20%\r"),
        ("printf 'caf\\303'; gate a; printf '\\251'; gate b; echo", b"caf"),
        ("printf 'no end'; gate a", b"no end"),
    ],
)
def test_tail_prints_the_open_line_and_then_its_rest(
    variants: Variants, jobs: LocalJobs, script: str, shown: bytes
) -> None:
    """Byte by byte what the job wrote, as soon as it is seen; the last line gets its newline."""
    job_id = start(jobs, variants, script)
    command = [*TAILSPAN, "tail", job_id, "--refresh", "0.1"]
    with subprocess.Popen(command, env=variants.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tail:
        assert tail.stdout is not None
        assert tail.stdout.read(len(shown)) == shown
        (variants.directory / "a").touch()
        (variants.directory / "b").touch()
        rest = tail.stdout.read()
    log = (jobs.directory(job_id) / "log").read_bytes()
    assert shown + rest == log.removesuffix(b"\n") + b"\n"


def test_two_streams_with_an_open_line(variants: Variants, jobs: LocalJobs) -> None:
    """A line of one stream does not hide the open line of the other, and neither is lost."""
    job_id = start(jobs, variants, "printf 'Loading... '; gate a; echo oops >&2; gate b; echo done")
    until(lambda: open_text(jobs, job_id) == b"Loading... ")
    (variants.directory / "a").touch()
    until(lambda: jobs.lines(job_id) == [b"oops"])
    until(lambda: open_text(jobs, job_id) == b"Loading... ")
    (variants.directory / "b").touch()
    until(lambda: jobs.lines(job_id) == [b"oops", b"Loading... done"])


def test_tail_at_a_terminal(variants: Variants, jobs: LocalJobs) -> None:
    """The state line of `tail` does not overwrite the open line."""
    job_id = start(jobs, variants, "echo first; printf 'Continue? '; gate a; echo yes; gate b")
    command = [*TAILSPAN, "tail", job_id, "--refresh", "0.1"]
    with Terminal(command, env=variants.env, cwd=variants.directory) as terminal:
        terminal.until(b"Continue? ")
        seen = len(terminal.shown)
        (variants.directory / "a").touch()
        assert terminal.until(b"yes\r\n")[seen:].startswith(b"yes\r\n")
        terminal.until(b"RUNNING")
        (variants.directory / "b").touch()
        assert terminal.end() == 0
