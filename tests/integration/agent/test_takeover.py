"""A state directory of an older agent is taken over: nothing is lost, nothing comes twice, every id is the same.

``tests/data/state_b019149`` was written by the code of that commit; see its ``make.py``.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import pytest

from tailspan.cli import main
from tailspan.config import load_settings
from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector
from tests.fakes.job_api import FakeJobApi
from tests.fakes.otlp_rows import LogRow, SpanRow

OLD = Path(__file__).parents[2] / "data" / "state_b019149"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
API = "http://job-api.invalid/server/v1"
# Of the older agent's machine, and of the moment when an event was made.
_PLACE = {"host.id", "host.name", "cicd.worker.id"}
# The older agent had these on the run span only; now a store finds a running job by its other spans, too.
_ADDED = {"cicd.pipeline.name", "cicd.pipeline.run.id"}


@pytest.fixture
def api() -> Iterator[FakeJobApi]:
    """The job API, with the job of which the older agent had three lines acknowledged."""
    with FakeJobApi() as fake:
        job = fake.add_job("api")
        for number in range(3):
            job.line(f"line {number}", 1_700_000_000_000 + number)
        yield fake


@pytest.fixture
def taken_over(tmp_path: Path, api: FakeJobApi, collector: Collector) -> Machine:
    """A machine with the state of the older agent; the times of its rows are moved to now, as of a restart."""
    machine = Machine(tmp_path)
    machine.env |= {"http_proxy": api.base_url.removesuffix("/server/v1"), "no_proxy": "127.0.0.1"}
    for name in ("jobs", "agent"):
        shutil.copytree(OLD / name, tmp_path / name)
    for path in tmp_path.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    with closing(sqlite3.connect(tmp_path / "agent" / "checkpoints.db")) as db:
        db.executescript((OLD / "checkpoints.sql").read_text())
        db.execute("UPDATE jobs SET updated_s = CAST(strftime('%s', 'now') AS REAL)")
        db.commit()
    configure(machine, collector)
    return machine


def configure(machine: Machine, collector: Collector, state_dir: str = "agent") -> None:
    """Write the configuration that the older agent had."""
    machine.config.write_text(
        f'[services.local]\ntype = "local"\nstate_dir = "{machine.home}/jobs"\n'
        f'[services.api]\ntype = "fused"\nbase_url = "{API}"\ntoken = "t0ken"\n'
        f'[agent]\nstate_dir = "{machine.home}/{state_dir}"\nlisten = ""\n'
        '[[agent.watch]]\nservice = "local"\ndiscover = true\nsettle = "0s"\nlookback = "36500d"\n'
        '[[agent.watch]]\nservice = "api"\njobs = ["api"]\nsettle = "0s"\n'
        f'[otlp]\nendpoint = "{collector.http_url}"\n'
    )


def relayed_lines(collector: Collector) -> Counter[str]:
    """Return the local jobs' lines as JSON, with all ids, times and attributes."""
    return lines([as_record(row) for row in collector.log_records()])


def lines(records: list[dict[str, Any]]) -> Counter[str]:
    return Counter(_text(row) for row in records if not row["event_name"] and row["job_id"] != "api")


def events(records: list[dict[str, Any]]) -> Counter[tuple[str, ...]]:
    """Return which events came, by job, trace and span."""
    return Counter(
        (row["event_name"], row["job_id"], row["trace_id"], row["span_id"])
        for row in records
        if row["event_name"] and row["job_id"] != "api"
    )


def spans(rows: list[dict[str, Any]]) -> Counter[str]:
    """Return the local jobs' spans with all ids and times; attributes may be added, see `keeps_attributes`."""
    return Counter(_text({**row, "attributes": {}}) for row in rows if row["job_id"] != "api")


def keeps_attributes(collector: Collector) -> bool:
    """Return whether the spans have at least the attributes that the older agent gave them."""
    old = {
        row["span_id"]: {pair for pair in row["attributes"].items() if pair[0] not in _PLACE}
        for row in EXPECTED["all"]["spans"]
    }
    new = [as_span(row) for row in collector.spans()]
    return all(old.get(row["span_id"], set()) <= row["attributes"].items() for row in new)


