"""Metrics in a real Prometheus 3, which receives them over OTLP from a real agent with real jobs.

``PROMETHEUS_BIN``, or ``.venv/stores/bin/prometheus`` from ``tests/stores/build.sh``; skipped without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.deploy.prometheus import Prometheus, eventually
from tests.deploy.queries import ALL, DASHBOARDS, dashboard_queries
from tests.patience import Patience
from tests.ports import free_port
from tests.stores.programs import program

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

TAILSPAN = str(Path(sys.executable).with_name("tailspan"))
PROMETHEUS = DASHBOARDS.parents[1] / "prometheus"
RULES: dict[str, str] = {
    rule["alert"]: rule["expr"]
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
}
AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
EXPONENTIAL = "base2_exponential_bucket_histogram"
UPTIME = "tailspan_agent_uptime_seconds"
KINDS = pytest.mark.parametrize("aggregation", ["explicit_bucket_histogram", EXPONENTIAL])
HOSTILE = """a"b'c\\d(e)+f$g[h]{i}|j.k*l?m^n/o&p=q#r%s t~u!v,w"""
PROGRESS = "import time\nfor n in range(8): print(f'step {n}/8', flush=True); time.sleep(1)"
LIVE = (
    "tailspan_job_progress_ratio",
    "tailspan_job_last_line_age_seconds",
    "tailspan_job_exec_time_seconds",
    "tailspan_job_silent",
    "tailspan_job_slow",
)


class Scene:
    """A Prometheus 3, an agent that pushes to it once in ten minutes, and jobs.

    Args:
        home: Directory of everything.
        server: The Prometheus.
        otlp_url: Its address for metrics.
    """

    def __init__(self, home: Path, server: Prometheus, otlp_url: str) -> None:
        self.server = server
        self._log = home / "agent.log"
        self._env = os.environ | {
            "TAILSPAN_CONFIG": str(home / "config.toml"),
            # so that only the exports for runs explain what is found
            "OTEL_METRIC_EXPORT_INTERVAL": "600000",
        }
        (home / "config.toml").write_text(
            f"""
            [services.local]
            state_dir = "{home}/jobs"
            [agent]
            state_dir = "{home}/agent"
            listen = ""
            [[agent.watch]]
            service = "local"
            discover = true
            settle = 0
            [otlp]
            signals = ["metrics"]
            [otlp.metrics]
            endpoint = "{otlp_url}"
            timeout = "120s"
            """
        )

    @contextmanager
    def agent(self, aggregation: str) -> Iterator[None]:
        """Run an agent; its end is orderly."""
        env = self._env | {AGGREGATION: aggregation}
        began_s = time.monotonic()
        with self._log.open("a") as log:
            process = subprocess.Popen([TAILSPAN, "agent", "run"], env=env, stderr=log)
        try:
            # The series of an agent that has ended lasts for five minutes.
            eventually(lambda: [up < time.monotonic() - began_s for _, up in self.server.query(UPTIME)], [True])
            yield
        finally:
            process.terminate()
            patience = Patience(60, lambda: [process.pid])
            while process.poll() is None:
                if patience.is_over():
                    process.kill()
                    raise AssertionError(f"the agent does not stop: {self._log.read_text()[-3000:]}")
                time.sleep(0.05)

    def run(self, name: str, *command: str) -> None:
        """Run a job to its end, however it ends."""
        subprocess.run(
            [TAILSPAN, "run", "--name", name, "--", *command], env=self._env, capture_output=True, timeout=60
        )

    def detach(self, name: str, *command: str) -> None:
        """Start a job that runs on."""
        command = (TAILSPAN, "run", "--detach", "--name", name, "--", *command)
        subprocess.run(command, env=self._env, capture_output=True, timeout=60, check=True)

    def panel(self, title: str, window: str = "1h", chosen: tuple[str, ...] = (ALL,)) -> dict[str, float]:
        """Return what the first query of a panel finds, by pipeline; by "" without one."""
        query = next(one for one in dashboard_queries({}, chosen, window) if one.panel == title)
        return {labels.get("cicd_pipeline_name", ""): value for labels, value in self.server.query(query.text)}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Start a Prometheus 3 with the project's own configuration."""
    binary = program("prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules.yaml")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        binary,
        f"--config.file={tmp_path}/prometheus.yaml",
        f"--storage.tsdb.path={tmp_path}/tsdb",
        f"--web.listen-address={address}",
        "--web.enable-otlp-receiver",
        "--enable-feature=exemplar-storage",
    ]
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        server = Prometheus(address)
        eventually(server.ready, True)
        yield Scene(tmp_path, server, f"http://{address}/api/v1/otlp/v1/metrics")
    finally:
        process.terminate()
        process.wait()


