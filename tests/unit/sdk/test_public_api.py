"""The contract of the public names: signatures, exports, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tailspan
from tailspan import RunResponse, jobs

# The signatures of the user's own documentation, and what each verb returns.
CONTRACT = {
    "job_get_logs": ("(job, since_ms=None)", "Rows[Message]"),
    "job_print_logs": ("(job, since_ms=None, file=None)", "None"),
    "job_tail_logs": ("(job, refresh_seconds=1, sample_logs=True, timeout=None, get_logs_retries=1)", "None"),
    "job_get_status": ("(job)", "RunResponse"),
    "job_cancel": ("(job)", "RunResponse"),
    "job_get_exec_time": ("(job)", "timedelta"),
    "job_wait_for_job": ("(job, poll_interval_seconds=5, timeout=None)", "RunResponse"),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_verb_has_the_signature_of_the_contract(name):
    """Positional parameters are exactly those promised; all others are keyword-only and have defaults."""
    signature = inspect.signature(getattr(tailspan, name))
    positional = [
        one.replace(annotation=one.empty) for one in signature.parameters.values() if one.kind is not one.KEYWORD_ONLY
    ]
    added = [one for one in signature.parameters.values() if one.kind is one.KEYWORD_ONLY]
    promised, returned = CONTRACT[name]
    assert str(inspect.Signature(positional)) == promised
    assert signature.return_annotation == returned
    assert all(one.default is not one.empty for one in added)
    assert "service" in signature.parameters


@pytest.mark.parametrize("name", ["job_list", "job_submit", *CONTRACT])
def test_a_verb_is_documented(name):
    """Arguments are all explained, and errors and results are named."""
    function = getattr(jobs, name)
    text = inspect.getdoc(function) or ""
    assert all(f"    {parameter}: " in text for parameter in inspect.signature(function).parameters)
    assert "Raises:" in text


def test_run_response_has_the_methods_of_fused():
    """A status can be updated, read, printed, tailed, waited for, timed and cancelled."""
    for name in CONTRACT:
        method = getattr(RunResponse, name.removeprefix("job_"))
        assert callable(method)


def test_nothing_heavy_is_imported_before_the_first_call():
    """`import tailspan` and naming a verb load no HTTP client, no validation, no terminal and no telemetry library."""
    code = """
import sys
import tailspan
heavy = {"httpx", "pydantic", "pydantic_settings", "rich", "msgspec", "anyio", "click", "asyncio", "opentelemetry"}
print(sorted(heavy & set(sys.modules)))
tailspan.job_get_logs, tailspan.JobState, tailspan.TailspanError
print(sorted((heavy - {"anyio", "asyncio"}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_type_checkers_see_what_the_package_exports_lazily():
    """The imports for type checkers, `__all__` and the lazy table name the same."""
    tree = ast.parse(Path(tailspan.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen.keys() - {"__version__"}) == tailspan.__all__
    assert seen == tailspan._MODULE_OF


@pytest.mark.parametrize("name", ["tailspan.logs", "tailspan.services", "tailspan.errors", "tailspan.testing"])
def test_public_packages_export_what_they_name(name):
    """Each name of ``__all__`` is there, and a wrong one is an AttributeError."""
    module = importlib.import_module(name)
    assert [one for one in module.__all__ if not hasattr(module, one)] == []
    assert set(module.__all__) <= set(dir(module))
    assert not hasattr(module, "no_such_name")


def test_the_line_model_is_not_imported_by_its_package():
    """The supervisor of a local job imports ``tailspan.logs`` and must stay small."""
    code = "import sys, tailspan.logs; print(sorted(m for m in sys.modules if m.startswith('tailspan.logs.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
