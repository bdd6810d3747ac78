"""`tailspan.cli.start`: the program needs no plugins of pydantic."""

from __future__ import annotations

import importlib
import sys

import pytest

from tailspan.cli.start import _use_no_plugins

LOADER = "pydantic.plugin._loader"


def test_pydantic_finds_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validators are made without them; a version of pydantic that needs more of its module gets that module."""
    real = importlib.import_module(LOADER)
    monkeypatch.setitem(sys.modules, LOADER, real)
    monkeypatch.setattr(real, "get_plugins", None)
    _use_no_plugins()
    from pydantic import BaseModel

    class Table(BaseModel):
        key: int

    assert Table(key="1").key == 1
    assert sys.modules[LOADER].PYDANTIC_ENTRY_POINT_GROUP == "pydantic"
    assert callable(sys.modules[LOADER].get_plugins)
    assert sys.modules[LOADER].__file__
