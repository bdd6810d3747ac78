"""`tailspan._delivery`: what `wait --delivered` makes of the answers of the server on ``agent.listen``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest

from tailspan._delivery import wait_until_delivered
from tailspan.config import Settings, load_settings
from tailspan.errors import AuthError, ConfigError, ProtocolError, ServiceUnavailableError, WaitTimeoutError
from tailspan.models import JobState
from tailspan.testing import FakeClock, FakeService
from tests.ports import free_port


class Agent(ThreadingHTTPServer):
    """Gives the prepared answers, the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, bytes]] = []
        self.requests: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    """Notes the path and the token of a request."""

    def do_GET(self) -> None:
        """Answer."""
        server = self.server
        assert isinstance(server, Agent)
        server.requests.append((self.path, self.headers.get("Authorization", "")))
        status, body = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """A server in place of the agent; a proxy in the environment that must not be used."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Agent() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def settings_of(listen: str) -> Settings:
    """Return settings whose agent listens there."""
    return load_settings(overrides={"agent": {"listen": listen, "token": "s3cret-token"}})


async def wait(settings: Settings, timeout_s: float = 30.0) -> None:
    """Wait for the delivery of an ended job."""
    service = FakeService()
    job = service.add_job("job-1/ä", state=JobState.SUCCEEDED)
    clock = FakeClock()
    await wait_until_delivered(settings, service, job, clock, clock.monotonic_s() + timeout_s)


def wait_for(agent: Agent, *answers: tuple[int, bytes], timeout_s: float = 30.0) -> None:
    """Wait with these answers of the agent."""
    agent.answers = list(answers)
    anyio.run(wait, settings_of(f"127.0.0.1:{agent.server_address[1]}"), timeout_s)


def test_it_asks_until_the_last_line_is_delivered(agent: Agent) -> None:
    """Each time for this job, with the token."""
    wait_for(agent, (200, b'{"logs_complete": false}'), (200, b'{"logs_complete": true}'))
    identity = FakeService().identity
    assert agent.requests == [(f"/delivery?identity={identity}&job_id=job-1%2F%C3%A4", "Bearer s3cret-token")] * 2


def test_it_gives_up_in_time(agent: Agent) -> None:
    """The error names the job."""
    with pytest.raises(WaitTimeoutError, match="job-1/ä has ended, but the agent had not delivered its last line"):
        wait_for(agent, (200, b'{"logs_complete": false}'), timeout_s=1.0)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token(agent: Agent, status: int) -> None:
    """The cure is a key of the configuration."""
    with pytest.raises(AuthError, match=r"refused the token: set agent\.token_file"):
        wait_for(agent, (status, b""))


@pytest.mark.parametrize("status", [302, 404, 500])
def test_another_answer_than_success(agent: Agent, status: int) -> None:
    """It may be the wrong server."""
    with pytest.raises(ProtocolError, match=rf"/delivery answered {status}: check that a Tailspan agent listens there"):
        wait_for(agent, (status, b""))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b"1", b"[" * 5000, b"\xff"])
def test_a_server_that_is_not_an_agent(agent: Agent, body: bytes) -> None:
    """It answers, but not as an agent does."""
    with pytest.raises(ProtocolError, match="is not a Tailspan agent: correct agent"):
        wait_for(agent, (200, body))


def test_no_answer() -> None:
    """The error says where, and how to start an agent."""
    port = free_port()
    with pytest.raises(
        ServiceUnavailableError, match=rf"127\.0\.0\.1:{port}/delivery does not answer .*tailspan agent run"
    ):
        anyio.run(wait, settings_of(f"127.0.0.1:{port}"))


def test_no_address_to_ask() -> None:
    """An agent without its server reports no deliveries."""
    with pytest.raises(ConfigError, match=r"agent\.listen is empty"):
        anyio.run(wait, settings_of(""))
