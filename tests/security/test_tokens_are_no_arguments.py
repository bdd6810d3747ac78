"""A token is never an argument, which every user of the machine could see, and is compared in constant time."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tailspan.cli import main

ROOT = Path(__file__).parents[2]
SECRET = re.compile(r"token|secret|passw|credential")
SERVERS = ("sdk/tailspan/job_api/server.py", "agent/tailspan_agent/web/session.py")


def options(command: click.Command) -> Iterator[str]:
    """Yield every option of a command and of those below it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from options(found)
    for parameter in command.params:
        yield from parameter.opts


def test_no_option_takes_a_secret() -> None:
    """Only the name of the file that has it."""
    secret = {option for option in options(main) if SECRET.search(option)}
    assert "--token-file" in secret
    assert {option for option in secret if not option.endswith("-file")} == {"--no-token"}, "this one takes no value"


@pytest.mark.parametrize("path", SERVERS)
def test_our_servers_compare_tokens_in_constant_time(path: str) -> None:
    """The time of a rejection must not depend on how much of a token was right."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "token" in ast.unparse(node)]
    assert any(ast.unparse(node.func) == "hmac.compare_digest" for node in calls)
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    equal = [node for node in compared if isinstance(node.ops[0], ast.Eq | ast.NotEq) and "token" in ast.unparse(node)]
    assert [ast.unparse(node) for node in equal] == []
