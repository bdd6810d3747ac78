"""Make this directory with the code of commit b019149, in its environment and from its root.

    PYTHONPATH=. python /path/to/make.py DIRECTORY

The agent of that commit relays four local jobs and one of a job API, up to different points, and is not started again:

    relayed   ended, completely acknowledged
    half      acknowledged up to its fifth line; it then wrote more and failed
    refused   its lines were rejected and are in the dead letter
    held      its lines are acknowledged, its spans wait in the store for an endpoint that was down
    unseen    ended after the agent's last pass
    api       acknowledged up to its third line

``expected.json`` has what an agent of that commit relays of the local jobs if it starts from nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import click
from tests.fakes.collector import Collector, Reply
from tests.fakes.job_api import FakeJobApi

from tailspan.cli import main

TAILSPAN = str(Path(sys.executable).with_name("tailspan"))
API = "http://job-api.invalid/server/v1"
FAILS = "raise ValueError('no such table')"
HALF = f"""
for number in 0 1 2 3 4; do echo "line $number"; done
until [ -e "$GATE" ]; do sleep 0.02; done
for number in 5 6 7; do echo "line $number"; done
exec python3 -c "{FAILS}"
"""


class Home:
    """A directory with local jobs and an agent."""

    def __init__(self, path: Path, endpoint: str, api: str) -> None:
        self.path = path
        self.endpoint = endpoint
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("TAILSPAN_", "OTEL_"))}
        self.env |= {"TAILSPAN_CONFIG": f"{path}/config.toml", "GATE": f"{path}/gate", "HOME": str(path)}
        # Line uids come from the address of the job API: it must be the same each time, whatever the fake's port is.
        self.env |= {"http_proxy": api.removesuffix("/server/v1"), "no_proxy": "127.0.0.1"}

    def configure(self, agent: str = "agent", *, files: bool = False, api: bool = True) -> None:
        """Write the configuration."""
        watch = (
            f'[services.api]\ntype = "fused"\nbase_url = "{API}"\ntoken = "t0ken"\n[[agent.watch]]\nservice = "api"\n'
        )
        watch += 'jobs = ["api"]\nsettle = "0s"\n'
        endpoint = "" if files else f'[otlp]\nendpoint = "{self.endpoint}"\n'
        (self.path / "config.toml").write_text(
            f'[services.local]\ntype = "local"\nstate_dir = "{self.path}/jobs"\n'
            f'[agent]\nstate_dir = "{self.path}/{agent}"\nlisten = ""\n'
            '[[agent.watch]]\nservice = "local"\ndiscover = true\nsettle = "0s"\nlookback = "36500d"\n'
            f"{watch if api else ''}{endpoint}"
        )

    def run(self, *arguments: str, fails: bool = False) -> str:
        """Run a command."""
        done = subprocess.run([TAILSPAN, *arguments], env=self.env, cwd="/", stdout=subprocess.PIPE, text=True)
        assert bool(done.returncode) is fails, done
        return done.stdout.strip()

    def relay(self, *, fails: bool = False) -> None:
        """Relay what is readable now."""
        self.run("agent", "run", "--once", "--timeout", "5", fails=fails)


def dump(database: Path) -> str:
    """Return a checkpoint database as SQL."""
    with closing(sqlite3.connect(database)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        return "\n".join([*db.iterdump(), f"PRAGMA user_version = {version};", ""])


def record(row: object) -> dict[str, object]:
    """Return what of a log record must stay the same."""
    attributes = {key: value for key, value in row.attributes.items() if isinstance(value, str | int)}
    return {
        "job_id": row.resource["cicd.pipeline.run.id"],
        "body": row.body,
        "event_name": row.event_name,
        "time_unix_nano": row.time_unix_nano,
        "trace_id": row.trace_id,
        "span_id": row.span_id,
        "severity": row.severity_text,
        "attributes": attributes,
    }


def span(row: object) -> dict[str, object]:
    """Return what of a span must stay the same."""
    return {
        "job_id": row.resource["cicd.pipeline.run.id"],
        "name": row.name,
        "trace_id": row.trace_id,
        "span_id": row.span_id,
        "parent_span_id": row.parent_span_id,
        "start_unix_nano": row.start_unix_nano,
        "end_unix_nano": row.end_unix_nano,
        "attributes": {key: value for key, value in row.attributes.items() if isinstance(value, str | int)},
    }


def options(command: click.Command, path: tuple[str, ...], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the options and arguments of every command."""
    found[" ".join(path)] = sorted(
        opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)
    )
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            options(command.get_command(context, name), (*path, name), found)
    return found


def make(target: Path) -> None:
    """Make the directory."""
    with Collector() as collector, FakeJobApi() as api, tempfile.TemporaryDirectory() as temporary:
        home = Home(Path(temporary), collector.http_url, api.base_url)
        home.configure()
        job = api.add_job("api")
        for number in range(3):
            job.line(f"line {number}", 1_700_000_000_000 + number)

        home.run("run", "--name", "refused", "--", "sh", "-c", "echo one; echo two")
        collector.always("logs", Reply(400, message="no"))
        home.configure(api=False)
        home.relay(fails=True)
        collector.always("logs", Reply())
        home.configure()
        home.env["TRACEPARENT"] = f"00-{'ab' * 16}-{'cd' * 8}-01"
        home.run("run", "--name", "relayed", "--attr", "team=geo", "--", "sh", "-c", "echo started; echo done")
        del home.env["TRACEPARENT"]
        half = home.run("run", "--detach", "--name", "half", "--", "sh", "-c", HALF)
        while "line 4" not in home.run("logs", half):
            time.sleep(0.1)
        home.relay()
        collector.always("traces", Reply(503))
        home.run("run", "--name", "held", "--", "sh", "-c", "echo WARNING held")
        home.relay(fails=True)
        collector.always("traces", Reply())
        (home.path / "gate").touch()
        home.run("wait", half, fails=True)
        home.run("run", "--name", "unseen", "--", "sh", "-c", "echo unseen >&2; exit 4", fails=True)
        time.sleep(1)

        taken = [record(row) for row in collector.log_records()]
        acked = [span(row) for row in collector.spans()]
        store = home.path / "agent"
        (target / "checkpoints.sql").write_text(dump(store / "checkpoints.db"))
        shutil.copytree(store / "dead-letter", target / "agent" / "dead-letter")
        shutil.copytree(home.path / "jobs", target / "jobs")

        collector.clear()
        home.configure("fresh", api=False)
        home.relay()
        expected = {
            "acknowledged": {"records": taken, "spans": acked},
            "all": {
                "records": [record(row) for row in collector.log_records()],
                "spans": [span(row) for row in collector.spans()],
            },
            "options": options(main, ("tailspan",), {}),
        }
        (target / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        home.configure("files", files=True, api=False)
        home.relay()
        shutil.copytree(home.path / "files" / "otlp", target / "otlp")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
