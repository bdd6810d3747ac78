"""What README says works as it stands there."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tailspan import JobNotFoundError, JobService, job_get_logs, job_get_status
from tailspan._identity import span_id, trace_id

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_service_of_the_readme_works(tmp_path: Path) -> None:
    """A newcomer who copies it has a service that all verbs can use."""
    (code,) = [block for block in PYTHON if "class FilesService" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    (tmp_path / "one.log").write_text("first\nsecond\n")
    service = names["FilesService"].from_options("files", {"folder": tmp_path}, None)
    assert isinstance(service, JobService)
    assert [line["message"] for line in job_get_logs("one", service=service)] == ["first", "second"]
    assert job_get_status("one", service=service).state.is_terminal
    with pytest.raises(JobNotFoundError):
        job_get_status("../one", service=service)
    asyncio.run(service.aclose())


def test_the_program_of_the_readme_works(capsys: pytest.CaptureFixture[str]) -> None:
    """A job is submitted, tailed and waited for, as shown."""
    (code,) = [block for block in PYTHON if "job_submit" in block]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "hello" in printed
    assert "SUCCEEDED" in printed


def test_the_published_vector_of_ids() -> None:
    """Other programs compute ids by the rule in README: it must never change."""
    identity, job = "http://127.0.0.1:8798/server/v1", "job-1"
    for value in (identity, job, trace_id(identity, job), span_id(identity, job, "run")):
        assert f"`{value}`" in README
    assert trace_id(identity, job) == "50ff8522284b14410aa019fc12310394"
