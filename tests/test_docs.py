"""README and docs: every page is listed, every link leads somewhere, and every example works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tailspan.cli import main
from tailspan.config import load_settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "deploy/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(
    r"^(?:<!-- (?P<not_run>not run: .+?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
# What an example may start when a test runs it; other commands need the network, Docker or root.
RUNNABLE = {"tailspan", "cp", "JOB=$(tailspan"}
CONFIG_TABLES = ("services", "agent", "fleet", "otlp", "files", "redact", "links")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return the page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[tuple[str, bool]]:
    """Return the page's code blocks of one kind, and whether each may run."""
    return [(m["text"], m["not_run"] is None) for m in BLOCK.finditer(text_of(page)) if m["kind"] == kind]


def commands(text: str) -> list[str]:
    """Return the commands of a console block, without prompts and comments."""
    joined = text.replace("\\\n", " ")
    return [re.sub(r"\s+#.*", "", line[2:]).strip() for line in joined.splitlines() if line.startswith("$ ")]


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Each relative link names a file of this repository, and each anchor a heading."""
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_index_lists_every_page() -> None:
    """A reader who starts at docs/index.md reaches every page from there."""
    index = DOCS / "index.md"
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in links(index)}
    assert [str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md") if page not in {index, *listed}] == []


def test_every_page_has_one_title() -> None:
    """A site generator takes a page's name from its only first-level heading."""
    assert [page.name for page in PAGES if len(re.findall(r"^# ", prose(page), re.MULTILINE)) != 1] == []


def test_readme_is_short() -> None:
    """README introduces Tailspan in at most 200 lines; all else is in docs/."""
    assert len(text_of(ROOT / "README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_toml_examples_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration loader accepts each example."""
    for name in [name for name in os.environ if name.startswith(("TAILSPAN_", "OTEL_"))]:
        monkeypatch.delenv(name)
    for number, (text, _) in enumerate(blocks(page, "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text, encoding="utf-8")
        assert set(tomllib.loads(text)) <= {"default_service", *CONFIG_TABLES}
        load_settings(path)


def parse(words: list[str]) -> None:
    """Parse a command line without running it.

    Raises:
        click.UsageError: A command or an option does not exist.
    """
    command: click.Command = main
    context = click.Context(command, info_name="tailspan")
    while True:
        _, rest, _ = command.make_parser(context).parse_args(list(words))
        if not isinstance(command, click.Group) or not rest:
            return
        inner = command.get_command(context, rest[0])
        if inner is None and command.invoke_without_command:
            return
        assert inner is not None, f"no command {rest[0]}"
        command, words = inner, rest[1:]
        context = click.Context(command, info_name=rest[0], parent=context)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_examples_exist(page: Path) -> None:
    """Each `tailspan` command in an example has a known name and known options."""
    for kind in ("console", "sh"):
        for text, _ in blocks(page, kind):
            for line in commands(text) if kind == "console" else text.splitlines():
                for found in re.findall(r"(?:^|\$\(|\s)tailspan (?!\S*:)([^)\n]*)", line):
                    if line.startswith(("tailspan ", "JOB=", "~", "$")):
                        parse(shlex.split(found, comments=True))


def runnable(page: Path) -> list[str]:
    """Return the page's commands that a test can run; `agent run` gets `--once`, so that it ends."""
    script = []
    for text, may_run in blocks(page, "console"):
        lines = commands(text)
        if may_run and {line.split()[0] for line in lines} <= RUNNABLE:
            script += [
                f"{line} --once" if re.match(r"tailspan agent run (?!.*--once)", line) else line for line in lines
            ]
    return script


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_example_runs_or_says_why_not(page: Path) -> None:
    """A console example runs in a test, or a comment before it gives the reason; a script has such a comment."""
    silent = [text for text, may_run in blocks(page, "sh") if may_run]
    for text, may_run in blocks(page, "console"):
        programs = {line.split()[0] for line in commands(text)}
        if may_run and not (programs and programs <= RUNNABLE):
            silent.append(text)
    assert silent == []


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_console_examples_run(page: Path, tmp_path: Path) -> None:
    """A reader who types a page's commands, in their order, sees none fail."""
    (tmp_path / "etl.py").write_text("print('step 1 of 2')\nprint('step 2 of 2')\n")
    (tmp_path / "config.example.toml").write_text(text_of(ROOT / "config.example.toml"))
    script = "\n".join(runnable(page))
    home = {name: value for name, value in os.environ.items() if not name.startswith(("TAILSPAN_", "OTEL_", "XDG_"))}
    home |= {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    home["TAILSPAN_AGENT__LISTEN"] = "127.0.0.1:0"  # an agent of another test may have the usual port
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=home, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, done.stderr), script


def test_paths_in_the_architecture_page_exist() -> None:
    """A reader finds each module where docs/architecture.md says it is."""
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text_of(DOCS / "architecture.md")))
    roots = [ROOT, ROOT / "agent" / "tailspan_agent", ROOT / "sdk" / "tailspan"]
    assert len(named) > 30
    assert sorted(name for name in named if not any((root / name).exists() for root in roots)) == []


def test_classes_in_the_glossary_exist() -> None:
    """A renamed class gets its new name in docs/glossary.md."""
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", text_of(DOCS / "glossary.md"))) - {"LOST"}
    source = "".join(text_of(path) for top in ("sdk", "agent") for path in (ROOT / top).rglob("*.py"))
    assert len(named) > 15
    assert sorted(name for name in named if not re.search(rf"^class {name}\b", source, re.MULTILINE)) == []


def test_the_configuration_page_has_every_key() -> None:
    """docs/configuration.md names each key of config.example.toml in the section of its table."""
    example = text_of(ROOT / "config.example.toml")
    every = tomllib.loads(re.sub(r'^#(?=\[|[a-z_]+ = |"[^"]+" = )', "", example, flags=re.MULTILINE))
    page = text_of(DOCS / "configuration.md")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    titles = {
        "services": "Services",
        "agent": "Agent",
        "otlp": "Endpoint",
        "files": "Files",
        "redact": "Redaction",
        "links": "Links",
    }
    missing = []
    for table, title in titles.items():
        (section,) = [text for text in sections if text.startswith(title)]
        keys = set(every[table])
        if table == "services":
            keys = {key for service in every[table].values() for key in service}
        missing += [
            f"{table}.{key}"
            for key in keys - {"watch", "expect"}
            if f"`{key}`" not in section and f".{key}]" not in section
        ]
    for table, title in {"watch": "Watches", "expect": "Expected runs"}.items():
        (section,) = [text for text in sections if text.startswith(title)]
        missing += [f"agent.{table}.{key}" for key in every["agent"][table][0] if f"`{key}`" not in section]
    assert sorted(missing) == []
