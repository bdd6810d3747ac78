"""Bad input: a clear message, the exit code of the contract, and never a traceback."""

from __future__ import annotations

import http.server
import subprocess
import threading
from collections.abc import Iterator

import pytest
from click.testing import Result

from tests.e2e.conftest import Machine
from tests.ports import free_port


class _Html(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<html><body>Sign in</body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def html_url() -> Iterator[str]:
    """A server that answers every request with an HTML page."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Html) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def dead_url() -> str:
    """An address where nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def complaint(machine: Machine, *arguments: str, exit_code: int) -> str:
    """Run a command that must fail, in this process, and return its one line."""
    return one_line(machine.invoke(*arguments, exit_code=exit_code))


def one_line(done: Result | subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a command that failed."""
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("tailspan: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_broken_toml_names_file_line_and_column(machine: Machine) -> None:
    """A syntax error has a position."""
    machine.config.write_text("[agent]\nstate_dir = \n")
    message = complaint(machine, "agent", "check", exit_code=2)
    assert "config.toml" in message
    assert "2" in message


def test_unknown_key_names_its_path_and_the_nearest_one(machine: Machine) -> None:
    """A misspelt key is an error; in a process of its own, as users run it."""
    machine.configure('[otlp]\nendpont = "http://localhost:4318"\n')
    message = one_line(machine.tailspan("agent", "run", "--once", exit_code=2))
    assert "otlp.endpont" in message
    assert "endpoint" in message


def test_missing_file(machine: Machine) -> None:
    """A configuration file named on the command line must exist."""
    assert "absent.toml" in complaint(machine, "jobs", "--config", "absent.toml", exit_code=2)


def test_missing_token(machine: Machine) -> None:
    """Without a token no request is sent to the hosted service."""
    machine.configure('[services.fused]\ntype = "fused"\n')
    message = complaint(machine, "status", "some-job", "--service", "fused", exit_code=2)
    assert "FUSED_AUTH_TOKEN" in message


def test_unreachable_service(machine: Machine, dead_url: str) -> None:
    """The message names the service and its address, without the token."""
    machine.configure(f'[services.api]\ntype = "fused"\nbase_url = "{dead_url}/server/v1"\ntoken = "t0ken"\n')
    message = complaint(machine, "status", "some-job", "--service", "api", exit_code=3)
    assert "127.0.0.1" in message
    assert "t0ken" not in message


def test_service_that_answers_html(machine: Machine, html_url: str) -> None:
    """A sign-in page is not a status."""
    machine.configure(f'[services.api]\ntype = "fused"\nbase_url = "{html_url}"\ntoken = "t0ken"\n')
    for arguments in (("status", "some-job"), ("logs", "some-job"), ("jobs",)):
        message = complaint(machine, *arguments, "--service", "api", exit_code=3)
        assert "HTML" in message
        assert "services.api.base_url" in message


@pytest.mark.parametrize("job_id", ["20200101-000000000-nobody", "../../etc/passwd", "a/b", "..", "no such job"])
def test_unknown_job(machine: Machine, job_id: str) -> None:
    """Any text is a valid argument: it is an unknown job and never a file."""
    message = complaint(machine, "status", job_id, exit_code=4)
    assert job_id in message


def test_unknown_service(machine: Machine) -> None:
    """The message lists the configured services."""
    assert "local" in complaint(machine, "jobs", "--service", "nomad", exit_code=2)


def test_dead_endpoint_is_reported_and_nothing_is_lost(machine: Machine, dead_url: str) -> None:
    """A pass that cannot deliver reports it within its timeout, and the next one resumes."""
    machine.tailspan("run", "--", "echo", "hello")
    machine.configure(f'[otlp]\nendpoint = "{dead_url}"\n')
    done = machine.tailspan("agent", "run", "--once", "--timeout", "1", exit_code=3)
    assert "not everything was acknowledged" in done.stderr
    machine.configure()
    machine.tailspan("agent", "run", "--once")
    assert "hello" in (machine.home / "agent" / "otlp" / "logs.jsonl").read_text()


def test_agent_check_finds_all_of_it_at_once(machine: Machine, dead_url: str, html_url: str) -> None:
    """Each service and signal has its own line."""
    machine.configure(
        f'[services.api]\ntype = "fused"\nbase_url = "{html_url}"\ntoken = "t0ken"\n'
        '[[agent.watch]]\nservice = "api"\ndiscover = true\n'
        '[[agent.watch]]\nservice = "local"\njobs = ["20200101-000000000-nobody"]\n'
        f'[otlp]\nendpoint = "{dead_url}"\n'
    )
    done = machine.invoke("agent", "check", exit_code=3)
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert len(problems) == 5, done.stdout
    assert "t0ken" not in done.stdout


def test_second_agent_refuses_and_names_the_first(machine: Machine) -> None:
    """Two agents with one store would relay everything twice."""
    agent = machine.start("agent", "run")
    assert agent.stderr is not None
    agent.stderr.readline()
    second = one_line(machine.tailspan("agent", "run", "--once", exit_code=2))
    assert f"pid {agent.pid}" in second


FOREIGN = {
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1.5",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317",
    "OTEL_RESOURCE_ATTRIBUTES": "no pairs",
}


def test_variables_for_other_programs_do_not_stop_a_job(machine: Machine) -> None:
    """A job runs although the agent could not send with them; it gets them, but attributes of its own."""
    shown = machine.tailspan("run", "--", "env", env=FOREIGN).stdout
    passed_on = {f"{name}={value}" for name, value in FOREIGN.items() if name != "OTEL_RESOURCE_ATTRIBUTES"}
    assert passed_on <= set(shown.splitlines())
    assert "SUCCEEDED" in machine.invoke("jobs", env=FOREIGN).stdout


@pytest.mark.parametrize("variable", FOREIGN)
def test_variables_for_other_programs_stop_only_the_agent(machine: Machine, variable: str) -> None:
    """The agent names the variable that it cannot use; `jobs` does not read it."""
    env = {variable: FOREIGN[variable]}
    machine.invoke("jobs", env=env)
    assert variable in machine.invoke("agent", "run", "--once", exit_code=2, env=env).stderr