def as_record(row: LogRow) -> dict[str, Any]:
    """Return what ``make.py`` keeps of a record."""
    return {
        "job_id": row.resource["cicd.pipeline.run.id"],
        "body": row.body,
        "event_name": row.event_name,
        "time_unix_nano": row.time_unix_nano,
        "trace_id": row.trace_id,
        "span_id": row.span_id,
        "severity": row.severity_text,
        "attributes": {key: value for key, value in row.attributes.items() if isinstance(value, str | int)},
    }


def as_span(row: SpanRow) -> dict[str, Any]:
    """Return what ``make.py`` keeps of a span."""
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


def _text(row: dict[str, Any]) -> str:
    attributes = {key: value for key, value in row["attributes"].items() if key not in _PLACE | _ADDED}
    return json.dumps({**row, "attributes": attributes}, sort_keys=True)


def test_what_was_not_acknowledged_is_relayed_once(taken_over: Machine, api: FakeJobApi, collector: Collector) -> None:
    """Lines after the last acknowledged one, the spans in the store, and jobs that the older agent never read."""
    for number in (3, 4):
        api.jobs["api"].line(f"line {number}", 1_700_000_000_000 + number)
    api.jobs["api"].becomes("Done")
    taken_over.invoke("agent", "run", "--once")
    records, every = [as_record(row) for row in collector.log_records()], EXPECTED["all"]
    rejected = [row for row in every["records"] if row["body"] in ("one", "two")]
    done = EXPECTED["acknowledged"]
    assert lines(records) == lines(every["records"]) - lines(done["records"]) - lines(rejected)
    assert [row["body"] for row in records if row["job_id"] == "api" and not row["event_name"]] == ["line 3", "line 4"]
    refused = rejected[0]["job_id"]
    assert events(records) == Counter(
        {
            key: count
            for key, count in (events(every["records"]) - events(done["records"])).items()
            if refused not in key
        }
    )
    assert spans([as_span(row) for row in collector.spans()]) == spans(
        [row for row in every["spans"] if row["span_id"] not in {row["span_id"] for row in done["spans"]}]
    )


def test_a_second_start_finds_nothing_left(taken_over: Machine, api: FakeJobApi, collector: Collector) -> None:
    """What was taken over is in the store as any other."""
    api.jobs["api"].becomes("Done")
    taken_over.invoke("agent", "run", "--once")
    collector.clear()
    taken_over.invoke("agent", "run", "--once")
    assert collector.log_records() == []
    assert collector.spans() == []


def test_ids_are_those_of_the_older_agent(taken_over: Machine, collector: Collector) -> None:
    """An agent that starts from nothing makes the same trace ids, span ids and uids, byte for byte."""
    configure(taken_over, collector, state_dir="fresh")
    taken_over.invoke("agent", "run", "--once")
    assert relayed_lines(collector) == lines(EXPECTED["all"]["records"])
    assert spans([as_span(row) for row in collector.spans()]) == spans(EXPECTED["all"]["spans"])
    assert keeps_attributes(collector)


def test_the_dead_letter_and_the_files_are_replayed(taken_over: Machine, collector: Collector) -> None:
    """What the older agent kept in files has the same ids when it is sent at last."""
    taken_over.invoke("agent", "replay", str(taken_over.home / "agent" / "dead-letter" / "logs.jsonl"))
    assert [row.body for row in collector.log_records() if not row.event_name] == ["one", "two"]
    assert relayed_lines(collector) <= lines(EXPECTED["all"]["records"])
    collector.clear()
    taken_over.invoke("agent", "replay", *map(str, sorted((OLD / "otlp").glob("*.jsonl"))))
    assert relayed_lines(collector) == lines(EXPECTED["all"]["records"])
    assert spans([as_span(row) for row in collector.spans()]) == spans(EXPECTED["all"]["spans"])
    assert collector.metrics()


def test_every_configuration_key_is_still_known(tmp_path: Path) -> None:
    """The older example with all its keys switched on loads."""
    text = (OLD / "config.example.toml").read_text()
    path = tmp_path / "config.toml"
    path.write_text(re.sub(r'^#(?=\[|[a-z_]+ = |"[^"]+" = )', "", text, flags=re.MULTILINE))
    load_settings(path)


def test_every_command_and_option_is_still_there() -> None:
    """Scripts of users go on to work; new options may come."""
    known = EXPECTED["options"]
    for path, options in known.items():
        command: click.Command = main
        for name in path.split()[1:]:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), name)
            assert found is not None, path
            command = found
        now = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(options) <= now, path
