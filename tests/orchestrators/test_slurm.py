"""Jobs of a real Slurm cluster, with and without its database, relayed by a real agent: equal to their files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import SpanRow
from tests.orchestrators.harness import Relay, texts

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
CLIENTS = ("squeue", "scontrol", "sacct", "scancel", "sbatch")
SERVERS = ("slurmctld", "slurmd", "munged", "unshare", "nsenter")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
READY_S = 120.0
TWO_FILES = """for i in 1 2 3; do echo "line $i"; echo "err $i" >&2; sleep 0.3; done
srun -n1 --job-name=prep bash -c "echo in step; sleep 1"; srun -n1 --job-name=load bash -c "exit 4"; exit 0"""
LONG = 'for i in $(seq 200); do echo "tick $i"; sleep 0.1; done'
AGAIN = 'for i in $(seq 60); do echo "$SLURM_RESTART_COUNT line $i"; sleep 0.2; done'


class Cluster:
    """A Slurm cluster of one node, in namespaces of its own. A context manager.

    Attributes:
        directory: Its files; jobs write into ``work``.
        programs: Wrappers that run its programs in its namespaces.
    """

    def __init__(self, directory: Path, *, database: bool) -> None:
        needed = (*SERVERS, *CLIENTS, *(("slurmdbd", "mariadbd") if database else ()))
        missing = [program for program in needed if shutil.which(program, path=PATH) is None]
        if missing or os.geteuid() != 0:
            packages = "slurm-wlm munge slurmdbd mariadb-server"
            pytest.skip(f"needs root and {', '.join(missing or needed)}: apt-get install {packages}")
        self.directory = directory / "cluster"
        self.work = directory / "work"
        self.programs = directory / "programs"
        for place in (self.directory, self.work, self.programs):
            place.mkdir()
        self._database = database

    def __enter__(self) -> Self:
        arguments = [str(SCRIPT), str(self.directory), *(["database"] if self._database else [])]
        spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.directory / "out").open("ab") as out:
            self._process = subprocess.Popen(
                ["unshare", *spaces, "bash", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, "PATH": PATH},
            )  # fmt: skip
        try:
            self.until(lambda: (self.directory / "ready").exists(), "the cluster")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        enter = f"nsenter -t {children[0]} -n -u -m -p --wd=$PWD env SLURM_CONF={self.directory}/slurm.conf"
        self._enter = ["sh", "-c", f'exec {enter} "$@"', "sh"]
        for program in CLIENTS:
            wrapper = self.programs / program
            wrapper.write_text(f'#!/bin/sh\nexec {enter} {shutil.which(program, path=PATH)} "$@"\n')
            wrapper.chmod(0o755)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def until(self, holds: Callable[[], object], what: str, timeout_s: float = READY_S) -> None:
        """Wait for a condition; the failure shows the end of the cluster's output."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            out = (self.directory / "out").read_text(errors="replace")
            assert self._process.poll() is None, out[-2000:]
            assert time.monotonic() < deadline, f"{what}: {out[-2000:]}"
            time.sleep(0.2)

    def run(self, *command: str) -> str:
        """Run a program in the cluster's namespaces and return its output."""
        done = subprocess.run(
            [*self._enter, *command],
            cwd=self.work,
            env={**os.environ, "PATH": PATH},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def submit(self, name: str, script: str, *options: str) -> str:
        """Submit a script and return its id."""
        return self.run("sbatch", "--parsable", "--job-name", name, *options, "--wrap", script)

    def state(self, job_id: str) -> str:
        """Return the state of a job as the controller has it."""
        return self.run("squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T")

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Take the controller away for a time."""
        pid = self.directory / "slurmctld.pid"
        self.run("kill", pid.read_text().strip())
        self.until(lambda: not pid.exists(), "the end of the controller")
        yield
        self.run("slurmctld", "-f", str(self.directory / "slurm.conf"))


@pytest.mark.parametrize("database", [False, True])
def test_jobs_arrive_whole_through_stops_of_agent_and_controller(
    collector: Collector, tmp_path: Path, database: bool
) -> None:
    """Steps, an array, a requeue, a cancel and a hostile name: each line of the files arrives, with the right states.

    Meanwhile the agent is killed and stopped, and the controller is away.
    """
    with Cluster(tmp_path, database=database) as cluster:
        section = f'bin_dir = "{cluster.programs}"\nslurm_conf = "{cluster.directory}/slurm.conf"\nrefresh = "2s"'
        with Relay("slurm", section, collector, tmp_path) as relay:
            text = relay.config.read_text().replace('lookback = "1d"', 'lookback = "1d"\nsettle = "3s"')
            relay.config.write_text(text)
            ids = {
                "long": cluster.submit("long", LONG),
                "again": cluster.submit("again", AGAIN, "-o", "again-%j.out"),
                "files": cluster.submit("files", TWO_FILES, "-o", "%x-%j.out", "-e", "%x-%j.err", "--comment=team=geo"),
                "fails": cluster.submit("fails", "echo hello; printf half; exit 3"),
                "array": cluster.submit(
                    "array", 'echo "task $SLURM_ARRAY_TASK_ID"; sleep 1; exit $SLURM_ARRAY_TASK_ID', "--array=0-2"
                ),
                "killed": cluster.submit("killed", "echo x; kill -9 $$"),
                "sleeper": cluster.submit("sleeper", "echo started; sleep 600"),
            }
            ids["never"] = cluster.submit("never", "echo never", f"--dependency=afterok:{ids['fails']}")
            ids["evil"] = cluster.submit(f"evil\nJobId={ids['fails']} JobName=x StdOut=/etc/passwd", "echo evil")
            relay.interrupt(signal.SIGKILL, after_lines=30)
            file = cluster.work / f"again-{ids['again']}.out"
            cluster.until(lambda: file.exists() and file.read_text().count("\n") > 5, "the first attempt")
            relay.interrupt(signal.SIGTERM, after_lines=20)
            cluster.run("scontrol", "requeue", ids["again"])
            cluster.until(lambda: cluster.state(ids["again"]) == "PENDING", "the requeue")
            first = file.read_text().splitlines()
            assert first
            agent = relay.start()
            collector.wait_until(lambda: all(texts(collector)["again", line] for line in first), 60)
            with cluster.without_controller():
                time.sleep(6)
            cluster.until(lambda: cluster.state(ids["again"]) == "RUNNING", "the second attempt")
            cluster.run("scancel", ids["sleeper"], ids["never"])
            cluster.until(lambda: file.read_text().count("1 line") > 10, "the second attempt")
            agent.kill()
            agent.wait()
            relay.start()
            for job_id in ids.values():
                cluster.until(
                    lambda job_id=job_id: not {"RUNNING", "PENDING", "COMPLETING"} & set(cluster.state(job_id).split()),
                    "the end",
                )
            expected = Counter({("again", line): 1 for line in first})
            for path in cluster.work.iterdir():
                job_id = path.stem.rpartition("-")[2].partition("_")[0]
                name = next(name for name, one in ids.items() if one == job_id)
                expected.update((name, line) for line in path.read_text().splitlines())
            with contextlib.suppress(TimeoutError, AssertionError):
                collector.wait_until(lambda: shown_texts(collector) == expected, 90)
            found = shown_texts(collector)
            missing, extra = expected - found, found - expected
            assert (list(missing)[:20], list(extra)[:20]) == ([], []), (
                f"{missing.total()} missing, {extra.total()} extra"
            )
            # Eleven jobs, and the first attempt of one of them.
            spans = relay.spans(runs=11, attempts=12 if database else 0)
            with contextlib.suppress(TimeoutError):
                collector.wait_until(lambda: len(runs(relay.spans(runs=11, attempts=0))) == 12, 60)
            spans = relay.spans(runs=11, attempts=0)
    assert Counter(
        (span.name.split()[1], span.attributes["cicd.pipeline.result"], span.attributes.get("process.exit.code"))
        for span in runs(spans)
    ) == Counter(
        [
            ("long", "success", 0),
            ("again", "failure", None),
            ("again", "success", 0),
            ("files", "success", 0),
            ("fails", "failure", 3),
            ("array", "success", 0),
            ("array", "failure", 1),
            ("array", "failure", 2),
            ("killed", "failure", 137),
            ("sleeper", "cancellation", None if database else 143),
            ("never", "cancellation", None),
            ("evil", "success", 0),
        ]
    )
    (retried,) = [span for span in runs(spans) if span.links]
    assert retried.attributes["cicd.pipeline.run.id"] == ids["again"]
    assert 10 < (retried.end_unix_nano - retried.start_unix_nano) / 1e9 < 60
    steps = {
        (span.name, span.attributes["cicd.pipeline.task.run.result"], span.attributes["process.exit.code"])
        for span in spans.values()
        if "tailspan.task.id" in span.attributes and span.name != "batch"
    }
    assert steps == ({("prep", "success", 0), ("load", "failure", 4)} if database else set())


def runs(spans: Mapping[str, SpanRow]) -> list[SpanRow]:
    """Return the run spans: one for each attempt of a job."""
    return [span for span in spans.values() if span.name.startswith("RUN ")]


def shown_texts(collector: Collector) -> Counter[tuple[str, str]]:
    """Return the lines that arrived, under the first word of the job's name."""
    found: Counter[tuple[str, str]] = Counter()
    for (name, text), count in texts(collector).items():
        found[name.split()[0], text] += count
    return found
