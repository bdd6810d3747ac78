"""DAG runs of a real Airflow, relayed by a real agent: equal to what the server's own API says at the end."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pytest

from tailspan import Client, load_settings
from tailspan.models import JobState
from tests.fakes.collector import Collector
from tests.orchestrators.harness import ListedLine, Orchestrator, Proxy, Relay, by_task, results
from tests.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.timeout(1500)]

DAGS = """
import logging, sys, time
from airflow.sdk import dag, get_current_context, task, task_group
from airflow.sdk.exceptions import AirflowSkipException
from datetime import datetime, timedelta

log = logging.getLogger("etl")
start = {"schedule": None, "start_date": datetime(2024, 1, 1), "catchup": False}

@dag(dag_id="nightly", params={"seconds": 10}, **start)
def nightly():
    @task(retries=1, retry_delay=timedelta(seconds=2))
    def flaky():
        number = get_current_context()["ti"].try_number
        print("plain print, try", number); log.warning("a warning\\nof two lines"); print("to stderr", file=sys.stderr)
        if number < 2:
            try: {}["key"]
            except KeyError as error: raise ValueError("first try fails\\nsecond line") from error
    @task
    def extract(n):
        for i in range(n): log.info("extract line %d", i); print("printed", i)
        return n
    @task
    def slow():
        for i in range(get_current_context()["params"]["seconds"] * 5): print("tick", i, flush=True); time.sleep(0.2)
    @task
    def optional(): raise AirflowSkipException("not today")
    @task
    def never(): print("never")
    @task_group
    def load():
        @task
        def one(x): print("gr\\u00f6\\u00dfe", x)
        one.expand(x=[1, 2])
    flaky() >> [extract(400), slow()] >> load()
    optional() >> never()
nightly()

@dag(dag_id="broken", **start)
def broken():
    @task
    def boom(): raise RuntimeError("boom")
    @task
    def after(): print("never")
    boom() >> after()
broken()
"""
SEVERITIES = {"debug": 5, "info": 9, "warning": 13, "error": 17, "critical": 21}
RESULTS = {"success": "success", "failed": "failure", "skipped": "skip", "upstream_failed": "skip"}


class Attempt(NamedTuple):
    """A try with the entries of its log, as the API has them."""

    row: dict[str, Any]
    entries: list[dict[str, Any]]

    @property
    def task_id(self) -> str:
        """The task's id in our spans."""
        index = self.row["map_index"]
        return self.row["task_id"] if index < 0 else f"{self.row['task_id']}[{index}]"


