"""Logs that real programs write and logrotate rotates, relayed by a real agent: equal to what was written."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes.collector import Collector
from tests.orchestrators.harness import Relay, results, texts

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

# Lines come in bursts: a rotation hits every place between them.
LONG = r"""
for i in $(seq $1); do echo "$2 line $i"; [ $((i % 50)) = 0 ] && sleep 0.2; done
printf 'done\n'
"""
CRON = """for i in 1 2 3 4 5; do echo "$1 tick $i"; sleep 0.1; done; echo "exit $2" """


def logrotate(directory: Path, log: Path, way: str) -> None:
    """Rotate a log now, as the real logrotate does."""
    program = shutil.which("logrotate", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if program is None:
        pytest.skip("logrotate is not installed: apt-get install logrotate")
    config = directory / f"{log.stem}.conf"
    config.write_text(f"{log} {{\n rotate 9\n {way}\n su root root\n missingok\n}}\n")
    config.chmod(0o600)
    command = [program, "--force", "--state", str(directory / f"{log.stem}.state"), str(config)]
    subprocess.run(command, check=True, capture_output=True)


def shell(script: str, log: Path, *arguments: object, mode: str = "ab") -> subprocess.Popen[bytes]:
    """Run a script whose output goes into a log."""
    with log.open(mode) as out:
        return subprocess.Popen(["bash", "-c", script, "x", *map(str, arguments)], stdout=out, stderr=out)


def test_rotation_and_runs_through_stops_of_the_agent(collector: Collector, tmp_path: Path) -> None:
    """Two logs are rotated under load, and cron truncates and appends to others: no line is missing.

    Meanwhile the agent is killed and stopped.
    """
    root = tmp_path / "logs"
    root.mkdir()
    for name in ("copied", "appended", "truncated"):
        (root / f"{name}.log").touch()
    section = 'type = "files"\nroot = "{root}"\nglob = "{glob}"\nruns = "{runs}"\nend_marker = \'{marker}\''
    watch = '[[agent.watch]]\nservice = "{name}"\ndiscover = true\nlookback = "1d"\nsettle = "2s"\n'
    code = r"^exit (?P<exit_code>\d+)$"
    with Relay(
        "long", section.format(root=root, glob="*ed.txt", runs="file", marker="^done$"), collector, tmp_path
    ) as relay:
        with relay.config.open("a") as config:
            for name, runs in (("appended", "append"), ("truncated", "truncate")):
                keys = section.format(root=root, glob=f"{name}.log", runs=runs, marker=code)
                config.write(f"[services.{name}]\n{keys}\n{watch.format(name=name)}")
        writers = [
            shell(LONG, root / "copied.txt", 1500, "copied"),
            shell(LONG, root / "renamed.txt", 1500, "renamed"),
        ]
        crons = [
            shell(CRON, root / "appended.log", "a1", 0),
            shell(CRON, root / "truncated.log", "t1", 0, mode="wb"),
        ]
        relay.interrupt(signal.SIGKILL, after_lines=60)
        logrotate(tmp_path, root / "copied.txt", "copytruncate")
        logrotate(tmp_path, root / "renamed.txt", "create")
        for cron in crons:
            cron.wait()
        agent = relay.start()
        collector.wait_until(lambda: texts(collector)["truncated", "exit 0"] == 1, 60)
        shell(CRON, root / "appended.log", "a2", 3).wait()
        shell(CRON, root / "truncated.log", "t2", 0, mode="wb").wait()
        logrotate(tmp_path, root / "copied.txt", "copytruncate")
        agent.send_signal(signal.SIGTERM)
        agent.wait()
        relay.interrupt(signal.SIGKILL, after_lines=60)
        for writer in writers:
            writer.wait()
        time.sleep(0.1)
        relay.finish()
        expected = Counter({(name, f"{name} line {i}"): 1 for name in ("copied", "renamed") for i in range(1, 1501)})
        expected |= {(name, "done"): 1 for name in ("copied", "renamed")}
        for name, runs in (("appended", ("a1", "a2")), ("truncated", ("t1", "t2"))):
            expected |= {(name, f"{run} tick {i}"): 1 for run in runs for i in range(1, 6)}
        expected |= {("appended", "exit 0"): 1, ("appended", "exit 3"): 1, ("truncated", "exit 0"): 2}
        found = texts(collector)
        # logrotate itself loses what is written between its copy and its truncation.
        missing, extra = expected - found, found - expected
        lost = [text for name, text in missing if name == "copied"]
        assert (missing.total() - len(lost), extra.total()) == (0, 0), f"{list(missing)[:20]} {list(extra)[:20]}"
        assert len(lost) <= 50, lost
        spans = relay.spans(runs=6, attempts=0)
    assert Counter(results(spans).values()) == {"success": 5, "failure": 1}
