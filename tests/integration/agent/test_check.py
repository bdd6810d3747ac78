"""`agent check`: its findings are what the agent would encounter."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tailspan.config import Settings
from tailspan.errors import AuthError, ConfigError, ServiceUnavailableError
from tailspan.services import JobService, Problem
from tailspan.testing import FakeService
from tailspan_agent.commands.check import Finding, check
from tests.fakes.agents import Bench
from tests.fakes.collector import Reply


def findings(bench: Bench, *watches: dict[str, Any], settings: Settings | None = None, **keys: Any) -> list[Finding]:
    async def run_checks() -> list[Finding]:
        return [finding async for finding in check(settings or bench.settings(*watches, **keys), bench.open)]

    return asyncio.run(run_checks())


def about(found: list[Finding], subject: str) -> Finding:
    (one,) = [finding for finding in found if finding.subject == subject]
    return one


def test_all_well(bench: Bench) -> None:
    """Service, configured job and signals each have a finding; nothing is relayed, and the service is closed."""
    bench.fake.add_job("j1", job_name="etl")
    found = findings(bench, {"jobs": ["j1"]})
    assert [finding.exit_code for finding in found] == [0] * 5
    assert about(found, "services.fake").text == "reachable; its newest job is j1"
    assert about(found, "job j1").text == "etl: RUNNING"
    assert about(found, "otlp traces").text == f"{bench.collector.http_url}/v1/traces accepts them"
    assert bench.collector.log_records() == []
    assert bench.fake.calls[-1] == ("aclose", "")


def test_a_service_without_jobs_is_well(bench: Bench) -> None:
    """An empty list is not a problem."""
    assert about(findings(bench), "services.fake").text == "reachable; it has no jobs yet"


@pytest.mark.parametrize(("error", "code"), [(ServiceUnavailableError("away"), 3), (AuthError("who are you"), 2)])
def test_a_service_that_does_not_answer(bench: Bench, error: Exception, code: int) -> None:
    """The finding has its message and exit code, and the other checks still run."""
    bench.fake.fail_next("list_jobs", error)
    found = findings(bench)
    assert (about(found, "services.fake").exit_code, about(found, "services.fake").text) == (code, str(error))
    assert about(found, "otlp logs").exit_code == 0


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (
            "get_job",
            KeyError("id"),
            r"get_job('j1') of its newest job failed: unexpected KeyError in the service plugin",
        ),
        ("read_logs", AuthError("no right to logs"), "read_logs('j1') of its newest job failed: no right to logs"),
    ],
)
def test_a_plugin_that_lists_and_cannot_read(bench: Bench, method: str, error: Exception, text: str) -> None:
    """The newest job is read, although no job is configured; the other checks still run."""
    bench.fake.add_job("j1")
    bench.fake.fail_next(method, error)
    found = findings(bench)
    (problem,) = [one for one in found if one.exit_code]
    assert (problem.subject, problem.exit_code) == ("services.fake", 2)
    assert problem.text.startswith(text)
    assert about(found, "otlp logs").exit_code == 0


def test_a_port_that_is_taken(bench: Bench) -> None:
    """The agent could not listen."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = findings(bench, listen=f"127.0.0.1:{taken.getsockname()[1]}")
    assert "Address already in use: another program listens there" in about(found, "agent.listen").text
    assert about(found, "agent.listen").exit_code == 2


def test_what_a_service_lacks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem that a service finds is a finding: an error if jobs or lines are not relayed, else a warning."""

    async def find_problems() -> list[Problem]:
        return [Problem("may not read logs"), Problem("may not cancel jobs", is_fatal=False)]

    monkeypatch.setattr(bench.fake, "find_problems", find_problems)
    found = [one for one in findings(bench) if one.subject == "services.fake"][1:]
    assert [(one.text, one.exit_code, one.warning) for one in found] == [
        ("may not read logs", 2, False),
        ("may not cancel jobs", 0, True),
    ]


def test_a_job_that_does_not_exist(bench: Bench) -> None:
    """Each missing job has one finding."""
    bench.fake.add_job("j1")
    found = findings(bench, {"jobs": ["typo", "j1"]}, {"jobs": ["typo"]})
    assert about(found, "job typo").exit_code == 4
    assert about(found, "job j1").exit_code == 0


def test_an_endpoint_that_is_wrong(bench: Bench) -> None:
    """Rejecting everything is a problem, rejecting an empty request a warning, a missing file a configuration error."""
    bench.collector.always("logs", Reply(404))
    bench.collector.always("traces", Reply(400, message="empty"))
    found = findings(bench)
    assert about(found, "otlp logs").exit_code == 3
    assert (about(found, "otlp traces").exit_code, about(found, "otlp traces").warning) == (0, True)
    away = about(findings(bench, otlp={"endpoint": "http://127.0.0.1:1"}), "otlp logs")
    assert (away.exit_code, away.text.count("127.0.0.1:1")) == (3, 1)
    missing = findings(bench, otlp={"ca_file": str(bench.directory / "missing.pem")})
    assert about(missing, "otlp logs").exit_code == 2


def test_signals_that_are_not_sent_and_files(bench: Bench) -> None:
    """Neither is a problem; the finding names the files."""
    found = findings(bench, otlp={"signals": ["traces"]})
    assert about(found, "otlp logs").text == "not sent (otlp.signals)"
    found = findings(bench, otlp={"endpoint": None})
    assert str(bench.state_dir / "otlp" / "logs.jsonl") in about(found, "otlp logs").text


def test_watches_in_each_others_way(bench: Bench) -> None:
    """A job that is named twice, and a watch whose jobs an earlier one takes, are warnings."""
    bench.fake.add_job("j1")
    found = findings(
        bench,
        {"jobs": ["j1"]},
        {"discover": True, "exclude": ["x"]},
        {"discover": True, "name": "etl"},
        {"jobs": ["j1"], "discover": True, "name": "etl"},
    )
    warnings = [(finding.subject, finding.text) for finding in found if finding.warning]
    assert [subject for subject, _ in warnings] == ["agent.watch[3]"] * 2
    assert "already named by agent.watch[0]" in warnings[0][1]
    assert "agent.watch[2] comes first" in warnings[1][1]


def test_one_service_by_two_names(bench: Bench) -> None:
    """The agent would reject it."""
    bench.services["twin"] = FakeService("twin")
    found = findings(bench, {"discover": True}, {"service": "twin", "discover": True})
    assert [finding.exit_code for finding in found if finding.subject == "services.twin"] == [2, 0]


def test_a_service_that_cannot_be_made(bench: Bench) -> None:
    """Invalid options: a finding with the key, and the other checks still run."""

    def opener(name: str, settings: Settings) -> JobService:
        raise ConfigError("services.fake.token: no such file", key="services.fake.token")

    async def run_checks() -> list[Finding]:
        return [finding async for finding in check(bench.settings(), opener)]

    found = asyncio.run(run_checks())
    assert about(found, "services.fake").exit_code == 2
    assert about(found, "otlp logs").exit_code == 0


def test_the_sdk_switched_off(bench: Bench) -> None:
    """A setting that prevents the agent from starting is found."""
    settings = bench.settings()
    off = settings.model_copy(update={"otlp": settings.otlp.model_copy(update={"disabled": True})})
    assert about(findings(bench, settings=off), "OTEL_SDK_DISABLED").exit_code == 2
