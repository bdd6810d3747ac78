"""Clients that flood, other users of the machine, and servers that quote what they got: the threat model as rows.

Everything is done to the real commands as processes, over loopback. `docs/security.md` says what holds.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from tests.patience import Patience
from tests.prove.hostile_jobs import MOST_HEALTH_S
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import TAILSPAN, Settings, World
from tests.security.test_many_clients import FLOODS

SECRET = 'S3cr3t/of+the"agent=9fQ7x'
_MOST_LOG_BYTES = 64 << 10
_CONNECTIONS = {"idle": 1200, "kept alive": 505}
_OTHER_CONNECTIONS = 300
_DRIPS = 10
_WAIT_S = 60.0


@dataclass(frozen=True)
class Attack:
    """A row.

    Attributes:
        name: The row's name.
        act: Attacks the commands of a world, and notes what did not hold.
        settings: Of the world.
    """

    name: str
    act: Callable[[World, Row], None]
    settings: Settings = field(default_factory=lambda: Settings(page=True))

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run, alone=True)

    def _run(self, seed: str) -> Row:
        row = Row(self.name)
        with World(seed, self.settings) as world:
            world.configure()
            self.act(world, row)
        return row


def _expect(row: Row, holds: object, problem: str) -> None:
    row.problems += [] if holds else [problem]


def _environ(world: World, **more: str) -> dict[str, str]:
    """Return the environment of a command of this world: none of the settings of the machine."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("TAILSPAN_", "OTEL_", "FUSED_", "XDG_"))
    }
    return {**kept, "HOME": str(world.home), "TAILSPAN_CONFIG": str(world.home / "config.toml"), **more}


def run_tailspan(world: World, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [TAILSPAN, *arguments]
    return subprocess.run(
        command,
        env=_environ(world, **environ),
        cwd=world.home,
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
        check=False,
    )


@contextlib.contextmanager
def _serving(world: World) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """Run ``tailspan serve``; yield its process, its URL and its log."""
    log = world.home / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [TAILSPAN, "serve", "--port", "0", "--service", "local"],
            env=_environ(world), cwd=world.home, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
        )  # fmt: skip
    try:
        world.until(lambda: any(word.startswith("http://") for word in log.read_text().split()), "the job API")
        yield process, next(word for word in log.read_text().split() if word.startswith("http://")), log
    finally:
        process.terminate()
        process.wait()


def _get(url: str, path: str = "", headers: Mapping[str, str] | None = None) -> int:
    """Return the status of a request; 0 if the connection ends without one."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url + path, headers=dict(headers or {})), timeout=_WAIT_S
        ) as found:
            found.read(1)  # live updates have no end
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _start_page(world: World) -> None:
    world.start()
    world.until(lambda: _get(world.page_url, "/healthz") == 200, "the agent's page")


def _flood(row: Row, pid: int, port: int, paths: Mapping[str, Mapping[str, str]]) -> None:
    """Open more connections of each kind than the server takes; these paths are answered in time all the while.

    Args:
        row: Notes what was not.
        pid: The server.
        port: Where it listens.
        paths: What is requested, with its headers.
    """
    base = f"http://127.0.0.1:{port}"
    slow: dict[str, int] = {}
    for kind, first in FLOODS.items():
        with contextlib.ExitStack() as stack:
            clients = []
            for number in range(_CONNECTIONS.get(kind, _OTHER_CONNECTIONS)):
                with contextlib.suppress(OSError):
                    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S))
                    client.setblocking(False)
                    client.send(first)
                    if number % 2:
                        client.shutdown(socket.SHUT_WR)
                    clients.append(client)
            for _ in range(_DRIPS):
                for client in clients:
                    with contextlib.suppress(OSError):
                        client.send(b"x")
                for path, headers in paths.items():
                    patience = Patience(MOST_HEALTH_S, lambda: (pid, os.getpid()))
                    answered = _get(base, path, headers) == 200
                    if not answered or patience.is_over():
                        slow[f"{kind}, {path}"] = slow.get(f"{kind}, {path}", 0) + 1
    row.problems += [
        f"{what}: {count} of {_DRIPS} requests not answered in {MOST_HEALTH_S:g} s" for what, count in slow.items()
    ]


def _check_log(row: Row, text: str) -> None:
    _expect(row, "Traceback" not in text, "a request logged a traceback")
    _expect(row, len(text) <= _MOST_LOG_BYTES, f"the log has {len(text) >> 10} KiB")


def flooded_page(world: World, row: Row) -> None:
    """The agent's page: health, metrics, and the lines of a job all the while."""
    job = world.local_job("busy", burst=5, pause_s=0.05)
    _start_page(world)
    assert world.agent is not None
    _flood(row, world.agent.pid, int(world.page_url.rpartition(":")[2]), {"/healthz": {}, "/readyz": {}})
    _check_log(row, world.log)
    job.end()
    row.found = [world.finish()]


