"""`tailspan.config`: reading a file and a variable needs no pydantic."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tailspan.config

LIGHT = ("layers", "otel_env", "signals", "units")


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_only_the_standard_library(module: str) -> None:
    """In a fresh interpreter: a short command must not wait for pydantic's import."""
    code = (
        f"import sys, tailspan.config.{module}\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'__main__', 'tailspan'})"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={
            "PYTHONPATH": tailspan.config.__path__[0].removesuffix("/tailspan/config"),
        },
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


def test_every_public_name_is_found_when_it_is_used() -> None:
    """The lazy table and ``__all__`` have the same names."""
    assert sorted(name for names in tailspan.config._MODULES.values() for name in names) == tailspan.config.__all__
    for name in tailspan.config.__all__:
        assert getattr(tailspan.config, name) is not None
    assert {*tailspan.config.__all__} <= {*dir(tailspan.config)}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tailspan.config.nothing
