"""The documentation as a site: each page is in the navigation, links hold, generated pages are complete."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import tailspan
from tailspan.cli import main
from tests.docs_site import reference
from tests.docs_site.sources import anchor, linked, navigation, pages, write_sources

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as the generator reads them."""
    root = tmp_path_factory.mktemp("site")
    write_sources(root)
    return root


def paths(entries: list[Any]) -> Iterator[str]:
    """Yield the pages of a navigation."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else paths(value)


def test_each_page_is_in_the_navigation_once(site: Path) -> None:
    """Those of docs/, of deploy/README.md and the generated ones; the configuration is TOML with that navigation."""
    assert sorted(paths(navigation())) == sorted(pages())
    assert tomllib.loads((site / "zensical.toml").read_text())["project"]["nav"] == navigation()


def test_links_hold_in_the_site(site: Path) -> None:
    """Each relative link leads to a page, a heading or a file of the site; none leads out of it."""
    dead = []
    headings = {
        path: {
            anchor(heading) for heading in re.findall(r"^#+ (.+)$", (site / "docs" / path).read_text(), re.MULTILINE)
        }
        for path in pages()
    }
    for path in pages():
        page = site / "docs" / path
        for link in linked(page.read_text()):
            file, _, fragment = link.partition("#")
            goal = (page.parent / file).resolve() if file else page
            if re.match(r"[a-z]+:", link):
                continue
            name = str(goal.relative_to(site / "docs")) if goal.is_relative_to(site / "docs") else ""
            if not goal.is_file() or (goal.suffix == ".md" and fragment and fragment not in headings.get(name, set())):
                dead.append(f"{path}: {link}")
    assert dead == []


def test_a_page_has_one_task_of_deployment(site: Path) -> None:
    """The sections of deploy/README.md are pages; a link to a runbook leads to its heading."""
    assert (site / "docs" / "deploy" / "systemd.md").read_text().startswith("# systemd\n")
    assert "(deploy/alerts.md)" in (site / "docs" / "troubleshooting.md").read_text()


def test_the_commands_page_has_each_command() -> None:
    """With each option that is not hidden."""
    page = reference.commands()

    def all_of(command: click.Command, name: str) -> Iterator[str]:
        yield f"## {name}\n"
        yield from (
            max(one.opts, key=len) for one in command.params if isinstance(one, click.Option) and not one.hidden
        )
        if isinstance(command, click.Group):
            for inner in command.list_commands(click.Context(command)):
                found = command.get_command(click.Context(command), inner)
                assert found is not None
                if not found.hidden:
                    yield from all_of(found, f"{name} {inner}")

    assert [text for text in all_of(main, "tailspan") if text not in page] == []


def test_the_keys_page_has_each_key_with_its_meaning() -> None:
    """Each key of config.example.toml is there, and each key has a type, a default and a meaning."""
    page = reference.keys()
    example = (ROOT / "config.example.toml").read_text()
    every = set(re.findall(r"^#(\w+) = ", example, re.MULTILINE))
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    tables = set(re.findall(r"^## .*\.(\w+)$", page, re.MULTILINE))
    assert every - {name for name, *_ in rows} - tables == set()
    assert [row for row in rows if not all(row)] == []
    kinds = set(re.findall(r'^### type = "(\w+)"$', page, re.MULTILINE))
    assert kinds == set(re.findall(r'^#type = "(\w+)"', example, re.MULTILINE))


def test_the_python_page_has_each_public_name() -> None:
    """With its signature and its docstring."""
    page = reference.python()
    missing = [name for name in tailspan.__all__ if f"### {name}\n" not in page]
    # these are types of arguments
    assert missing == [name for name in missing if not callable(getattr(tailspan, name))]
    assert "job_tail_logs(job: CoerceableToJobId, refresh_seconds" in page
