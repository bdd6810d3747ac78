"""House rules that neither ruff nor mypy check: layers, names, and what the docs must name."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

import tailspan
from tests import plain_english

ROOT = Path(__file__).parents[1]
SDK = sorted((ROOT / "sdk").rglob("*.py"))
AGENT = sorted((ROOT / "agent").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FORBIDDEN_NAMES = {"utils", "util", "helpers", "core", "common", "manager", "base", "misc"}
VERBS = (
    "job_get_logs",
    "job_print_logs",
    "job_tail_logs",
    "job_get_status",
    "job_cancel",
    "job_get_exec_time",
    "job_wait_for_job",
    "job_list",
    "job_submit",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def source(path: Path) -> ast.Module:
    return ast.parse(text_of(path), filename=str(path))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what the file consists of, without expressions, which are most of it, and what is for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) or (isinstance(child, ast.If) and is_for_types(child.test)):
            continue
        yield child
        yield from statements(child)


def is_for_types(test: ast.expr) -> bool:
    return isinstance(test, ast.Name | ast.Attribute) and ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports(node: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import that runs, wherever it stands; name is None for plain imports."""
    for child in statements(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, None) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from ((child.module or "", alias.name) for alias in child.names)


@cache
def known_modules() -> frozenset[str]:
    return frozenset(module_name(file) for file in SDK + AGENT)


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports; of ``from package import module`` it is the module."""
    known = known_modules()
    return {f"{module}.{name}" if f"{module}.{name}" in known else module for module, name in imports(source(path))}


def test_the_sdk_knows_neither_opentelemetry_nor_the_agent() -> None:
    """OpenTelemetry stays in the agent; only the command line may load the agent."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SDK
        if re.search("opentelemetry|tailspan_agent", text_of(path))
        for module in imported_modules(path)
        if (module.split(".")[0] == "opentelemetry" and module_name(path) != "tailspan.otel")
        or (module.split(".")[0] == "tailspan_agent" and not module_name(path).startswith("tailspan.cli"))
    ]
    assert wrong == []


