"""The commands over a job API: what they print for people, pipes and programs, and what they exit with."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from tailspan.cli import main
from tests.fakes.job_api import HTML, FakeJobApi, status_fault


@pytest.fixture
def api(monkeypatch, tmp_path):
    """Return a running job API that is the default service of the command line."""
    with FakeJobApi() as api:
        config = tmp_path / "config.toml"
        config.write_text(
            'default_service = "far"\n'
            f'[services.far]\ntype = "fused"\nbase_url = "{api.base_url}"\ntoken = "of-the-test"\n'
            '[services.gone]\ntype = "fused"\nbase_url = "http://127.0.0.1:9/v1"\ntoken = "of-the-test"\n'
            '[links]\ntrace = "http://jaeger/trace/{trace_id}"\n'
        )
        monkeypatch.setenv("TAILSPAN_CONFIG", str(config))
        yield api


@pytest.fixture
def job(api):
    """Return an ended job, ``j``, of three lines."""
    job = api.add_job("j", name="etl", job_status="Done", job_status_date="2026-01-01T00:00:10+00:00")
    for number, text in enumerate(["one", "  two", "\x1b[31mthree"]):
        job.line(text, 1000 + 500 * number)
    return job


def invoke(*arguments: str):
    """Run a command in this process."""
    return CliRunner().invoke(main, arguments)


def test_logs_are_printed_as_they_are(job):
    """In a pipe the text stays; with --json each line is an object; --since-ms is inclusive."""
    assert invoke("logs", "j").stdout == "one\n  two\n\x1b[31mthree\n"
    rows = [json.loads(line) for line in invoke("logs", "j", "--json", "--since-ms", "1500").stdout.splitlines()]
    assert [(row["message"], row["timestamp"]) for row in rows] == [("  two", 1500), ("\x1b[31mthree", 2000)]


def test_status_is_plain_in_a_pipe(job):
    """One field a line, without colours, with the trace id and where to see it."""
    result = invoke("status", "j")
    fields = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert {key: value.strip() for key, value in fields.items()}.items() >= {
        ("job", "j"),
        ("name", "etl"),
        ("state", "SUCCEEDED"),
        ("service", "far"),
    }
    trace_id = fields["trace id"].strip()
    assert len(trace_id) == 32
    assert fields["trace"].strip() == f"http://jaeger/trace/{trace_id}"
    assert "\x1b" not in result.stdout


def test_status_as_json_has_every_field(job):
    """The twelve fields of Fused, and ours; times are ISO 8601."""
    answer = json.loads(invoke("status", "j", "--json").stdout)
    assert {"job_id", "job_name", "status", "terminal_status", "job_status", "finished_job_status"} <= set(answer)
    assert (answer["state"], answer["exit_code"], answer["attributes"]) == ("SUCCEEDED", None, {})
    assert datetime.fromisoformat(answer["job_status_date"]) == datetime(2026, 1, 1, 0, 0, 10, tzinfo=UTC)
    assert "origin" not in answer


@pytest.mark.parametrize(("job_status", "code"), [("Done", 0), ("Failed", 1), ("Canceled", 1)])
def test_wait_and_tail_exit_by_the_jobs_state(api, job_status, code):
    """0 succeeded, 1 failed or canceled; both print how it ended."""
    job = api.add_job("j", job_status_date="2026-01-01T00:00:00+00:00")
    job.becomes(job_status, from_status=2)
    word = {"Done": "succeeded", "Failed": "failed", "Canceled": "canceled"}[job_status]
    waited = invoke("wait", "j", "--poll", "0.01")
    assert (waited.exit_code, waited.stdout, waited.stderr) == (code, f"job j {word}\n", "")
    job.line("last words", 1000)
    tailed = invoke("tail", "j", "--refresh", "0.01")
    assert (tailed.exit_code, tailed.stdout, tailed.stderr) == (code, "last words\n", f"tailspan: job j {word}\n")


def test_wait_and_tail_give_up_with_124(api):
    """A timeout of the command is an exit code of its own, with the state of the job."""
    api.add_job("j")
    waited = invoke("wait", "j", "--poll", "0.01", "--timeout", "0.05")
    assert waited.exit_code == 124
    assert "job j had not ended after 50 ms: it is RUNNING" in waited.stderr
    tailed = invoke("tail", "j", "--refresh", "0.01", "--timeout", "0.05")
    assert tailed.exit_code == 124
    assert "job j has not ended after 50 ms" in tailed.stderr


def test_tail_samples_and_speaks_json(job):
    """--sample prints the newest line and, on standard error, how many it left out; --json prints lines of JSON."""
    sampled = invoke("tail", "j", "--sample", "--refresh", "0.01", "--json")
    assert [json.loads(line)["timestamp"] for line in sampled.stdout.splitlines()] == [2000]
    assert "tailspan: 2 lines left out\n" in sampled.stderr


def test_cancel(api):
    """A running job is cancelled; a second time changes nothing and is not an error."""
    job = api.add_job("j")
    for _ in range(2):
        result = invoke("cancel", "j")
        assert (result.exit_code, result.stdout) == (0, "job j canceled\n")
    assert job.cancels == 1
    assert json.loads(invoke("cancel", "j", "--json").stdout)["state"] == "CANCELED"


def test_exec_time(job, api):
    """From the first to the last line; for a running job so far, with a note."""
    assert invoke("exec-time", "j").stdout == "1 s\n"
    assert json.loads(invoke("exec-time", "j", "--json").stdout) == {
        "job_id": "j",
        "exec_time_s": 1.0,
        "in_progress": False,
    }
    api.add_job("r")
    running = invoke("exec-time", "r")
    assert (running.exit_code, running.stdout) == (0, "0 ms\n")
    assert "job r is RUNNING: this is its execution time so far" in running.stderr


def test_jobs_are_columns_in_a_pipe_and_an_array_for_programs(api):
    """Newest first, limited, filtered; the columns line up and the job comes first."""
    for number in range(5):
        api.add_job(f"job-{number}", job_status="Failed" if number % 2 else "Done")
    head, *rows = invoke("jobs").stdout.splitlines()
    assert head.split() == ["STATE", "NAME", "ID", "STARTED", "DURATION", "PROGRESS", "RESULT"]
    assert [row.split()[:3] for row in rows[:2]] == [["SUCCEEDED", "etl", "job-4"], ["FAILED", "etl", "job-3"]]
    assert {row.index("2026-") for row in rows} == {head.index("STARTED")}
    limited = invoke("jobs", "--limit", "2")
    assert len(limited.stdout.splitlines()) == 3
    assert "these are the newest 2; --all shows the others" in limited.stderr
    listed = json.loads(invoke("jobs", "--state", "failed", "--all", "--json").stdout)
    assert [row["job_id"] for row in listed] == ["job-3", "job-1"]
    assert "no jobs match" in invoke("jobs", "--name", "nothing*").stderr


def test_only_local_jobs_can_be_pruned(api):
    """A service that keeps its jobs itself is an error."""
    result = invoke("jobs", "prune", "--older-than", "1d")
    assert result.exit_code == 2
    assert "only local jobs can be pruned" in result.stderr


@pytest.mark.parametrize("job_id", ["unknown", "a/b", "..", "../../etc/passwd", "a?b=c#d", "%2e%2e"])
def test_an_unknown_job_is_exit_code_4(api, job_id):
    """Any id is escaped, requested, not found, and not the name of a job."""
    result = invoke("status", job_id)
    assert result.exit_code == 4
    assert result.stderr.startswith("tailspan: ")
    assert len(result.stderr.splitlines()) == 1
    assert {request.job_id for request in api.requests} <= {job_id, None}


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (HTML, 3, ""),
        (status_fault(403, "not your job"), 2, "not your job"),
        (status_fault(400, "no such thing"), 3, "no such thing"),
    ],
    ids=["HTML", "403", "400"],
)
def test_a_service_that_answers_oddly_is_one_line(job, api, fault, code, words):
    """A clear message with the server's text, and the documented exit code."""
    api.fault(fault, times=None)
    for command in ("status", "logs", "tail", "wait", "cancel", "exec-time"):
        result = invoke(command, "j")
        assert result.exit_code == code, command
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert isinstance(result.exception, SystemExit)