@KINDS
def test_a_run_is_seen_while_it_runs_and_is_gone_when_it_has_ended(scene: Scene, aggregation: str) -> None:
    """A run of some seconds is there at once, with its progress, and no series of it remains for five minutes."""
    with scene.agent(aggregation):
        scene.detach("twenty", sys.executable, "-c", PROGRESS)
        active = 'cicd_pipeline_run_active{cicd_pipeline_name="twenty", cicd_pipeline_run_state="executing"}'
        eventually(lambda: [value for _, value in scene.server.query(active)], [1.0])
        eventually(lambda: {name for name in LIVE if scene.server.query(name)}, set(LIVE))
        eventually(lambda: [value for _, value in scene.server.query(active)], [0.0])
        ended_s = time.monotonic()
        eventually(lambda: {name for name in LIVE if scene.server.query(name)}, set())
        assert time.monotonic() - ended_s < 30
        eventually(lambda: scene.panel("jobs: Succeeded"), {"": 1})


@KINDS
def test_runs_between_two_exports_are_counted_with_their_durations(scene: Scene, aggregation: str) -> None:
    """Counts, the 95th percentile, exemplars, the alert and the success rate of runs that no interval has seen."""
    with scene.agent(aggregation):
        for _ in range(3):
            scene.run("quick", "sleep", "0.2")
        scene.run(HOSTILE, "sh", "-c", "exit 3")
        eventually(lambda: scene.panel("jobs: Succeeded"), {"": 3})
        eventually(lambda: scene.panel("jobs: Failed"), {"": 1})
        assert scene.panel("pipelines: Success rate") == {"quick": 1, HOSTILE: 0}
        assert scene.panel("jobs: Failed", chosen=(HOSTILE,)) == {"": 1}
        assert scene.panel("jobs: Failed", chosen=(HOSTILE, "quick")) == {"": 1}
        assert scene.panel("jobs: Failed", chosen=("quick",)) in ({}, {"": 0})
        quantiles = scene.panel("pipelines: 95th percentile of the last hour's runs")
        assert 0.2 < quantiles["quick"] < 0.5
        eventually(lambda: scene.server.labels(RULES["JobFailed"], "cicd_pipeline_name"), [(HOSTILE,)])
        name = "cicd_pipeline_run_duration_seconds"
        name += "" if aggregation == EXPONENTIAL else "_bucket"
        assert scene.server.query(name)
        found = scene.server.get("query_exemplars", query=name, start=0, end=2**32)
        exemplars = [one for series in found for one in series["exemplars"]]
        assert {len(one["labels"]["trace_id"]) for one in exemplars} == {32}
        assert {float(one["value"]) >= 0.2 for one in exemplars} == {True, False}


@KINDS
def test_every_query_of_the_dashboards_runs(scene: Scene, aggregation: str) -> None:
    """No query is an error, whatever is chosen and typed; without an id, One job finds nothing of any run."""
    with scene.agent(aggregation):
        scene.detach(HOSTILE, sys.executable, "-c", PROGRESS)
        eventually(lambda: {name for name in LIVE if scene.server.query(name)}, set(LIVE))
        one_job = {}
        for run in ({}, {"pipeline": HOSTILE, "run_id": HOSTILE}):
            queries = [
                one for one in dashboard_queries(run, [HOSTILE, "etl"] if run else [ALL]) if one.source == "prometheus"
            ]
            found = {query.panel for query in queries if scene.server.query(query.text)}
            one_job[len(run)] = {panel for panel in found if panel.startswith("job: ")}
        assert one_job == {0: set(), 2: {"job: Progress", "job: Time left", "job: Last line", "job: So far"}}


def test_a_change_of_the_kind_of_histogram_counts_no_run_twice(scene: Scene) -> None:
    """In both directions, a window counts only what ended in it."""
    kinds = [EXPONENTIAL, "explicit_bucket_histogram", EXPONENTIAL]
    with scene.agent("explicit_bucket_histogram"):
        for _ in range(5):
            scene.run("quick", "true")
        eventually(lambda: scene.panel("jobs: Succeeded"), {"": 5})
    for number, kind in enumerate(kinds, start=1):
        time.sleep(2)  # the window begins in whole seconds
        began_s = time.monotonic() - 1
        with scene.agent(kind):
            scene.run("quick", "true")
            eventually(lambda: scene.panel("jobs: Succeeded"), {"": 5 + number})
            assert scene.panel("jobs: Succeeded", f"{int(time.monotonic() - began_s)}s") == {"": 1}
