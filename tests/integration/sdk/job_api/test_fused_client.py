"""The published `fused` clients against our server: their own requests, and their own strict types.

`fused_exchanges.json` holds the requests of four published versions as they were recorded; every run replays them.
With TEST_FUSED_PYTHONS (interpreters that have `fused`, joined by colons) the clients themselves are driven, and
must still send what was recorded: `tests/fused_clients.sh` does all of that.
"""

import http.client
import json
import os
import subprocess
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import BaseModel, StrictBool, StrictInt, StrictStr, TypeAdapter

from tailspan.models import JobState
from tests.fakes import fused_client_program
from tests.fakes.scripted_service import START_MS, RunningServer, ScriptedJob, ScriptedService, serving

TOKEN = "the-token"
LINES = ["one", "  two", "three", "vier ä", "five, 0 ERRORS"]
JOB_IDS = ["done", "forever", "größe 1", "growing", "growing too", "waited"]
EXCHANGES = json.loads(Path(__file__).parents[3].joinpath("data", "fused_exchanges.json").read_text(encoding="utf-8"))
PYTHONS = [path for path in os.environ.get("TEST_FUSED_PYTHONS", "").split(":") if path]


class OldestStatus(BaseModel):
    """RunResponse of `fused` 1.1.2: the instance keys have no default."""

    job_id: StrictStr
    instance_id: StrictStr | None
    instance_type: StrictStr | None
    status: StrictStr
    terminal_status: StrictBool


class NewestStatus(OldestStatus):
    """RunResponse of `fused` 2.9.5."""

    job_name: StrictStr
    last_heartbeat: datetime | None
    job_status: StrictStr | None
    job_status_date: datetime | None
    finished_job_status: StrictBool | None
    total_tasks: StrictInt
    finished_tasks: StrictInt


class ListRow(BaseModel):
    """JobResponse, the same in all versions."""

    id: StrictStr
    user_id: StrictStr
    creation_date: datetime
    job_status: StrictStr | None
    job_status_date: datetime | None
    instance_id: StrictStr | None
    instance_type: StrictStr | None
    execution_environment_id: StrictStr


class Message(BaseModel):
    """What the clients take from a line."""

    message: StrictStr
    timestamp: StrictInt


def scripted_service() -> ScriptedService:
    """Return the jobs that `fused_client_program` asks for."""
    growing = [f"line {number}" for number in range(6)]
    return ScriptedService(
        {
            "done": ScriptedJob(lines=LINES),
            "forever": ScriptedJob(lines=["started"], statuses=None),
            "größe 1": ScriptedJob(),
            "growing": ScriptedJob(lines=growing, growing=True, statuses=4),
            "growing too": ScriptedJob(lines=growing, growing=True, statuses=4),
            "waited": ScriptedJob(statuses=3, state=JobState.FAILED),
        }
    )


def by_function(server: RunningServer) -> dict[str, list[str]]:
    """Return the recorded requests under the name of the job function that sent them."""
    functions: dict[str, list[str]] = {}
    for request in server.requests:
        head, found, name = request.target.partition("/begin/")
        if found:
            functions[unquote(name)] = []
        else:
            functions[list(functions)[-1]].append(f"{request.method} {head}")
    return functions


