"""Bad input: a clear message, the exit code of the contract, and never a traceback."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

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
    """A server that answers everything with a page for people."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Html) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def dead_url() -> str:
    """An address where nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def complaint(machine: Machine, *arguments: str, exit_code: int) -> str:
    """Run a command that must fail, and return its one line."""
    done = machine.tailspan(*arguments, exit_code=exit_code)
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("tailspan: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_broken_toml_names_file_line_and_column(machine: Machine) -> None:
    """A syntax error is found again."""
    machine.config.write_text("[agent]\nstate_dir = \n")
    message = complaint(machine, "agent", "check", exit_code=2)
    assert "config.toml" in message
    assert "2" in message


def test_unknown_key_names_its_path_and_the_nearest_one(machine: Machine) -> None:
    """A slip of the pen does not silently configure nothing."""
    machine.configure('[otlp]\nendpont = "http://localhost:4318"\n')
    message = complaint(machine, "agent", "run", "--once", exit_code=2)
    assert "otlp.endpont" in message
    assert "endpoint" in message


def test_missing_file(machine: Machine) -> None:
    """A configuration that is named must be there."""
    assert "absent.toml" in complaint(machine, "jobs", "--config", "absent.toml", exit_code=2)


def test_missing_token(machine: Machine) -> None:
    """The hosted service is not asked without a token."""
    machine.configure('[services.fused]\ntype = "fused"\n')
    message = complaint(machine, "status", "some-job", "--service", "fused", exit_code=2)
    assert "FUSED_AUTH_TOKEN" in message


def test_unreachable_service(machine: Machine, dead_url: str) -> None:
    """It says which service, and where it was looked for."""
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
    """Whatever the id looks like, it is no job, and no file."""
    message = complaint(machine, "status", job_id, exit_code=4)
    assert job_id in message


def test_unknown_service(machine: Machine) -> None:
    """It says which there are."""
    assert "local" in complaint(machine, "jobs", "--service", "nomad", exit_code=2)


def test_dead_endpoint_is_said_and_nothing_is_lost(machine: Machine, dead_url: str) -> None:
    """A pass that cannot deliver says so within its time, and the next one goes on."""
    machine.tailspan("run", "--", "echo", "hello")
    machine.configure(f'[otlp]\nendpoint = "{dead_url}"\n')
    done = machine.tailspan("agent", "run", "--once", "--timeout", "2", exit_code=3)
    assert "acked" in done.stderr
    machine.configure()
    machine.tailspan("agent", "run", "--once")
    assert "hello" in (machine.home / "agent" / "otlp" / "logs.jsonl").read_text()


def test_agent_check_finds_all_of_it_at_once(machine: Machine, dead_url: str, html_url: str) -> None:
    """Each service and signal has a line of its own."""
    machine.configure(
        f'[services.api]\ntype = "fused"\nbase_url = "{html_url}"\ntoken = "t0ken"\n'
        '[[agent.watch]]\nservice = "api"\ndiscover = true\n'
        '[[agent.watch]]\nservice = "local"\njobs = ["20200101-000000000-nobody"]\n'
        f'[otlp]\nendpoint = "{dead_url}"\n'
    )
    done = machine.tailspan("agent", "check", exit_code=3)
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert len(problems) == 5, done.stdout
    assert "t0ken" not in done.stdout


def test_second_agent_refuses_and_names_the_first(machine: Machine) -> None:
    """Two agents on one store would relay everything twice."""
    agent = machine.start("agent", "run")
    assert agent.stderr is not None
    agent.stderr.readline()
    assert f"pid {agent.pid}" in complaint(machine, "agent", "run", "--once", exit_code=2)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
        ("OTEL_RESOURCE_ATTRIBUTES", "no pairs"),
    ],
)
def test_variables_for_other_programs_stop_only_the_agent(machine: Machine, variable: str, value: str) -> None:
    """A job runs, with the variable passed on, although the agent could not send with it."""
    odd = {variable: value}
    shown = machine.tailspan("run", "--", "sh", "-c", "echo $OTEL_EXPORTER_OTLP_PROTOCOL ran", env=odd).stdout
    assert shown.split()[-1] == "ran"
    assert "SUCCEEDED" in machine.tailspan("jobs", env=odd).stdout
    done = machine.tailspan("agent", "run", "--once", exit_code=2, env=odd)
    assert variable in done.stderr
