"""Files of ours are 0600 and directories 0700, whatever the umask, up to the first directory that was there before."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tailspan._private_dirs import make_private
from tests.e2e.conftest import TAILSPAN, Machine
from tests.fakes.collector import Collector, Reply


def open_to_others(top: Path) -> list[str]:
    """Return what other users may read, write or enter."""
    return [
        f"{path.relative_to(top.parent)} {stat.S_IMODE(path.lstat().st_mode):o}"
        for path in (top, *top.rglob("*"))
        if not path.is_symlink() and stat.S_IMODE(path.lstat().st_mode) != (0o700 if path.is_dir() else 0o600)
    ]


def test_after_a_full_run_with_a_hostile_umask(machine: Machine, collector: Collector) -> None:
    """Jobs, checkpoints, their write-ahead log, dead letter and OTLP files, and the directories above that are new."""
    deep = machine.home / "srv" / "tailspan"
    collector.always("logs", Reply(400, message="no"))
    for way, otlp in {"sent": f'[otlp]\nendpoint = "{collector.http_url}"\n', "kept": ""}.items():
        machine.config.write_text(
            f'[services.local]\nstate_dir = "{deep}/a/jobs"\n[agent]\nlisten = ""\n'
            f'state_dir = "{deep}/{way}/agent"\n[[agent.watch]]\ndiscover = true\n{otlp}'
        )
        for command in (("run", "--", "false"), ("agent", "run", "--once")):
            subprocess.run(
                [TAILSPAN, *command], env=machine.env, capture_output=True, timeout=120, umask=0, cwd=machine.home
            )
    names = {path.name for path in deep.rglob("*")}
    assert {"state.json", "log.idx", "checkpoints.db", "agent.lock", "dead-letter", "logs.jsonl", "identity"} <= names
    assert open_to_others(machine.home / "srv") == []


def test_while_the_agent_runs(machine: Machine) -> None:
    """SQLite's own files beside the store are as private as it is."""
    before = os.umask(0)
    try:
        machine.configure('[[agent.watch]]\nservice = "local"\ndiscover = true\n')
        machine.detach("echo", "hi")
        agent = machine.start("agent", "run")
        assert agent.stderr is not None
        assert "follows local" in next(line for line in agent.stderr if "follows" in line)
        assert (machine.home / "agent" / "checkpoints.db-wal").exists()
        assert open_to_others(machine.home / "agent") == []
        assert open_to_others(machine.home / "jobs") == []
    finally:
        os.umask(before)


def test_directories_that_were_there_stay_as_they_are(tmp_path: Path) -> None:
    """An existing directory keeps its mode; what the code creates below it is private."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    make_private(shared / "a" / "b")
    make_private(shared / "a" / "b")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (shared, shared / "a", shared / "a" / "b")]
    assert modes == [0o775, 0o700, 0o700]
    (shared / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_private(shared / "file" / "c")
