"""The job API as a server: who may ask, where it listens, how it bears slow readers and stops."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tailspan.errors import ConfigError
from tailspan.job_api.server import create_app, listen
from tests.fakes.scripted_service import START_MS, ScriptedJob, ScriptedService, ask, serving

REPOSITORY = Path(__file__).parents[4]
SERVE_PROGRAM = """
import sys
from tailspan.job_api.server import serve
from tests.fakes.scripted_service import ScriptedJob, ScriptedService

service = ScriptedService({"huge": ScriptedJob(lines=["x" * 1000] * 100_000, page_lines=1000)})
serve(service, on_ready=lambda url: print(url, flush=True))
assert service.closed
"""


@pytest.fixture
def service():
    """Three jobs: one that has ended, one that runs for ever, one without lines."""
    return ScriptedService(
        {
            "done": ScriptedJob(lines=["one", "two", "three", "four", "five"]),
            "forever": ScriptedJob(lines=["a"], statuses=None),
            "silent": ScriptedJob(),
        }
    )


@pytest.fixture
def server(service):
    """The job API over those jobs, open to this machine without a token."""
    with serving(service) as running:
        yield running


@pytest.fixture
def api(server):
    """A client of that server."""
    with httpx.Client(base_url=server.url, verify=False) as client:
        yield client


@pytest.mark.parametrize("scheme", ["Bearer", "Fused-Env-Bearer", "Fused-Rtenv-Bearer", "Fused-Service-Token", "x"])
def test_token_is_taken_after_any_scheme(service, scheme):
    """All the schemes of the published clients carry the token."""
    reply = ask(service, "/run/by-id/done", token="tökén", headers={"Authorization": f"{scheme} tökén".encode()})
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "token",
        "Bearer",
        " Bearer",
        "Bearer toke",
        "Bearer tokens",
        "Bearer TOKEN",
        "Bearer t token",
        "Bearer tök",
    ],
)
@pytest.mark.parametrize("path", ["/run/by-id/done", "/nowhere"])
def test_without_the_token_nothing_is_told(service, header, path):
    """A wrong, shortened, longer or missing token, or one without a scheme, is 401 on every path."""
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    reply = ask(service, path, token="token", headers=headers)
    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: <scheme> <token>" in reply.json()["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1:1", "127.1.2.3", "[::1]:8798", "LOCALHOST"])
def test_loopback_names_need_no_token(service, host):
    """Whoever names this machine as loopback does may ask a server without a token."""
    assert ask(service, "/run/by-id/done", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8798", "localhost.evil.example", "10.0.0.1", "", "[", "@localhost:x"]
)
def test_other_names_need_a_token(service, host):
    """A web page whose name was rebound to this machine is refused, unless it has a token."""
    assert ask(service, "/run/by-id/done", headers={"Host": host}).status_code == 403


def test_token_makes_the_name_free(service):
    """Behind a proxy or on a network the name is whatever it is: the token decides."""
    headers = {"Host": "jobs.example", "Origin": "https://jobs.example", "Authorization": "Bearer token"}
    assert ask(service, "/run/by-id/done", token="token", headers=headers).status_code == 200


def test_web_page_cannot_cancel_a_job_on_this_machine(service, api):
    """A page's blind POST to localhost, which needs no preflight, does nothing."""
    reply = api.post("/run/by-id/forever/cancel", headers={"Origin": "https://evil.example"})
    assert reply.status_code == 403
    assert service.jobs["forever"].statuses is None


@pytest.mark.parametrize("token", ["", "  "])
def test_empty_token_is_refused(service, token):
    """A token that was left empty must not open the door."""
    with pytest.raises(ConfigError, match="empty"):
        create_app(service, token=token)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_loopback_a_token_is_needed(host):
    """Listening for other machines without a token is refused before anything is opened."""
    with pytest.raises(ConfigError, match="there is no token"):
        listen(host, 0, None)


def test_beyond_loopback_a_token_is_enough():
    """With a token all addresses can be listened on."""
    with listen("0.0.0.0", 0, "token") as listener:
        assert listener.getsockname()[1] > 0


def test_port_in_use_is_told():
    """A port that is taken is one clear sentence."""
    with listen("127.0.0.1", 0, None) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: .*in use"):
            listen("127.0.0.1", port, None)


def test_unknown_host_is_told():
    """A host name that means nothing is one clear sentence."""
    with pytest.raises(ConfigError, match=r"cannot listen on no-such-host\.invalid"):
        listen("no-such-host.invalid", 0, "token")


def test_replies_do_not_wait_for_acknowledgements(server, api):
    """TCP_NODELAY is set on accepted connections: without it each keep-alive reply takes 44 ms."""
    api.get("/run/by-id/done")
    (connection,) = server.server.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_request_with_a_large_body_is_refused(api):
    """No request of the job API has a body: a large one is not read."""
    assert api.post("/run/by-id/done/cancel", content=b"x" * 70_000).status_code == 413


def test_slow_reader_holds_no_more_than_a_few_pages():
    """A log is read from the service only as fast as the client takes it, and not at all once it is gone."""
    lines = ["x" * 10_000] * 10_000
    service = ScriptedService({"huge": ScriptedJob(lines=lines, page_lines=100)})
    with serving(service) as running, closing(socket.socket()) as slow, httpx.Client(verify=False) as other:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.connect(("127.0.0.1", running.port))
        slow.sendall(b"GET /server/v1/logs/huge HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow.recv(1000)
        # Other requests are answered meanwhile; each gives the server the chance to read on, if it would.
        for _ in range(50):
            assert other.get(f"{running.url}/run/by-id/huge").status_code == 200
        assert service.open_reads == 1
        assert service.pages_made < 20
        slow.close()
        assert service.read_ended.wait(10)
    assert service.open_reads == 0
    assert service.pages_made < 20


def test_readers_do_not_wait_for_each_other(server, api):
    """Many requests at once are all answered, each with its own reply."""
    replies: dict[int, int] = {}

    def read(number):
        replies[number] = len(httpx.get(f"{server.url}/logs/done?since_ms={START_MS + number}").json())

    threads = [threading.Thread(target=read, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {number: 5 - number for number in range(5)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_server_at_once(number):
    """Asked to stop, it ends with 0 and closes its service, though a client still holds a reply open."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE_PROGRAM],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.stream("GET", f"{url}/logs/huge") as reply:
            next(reply.iter_raw())
            process.send_signal(number)
            assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
