"""The C part: used where it can be compiled, replaced by Python elsewhere, and without a warning of the compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tailspan import _native
from tailspan.logs import text
from tailspan.services.fused import stream, window
from tailspan_agent.job import line_sums
from tailspan_agent.records import framing, severity

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "sdk/tailspan/_native.c"
HEADERS = Path(sysconfig.get_path("include"))
COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])

needs_a_compiler = pytest.mark.skipif(
    COMPILER is None or not (HEADERS / "Python.h").exists(), reason="there is no C compiler here, or no Python.h"
)

PURE = """
import sys
sys.modules["tailspan._compiled"] = None
from tailspan import _native
from tailspan.logs import text
from tailspan.services.fused import stream, window
from tailspan_agent.job import line_sums
from tailspan_agent.records import framing, severity
assert not _native.COMPILED
assert text.count_lines is text.count_lines_in_python
assert text.lines_end is text.lines_end_in_python
assert severity.find_severities is severity.find_severities_in_python
assert framing.frame is framing.frame_in_python
assert window.distinct_digests is window.distinct_digests_in_python
assert line_sums.sum_digests is line_sums.sum_digests_in_python
assert stream.usual_entries(b"[]") is None
"""


def test_there_is_one_c_file() -> None:
    """`agent/hatch_build.py` builds it, and the tests here cover it."""
    assert [*ROOT.glob("[as]*/tailspan*/**/*.c")] == [SOURCE]


@needs_a_compiler
def test_c_is_used_where_it_could_be_compiled() -> None:
    """The installation compiled it, so all other tests run with it."""
    assert _native.COMPILED, "pip install -e . again: the C part was removed since, or there was no compiler"
    assert text.count_lines is not text.count_lines_in_python
    assert text.lines_end is not text.lines_end_in_python
    assert severity.find_severities is not severity.find_severities_in_python
    assert framing.frame is not framing.frame_in_python
    assert window.distinct_digests is not window.distinct_digests_in_python
    assert line_sums.sum_digests is not line_sums.sum_digests_in_python
    assert stream.usual_entries(b"[]") == []


def test_python_replaces_the_c_part_where_it_is_absent() -> None:
    """Each function by its Python form, in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", PURE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_a_compiler
def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    """With the compiler that this Python was built with."""
    flags = ("-std=c11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-O2", "-fPIC", "-DPy_LIMITED_API=0x030B0000")
    command = (str(COMPILER), *flags, f"-I{HEADERS}", "-c", str(SOURCE), "-o", str(tmp_path / "compiled.o"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
