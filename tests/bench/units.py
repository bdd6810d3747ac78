"""W19: an agent beside five thousand silent units, whose journal a fake journalctl prints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.log_files import cpu_with_children
from tests.bench.measure import peak_rss, started, tailspan
from tests.bench.receiver import receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row
from tests.fakes.journal import FakeJournal

__all__ = ["silent_units"]

_SETTLED_S = 120.0
_WATCHED_S = 120.0


def silent_units(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield CPU and memory of the agent; programs that it starts count once they have ended."""
    with receiving(directory) as receiver:
        journal = FakeJournal(directory / "journal")
        journal.start_silent(scale.of(5_000))
        config = directory / "config.toml"
        config.write_text(
            f"[services.systemd]\ncommand_prefix = {json.dumps(journal.prefix)}\n"
            f'[agent]\nstate_dir = {json.dumps(str(directory / "agent"))}\nlisten = ""\n'
            f'[[agent.watch]]\nservice = "systemd"\ndiscover = true\nlookback = "1h"\n'
            f'[otlp]\nendpoint = "{receiver.http_url}"\n'
        )
        with started(tailspan("agent", "run", "--config", str(config)), log=directory / "agent.log") as (pid, _):
            # Until each unit was read once, and has become silent.
            time.sleep(_SETTLED_S * max(scale.factor, 0.5))
            begun_s, before_s = time.perf_counter(), cpu_with_children(pid)
            time.sleep(_WATCHED_S * min(scale.factor, 1.0))
            share = (cpu_with_children(pid) - before_s) / (time.perf_counter() - begun_s) * 100
            memory = peak_rss(pid)
        yield Row(case="W19 systemd", figure=share, unit="% of a core", goal=Goal(10))
        yield Row(case="W19 systemd, memory", figure=memory / MIB, unit="MiB")
