"""`tailspan run` and `agent run` have two parsers: a light one for what is usual, and click, which explains."""

from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from tailspan.cli import run as run_module
from tailspan.cli.run_job import RunOptions
from tailspan.cli.start import parse_agent_run, parse_run
from tailspan_agent import cli as agent_cli

# What only click parses.
LEFT_TO_CLICK = {"--json", "--help", "-h"}


def by_click(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> dict[str, object] | None:
    """Return the options that click finds; None if it rejects the arguments."""
    found: list[RunOptions] = []

    def run_command(options: RunOptions, *, own_process: bool) -> int:
        found.append(options)
        return 0

    monkeypatch.setattr(run_module, "run_command", run_command)
    CliRunner().invoke(run_module.run, arguments)
    return fields(found[0]) if found else None


def fields(options: RunOptions) -> dict[str, object]:
    """Return the options by name."""
    return {**vars(options), "command": list(options.command), "attributes": dict(options.attributes or {})}


@pytest.mark.parametrize(
    "arguments",
    [
        "true",
        "-- true",
        "sh -c --name",
        "true -- --detach x",
        "-- -- x",
        "--name n -- make -j 4",
        "--name=n=m make",
        "--name --detach -- true",
        "--attr a=1 --attr=b=2=3 --attr c= --attr a=4 -- true",
        "--timeout 1.5 true",
        "--timeout=1e3 true",
        "--timeout -1 true",
        "--timeout inf true",
        "--timeout 30m true",
        "--timeout=1h30m true",
        "--detach --strict --no-tty --encoding latin-1 -- true",
        "--service local --detach true",
        "--config=x.toml --service other true",
    ],
)
def test_both_find_the_same(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    """Options in all forms, before any command."""
    light = parse_run(["run", *arguments.split()])
    assert light is not None
    assert fields(light) == by_click(monkeypatch, arguments.split())


def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a number is equal to nothing, so it is compared apart."""
    light, other = parse_run(["run", "--timeout", "nan", "true"]), by_click(monkeypatch, ["--timeout", "nan", "true"])
    assert light is not None
    assert light.timeout_s is not None
    assert other is not None
    assert math.isnan(light.timeout_s)
    assert math.isnan(float(str(other["timeout_s"])))


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--",
        "--name",
        "--name n",
        "--help",
        "--json --detach true",
        "--nam n true",
        "--detach=yes true",
        "--attr a true",
        "--attr =1 true",
        "--timeout soon true",
        "--timeout 0 true",
        "--detach --service other true",
        "-x true",
        "- true",
    ],
)
def test_what_needs_an_explanation_is_left_to_click(arguments: str) -> None:
    """So is what submits to another service."""
    assert parse_run(["run", *arguments.split()]) is None


def test_other_commands_are_left_to_click() -> None:
    """Nothing, an option of the group, and every other command."""
    assert parse_run([]) is None
    assert parse_run(["--config", "x", "run", "true"]) is None
    assert parse_run(["status", "run"]) is None


def test_each_option_is_known_to_both() -> None:
    """An option that click gains must be added to the light parser, or be listed here."""
    for parameter in run_module.run.params:
        for option in parameter.opts:
            if option.startswith("-") and option not in LEFT_TO_CLICK:
                with_value = (
                    [option] if getattr(parameter, "is_flag", False) else [option, "1=1" if "attr" in option else "1"]
                )
                assert parse_run(["run", *with_value, "--", "true"]) is not None, option


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--config x.toml",
        "--config=x.toml --once --timeout 90s --log-level DEBUG --no-token",
        "--timeout=1.5 --once --once",
        "--config a --config b",
        "--timeout inf",
    ],
)
def test_both_find_the_same_for_an_agent(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    """With the same defaults."""
    found: list[dict[str, object]] = []
    monkeypatch.setattr("tailspan_agent.commands.run.run_agent", lambda **options: found.append(options) or 0)
    light = parse_agent_run(["agent", "run", *arguments.split()])
    assert CliRunner().invoke(agent_cli.agent, ["run", *arguments.split()]).exit_code == 0
    assert [light] == found


@pytest.mark.parametrize(
    "arguments",
    [
        "agent",
        "agent check",
        "--config x agent run",
        "agent run --help",
        "agent run --",
        "agent run x",
        "agent run --config",
        "agent run --config= --once",
        "agent run --once=yes",
        "agent run --timeout 0",
        "agent run --timeout nan",
        "agent run --timeout soon",
        "agent run --log-level loud",
    ],
)
def test_other_commands_of_agents_are_left_to_click(arguments: str) -> None:
    """So is what needs an explanation."""
    assert parse_agent_run(arguments.split()) is None


def test_each_option_of_an_agent_is_known_to_both() -> None:
    """An option that click gains must be added to the light parser."""
    values = {"--config": "x", "--timeout": "1", "--log-level": "info"}
    for parameter in agent_cli.agent.commands["run"].params:
        for option in parameter.opts:
            given = [option, values[option]] if option in values else [option]
            assert parse_agent_run(["agent", "run", *given]) is not None, option
