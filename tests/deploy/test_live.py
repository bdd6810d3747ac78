"""Every query in a real Prometheus that scrapes a real agent, and in the grammars that Grafana uses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from tests.deploy.fleet import Fleet
from tests.deploy.prometheus import Prometheus, eventually
from tests.deploy.queries import DASHBOARDS, Query, dashboard_queries, datasource_queries
from tests.fakes.collector import Reply
from tests.fakes.job_api import status_fault
from tests.ports import free_port

pytestmark = pytest.mark.services

PROMETHEUS = DASHBOARDS.parents[1] / "prometheus"
NODE = DASHBOARDS.parents[2] / ".venv" / "node"
RULES: dict[str, str] = {
    rule["alert"]: rule["expr"]
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
}


@contextmanager
def prometheus(home: Path, fleet: Fleet) -> Iterator[Prometheus]:
    """Run Debian's Prometheus on our scrape configuration, only faster."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.scrape.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules.yaml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [fleet.address]}]
    (home / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={home}/prometheus.yaml",
        f"--storage.tsdb.path={home}/tsdb",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
    ]
    with (home / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=home)
    try:
        server = Prometheus(address)
        fleet.wait_for(server.ready)
        yield server
    finally:
        process.terminate()
        process.wait()


def promql(pipeline: str, run_id: str) -> list[Query]:
    """All PromQL of all dashboards, for one run where a dashboard shows one."""
    run = {"pipeline": pipeline, "run_id": run_id}
    return [one for one in dashboard_queries(run) if one.source == "prometheus"]


def test_every_query_finds_trouble(tmp_path: Path) -> None:
    """Each failure is found: of jobs, of records, of the endpoint, of the service, of the agent."""
    home = tmp_path / "prometheus"
    home.mkdir()
    with Fleet(tmp_path) as fleet, prometheus(home, fleet) as server:
        fleet.start_agent()
        for _ in range(10):
            fleet.detach("etl", "sh", "-c", "echo begin; sleep 2.2")
        past = 'cicd_pipeline_run_duration_seconds_count{cicd_pipeline_name="etl"} == 10'
        eventually(lambda: server.labels(past, "cicd_pipeline_result"), [("success",)])
        hung = fleet.detach("etl", "sh", "-c", "echo begin; sleep 600")
        fleet.run("etl", sys.executable, "-c", "print('nothing to do')")
        fleet.trouble()

        def pipelines(alert: str) -> list[tuple[str, ...]]:
            return server.labels(RULES[alert], "cicd_pipeline_name")

        eventually(
            lambda: server.labels(RULES["JobFailed"], "cicd_pipeline_name", "cicd_pipeline_result"),
            [("broken", "failure")],
        )
        eventually(lambda: pipelines("JobRunningTooLong"), [("etl",)])
        eventually(lambda: pipelines("JobPendingTooLong"), [("queued",)])
        eventually(lambda: pipelines("JobMissing"), [("nightly",)])
        eventually(lambda: pipelines("JobFinishedTooFast"), [("etl",)])
        eventually(lambda: server.labels(RULES["AgentRejectsLines"], "service", "reason"), [("local", "invalid")])
        for quiet in ("AgentExportFailing", "AgentLagHigh", "AgentDown"):
            eventually(lambda quiet=quiet: server.query(RULES[quiet]), [])
        eventually(lambda: pipelines("JobSilent"), [("etl",)], timeout_s=120)
        firing = 'ALERTS{alertstate="firing", alertname="JobFailed"}'
        eventually(lambda: server.labels(firing, "cicd_pipeline_name"), [("broken",)])

        def silent_panels() -> set[str]:
            # r-1 has tasks, and the pipeline of the other run has a history
            runs = [("remote", "r-1"), ("etl", hung)]
            silent = [{f"{one.panel} {one.ref}" for one in promql(*run) if not server.query(one.text)} for run in runs]
            return silent[0] & silent[1]

        eventually(silent_panels, set())
        found = {one.panel: server.query(one.text) for one in promql("remote", "r-1") if one.ref == "A"}
        values = {panel: series[0][1] for panel, series in found.items() if series}
        assert values["jobs: Failed"] == 2  # the very first runs of their pipeline
        assert values["jobs: Succeeded"] == 12
        assert (values["jobs: Running"], values["jobs: Pending"], values["jobs: Silent"], values["jobs: Slow"]) == (
            2,
            1,
            1,
            1,
        )
        assert (values["jobs: Too fast"], values["jobs: Missing"], values["job: Progress"]) == (1, 1, 0.4)
        rates = {one.panel: server.query(one.text) for one in promql("etl", hung)}["pipelines: Success rate"]
        assert {labels["cicd_pipeline_name"]: value for labels, value in rates} == {"etl": 1, "noisy": 1, "broken": 0}
        exemplars = server.get("query_exemplars", query="cicd_pipeline_run_duration_seconds_bucket", start=0, end=2**32)
        assert {len(one["labels"]["trace_id"]) for series in exemplars for one in series["exemplars"]} == {32}

        fleet.api.fault(status_fault(401), times=None)
        eventually(lambda: server.labels(RULES["ServiceErrors"], "service"), [("remote",)], timeout_s=120)
        fleet.api.clear_faults()
        fleet.collector.always("logs", Reply(503))
        fleet.api.jobs["r-1"].line("one more of long ago", int(datetime.now(UTC).timestamp() * 1000) - 900_000)
        eventually(lambda: server.labels(RULES["AgentExportFailing"], "signal"), [("logs",)], timeout_s=120)
        eventually(lambda: server.labels(RULES["AgentLagHigh"], "service"), [("remote",)], timeout_s=120)
        fleet.stop_agent()
        eventually(lambda: server.labels(RULES["AgentDown"], "host_name"), [(socket.gethostname(),)])


