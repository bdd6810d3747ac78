"""The Python examples and the published ids of README and docs work as printed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tailspan import JobNotFoundError, JobService, errors, job_get_logs, job_get_status
from tailspan._identity import span_id, trace_id
from tailspan.testing import check_service

ROOT = Path(__file__).parents[1]
SERVICE = ROOT / "docs" / "services" / "writing-a-service.md"


def python_blocks(page: Path) -> list[str]:
    """Return the page's Python examples."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_service_works(tmp_path: Path) -> None:
    """A reader who copies it has a service that all verbs can use and that keeps every promise, in few lines."""
    (code,) = [block for block in python_blocks(SERVICE) if "class FilesService" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 28
    names: dict[str, Any] = {}
    exec(compile(code, SERVICE.name, "exec"), names)
    (tmp_path / "one.log").write_text("first\nsecond\n" * 3_000)
    service = names["FilesService"].from_options("files", {"type": "files", "folder": str(tmp_path)}, None)
    assert isinstance(service, JobService)
    assert [line["message"] for line in job_get_logs("one", service=service)] == ["first", "second"] * 3_000
    assert job_get_status("one", service=service).state.is_terminal
    with pytest.raises(JobNotFoundError):
        job_get_status("../one", service=service)
    check_service(lambda: names["FilesService"]("files", str(tmp_path)))


def test_the_example_of_the_test_kit_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the kit run on the example service, in the folder that they name."""
    names: dict[str, Any] = {}
    (tmp_path / "tests" / "data").mkdir(parents=True)
    (tmp_path / "tests" / "data" / "one.log").write_text("first\nsecond\n")
    monkeypatch.chdir(tmp_path)
    for code in python_blocks(SERVICE):
        exec(compile(code, SERVICE.name, "exec"), names)
    tests = names["TestFilesService"]()
    for name in dir(tests):
        if name.startswith("test_"):
            getattr(tests, name)()


@pytest.mark.parametrize(("page", "number"), [("README.md", 0), ("docs/python.md", 0), ("docs/python.md", 3)])
def test_the_example_programs_work(
    page: str, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program submits a job, waits for it and prints its line and its state, as shown."""
    # Some systems call it python3 only; in an environment that is active it is there by this name, too.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    exec(compile(python_blocks(ROOT / page)[number], page, "exec"), {})
    printed = capsys.readouterr().out
    assert "hello" in printed
    assert "SUCCEEDED" in printed


def test_the_error_tree_is_that_of_the_code() -> None:
    """docs/python.md draws the tree as `tailspan.errors` does, without the agent's errors."""
    drawn = re.search(r"^TailspanError .*?(?=^  AgentError)", str(errors.__doc__), re.MULTILINE | re.DOTALL)
    assert drawn is not None
    assert drawn[0] in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_published_vector_of_ids() -> None:
    """Other programs compute ids by the rule in docs/traces.md: the rule must never change."""
    text = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")
    identity, job = "http://127.0.0.1:8798/server/v1", "job-1"
    for value in (identity, job, trace_id(identity, job), span_id(identity, job, "run")):
        assert f"`{value}`" in text
    assert trace_id(identity, job) == "50ff8522284b14410aa019fc12310394"