def test_the_supervisor_needs_only_the_standard_library() -> None:
    """A job costs little to start: what its supervisor imports, it and its parts, is the standard library."""
    files = {module_name(path): path for path in SDK}
    in_c = {module_name(path) for path in (ROOT / "sdk").rglob("*.c")}
    todo, seen = ["tailspan.local.supervisor"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        todo += [other for other in imported_modules(files[module]) if other in files and other not in seen]
        foreign = {
            other
            for other in imported_modules(files[module])
            if other not in files and other not in in_c and other.split(".")[0] not in sys.stdlib_module_names
        }
        assert not foreign, f"{module} imports {foreign}"
    assert len(seen) > 1


def test_modules_are_named_for_what_they_do() -> None:
    """A newcomer finds each thing within a minute: no drawer names."""
    names = [module_name(path) for path in [*SDK, *AGENT]]
    assert [name for name in names if {part.strip("_") for part in name.split(".")} & FORBIDDEN_NAMES] == []


def test_tests_say_what_they_show() -> None:
    """Each test has a docstring."""
    silent = re.compile(r"""def test_\w+\((?:[^()]|\([^()]*\))*\)[^:\n]*:\n\s*(?!\s|r?\"{3})""")
    suspects = [path for path in TESTS if path.name.startswith("test_") and silent.search(text_of(path))]
    found = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in suspects
        for node in statements(source(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.name.startswith("test_") and not ast.get_docstring(node))
    ]
    assert found == []


def test_fakes_implement_the_seam() -> None:
    """Nothing is patched in by unittest.mock."""
    suspects = [path for path in TESTS if "mock" in text_of(path)]
    found = [
        (path.name, *item) for path in suspects for item in imports(source(path)) if "mock" in ".".join(map(str, item))
    ]
    assert found == []


def test_the_text_is_plain_english() -> None:
    """Docstrings, comments, messages and documentation use none of the words that a newcomer has to decode."""
    documents = [
        *ROOT.glob("*.md"),
        *(path for top in ("docs", "deploy", "tests") for path in (ROOT / top).rglob("*.md")),
    ]
    found = [finding for path in [*SDK, *AGENT, *documents] for finding in plain_english.in_file(path, ROOT)]
    assert list(map(str, found)) == []


def test_each_package_says_what_belongs_there() -> None:
    """The docstring of a package says what it is, what belongs there, and what may not."""
    packages = [path for path in [*SDK, *AGENT] if path.name == "__init__.py"]
    texts = {str(path.relative_to(ROOT)): ast.get_docstring(source(path)) or "" for path in packages}
    assert [name for name, text in texts.items() if " belong" not in text or not re.search(r"\bmay\b", text)] == []


def test_a_class_name_has_one_meaning() -> None:
    """No two classes of SDK and agent have the same name."""
    names = [
        name for path in [*SDK, *AGENT] for name in re.findall(r"^ *class (\w+)[(:\[]", text_of(path), re.MULTILINE)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_word_test_finds_words() -> None:
    """The test of the test: each kind of text is searched, names and code are not."""
    code = (
        'told = 1  # anew\ndef f():\n    """Be a job.\n\n    The job shall end.\n    """\n    return f"{told} mended"\n'
    )
    assert list(map(str, plain_english.in_python("x.py", code))) == ["x.py:1: anew", "x.py:5: shall", "x.py:7: mended"]
    for text in '"\\ntold"', '"goes "\n"over"', '"goes " f"over"', "# Anew.":
        assert len(plain_english.in_python("x.py", f"x = ({text}\n)\n")) == 1, text
    markdown = "`told`\n```\nanew\n```\nlooked   at\n"
    assert list(map(str, plain_english.in_markdown("x.md", markdown))) == ["x.md:5: looked at"]


def shipped_texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the project, without what tools leave behind."""
    tops = ["sdk", "agent", "tests", "deploy", "docs", ".ci"]
    files = [path for top in tops for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]
    for path in [*files, *ROOT.glob("*.*"), ROOT / "Makefile"]:
        if path.is_file() and path != Path(__file__) and path.name != ".git":  # a file in a worktree
            try:
                yield path.relative_to(ROOT), path.read_bytes().decode()
            except UnicodeDecodeError:
                continue


def test_no_file_names_somebodys_machine() -> None:
    """Paths of one machine and addresses of package mirrors work for nobody else."""
    machine = re.compile(
        r"""(?<![\w.~}/-])/(?:root|work|tmp(?!/ray\b)|home/\w+|Users/\w+)/|index-url|find-links|://\S*/simple/"""
    )
    assert [f"{path}: {found[0]}" for path, text in shipped_texts() for found in machine.finditer(text)] == []


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path[-1])
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None, name
            yield from commands(inner, (*path, name))
    yield path, command


def test_the_version_is_told_as_it_is_packed() -> None:
    """Once in the code, once for the package: they must not part."""
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tailspan.__version__ == packed


def test_the_docs_name_every_command_and_option() -> None:
    """docs/cli.md has each command by its whole name, and each option by its long form."""
    from tailspan.cli import main

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    missing = set()
    for path, command in commands(main, ("tailspan",)):
        if not re.search(rf"\b{' '.join(path)}\b", page) and not command.hidden:
            missing.add(" ".join(path))
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                option = max(parameter.opts, key=len)
                if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", page):
                    missing.add(f"{' '.join(path)} {option}")
    assert sorted(missing) == []


def test_the_docs_name_every_verb() -> None:
    """docs/python.md has the seven verbs of the contract and the two added ones."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"`{verb}(" not in page] == []


def test_verbs_have_the_promised_signatures() -> None:
    """The seven verbs' positional parameters and defaults are the contract; the rest is keyword-only."""
    promised = {
        "job_get_logs": "job, since_ms=None",
        "job_print_logs": "job, since_ms=None, file=None",
        "job_tail_logs": "job, refresh_seconds=1, sample_logs=True, timeout=None, get_logs_retries=1",
        "job_get_status": "job",
        "job_cancel": "job",
        "job_get_exec_time": "job",
        "job_wait_for_job": "job, poll_interval_seconds=5, timeout=None",
    }
    for name, text in promised.items():
        parameters = inspect.signature(getattr(tailspan, name)).parameters.values()
        positional = [item for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD]
        shown = [item.name + ("" if item.default is item.empty else f"={item.default}") for item in positional]
        assert ", ".join(shown) == text
        keyword = [item for item in parameters if item not in positional]
        assert all(item.kind is item.KEYWORD_ONLY and item.default is not item.empty for item in keyword), name