def test_an_unreachable_service_is_exit_code_3(api):
    """No server listens there."""
    result = invoke("status", "j", "--service", "gone")
    assert result.exit_code == 3
    assert "127.0.0.1:9" in result.stderr


def test_a_job_by_its_name_its_beginning_or_as_the_newest(api):
    """Every command that takes a job finds it; of a name the newest run."""
    for number, name in enumerate(["etl", "etl", "report"]):
        ended = "2026-01-01T00:00:10+00:00"
        job = api.add_job(f"{number}-aa-{number}b", name=name, job_status="Done", job_status_date=ended)
        job.line(f"line of {number}", 1000)
    for given, number in (("etl", 1), ("0-", 0), ("2b", 2), ("-1", 2), ("--last", 2), ("1-aa-1b", 1)):
        assert invoke("logs", given).stdout == f"line of {number}\n", given
        for command in ("status", "tasks", "cancel", "wait", "tail", "exec-time"):
            assert invoke(command, given).exit_code == 0, (command, given)
    unknown = invoke("status", "repotr")
    assert (unknown.exit_code, "did you mean 'report'?" in unknown.stderr) == (4, True)
    missing = invoke("status")
    assert (missing.exit_code, "-1 for the newest job" in missing.stderr) == (2, True)
    for number in (3, 4):
        api.add_job(f"run-{number}", name="nightly")
    several = invoke("logs", "run")
    assert several.exit_code == 2
    assert "'run' is the beginning of 2 job ids: run-4 (nightly, RUNNING), run-3 (nightly, RUNNING)" in several.stderr


