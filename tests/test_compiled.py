"""The parts in C: they are there where they can be, and a strict compiler has nothing to say about them."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each beside the module that does the same in Python.
SOURCES = {
    "tailspan.logs.text": "sdk/tailspan/logs/_text.c",
    "tailspan_agent.records.framing": "agent/tailspan_agent/records/_framing.c",
}
HEADERS = Path(sysconfig.get_path("include"))
COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])

pytestmark = pytest.mark.skipif(
    COMPILER is None or not (HEADERS / "Python.h").exists(), reason="there is no C compiler here, or no Python.h"
)


def test_no_other_source_is_in_c() -> None:
    """All are built (`agent/hatch_build.py`) and tested here."""
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("[as]*/tailspan*/**/*.c")} == {*SOURCES.values()}


@pytest.mark.parametrize("module", SOURCES)
def test_c_does_it_where_it_could_be_compiled(module: str) -> None:
    """Installing Tailspan compiled it, so that all other tests ran with it."""
    assert importlib.import_module(module).COMPILED, (
        "pip install -e . again: since then its compiled part was removed, or there was no compiler"
    )


@pytest.mark.parametrize("source", SOURCES.values())
def test_a_source_has_no_warnings(source: str, tmp_path: Path) -> None:
    """Of the compiler that this Python was made with."""
    flags = ("-std=c11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-O2", "-fPIC", "-DPy_LIMITED_API=0x030B0000")
    command = (str(COMPILER), *flags, f"-I{HEADERS}", "-c", str(ROOT / source), "-o", str(tmp_path / "compiled.o"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
