"""`tailspan doctor`: the bundle for bug reports, from the real command."""

from __future__ import annotations

import json
import os
import stat

from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector, Reply


def test_beside_a_running_agent(machine: Machine, collector: Collector) -> None:
    """All is well: versions, health, state and reachability, and the agent goes on."""
    machine.env["TAILSPAN_OTLP__ENDPOINT"] = collector.http_url
    machine.configure('[[agent.watch]]\nservice = "local"\ndiscover = true\nsettle = 0\n')
    machine.config.write_text(machine.config.read_text().replace('listen = ""', 'listen = "127.0.0.1:0"'))
    machine.tailspan("run", "--name", "etl", "--", "true")
    agent = machine.start("agent", "run")
    assert agent.stderr is not None
    assert "follows local" in next(line for line in agent.stderr if "follows" in line)
    report = json.loads(machine.tailspan("doctor", "--json").stdout)
    assert report["problems"] == []
    assert report["versions"]["tailspan"] == machine.invoke("--version").stdout.split()[-1]
    assert report["store"]["agent"] == f"runs as pid {agent.pid}"
    assert report["store"]["integrity"] == "ok"
    assert report["reach"]["otlp logs"] == f"{collector.http_url}/v1/logs accepts them"
    assert report["configuration"]["agent.watch[0].service"] == f"local  ({machine.config}:8)"
    assert report["configuration"]["otlp.endpoint"].endswith("(TAILSPAN_OTLP__ENDPOINT)")
    assert len(report["disk"]) == 2
    assert agent.poll() is None


def test_where_much_is_wrong(machine: Machine, collector: Collector) -> None:
    """A file for its owner alone says what fails and what failed before, and no secret that a server repeats."""
    secret = "hush-very-secret"
    machine.env["OTEL_EXPORTER_OTLP_HEADERS"] = f"authorization=Bearer%20{secret}"
    machine.configure(
        f'[[agent.watch]]\nservice = "local"\ndiscover = true\n[otlp]\nendpoint = "{collector.http_url}"\n'
    )
    for signal in ("logs", "traces", "metrics"):
        collector.always(signal, Reply(401, message=f"who is Bearer {secret}?"))
    machine.tailspan("run", "--name", "etl", "--", "echo", "hi")
    machine.tailspan("agent", "run", "--once", "--timeout", "1", exit_code=3)
    (machine.home / "agent" / "checkpoints.corrupt-1.db").write_text("")
    (machine.home / "report.txt").write_text("was here before")
    said = machine.invoke("doctor", "--output", "report.txt", exit_code=3)
    assert said.stdout == ""
    report = (machine.home / "report.txt").read_text()
    assert "problems:\n  - otlp logs: " in report
    assert "checkpoints.corrupt-1.db" in report
    assert "last errors:\n  - 20" in report
    assert "OTEL_EXPORTER_OTLP_HEADERS" in report
    assert secret not in report + said.stderr
    assert stat.S_IMODE((machine.home / "report.txt").stat().st_mode) == 0o600


def test_a_configuration_that_does_not_load(machine: Machine) -> None:
    """The error without the value; the rest of the report all the same."""
    secret = "http://me:hush-very-secret-and-also-much-longer-than-an-error-shows@host"
    machine.config.write_text(f'[agent]\nlisten = 7\n[otlp]\nendpoint = "{secret}"\ntimeout = "{secret}"\n')
    said = machine.invoke("doctor", exit_code=2).stdout
    assert f"{machine.config}:2: agent.listen: expected text in quotes" in said
    assert "tailspan: " in said
    assert "hush" not in said


def test_state_of_another_kind(machine: Machine) -> None:
    """A store that is no database is a problem with its own exit code; a token that is a pipe stops nothing."""
    (machine.home / "agent").mkdir()
    damaged = machine.home / "agent" / "checkpoints.db"
    damaged.write_bytes(b"SQLite format 3\0" + b"x" * 2000)
    os.mkfifo(machine.home / "pipe")
    machine.env["TAILSPAN_AGENT__TOKEN_FILE"] = str(machine.home / "pipe")
    report = json.loads(machine.invoke("doctor", "--json", exit_code=1).stdout)
    assert any("store: " in problem and "not a database" in problem for problem in report["problems"])
    assert report["store"]["agent"] == "does not run on this state_dir"
    assert damaged.stat().st_size == 2016
