"""`tailspan serve` as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
from click.testing import CliRunner

from tailspan.cli import main

TOKEN = "a-token-of-the-test"
# Five lines of hostile bytes, and an end with failure.
COMMAND = ["sh", "-c", r"printf 'one\n  two\n\033[31mred\033[0m\n10%%\r20%%\n\377 no newline'; exit 3"]
LINES = ["one", "  two", "\x1b[31mred\x1b[0m", "10%\r20%", "\ufffd no newline"]


@contextmanager
def tailspan_serve(environment, *arguments):
    """Run the command on a free port; give the URL that it prints, and end it by SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-c", "from tailspan.cli import main; main()", "serve", "--port", "0", *arguments],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            yield process.stderr.readline()
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
        assert (process.wait(), rest) == (0, "")


@pytest.fixture
def environment(tmp_path):
    """Where local jobs, the token and the configuration of this test are."""
    return {"TAILSPAN_STATE_DIR": str(tmp_path / "state"), "TAILSPAN_CONFIG": "", "TAILSPAN_SERVE_TOKEN": TOKEN}


def test_local_jobs_are_served_as_they_are(runner, environment):
    """Another program gets the status, every byte of the log and the list of a real job, if it has the token."""
    assert (
        runner.invoke(main, ["run", "--name", "etl", "--attr", "team=geo", "--", *COMMAND], env=environment).exit_code
        == 3
    )
    (row,) = json.loads(runner.invoke(main, ["jobs", "--json"], env=environment).stdout)
    job_id = row["job_id"]
    local = json.loads(runner.invoke(main, ["status", "--json", job_id], env=environment).stdout)
    with tailspan_serve(environment) as announced:
        match = re.fullmatch(r"serving jobs of 'local' at (http://127\.0\.0\.1:[1-9]\d*/server/v1)\n", announced)
        assert match
        assert httpx.get(f"{match[1]}/job/self").status_code == 401
        with httpx.Client(base_url=match[1], headers={"Authorization": f"Bearer {TOKEN}"}) as api:
            status = api.get(f"/run/by-id/{job_id}").json()
            lines = api.get(f"/logs/{job_id}").json()
            (listed,) = api.get("/job/self").json()
            again = api.get(f"/logs/{job_id}", params={"since_ms": status["last_line_ms"]}).json()
            for beside in (f"{job_id}%2flog", "..%2fidentity", "..", "%2e%2e%2f%2e%2e%2fetc%2fpasswd"):
                assert api.get(f"/logs/{beside.replace('..', '%2e%2e')}").status_code == 404
    assert [line["message"] for line in lines] == LINES
    assert again == [line for line in lines if line["timestamp"] >= status["last_line_ms"]]
    assert [line["timestamp"] for line in lines] == sorted(line["timestamp"] for line in lines)
    assert (status["state"], status["exit_code"], status["attributes"]) == ("FAILED", 3, {"team": "geo"})
    assert (status["trace_id"], status["job_name"]) == (local["trace_id"], "etl")
    assert (listed["id"], listed["lines"], listed["state"]) == (job_id, 5, "FAILED")


def test_served_jobs_are_the_same_jobs_from_afar(runner, environment, tmp_path):
    """Through the server another Tailspan sees one job: same lines, same state, same trace."""
    assert runner.invoke(main, ["run", "--", *COMMAND], env=environment).exit_code == 3
    (row,) = json.loads(runner.invoke(main, ["jobs", "--json"], env=environment).stdout)
    config = tmp_path / "far.toml"
    (tmp_path / "token").write_text(TOKEN + "\n")
    with tailspan_serve(environment, "--token-file", str(tmp_path / "token")) as announced:
        url = announced.split()[-1]
        config.write_text(f"[services.far]\ntype = 'fused'\nbase_url = '{url}'\ntoken = '{TOKEN}'\n")

        def both(*arguments):
            return [
                runner.invoke(main, [*arguments, "--service", name, "--config", str(config)], env=environment)
                for name in ("local", "far")
            ]

        near, far = (json.loads(result.stdout) for result in both("status", row["job_id"], "--json"))
        near_lines, far_lines = (result.stdout for result in both("logs", row["job_id"], "--json"))
        near_rows, far_rows = (json.loads(result.stdout) for result in both("jobs", "--json"))
    del near["service"], far["service"]
    assert near == far
    assert near_lines == far_lines
    assert "no newline" in near_lines
    assert [row["job_id"] for row in near_rows] == [row["job_id"] for row in far_rows]


def test_job_can_be_canceled_through_the_server(runner, environment):
    """Cancel over HTTP ends the real processes, and the job is CANCELED."""
    job_id = runner.invoke(main, ["run", "--detach", "--", "sleep", "600"], env=environment).stdout.strip()
    with (
        tailspan_serve(environment) as announced,
        httpx.Client(base_url=announced.split()[-1], headers={"Authorization": f"x {TOKEN}"}) as api,
    ):
        assert api.post(f"/run/by-id/{job_id}/cancel", timeout=30).json()["job_id"] == job_id
        waited = runner.invoke(main, ["wait", job_id, "--json"], env=environment)
        assert api.get(f"/run/by-id/{job_id}").json()["job_status"] == "Canceled"
    assert waited.exit_code == 1


@pytest.fixture
def runner(tmp_path):
    """Type commands with a state directory of their own."""
    return CliRunner(env={"TAILSPAN_STATE_DIR": str(tmp_path), "TAILSPAN_CONFIG": "", "TAILSPAN_SERVE_TOKEN": None})


def test_public_address_without_a_token_is_refused(runner):
    """Jobs are not shown to the network by accident: exit code 2 and what to do."""
    result = runner.invoke(main, ["serve", "--host", "0.0.0.0"])
    assert result.exit_code == 2
    assert "0.0.0.0 is not a loopback address" in result.stderr
    assert "--token-file" in result.stderr


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", b"\xff\xfe", b"nul\0"])
def test_token_file_without_a_token_is_refused(runner, tmp_path, content):
    """An invalid token is reported without its text."""
    path = tmp_path / "token"
    path.write_bytes(content)
    result = runner.invoke(main, ["serve", "--token-file", str(path)])
    assert result.exit_code == 2
    assert str(path) in result.stderr.replace("\n", "")
    assert "two" not in result.stderr


def test_missing_token_file_is_told(runner, tmp_path):
    """A token file that is not there stops the server before it serves everybody."""
    result = runner.invoke(main, ["serve", "--token-file", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "No such file" in result.stderr


def test_empty_token_variable_is_refused(runner):
    """A variable that was meant to hold the token and is empty does not open the server to everybody."""
    result = runner.invoke(main, ["serve"], env={"TAILSPAN_SERVE_TOKEN": ""})
    assert result.exit_code == 2
    assert "TAILSPAN_SERVE_TOKEN contains no token" in result.stderr


def test_unknown_service_is_told(runner):
    """A service that is not configured is named, with those that are."""
    result = runner.invoke(main, ["serve", "--service", "nope"])
    assert result.exit_code == 2
    assert "'nope'" in result.stderr


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_missing_package_says_what_to_install(package):
    """Without the extra, the command names it."""
    program = f"import sys; sys.modules[{package!r}] = None; from tailspan.cli import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{package}, which is not installed: pip install 'tailspan[serve]'" in done.stderr


def test_help_names_the_token_variable_and_an_example(runner):
    """The help explains the token and has an example."""
    text = runner.invoke(main, ["serve", "--help"]).output
    assert "TAILSPAN_SERVE_TOKEN" in text
    assert "tailspan serve --host" in text