def test_the_lines_that_are_wanted(job):
    """By age, number, pattern and stream; with their times, in UTC in a pipe; `tail -n` begins with the last ones."""
    assert invoke("logs", "j", "--tail", "1").stdout == "\x1b[31mthree\n"
    assert invoke("logs", "j", "-n", "0").stdout == ""
    assert invoke("logs", "j", "--grep", "^(one|.*w)").stdout == "one\n  two\n"
    assert invoke("logs", "j", "--grep", "e", "--tail", "1", "--json").stdout.count('"timestamp": 2000') == 1
    assert invoke("logs", "j", "--since", "1970-01-01T00:00:01.500Z", "-n", "2").stdout == "  two\n\x1b[31mthree\n"
    assert invoke("logs", "j", "--since", "10m").stdout == ""
    assert invoke("logs", "j", "--stream", "stderr").stdout == ""
    assert invoke("logs", "j", "-t", "-n", "2").stdout.splitlines()[0] == "1970-01-01T00:00:01.500Z   two"
    tailed = invoke("tail", "j", "-n", "2", "--grep", "t", "-t")
    assert tailed.stdout == "1970-01-01T00:00:01.500Z   two\n1970-01-01T00:00:02.000Z \x1b[31mthree\n"


def test_the_ids_of_jobs_are_listed_for_scripts(api):
    """One on each line, the newest first, with the same filters as the table; nothing without a match."""
    for number, state in enumerate(["Done", "Running", "Done"]):
        api.add_job(f"job-{number}", job_status=state)
    assert invoke("jobs", "-q").stdout == "job-2\njob-1\njob-0\n"
    assert invoke("jobs", "--quiet", "--state", "succeeded").stdout == "job-2\njob-0\n"
    assert invoke("jobs", "-q", "--name", "nothing").output == ""


def test_jobs_say_how_they_ended_and_are_found_by_age_and_attribute(api):
    """The columns have start, duration, progress and result; --json has every field of row and status."""
    api.add_job("old", job_status="Done", attributes={"team": "geo"}, submitted_at="2026-01-01T00:00:00+00:00")
    api.add_job(
        "new",
        job_status="Failed",
        attributes={"team": "geo", "day": "1"},
        exit_code=3,
        error="out of memory",
        started_at="2026-01-02T00:00:00+00:00",
        finished_at="2026-01-02T00:02:03+00:00",
        total_tasks=4,
        finished_tasks=1,
    )
    api.add_job("other", job_status="Done", attributes={"team": "ops"})
    (row,) = json.loads(invoke("jobs", "--attr", "team=geo", "--attr", "day=1", "--json").stdout)
    assert (row["job_id"], row["exit_code"], row["error"], row["duration_s"]) == ("new", 3, "out of memory", 123.0)
    assert (row["progress"], row["started_at"]) == (0.25, "2026-01-02T00:00:00+00:00")
    _, shown = invoke("jobs", "--state", "failed").stdout.splitlines()
    assert shown.split() == [
        "FAILED", "etl", "new", "2026-01-02T00:00:00Z", "2m", "03s", "25%", "(1", "of", "4)", "out", "of", "memory",
    ]  # fmt: skip
    assert [row["job_id"] for row in json.loads(invoke("jobs", "--attr", "team=geo", "--json").stdout)] == [
        "new",
        "old",
    ]
    assert "no jobs match" in invoke("jobs", "--attr", "team=none").stderr


def test_where_a_job_is_opened(job):
    """Its trace where that is wanted or all there is; a job of another service is not retried here."""
    trace = json.loads(invoke("status", "j", "--json").stdout)["links"]["trace"]
    assert invoke("open", "etl", "--print").stdout == invoke("open", "-1", "--trace", "--print").stdout == f"{trace}\n"
    refused = invoke("retry", "j")
    assert (refused.exit_code, "only local jobs can be retried" in refused.stderr) == (2, True)
