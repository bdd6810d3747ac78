"""Text of remote servers cannot control the terminal: every command, on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tailspan.services._requests import error_text
from tests.e2e.conftest import TAILSPAN, Machine
from tests.fakes.collector import Collector, Reply
from tests.fakes.job_api import FakeJobApi, status_fault

# A title, a cleared screen, a cursor that goes up, C1 controls, a device report, backspaces, a link, a line feed.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[5A\x9b6n\x90owned\x9c\x1bc\x08\x08\x7f\x1b]8;;http://owned\x1b\\x\x1b[0c"
ACTS = ("\x1b]", "\x1b[2J", "\x1b[5A", "\x9b", "\x90", "\x9c", "\x1bc", "\x08", "\x07", "\x7f", "\x1b\\", "\x1b[0c")


# One process for several commands, with a line between them.
RUN_ALL = """
import sys
from tailspan.cli import main
for command in sys.argv[1:]:
    try:
        main(command.split(), prog_name="tailspan")
    except SystemExit:
        pass
    print("=====", command, flush=True)
"""


@pytest.fixture
def api() -> Iterator[FakeJobApi]:
    """A job whose every text is hostile."""
    with FakeJobApi() as fake:
        job = fake.add_job(
            "j",
            name=f"name{HOSTILE}",
            job_status="Failed",
            instance_id=HOSTILE,
            error=f"error{HOSTILE}",
            url=HOSTILE,
            attributes={HOSTILE: HOSTILE},
            exit_code=3,
            finished_at="2026-01-01T00:00:00+00:00",
        )
        job.row |= {"job_name": f"name{HOSTILE}", "id": "j"}
        job.line(f"line{HOSTILE}end", 1_000)
        yield fake


def on_a_terminal(machine: Machine, *command: str) -> str:
    """Run a command whose standard output and error are a terminal, and return what reached it."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                shown.extend(data)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        env = {**machine.env, "TERM": "xterm-256color"}
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, timeout=120)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return shown.decode("utf-8", "replace")


def shown_by(machine: Machine, *commands: str) -> list[str]:
    """Run commands in one process on a terminal, and return what each of them showed."""
    *shown, rest = re.split(r"===== ([^\r\n]+)", on_a_terminal(machine, sys.executable, "-c", RUN_ALL, *commands))
    assert (tuple(shown[1::2]), rest.strip()) == (commands, "")
    return shown[::2]


def assert_harmless(shown: str) -> None:
    assert shown.strip()
    assert [act for act in ACTS if act in shown] == [], repr(shown[-2000:])


VERBS = ("status j", "jobs", "logs j", "tail j", "tail j --sample", "wait j", "cancel j", "exec-time j")


@pytest.mark.parametrize("command", ["others", "agent check", "agent run --once --timeout 20 --log-level debug"])
def test_answers_of_a_service(machine: Machine, api: FakeJobApi, command: str) -> None:
    """Names, errors, attributes, lines."""
    machine.configure(
        f'[services.remote]\ntype = "fused"\nbase_url = "{api.base_url}"\n'
        '[[agent.watch]]\nservice = "remote"\njobs = ["j"]\nsettle = "0s"\n'
    )
    if command != "others":
        assert_harmless(on_a_terminal(machine, TAILSPAN, *command.split()))
        return
    for text in shown_by(machine, *(f"{verb} --service remote" for verb in VERBS)):
        assert_harmless(text)


def test_errors_of_a_service(machine: Machine) -> None:
    """What a server writes into its error reply."""
    with ExitStack() as servers:
        sections = []
        for status in (400, 401, 404, 500):
            api = servers.enter_context(FakeJobApi())
            api.fault(status_fault(status, f"message{HOSTILE}"), times=None)
            sections.append(f'[services.s{status}]\ntype = "fused"\nbase_url = "{api.base_url}"\n')
        machine.configure("".join(sections))
        for text in shown_by(machine, *(f"status j --service s{status}" for status in (400, 401, 404, 500))):
            assert "message" in text
            assert_harmless(text)


def test_python_verbs(machine: Machine, api: FakeJobApi) -> None:
    """The same from a program: lines, remarks, warnings, and an unhandled exception."""
    machine.config.write_text(
        f'default_service = "remote"\n[services.remote]\ntype = "fused"\nbase_url = "{api.base_url}"\n'
    )
    api.add_job("silent", job_status="Failed", error=f"error{HOSTILE}", finished_at="2026-01-01T00:00:00+00:00")
    api.add_job("refused")
    program = (
        "import tailspan\n"
        "tailspan.job_print_logs('j')\n"
        "tailspan.job_tail_logs('j', sample_logs=False)\n"
        "tailspan.job_tail_logs('silent')\n"
        "print(tailspan.job_get_status('j'))\n"
    )
    assert_harmless(on_a_terminal(machine, sys.executable, "-c", program))
    api.fault(status_fault(400, f"message{HOSTILE}"), times=None)
    shown = on_a_terminal(machine, sys.executable, "-c", "import tailspan; tailspan.job_get_status('j')")
    assert "message" in shown
    assert_harmless(shown)


def test_answers_of_an_endpoint(machine: Machine, collector: Collector) -> None:
    """What an OTLP endpoint refuses with, in the log and in the dead letter's summary, and lines of a replayed file."""
    machine.configure(f'[[agent.watch]]\ndiscover = true\n[otlp]\nendpoint = "{collector.http_url}"\n')
    machine.tailspan("run", "--", "echo", "hi")
    for signal in ("logs", "traces", "metrics"):
        collector.always(signal, Reply(400, message=f"no{HOSTILE}"))
    assert_harmless(on_a_terminal(machine, TAILSPAN, "agent", "run", "--once"))
    (machine.home / "x.jsonl").write_text(f'{{"{HOSTILE}": 1}}\n' + HOSTILE)
    for text in shown_by(machine, "agent check", "agent dead-letter", f"agent replay {machine.home / 'x.jsonl'}"):
        assert_harmless(text)


def test_error_texts_are_printable() -> None:
    """Whatever encoding a server uses for it."""
    for reply in ({"message": HOSTILE + "a"}, {"detail": [{"loc": [HOSTILE], "msg": HOSTILE}]}, [HOSTILE], HOSTILE):
        assert error_text(json.dumps(reply).encode()).isprintable()
