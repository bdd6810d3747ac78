"""What a job is called, what is shown of its command, and the environment it gets: pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.local.command_line import default_name, redact_command
from tailspan.local.environment import job_environment, parent_of


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["/opt/etl/load"], "load"),
        (["./load.sh", "x"], "load"),
        (["python", "etl.py", "--date", "today"], "etl"),
        (["/usr/bin/python3.11", "-u", "/srv/etl.py"], "etl"),
        (["python3", "-m", "etl.nightly", "--fast"], "etl.nightly"),
        (["python", "-c", "print(1)"], "python"),
        (["bash", "-eu", "run.bash"], "run"),
        (["sh", "-c", "echo hi"], "sh"),
        (["uv", "run", "etl.py"], "etl"),
        (["Rscript", "model.R"], "model"),
        (["python"], "python"),
        (["/"], "/"),
        ([".sh"], ".sh"),
        (["/opt/caf\udce9"], "caf?"),
        (["python", "-m", "caf\udce9.nightly"], "caf?.nightly"),
    ],
)
def test_a_job_is_called_after_its_program_or_script(command, name):
    """A name is what the runs of one pipeline have in common."""
    assert default_name(command) == name


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["load", "--password", "hunter2", "x"], ["load", "--password", "***", "x"]),
        (["load", "--db-password=hunter2"], ["load", "--db-password=***"]),
        (["load", "-token", "hunter2"], ["load", "-token", "***"]),
        (["load", "--no-token", "--fast"], ["load", "--no-token", "--fast"]),
        (["env", "API_KEY=hunter2", "load"], ["env", "API_KEY=***", "load"]),
        (["load", "postgres://me:hunter2@db/x"], ["load", "postgres://***@db/x"]),
        (["load", "https://hunter2@host/x?a=b"], ["load", "https://***@host/x?a=b"]),
        (["load", "https://h/x?access_token=hunter2&a=b"], ["load", "https://h/x?access_token=***&a=b"]),
        (["curl", "-H", "Authorization: Bearer hunter2"], ["curl", "-H", "Authorization: ***"]),
        (["sh", "-c", "curl -H 'Authorization: Basic hunter2' x"], ["sh", "-c", "curl -H 'Authorization: ***' x"]),
        (["sh", "-c", "PGPASSWORD='hunter2' psql"], ["sh", "-c", "PGPASSWORD='***' psql"]),
        (["load", "ghp_" + "a" * 36], ["load", "***"]),
        (["load", "--author", "me", "--date=2026-01-01"], ["load", "--author", "me", "--date=2026-01-01"]),
        (["python", "etl.py", "s3://bucket/key"], ["python", "etl.py", "s3://bucket/key"]),
    ],
)
def test_secrets_are_hidden(command, shown):
    """By the name before it, by its own form, or in a URL; what is none stays."""
    assert redact_command(command) == shown


@given(st.lists(st.text(), min_size=1))
def test_redaction_keeps_the_number_of_arguments(command):
    """Whatever the arguments are, one is shown for each, and the program stays what it is."""
    assert len(redact_command(command)) == len(command)


VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("given", "parent"),
    [
        (VALID, VALID),
        (f" {VALID.upper()} ", VALID),
        ("", None),
        ("garbage", None),
        (VALID.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), None),
        (VALID.replace("b7ad6b7169203331", "0" * 16), None),
        ("ff" + VALID[2:], None),
    ],
)
def test_only_a_valid_parent_counts(given, parent):
    """A traceparent that the standard forbids is as good as none."""
    assert parent_of({"TRACEPARENT": given}) == parent


def environment(inherited: dict[str, str], **options: object) -> dict[str, str]:
    """Return a job's environment."""
    given = {"job_id": "j", "name": "etl", "trace_id": "t" * 32, "span_id": "s" * 16, "otlp": {}, **options}
    return job_environment(inherited, **given)


def test_a_name_that_was_given_stays():
    """The program's own service name wins over the job's, but not the name of the job around it."""
    assert environment({"OTEL_SERVICE_NAME": "mine"})["OTEL_SERVICE_NAME"] == "mine"
    outer = environment({}, name="outer job")
    assert environment(outer)["OTEL_SERVICE_NAME"] == "etl"
    assert environment(outer)["OTEL_RESOURCE_ATTRIBUTES"] == "cicd.pipeline.name=etl,cicd.pipeline.run.id=j"


def test_all_else_passes_unchanged():
    """What we know nothing of is not touched, and the caller's mapping neither."""
    inherited = {"PATH": "/bin", "TRACESTATE": "a=b", "X": "=,="}
    result = environment(inherited)
    assert (result["PATH"], result["X"]) == ("/bin", "=,=")
    assert "TRACESTATE" not in result
    assert inherited["TRACESTATE"] == "a=b"
