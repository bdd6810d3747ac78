"""Local jobs are read without an event loop and, where nothing is configured, without the configuration's classes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest

from tailspan import AsyncJobClient, Client
from tailspan.errors import ConfigError, JobNotFoundError
from tailspan.services.local import LocalService
from tailspan.testing import FakeService
from tests.fakes.local_jobs import LocalJobs

HEAVY = {"pydantic", "pydantic_settings", "httpcore", "msgspec", "rich", "anyio", "asyncio", "ssl", "logging", "email"}

WITH_A_FILE = "with a file ['email', 'pydantic']"


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Return local jobs in a directory of their own, which the environment names and nothing else."""
    for name in [name for name in os.environ if name.startswith("TAILSPAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path / "state"))
    with LocalJobs(tmp_path / "state") as jobs:
        yield jobs


@pytest.fixture
def job_id(local):
    """Return an ended job of two lines."""
    return local.run("sh", "-c", "echo one; echo two", name="etl").job_id


def test_nothing_heavy_is_imported(local, job_id, tmp_path):
    """Each verb and each command that reads: one interpreter for all, since each import lasts."""
    config = tmp_path / "config.toml"
    config.write_text("[services.fused]\nbase_url = 'http://127.0.0.1:1'\n")
    program = f"""
import io, sys
import tailspan
from tailspan.cli import main
heavy = {HEAVY!r}
def check(name):
    print(name, sorted(heavy & set(sys.modules)), file=sys.stderr)
status = tailspan.job_get_status({job_id!r})
check("job_get_status")
status.get_status(), status.get_logs(), list(status.iter_logs()), status.get_exec_time()
check("methods")
tailspan.job_get_logs({job_id!r}), tailspan.job_print_logs({job_id!r}, file=io.StringIO())
tailspan.job_list(name="e*"), tailspan.job_get_exec_time({job_id!r})
check("functions")
for arguments in ("status", "logs", "exec-time"):
    main([arguments, {job_id!r}], standalone_mode=False)
main(["jobs", "--name", "etl", "--service", "local"], standalone_mode=False)
main(["status", "--json", {job_id!r}], standalone_mode=False)
check("commands")
for arguments in (["jobs"], ["status", {job_id!r}], ["logs", {job_id!r}]):
    main([*arguments, "--config", {str(config)!r}], standalone_mode=False)
check("with a file")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["job_get_status []", "methods []", "functions []", "commands []", WITH_A_FILE]
    assert done.stdout.count(job_id) == 5
    assert "one\ntwo\n" in done.stdout


def test_the_answers_are_those_of_the_event_loop(local, job_id):
    """The same status, lines and rows as from `AsyncJobClient`."""

    async def by_loop():
        async with AsyncJobClient() as client:
            return await client.get_status(job_id), await client.get_logs(job_id), await client.list_jobs()

    with Client() as client:
        assert (client.get_status(job_id), client.get_logs(job_id), client.list_jobs()) == anyio.run(by_loop)
        assert client._portals == []
        printed = io.StringIO()
        client.print_logs(client.list_jobs()[0], file=printed)
        assert printed.getvalue() == "one\ntwo\n"


def test_a_status_crosses_between_both_ways(local, job_id):
    """A status that was read directly can be waited for, and one from a wait can be read again."""
    with Client() as client:
        waited = client.wait_for_job(client.get_status(job_id))
        assert client._portals != []
        assert waited.get_status() == client.get_status(waited)
        assert [message["message"] for message in waited.iter_logs()] == ["one", "two"]


def test_errors_are_the_same(local, job_id):
    """An unknown job, an argument that is no job, a service that is not configured."""
    with Client() as client:
        with pytest.raises(JobNotFoundError):
            client.get_status("20200101-000000000-abcdef")
        with pytest.raises(ConfigError):
            client.get_status(None)
        with pytest.raises(ConfigError, match="no service named 'other'"):
            client.get_status(job_id, service="other")
        with pytest.raises(JobNotFoundError):
            list(client.iter_logs("20200101-000000000-abcdef"))


def test_a_configured_local_service_is_read_directly(local, tmp_path, monkeypatch):
    """By whichever name, from the directory that the file names; a service of another type is not."""
    ended = local.run("true")
    config = tmp_path / "config.toml"
    config.write_text(
        f"default_service = 'mine'\n[services.mine]\ntype = 'local'\nstate_dir = '{local.state_dir}'\n"
        "[services.local]\nstate_dir = '{tmp_path}/other'\n[services.fused]\nbase_url = 'http://127.0.0.1:1'\n"
    )
    monkeypatch.setenv("TAILSPAN_CONFIG", str(config))
    monkeypatch.delenv("TAILSPAN_STATE_DIR")  # it would win over the file
    with Client() as client:
        status = client.get_status(ended.job_id)
        assert (status.service, client.get_logs(status), len(client.list_jobs())) == ("mine", [], 1)
        with pytest.raises(JobNotFoundError):
            client.get_status(ended.job_id, service="local")
        assert client._portals == []
        with pytest.raises(ConfigError, match="no service named 'other'"):
            client.get_status(ended.job_id, service="other")
        assert not client._direct.reads_directly(service="fused")


def test_another_service_is_read_in_the_loop(local):
    """Only the built-in local service waits for nothing: not one that derives from it, nor any other object."""

    class Slow(LocalService):
        async def get_job(self, job_id):
            await anyio.sleep(0)
            return await super().get_job(job_id)

    ended = local.run("true")
    with Client() as client:
        assert client.get_status(ended.job_id, service=Slow(state_dir=local.state_dir)).job_id == ended.job_id
        fake = FakeService()
        fake.add_job("j")
        assert client.get_status("j", service=fake).get_status().job_id == "j"


def test_the_directory_may_change_between_two_calls(local, job_id, tmp_path, monkeypatch):
    """As with a configuration: the environment counts when a verb is called."""
    with Client() as client:
        status = client.get_status(job_id)
        monkeypatch.setenv("TAILSPAN_STATE_DIR", str(tmp_path / "other"))
        assert client.list_jobs() == []
        assert status.get_status() == status


def test_a_configuration_file_counts(local, job_id, tmp_path, monkeypatch):
    """Once there is one, its mistakes are errors."""
    config = Path(tmp_path / "config.toml")
    config.write_text("[services.local]\nno_such_key = 1\n")
    with Client() as client:
        client.get_status(job_id)
        monkeypatch.setenv("TAILSPAN_CONFIG", str(config))
        with pytest.raises(ConfigError, match="no_such_key"):
            client.get_status(job_id)


def test_threads_read_at_the_same_time(local, job_id):
    """One client in eight threads, each with its own complete answers."""
    found = []
    with Client() as client:

        def read():
            found.extend(
                (len(client.list_jobs()), len(client.get_logs(job_id)), client.get_status(job_id).state)
                for _ in range(10)
            )

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(found) == {(1, 2, "SUCCEEDED")}
    assert len(found) == 80