def flooded_job_api(world: World, row: Row) -> None:
    """``tailspan serve``: the list of jobs for those who have the token."""
    with _serving(world) as (process, url, log):
        token = "".join(path.read_text().strip() for path in world.home.rglob("serve-token"))
        port = int(url.split(":")[2].partition("/")[0])
        jobs = {"/server/v1/job/self": {"authorization": f"Bearer {token}"}}
        _flood(row, process.pid, port, jobs)
        _check_log(row, log.read_text())
        process.send_signal(signal.SIGTERM)
        patience = Patience(_WAIT_S, lambda: (process.pid,))
        while process.poll() is None and not patience.is_over():
            time.sleep(0.05)
        _expect(row, process.poll() is not None, "SIGTERM did not end the job API")


def other_user(world: World, row: Row) -> None:
    """Without the token, loopback shows numbers only; the token is a file of its owner."""
    _start_page(world)
    for path in ("/", "/agent", "/pipelines", "/job?service=local&id=x", "/events/jobs"):
        found = _get(world.page_url, path)
        _expect(row, found == 401, f"the page answered {found} for {path} without a token")
    with _serving(world) as (_, url, _log):
        for path in ("/job/self", "/logs/x", "/job/x"):
            found = _get(url, path)
            _expect(row, found == 401, f"the job API answered {found} for {path} without a token")
    tokens = [path for path in world.home.rglob("*token*") if path.is_file() and path.name != "token"]
    _expect(row, len(tokens) == 2, f"{len(tokens)} files have a token of their own instead of 2")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tokens}
    _expect(row, modes == {0o600}, f"token files have the modes {sorted(map(oct, modes))}")


