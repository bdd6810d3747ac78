"""Canaries in every place that can hold a secret, real commands through failures of every kind, and then a search."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector, Reply

STATUSES = (400, 401, 403, 404, 413, 422, 500)


class Echo(http.server.ThreadingHTTPServer):
    """Answers everything with an error that quotes the request's headers, each time with another status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses = itertools.cycle(STATUSES)
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Echo

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(str(self.headers))
        quoted = " ".join(f"{name}={value}" for name, value in self.headers.items())
        body = json.dumps({"message": f"what is this: {quoted}"}).encode()
        sent = self.headers.get("Authorization", "").split() or [""]
        self.send_response(next(self.server.statuses), f"Nothing for {sent[-1]}")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def echo() -> Iterator[Echo]:
    """The unpleasant server."""
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Sweep:
    """Hands out canaries, keeps all that was said, and searches."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._canaries: dict[str, str] = {}
        self.said: dict[str, str] = {}
        self.own: set[Path] = set()

    def canary(self, place: str) -> str:
        """Return a secret for a place."""
        return self._canaries.setdefault(place, f"cAnAry{len(self._canaries):02d}{place.replace('_', 'x')}q7Zr")

    def file(self, name: str, text: str) -> Path:
        """Write a file that a secret belongs into."""
        path = self._home / name
        path.write_text(text)
        self.own.add(path)
        return path

    def hear(self, what: str, *texts: object) -> None:
        """Keep what was said."""
        self.said[f"{what} #{len(self.said)}"] = "\n".join(map(str, texts))

    def leaks(self) -> list[str]:
        """Return where canaries were found; of those that jobs print, their own log and command are the place."""
        found = []
        texts: dict[str, bytes] = {name: text.encode("utf-8", "replace") for name, text in self.said.items()}
        for path in self._home.rglob("*"):
            if path.is_file() and path not in self.own:
                texts[str(path.relative_to(self._home))] = path.read_bytes()
        for place, canary in self._canaries.items():
            for name, text in texts.items():
                job_file = re.search(r"jobs/jobs/[^/]+/(log|job\.json)$", name)
                if canary.encode() in text and not (place.startswith("printed") and job_file):
                    found.append(f"{place} in {name}: {_around(text, canary.encode())}")
        return found


def _around(text: bytes, canary: bytes) -> str:
    at = text.index(canary)
    return repr(text[max(0, at - 60) : at + 60])


@pytest.fixture
def sweep(machine: Machine) -> Sweep:
    """A sweep over one machine."""
    made = Sweep(machine.home)
    made.own.add(machine.config)
    return made


def run(machine: Machine, sweep: Sweep, *arguments: str, **env: str) -> str:
    done = machine.tailspan(*arguments, exit_code=None, env=env)
    sweep.hear(" ".join(arguments), done.stdout, done.stderr)
    return done.stdout


def invoke(machine: Machine, sweep: Sweep, *arguments: str, **env: str) -> None:
    done = machine.invoke(*arguments, exit_code=None, env=env)
    sweep.hear(" ".join(arguments), done.stdout, done.stderr)


def test_credentials_stay_where_they_are(machine: Machine, sweep: Sweep, echo: Echo) -> None:
    """Servers that echo headers, of services and of telemetry: what they say is shown without the credentials."""
    token_file = sweep.file("token", sweep.canary("token_file") + "\n")
    common = (
        f'[services.byfile]\ntype = "fused"\nbase_url = "{echo.url}/v1"\ntoken_file = "{token_file}"\n'
        f'[services.bytoken]\ntype = "fused"\nbase_url = "http://u:{sweep.canary("url")}@{echo.url[7:]}/v1"\n'
        f'token = "{sweep.canary("token")}"\n'
        f'[[agent.watch]]\nservice = "local"\ndiscover = true\n'
        f'[[agent.watch]]\nservice = "bytoken"\njobs = ["j"]\n'
    )
    otlp = (
        f'[otlp]\nendpoint = "{echo.url}"\ntimeout = "2s"\nretry_server_errors = 0\n'
        f'headers = {{ authorization = "Bearer {sweep.canary("header")}", x-scope = "{sweep.canary("header2")}" }}\n'
    )
    machine.configure(common + otlp)
    machine.detach("echo", "hello")
    for service in ("byfile", "bytoken"):
        for command in (("status", "j"), ("logs", "j"), ("jobs",)):
            invoke(machine, sweep, *command, "--service", service)
    run(machine, sweep, "status", "j", "--service", "bytoken")
    invoke(machine, sweep, "status", "j", "--service", "env", FUSED_AUTH_TOKEN=sweep.canary("fused_env"))
    run(machine, sweep, "agent", "check")
    run(machine, sweep, "agent", "run", "--once", "--timeout", "1", "--log-level", "debug")
    run(machine, sweep, "doctor", "--output", "report.txt")
    environment = f"authorization=Bearer%20{sweep.canary('otel_headers')}"
    machine.configure(common)
    invoke(
        machine, sweep, "agent", "check", OTEL_EXPORTER_OTLP_ENDPOINT=echo.url, OTEL_EXPORTER_OTLP_HEADERS=environment
    )
    for protocol in ("http/protobuf", "grpc"):
        unreachable = {"TAILSPAN_OTLP__ENDPOINT": "http://127.0.0.1:9", "TAILSPAN_OTLP__PROTOCOL": protocol}
        headers = f"authorization={sweep.canary('header_of_' + protocol.partition('/')[0])}"
        invoke(machine, sweep, "agent", "check", TAILSPAN_OTLP__HEADERS=headers, **unreachable)
    seen = "".join(echo.seen)
    for place in ("token_file", "token", "header", "header2", "otel_headers"):
        assert sweep.canary(place) in seen, f"the test does not send {place}"
    assert sweep.leaks() == []


BROKEN = (
    '[services.f]\ntype = "fused"\ntoken = ["{0}"]\n',
    '[services.f]\ntype = "fused"\ntoken = "{0}"\ntoken_file = "x"\n',
    '[services.f]\ntype = "fused"\nbase_url = "ftp://u:{0}@host"\n',
    '[services.f]\ntype = "fused"\nbase_url = "http://u:{0}@host:port"\n',
    '[services.f]\ntype = "fused"\ntokn = "{0}"\n',
    '[services]\ntoken = "{0}"\n',
    '[otlp]\nendpoint = "http://user:{0}@localhost:4318"\n',
    '[otlp]\nendpoint = "user:{0}@localhost:4318"\nprotocol = "grpc"\n',
    '[otlp]\nheaders = "authorization={0}"\n',
    '[otlp]\nheaders = {{ authorization = ["{0}"] }}\n',
    '[otlp]\nheaders = {{ authorization = "{0}\\n" }}\n',
    '[otlp]\nheaders = {{ "a b" = "{0}" }}\n',
    '[otlp.logs]\nheader = {{ authorization = "{0}" }}\n',
    '[otlp]\nheaders = {{ authorization = "{0}" \n',
    'token = "{0}\n',
    '[redact]\nenv = {{ a = "{0}" }}\n',
)


def test_broken_configurations_are_named_without_their_values(machine: Machine, sweep: Sweep) -> None:
    """A value of the wrong type, in the wrong place or in a line that is no TOML is not quoted."""
    whole = machine.config.read_text()
    for number, broken in enumerate(BROKEN):
        watch = '[[agent.watch]]\nservice = "f"\njobs = ["j"]\n' if "services.f" in broken else ""
        machine.config.write_text(whole + watch + broken.format(sweep.canary(f"broken{number}")))
        done = machine.invoke("agent", "check", exit_code=None)
        assert done.exit_code == 2, f"this is not broken: {broken}"
        sweep.hear(broken, done.stdout, done.stderr)
    bad = {"TAILSPAN_AGENT__TOKEN": "[", "TAILSPAN_OTLP__HEADERS": sweep.canary("no_pair")}
    machine.configure()
    run(machine, sweep, "agent", "check", **bad)
    assert sweep.leaks() == []


def test_tokens_of_our_servers_stay_inside(machine: Machine, sweep: Sweep) -> None:
    """Neither the job API nor the status page, their logs, or the process list show what they ask for."""
    agent_token = sweep.file("agent-token", sweep.canary("agent_token"))
    serve_token = sweep.file("serve-token", sweep.canary("serve_token"))
    machine.config.write_text(
        f'[services.local]\nstate_dir = "{machine.home}/jobs"\n[agent]\nstate_dir = "{machine.home}/agent"\n'
        f'listen = "127.0.0.1:0"\ntoken_file = "{agent_token}"\n[[agent.watch]]\ndiscover = true\n'
    )
    machine.env["TAILSPAN_SERVE_TOKEN"] = sweep.canary("serve_env")
    job = machine.detach("sleep", "60")
    server = machine.start("serve", "--port", "0", "--token-file", str(serve_token))
    agent = machine.start("agent", "run", "--log-level", "debug")
    assert server.stderr is not None
    url = server.stderr.readline().split()[-1]
    for path, token in itertools.product((f"/run/by-id/{job}", "/nowhere", "/logs/x"), ("", "wrong", "right")):
        value = sweep.canary("serve_token") if token == "right" else token
        request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {value}"})
        try:
            with urllib.request.urlopen(request) as reply:
                sweep.hear(path, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            sweep.hear(path, error.headers, error.read())
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            sweep.hear(f"argv of {process.name}", (process / "cmdline").read_bytes())
    for running in (server, agent):
        running.terminate()
        sweep.hear("process", *running.communicate(timeout=30))
    machine.tailspan("cancel", job)
    assert sweep.leaks() == []


def test_redacted_values_leave_neither_by_lines_nor_beside_them(
    machine: Machine, sweep: Sweep, collector: Collector
) -> None:
    """Lines, long lines, tracebacks, command, attributes, dead letter: what is sent, now or later, has no secret."""
    by_env, by_file, by_pattern = (sweep.canary(f"printed_{kind}") for kind in ("env", "file", "pattern"))
    secret_file = sweep.file("secrets", f"{by_file}\n")
    pattern = f"pat-{by_pattern}"
    machine.env["DB_WORD"] = by_env
    redact = (
        f'[redact]\nenv = ["DB_WORD"]\nfiles = ["{secret_file}"]\n'
        'patterns = [{ literal = "pat-", regex = "pat-\\\\w+" }]\n'
    )
    program = machine.home / "job.py"
    program.write_text(
        "import os, sys\n"
        "word, filed, pattern = sys.argv[1:]\n"
        "print(f'connecting with {word} and {filed} and {pattern}')\n"
        "print('\\x1b[31m' + word[:5] + '\\x1b[0m' + word[5:])\n"
        "print('x' * (256 * 1024 - 7) + word)\n"
        "sys.stdout.flush()\n"
        "raise RuntimeError(f'no luck with {word}\\nat {filed} ' + pattern)\n"
    )
    attributes = ("--attr", f"dsn=pg://u:{by_env}@db", "--attr", f"key={pattern}")
    command = ("python3", str(program), by_env, by_file, pattern)
    machine.tailspan("run", "--name", "leaky", *attributes, "--", *command, exit_code=1)
    ways = {
        "files": "",
        "refused": f'[otlp]\nendpoint = "{collector.http_url}"\n',
        "taken": f'[otlp]\nendpoint = "{collector.http_url}"\n',
    }
    collector.always("logs", Reply(400, message="no"))
    collector.always("traces", Reply(400, message="no"))
    for way, otlp in ways.items():
        if way == "taken":
            collector.always("logs", Reply())
            collector.always("traces", Reply())
        machine.configure(f'{redact}[[agent.watch]]\nservice = "local"\ndiscover = true\n{otlp}')
        text = machine.config.read_text().replace(f"{machine.home}/agent", f"{machine.home}/agent-{way}")
        machine.config.write_text(text)
        run(machine, sweep, "agent", "run", "--once", "--log-level", "debug")
        invoke(machine, sweep, "agent", "dead-letter")
    for request in collector.requests:
        sweep.hear(f"telemetry {request.signal}", request.payload.decode("latin-1"), request.headers)
    bodies = [row.body for row in collector.log_records()]
    assert any("connecting with [REDACTED] and [REDACTED] and [REDACTED]" in body for body in bodies)
    assert list((machine.home / "agent-refused" / "dead-letter").glob("*.jsonl"))
    assert (machine.home / "agent-files" / "otlp" / "logs.jsonl").stat().st_size > 0
    metrics = {row.name: row for row in collector.metrics()}
    assert metrics["tailspan.agent.redactions"]
    assert sweep.leaks() == []


def test_the_sweep_finds_what_leaks(machine: Machine, sweep: Sweep) -> None:
    """The test of the test: a canary in an output and one in a file are both found."""
    sweep.hear("output", "x" + sweep.canary("one"))
    (machine.home / "state").write_bytes(os.urandom(5) + sweep.canary("two").encode())
    assert [leak.split(":")[0].split(" #")[0] for leak in sweep.leaks()] == ["one in output", "two in state"]