def drive_client(python: str, server: RunningServer, home: Path, token: str = TOKEN) -> dict:
    """Run all job functions of the client that this interpreter has."""
    done = subprocess.run(
        [python, fused_client_program.__file__, server.url, token, str(START_MS + 3)],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", EXCHANGES)
def test_recorded_requests_get_replies_of_the_clients_own_types(version):
    """Each request of each version is answered with JSON that its strict models accept."""
    with serving(scripted_service(), TOKEN) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for function, requests in EXCHANGES[version]["requests"].items():
            for request in requests:
                method, target = request.split(" ")
                connection.putrequest(method, target)
                for name, value in EXCHANGES[version]["headers"].items():
                    connection.putheader(name, value)
                if method == "POST":
                    connection.putheader("Content-Length", "0")
                connection.endheaders()
                reply = connection.getresponse()
                body = reply.read()
                assert reply.headers["Content-Type"] == "application/json"
                assert reply.status == (404 if function == "status of nobody" else 200), body
                if reply.status == 404:
                    assert json.loads(body) == {"message": "no such job: nobody"}
                elif "/job/self" in target:
                    TypeAdapter(list[ListRow]).validate_json(body)
                elif "/logs/" in target:
                    TypeAdapter(list[Message]).validate_json(body)
                else:
                    NewestStatus.model_validate_json(body)
                    assert json.loads(body)["job_id"] in JOB_IDS
        connection.close()


@pytest.mark.parametrize("version", EXCHANGES)
def test_recorded_tail_is_given_each_line(version):
    """The replies to a version's tail, put together, hold every line that became readable, in order."""
    with serving(scripted_service(), TOKEN) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        seen: list[str] = []
        reads = 0
        for request in EXCHANGES[version]["requests"]["tail"]:
            method, target = request.split(" ")
            connection.request(method, target, headers=EXCHANGES[version]["headers"])
            reply = json.loads(connection.getresponse().read())
            if "/logs/" in target:
                reads += 1
                seen += [line["message"] for line in reply if line["message"] not in seen]
        connection.close()
    assert reads >= 4
    assert seen == [f"line {number}" for number in range(reads)]


def test_recorded_headers_are_those_of_the_wire():
    """The oldest and the newest client send what the recording is replayed with: any scheme before the token."""
    assert set(EXCHANGES) == {"1.1.2", "1.8.0", "1.16.2", "2.9.5"}
    for version, exchange in EXCHANGES.items():
        assert exchange["headers"]["fused-py-version"] == version
        assert exchange["headers"]["authorization"].split()[1] == TOKEN


if PYTHONS:

    @pytest.mark.parametrize("python", PYTHONS)
    def test_published_client_does_all_its_job_functions(python, tmp_path):
        """Status, logs, print, tail, exec time, wait, cancel and get_jobs of a real client do what they promise."""
        with serving(scripted_service(), TOKEN) as server:
            report = drive_client(python, server, tmp_path)
            requests = by_function(server)
        version, results = report["version"], report["results"]
        errors = {name: result["error"] for name, result in results.items() if "error" in result}
        assert errors == {"status of nobody": "HTTPError: no such job: nobody"}

        def value(name):
            return results[name]["value"]

        def printed(name):
            return results[name]["printed"].splitlines()

        assert value("status")["status"] == "terminated"
        assert value("status of running")["status"] == "running"
        assert value("status of odd id")["job_id"] == "größe 1"
        assert [line["message"] for line in value("logs")] == LINES
        assert [line["timestamp"] for line in value("logs")] == [START_MS + number for number in range(5)]
        assert value("logs since") == value("logs")[3:]
        assert printed("print") == [line.strip() for line in LINES]
        assert printed("tail of ended")[:2] == ["Logs for: done", "Job is not running (terminated)"]
        # The clients leave out or repeat lines by themselves; what they print must be what there was, in order.
        assert set(printed("tail")[1:]) <= {f"line {number}" for number in range(6)}
        assert printed("tail")[1:] == sorted(printed("tail")[1:])
        assert {f"line {number}" for number in range(4)} <= set(printed("tail all"))
        assert value("exec time") == 0.004
        assert value("wait")["terminal_status"] is True
        assert value("cancel") == value("cancel again")
        assert value("cancel")["terminal_status"] is True
        assert [job["id"] for job in value("jobs")["jobs"]] == JOB_IDS[:5]
        assert [job["id"] for job in value("jobs paged")["jobs"]] == JOB_IDS
        assert [job["id"] for job in value("jobs skipped")["jobs"]] == JOB_IDS[2:4]
        if version in EXCHANGES:
            assert requests == EXCHANGES[version]["requests"]

    @pytest.mark.parametrize("python", PYTHONS)
    def test_published_client_shows_why_its_token_is_refused(python, tmp_path):
        """A client with a wrong token reads the server's sentence, not a bare 401."""
        with serving(scripted_service(), TOKEN) as server:
            results = drive_client(python, server, tmp_path, token="wrong")["results"]
        assert all("this server requires a token" in result["error"] for result in results.values())