class Airflow(Orchestrator):
    """A real Airflow on ports of its own."""

    def __init__(self, directory: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        port = self.url.rpartition(":")[2]
        dags = directory / "dags"
        dags.mkdir()
        (dags / "flows.py").write_text(DAGS)
        # The API server fetches the logs of running tasks from this name.
        (directory / "this_host.py").write_text('def name():\n    return "127.0.0.1"\n')
        options = {
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": "3",
            "CORE__DAGS_FOLDER": str(dags),
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "CORE__HOSTNAME_CALLABLE": "this_host.name",
            "API__HOST": "127.0.0.1",
            "API__PORT": port,
            "API__BASE_URL": self.url,
            "API__WORKERS": "1",
            "LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
            "LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
            "SCHEDULER__PARSING_PROCESSES": "1",
            # On a busy machine, no task must fail because an answer or an import takes long.
            "WORKERS__EXECUTION_API_TIMEOUT": "120",
            "CORE__DAGBAG_IMPORT_TIMEOUT": "300",
            "DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "600",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        env = {f"AIRFLOW__{name}": value for name, value in options.items()}
        super().__init__("airflow", directory, {**env, "AIRFLOW_HOME": str(directory), "PYTHONPATH": str(directory)})
        self._token = ""

    def run(self) -> None:
        """Start the server, and wait until its DAGs can run."""
        self.start("airflow", "standalone")
        self.wait_until(lambda: self.password and self.get("/api/v2/dags")["total_entries"] == 2, "the DAGs")
        for dag in ("nightly", "broken"):
            self.send("PATCH", f"/api/v2/dags/{dag}", {"is_paused": False})

    @property
    def password(self) -> str:
        """Of the user ``admin``; empty before the server has made it."""
        path = self.directory / "simple_auth_manager_passwords.json.generated"
        return json.loads(path.read_text())["admin"] if path.exists() else ""

    def send(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Return the reply to a request."""
        if not self._token:
            login = {"username": "admin", "password": self.password}
            reply = httpx.post(f"{self.url}/auth/token", json=login, timeout=60)
            self._token = reply.raise_for_status().json()["access_token"]
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        reply = httpx.request(method, self.url + path, json=body, headers=headers, timeout=60)
        return dict(reply.raise_for_status().json())

    def get(self, path: str) -> dict[str, Any]:
        """Return the reply to a request that reads."""
        return self.send("GET", path)

    def attempts(self, dag: str, run: str) -> list[Attempt]:
        """Return every try of a run, with its log if it began."""
        path = f"/api/v2/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances"
        found: list[Attempt] = []
        for instance in self.get(f"{path}?limit=100")["task_instances"]:
            task, index = f"{path}/{instance['task_id']}", instance["map_index"]
            tries = self.get(f"{task}{'' if index < 0 else f'/{index}'}/tries")["task_instances"]
            for row in tries:
                number = row["try_number"]
                log = self.get(f"{task}/logs/{number}?map_index={index}")["content"] if number else []
                end = next((place for place, one in enumerate(log, 1) if one["event"] == "::endgroup::"), 0)
                found.append(Attempt(row, log[end:]))
        return found


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    """A server for all tests of this module."""
    with Airflow(tmp_path_factory.mktemp("airflow")) as server:
        server.run()
        yield server


def expected_lines(attempts: list[Attempt]) -> Counter[ListedLine]:
    """Return time in us, text, severity and task of each line, as the server's API has them."""
    lines: Counter[ListedLine] = Counter()
    for attempt in attempts:
        for entry in attempt.entries:
            time_us = round(datetime.fromisoformat(entry["timestamp"]).timestamp() * 1e6)
            for text in [*entry["event"].split("\n"), *exception_lines(entry.get("error_detail") or [])]:
                lines[time_us, text.rstrip(), SEVERITIES[entry["level"]], attempt.row["task_id"]] += 1
    return lines


def exception_lines(details: list[dict[str, Any]]) -> list[str]:
    """Return the traceback of an exception and its cause."""
    lines: list[str] = []
    for detail in reversed(details):
        lines += ["", "The above exception was the direct cause of the following exception:", ""] if lines else []
        lines += ["Traceback (most recent call last):"]
        lines += [f'  File "{one["filename"]}", line {one["lineno"]}, in {one["name"]}' for one in detail["frames"]]
        lines += f"{detail['exc_type']}: {detail['exc_value']}".split("\n")
    return lines


def microseconds(text: str) -> float:
    """Return a time of the API in us."""
    return datetime.fromisoformat(text).timestamp() * 1e6


def test_runs_arrive_whole_through_stops_of_the_agent(airflow: Airflow, collector: Collector, tmp_path: Path) -> None:
    """Retries, mapped, skipped, failed and canceled tasks: no line is missing or extra, and each try is a span.

    Meanwhile the agent is killed and stopped, the server is busy at times, and tokens expire.
    """
    password = tmp_path / "password"
    password.write_text(airflow.password)
    with Proxy(airflow.url, busy_each=50, expire_each=15) as proxy:
        keys = f'user = "admin"\npassword_file = "{password}"\ntimeout = "60s"'
        own = tmp_path / "client.toml"
        own.write_text(f'[services.airflow]\nbase_url = "{airflow.url}"\n{keys}\n')
        with (
            Relay("airflow", f'base_url = "{proxy.url}"\n{keys}', collector, tmp_path) as relay,
            Client(load_settings(own)) as client,
        ):
            whole = client.submit(["nightly", "seconds=15"], name="whole", service="airflow")
            broken = client.submit(["broken"], service="airflow")
            relay.interrupt(signal.SIGKILL)
            canceled = client.submit(["nightly", "seconds=300"], name="canceled", service="airflow")
            relay.interrupt(signal.SIGTERM)

            def ticks() -> bool:
                return any("tick" in one["message"] for one in client.get_logs(canceled))

            airflow.wait_until(ticks, "lines of the run to cancel")
            assert client.cancel(canceled).state is JobState.CANCELED
            jobs = [whole, broken, canceled]
            airflow.wait_until(
                lambda: all(client.get_status(job).state.is_terminal for job in jobs), "the end of all runs"
            )
            time.sleep(5)  # a task that is killed writes its last line after its end
            relay.finish()
            attempts = {job.job_id: airflow.attempts(*job.job_id.split("/", 1)) for job in jobs}
            relay.wait_for(sum((expected_lines(tries) for tries in attempts.values()), Counter()))
            spans = relay.spans(runs=len(attempts), attempts=sum(map(len, attempts.values())))
        assert {401, 429} <= set(proxy.refused), proxy.refused

    expected = {whole.job_id: "success", broken.job_id: "failure", canceled.job_id: "cancellation"}
    assert results(spans) == expected
    tasks = by_task(spans)
    rows = {(job, one.task_id, max(1, one.row["try_number"])): one for job, tries in attempts.items() for one in tries}
    assert tasks.keys() == rows.keys()
    for key, span in tasks.items():
        row, entries = rows[key]
        assert (span.name, span.attributes["cicd.pipeline.task.run.result"]) == (row["task_id"], RESULTS[row["state"]])
        assert span.status == ("ERROR" if row["state"] == "failed" else "UNSET")
        times = [microseconds(entry["timestamp"]) for entry in entries]
        if row["try_number"] and row["start_date"]:
            assert abs(span.start_unix_nano / 1000 - min([microseconds(row["start_date"]), *times])) < 2
            # The span is sent when the try has ended; its last line may be written after that.
            end_us, last_us = microseconds(row["end_date"]), max([microseconds(row["end_date"]), *times])
            assert end_us - 2 < span.end_unix_nano / 1000 < last_us + 2
        parent = spans[span.parent_span_id]
        assert parent.name == "executing"
        assert parent.start_unix_nano <= span.start_unix_nano <= span.end_unix_nano <= parent.end_unix_nano
        linked = {spans[span_id].name for _, span_id in span.links if span_id in spans}
        before = {"load.one": {"extract", "slow"}, "extract": {"flaky"}, "never": {"optional"}, "after": {"boom"}}
        assert before.get(span.name, set()) <= linked
        assert (key[2] > 1) == (span.name in linked)
    assert ("nightly/whole", "flaky", 2) in tasks
    assert {key[1] for key in tasks if key[0] == "nightly/whole"} > {"load.one[0]", "load.one[1]", "optional", "never"}