def test_nothing_is_wrong_in_a_quiet_run(tmp_path: Path) -> None:
    """With runs that succeed and one that runs on, no alert is true, and the red numbers of the overview are 0."""
    home = tmp_path / "prometheus"
    home.mkdir()
    with Fleet(tmp_path, expected="etl") as fleet, prometheus(home, fleet) as server:
        fleet.start_agent()
        for _ in range(12):
            fleet.detach("etl", "sh", "-c", "echo begin; sleep 1.5")
        done = 'cicd_pipeline_run_duration_seconds_count{cicd_pipeline_name="etl"} == 12'
        eventually(lambda: server.labels(done, "cicd_pipeline_result"), [("success",)])
        fleet.detach("chatty", "sh", "-c", "while echo tick; do sleep 0.2; done")
        eventually(lambda: server.labels("tailspan_pipeline_missing == 0", "cicd_pipeline_name"), [("etl",)])
        eventually(lambda: server.labels("tailspan_job_exec_time_seconds > 3", "cicd_pipeline_name"), [("chatty",)])
        assert {alert: found for alert, expr in RULES.items() if (found := server.query(expr))} == {}
        assert server.query("ALERTS") == []
        values = {
            one.panel: server.query(one.text)
            for one in promql("etl", "x")
            if one.panel.startswith("jobs: ") and one.ref == "A"
        }
        for title in ("Failed", "Silent", "Slow", "Too fast", "Missing", "Pending"):
            assert sum(value for _, value in values[f"jobs: {title}"]) == 0, title
        assert values["jobs: Succeeded"][0][1] == 12
        assert values["jobs: Firing alerts"] == []


def test_logql_and_traceql_parse() -> None:
    """All queries parse in Grafana's own grammars, and the check can fail."""
    asked: dict[str, list[str]] = {"logql": [], "traceql": []}
    run = {"pipeline": 'an "odd" (name)', "run_id": "20261125-r-1"}
    for one in (*dashboard_queries(run, [run["pipeline"], "b"]), *dashboard_queries({}), *datasource_queries()):
        if one.source == "loki":
            asked["logql"].append(one.text)
        elif one.source == "tempo" and one.text:
            asked["traceql"].append(one.text)
    assert min(map(len, asked.values())) >= 3

    def errors(queries: dict[str, list[str]]) -> str:
        command = ["node", str(Path(__file__).with_name("parse.mjs")), str(NODE)]
        return subprocess.run(command, input=json.dumps(queries), capture_output=True, text=True, check=True).stdout

    assert errors(asked) == ""
    assert errors({"logql": ['{a=~"b"} | c = '], "traceql": ["{ resource.a = "]}).count("\n") == 2
