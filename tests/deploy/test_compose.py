"""The compose files, as far as they can be tried without an engine, and what they mount."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tailspan.config import load_settings
from tests.deploy.configured import settings_of, understood
from tests.deploy.fleet import Fleet

DEPLOY = Path(__file__).parents[2] / "deploy"
SINGLE = ("lgtm", "jaeger", "full")
STACKS = (*SINGLE, "fleet")
EXAMPLE = dict(line.split("=", 1) for line in (DEPLOY / ".env.example").read_text().splitlines() if "=" in line)


def compose(stack: str, *, filled: bool = True) -> dict[str, Any]:
    """Return a compose file with its variables at their defaults, or as it is written."""
    text = (DEPLOY / f"compose.{stack}.yaml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text) if filled else text)
    return loaded


def mounts(stack: str) -> Iterator[tuple[str, str, str]]:
    """Yield service, source and target of each mount."""
    for name, service in compose(stack)["services"].items():
        for mount in service.get("volumes", ()):
            source, target, *_ = mount.split(":")
            yield name, source, target


@pytest.mark.parametrize("stack", STACKS)
def test_what_is_mounted_is_there(stack: str) -> None:
    """Files are of this repository and read-only; volumes are declared."""
    declared = set(compose(stack)["volumes"])
    for service, source, target in mounts(stack):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
            assert f"{source}:{target}:ro" in compose(stack)["services"][service]["volumes"]
        else:
            assert source in declared


@pytest.mark.parametrize("stack", STACKS)
def test_versions_and_ports_are_settings_with_the_defaults_of_the_example(stack: str) -> None:
    """Every image is pinned, every port is on loopback, and .env.example lists each variable with its default."""
    text = (DEPLOY / f"compose.{stack}.yaml").read_text()
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    assert used.items() <= EXAMPLE.items()
    for name, service in compose(stack)["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+(\.\d+){1,2}", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name


def test_the_example_has_no_variable_that_nothing_reads() -> None:
    """And each is used by a stack."""
    text = "".join((DEPLOY / f"compose.{stack}.yaml").read_text() for stack in STACKS)
    assert {name for name in EXAMPLE if f"${{{name}:-" not in text} == set()


@pytest.mark.parametrize("stack", SINGLE)
def test_the_agent_takes_its_configuration(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """File and environment together are valid, and lead to a service and a port of the stack."""
    services = compose(stack)["services"]
    for key, value in services["agent"]["environment"].items():
        monkeypatch.setenv(key, value)
    settings = load_settings(DEPLOY / "compose.agent.toml")
    logs, traces = settings.otlp.for_signal("logs"), settings.otlp.for_signal("traces")
    assert (logs is None) == (stack == "jaeger")
    assert traces is not None
    host, port = re.fullmatch(r"http://(\w+):(\d+)/v1/traces", traces.url or "").groups()  # type: ignore[union-attr]
    assert host in services
    assert port == "4318"
    assert "{trace_id}" in (settings.links.trace or "")


@pytest.mark.parametrize("stack", SINGLE)
def test_the_demo_is_a_profile_and_shares_the_jobs(stack: str) -> None:
    """Its jobs are in the volume that the agent follows; without the profile nothing of it runs."""
    services = compose(stack)["services"]
    assert services["demo"]["profiles"] == ["demo"]
    assert "tailspan:/var/lib/tailspan" in services["agent"]["volumes"]
    assert "tailspan:/var/lib/tailspan" in services["demo"]["volumes"]
    assert [name for name, service in services.items() if "profiles" in service] == ["demo"]


def test_the_agents_of_a_fleet_share_a_service_and_a_database() -> None:
    """Three agents differ in their volume and their page only; tokens and names lead to the services of the stack."""
    services = compose("fleet")["services"]
    agents = {name: service for name, service in services.items() if name.startswith("agent-")}
    assert len(agents) == 3
    found = {
        name: settings_of(service["environment"], DEPLOY / "compose.fleet.toml") for name, service in agents.items()
    }
    for name, settings in found.items():
        understood(agents[name]["command"])
        assert settings.fleet.is_used
        user, password, host, database = re.fullmatch(  # type: ignore[union-attr]
            r"postgresql://(\w+):(\w+)@(\w+)/(\w+)", settings.fleet.read_dsn()
        ).groups()
        environment = services[host]["environment"]
        assert [user, password, database] == [environment[f"POSTGRES_{key}"] for key in ("USER", "PASSWORD", "DB")]
        section = settings.services["jobs"]
        assert section["token"] == services["jobs"]["environment"]["TAILSPAN_SERVE_TOKEN"]
        assert section["base_url"] == "http://jobs:8798/server/v1"
        assert agents[name]["ports"] == [f"127.0.0.1:{(settings.agent.public_url or '').rpartition(':')[2]}:8797"]
        assert f"{name}:/var/lib/tailspan" in agents[name]["volumes"]
    assert len({settings.agent.public_url for settings in found.values()}) == 3
    understood(services["jobs"]["command"])
    assert services["jobs"]["volumes"][0] == services["demo"]["volumes"][0] == "jobs:/var/lib/tailspan"
    assert [name for name, service in services.items() if "profiles" in service] == ["demo"]


@pytest.mark.parametrize("stack", ["lgtm", "full", "fleet"])
def test_grafana_finds_what_is_provisioned(stack: str) -> None:
    """The folder of dashboards, the rules, and an address for each data source that its file asks for."""
    targets = {target for _, _, target in mounts(stack)}
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] in targets
    assert set(yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())["rule_files"]) <= targets
    grafana = compose(stack)["services"]["grafana" if stack == "full" else "lgtm"]["environment"]
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources.yaml").read_text())["datasources"]
    assert {source["uid"] for source in sources} == {"prometheus", "tempo", "loki"}
    for source in sources:
        assert grafana[source["url"].removeprefix("$")].startswith("http://")
    home = grafana["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana/dashboards" / Path(home).name).exists()


def test_the_collector_sends_every_signal_and_answers_only_for_what_a_store_has() -> None:
    """What its pipelines name exists; no queue, no batches and no retries of its own stand between agent and store."""
    config = yaml.safe_load((DEPLOY / "stores/collector.yaml").read_text())
    services = compose("full")["services"]
    assert set(config["service"]["pipelines"]) == {"traces", "logs", "metrics"}
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
        assert "batch" not in pipeline["processors"]
    for exporter in config["exporters"].values():
        assert not exporter["sending_queue"]["enabled"]
        assert not exporter["retry_on_failure"]["enabled"]
        url = exporter.get("endpoint") or exporter["metrics_endpoint"]
        assert re.match(r"http://(\w+):", url)[1] in services  # type: ignore[index]


def test_the_demo_runs_each_kind_of_pipeline(tmp_path: Path) -> None:
    """One pass of the script that the profile runs: a success, a failure, one with progress, one that is too slow."""
    with Fleet(tmp_path) as fleet:
        env = fleet.env | {"DEMO_TIMEOUT": "1", "DEMO_PAUSE": "600"}
        command = ["sh", str(DEPLOY / "compose.demo.sh")]
        script = subprocess.Popen(command, env=env, start_new_session=True)
        try:
            fleet.wait_for(lambda: len(fleet.states()) == 4 and "RUNNING" not in fleet.states().values())
        finally:
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()
        assert fleet.states() == {
            "weather-etl": "SUCCEEDED",
            "invoice-import": "FAILED",
            "tile-render": "SUCCEEDED",
            "backfill-year": "TIMED_OUT",
        }


@pytest.mark.services
@pytest.mark.parametrize("stack", STACKS)
def test_compose_takes_the_file(stack: str) -> None:
    """By the schema and the checks of docker-compose itself."""
    command = ["docker-compose", "-f", str(DEPLOY / f"compose.{stack}.yaml"), "--profile", "demo", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
