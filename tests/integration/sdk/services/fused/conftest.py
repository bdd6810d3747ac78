"""Tests of the Fused service: for a user without a `tailspan serve`, whose token a server on loopback would get."""

import pytest


@pytest.fixture(autouse=True)
def _no_own_token(monkeypatch, tmp_path_factory):
    """Give each test a state directory without the token of a server that another test started."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