class _Quoting(http.server.ThreadingHTTPServer):
    """A server that answers with an error, in which it quotes the credentials in one form after the other."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Quote)
        self.statuses = itertools.cycle((401, 403, 404, 422, 500))
        self.forms: Iterator[Callable[[str], str]] = itertools.cycle(FORMS.values())
        self.seen: list[str] = []

    def __enter__(self) -> _Quoting:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Quote(http.server.BaseHTTPRequestHandler):
    server: _Quoting

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sent = self.headers.get("Authorization", "")
        self.server.seen.append(sent)
        token = sent.partition(" ")[2]
        form = next(self.server.forms)(token) if token else ""
        body = json.dumps({"message": f"{'x' * 250}{form}{'y' * 900}"}).encode()
        reason = form if form.isascii() and form.isprintable() else "Bad"
        self.send_response(next(self.server.statuses), f"no {reason}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, *_: object) -> None:
        return


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "upper case": str.upper,
    "percent": lambda text: quote(text, safe=""),
    "all percent": lambda text: "".join(f"%{ord(char):02X}" for char in text),
    "JSON": lambda text: json.dumps(json.dumps(text)),
    "escaped": lambda text: "".join(f"\\u{ord(char):04X}" for char in text),
    "base64": lambda text: base64.b64encode(f"me:{text}".encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex().upper(),
    "HTML": lambda text: "".join(f"&#{ord(char)};" for char in text),
    "cut": lambda text: text[:-3],
}


def quoted_credentials(world: World, row: Row) -> None:
    """Whatever the form: no command prints a token that a server quotes, nor does the agent log it."""
    (world.home / "token").write_text(f"{SECRET}\n")
    with _Quoting() as server:
        world.configure(
            lambda text: text.replace(world.api.base_url, f"{server.url}/server/v1").replace(
                world.collector.http_url, server.url
            )
        )
        said = ""
        for command in (("status", "j"), ("logs", "j"), ("jobs",), ("wait", "j")) * 3:
            done = run_tailspan(
                world,
                *command,
                "--service",
                "fused",
                OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer {quote(SECRET, safe='')}",
            )
            said += done.stdout + done.stderr
        world.start()
        world.until(lambda: len(server.seen) > 40, "requests of the agent")
        world.terminate()
        world.ended()
        said += world.log
        _expect(row, any(SECRET in seen for seen in server.seen), "no request had the token")
    for name, form in FORMS.items():
        shown = form(SECRET)
        leaked = [at for at in range(4, len(shown) - 14) if shown[at : at + 10] in said]
        _expect(row, not leaked, f"a token was printed ({name}): {shown[leaked[0] : leaked[0] + 10] if leaked else ''}")


def foreign_server(world: World, row: Row) -> None:
    """The login of the ``fused`` client and ``FUSED_AUTH_TOKEN`` do not go to a server of another name."""
    login = world.home / ".fused" / "credentials"
    login.parent.mkdir()
    login.write_text(json.dumps({"access_token": SECRET, "expires_at": "2999-01-01T00:00:00+00:00"}))
    with _Quoting() as server:
        (world.home / "config.toml").write_text(
            f'[services.far]\ntype = "fused"\nbase_url = "{server.url}/server/v1"\n'
        )
        for environ in ({}, {"FUSED_AUTH_TOKEN": SECRET, "FUSED_AUTH_TOKEN_TYPE": "Fused-Service-Token"}):
            done = run_tailspan(world, "status", "j", "--service", "far", **environ)
            _expect(row, "token_file" in done.stderr, f"the error does not name the key to set: {done.stderr[-200:]}")
        _expect(row, not any(SECRET in seen for seen in server.seen), "the token went to another server")


_READS = """
import sys
from pathlib import Path
import anyio
from tailspan.errors import TailspanError
from tailspan.services.local import LocalService
service = LocalService(state_dir=Path(sys.argv[1]))
async def read():
    leaked = 0
    for _ in range(int(sys.argv[3])):
        try:
            async for page in service.read_logs(sys.argv[2]):
                leaked += sum(b"not yours" in line for line in page.lines)
        except (TailspanError, OSError):
            pass
    print(leaked)
anyio.run(read)
"""


def swapped_directory(world: World, row: Row) -> None:
    """A job's directory is swapped for a link to another store's, again and again while it is read: nothing leaks."""
    theirs, ours = world.home / "theirs", world.home / "jobs"
    ids = {}
    for store, text in ((theirs, "not yours"), (ours, "of the job")):
        done = run_tailspan(
            world, "run", "--detach", "--", "echo", text, TAILSPAN_SERVICES__LOCAL__STATE_DIR=str(store)
        )
        ids[store] = done.stdout.split()[-1]
        world.until(
            lambda store=store: b'"end"' in (store / "jobs" / ids[store] / "state.json").read_bytes(), "a job's end"
        )
    job, aside, link = ours / "jobs" / ids[ours], ours / "aside", ours / "link"
    link.symlink_to(theirs / "jobs" / ids[theirs])
    command = [sys.executable, "-c", _READS, str(ours), ids[ours], "4000"]
    reader = subprocess.Popen(command, env=_environ(world), stdout=subprocess.PIPE, text=True)
    while reader.poll() is None:
        for one, other in ((job, aside), (link, job), (job, link), (aside, job)):
            one.rename(other)
    leaked = (reader.stdout.read() if reader.stdout else "").strip()
    _expect(row, leaked == "0", f"{leaked or 'an unknown number of'} reads of 4000 returned lines of the other store")
    row.notes.append("4000 reads while the directory was swapped")


def rotated_token(world: World, row: Row) -> None:
    """New content of a token file applies with a reload, and what the old token opened ends."""
    file = world.home / "page-token"
    file.write_text("old-token-1234\n")
    world.configure(lambda text: text.replace("[agent]\n", f'[agent]\ntoken_file = "{file}"\n'))
    _start_page(world)
    old, new = ({"authorization": f"Bearer {token}"} for token in ("old-token-1234", "new-token-5678"))
    request = urllib.request.Request(f"{world.page_url}/events/jobs", headers=old)
    with urllib.request.urlopen(request, timeout=_WAIT_S) as events:
        file.write_text("new-token-5678\n")
        world.reload(lambda text: text.replace("[agent]\n", f'[agent]\ntoken_file = "{file}"\n'))
        found = [_get(world.page_url, "/metrics", headers) for headers in (old, new)]
        _expect(row, found == [401, 200], f"after the reload the old and the new token got {found}")
        patience = Patience(_WAIT_S, lambda: (os.getpid(),))
        with contextlib.suppress(OSError):
            while events.read1(4096) and not patience.is_over():
                pass
        _expect(row, not patience.is_over(), "the live updates of the old token did not end")


def printed_secrets(world: World, row: Row) -> None:
    """Secrets that a job prints, also across the cuts of long lines, and those of its command."""
    variable = "PIPELINE_SECRET"
    program = world.home / "prints.py"
    program.write_text(
        f"import os, sys\nsecret = os.environ['{variable}']\n"
        "for before in (0, 5, (1 << 20) - 5, (1 << 20) - 12, (256 << 10) - 7, (2 << 20) - 3):\n"
        "    sys.stdout.write('x' * before + secret + 'y' * 50 + chr(10))\n"
        "sys.stdout.write('password = \"two words ' + secret + '\"' + chr(10))\n"
        "raise SystemExit('failed with ' + secret)\n"
    )
    world.configure(lambda text: f'[redact]\nenv = ["{variable}"]\n{text}')
    secret = "Canary-42-of-the-pipeline"
    os.environ[variable] = secret
    try:
        _start_page(world)
        hidden = (
            "--password",
            "hidden-one",
            "--auth=hidden-two",
            "-phidden-three",
            "https://u:hidden-four@h/",
            "DB_PASS=hidden-five",
        )
        script = f"mysql -phidden-six; curl -u me:hidden-seven x; exec {sys.executable} {program}"
        done = run_tailspan(
            world,
            "run",
            "--name",
            "leaky",
            "--attr",
            "token=hidden-eight",
            "--",
            "sh",
            "-c",
            script,
            "mysql",
            *hidden,
            **{variable: secret},
        )
        world.until(lambda: _is_relayed(world, done.stderr), "the job's end")
    finally:
        del os.environ[variable]
    world.terminate()
    world.ended()
    world.settle_receiver()
    sent = b"".join(request.message.SerializeToString() for request in world.collector.drain())
    kept = b"".join(path.read_bytes() for path in world.state_dir.rglob("*") if path.is_file())
    specs = b"".join(
        path.read_bytes() for name in ("job.json", "state.json") for path in world.home.glob(f"jobs/jobs/*/{name}")
    )
    _expect(row, b"leaky" in sent, "nothing was sent")
    for what, found in (("what was sent", sent), ("the agent's files", kept + world.log.encode())):
        _expect(row, secret.encode() not in found, f"{what} have the secret that the job printed")
    _expect(row, b"hidden-" not in sent + kept + specs, "a secret of the command is shown")


def _is_relayed(world: World, _said: str) -> bool:
    records = [
        record for request in world.collector.requests if request.signal == "traces" for record in [request.message]
    ]
    return any(b"RUN leaky" in record.SerializeToString() for record in records)


ATTACKS = (
    Attack("clients: 1,200 idle, 505 kept alive and other floods on the page", flooded_page),
    Attack("clients: 1,200 idle, 505 kept alive and other floods on the job API", flooded_job_api),
    Attack("other users: page and job API without a token", other_user),
    Attack("credentials: a server of another name", foreign_server),
    Attack("credentials: a server that quotes them in ten forms", quoted_credentials),
    Attack("foreign store: a job's directory swapped for a link while it is read", swapped_directory),
    Attack("token file: new content and a reload", rotated_token),
    Attack("redaction: secrets across cuts of long lines, and in commands", printed_secrets),
)
