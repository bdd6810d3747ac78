"""The Kubernetes manifests: what they say to Tailspan, to each other and to Kubernetes; how a pod with a job ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tailspan.services.kubernetes.service import RIGHTS
from tailspan.services.registry import open_service
from tailspan_agent.agent import _LAST_PUSH_S
from tailspan_agent.web.app import _STOP_GRACE_S
from tests.deploy.configured import DEPLOY, settings_of, understood
from tests.deploy.test_image import image_environ
from tests.fakes.agents import PATIENCE_S
from tests.fakes.collector import Collector
from tests.ports import free_port

KUBERNETES = DEPLOY / "kubernetes"
BUILDS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
VERSION = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["version"]


def read(name: str) -> Any:
    return yaml.safe_load((KUBERNETES / name).read_text())


def pods() -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The pods of both ways, each with all of its containers."""
    for name in ("base/statefulset.yaml", "sidecar/job.yaml"):
        pod = read(name)["spec"]["template"]["spec"]
        yield pod, pod.get("initContainers", []) + pod["containers"]


def command(container: dict[str, Any]) -> list[str]:
    """A container's whole command line, with the image's entry point where it has none of its own."""
    return [*container.get("command", ["tailspan"]), *container.get("args", [])]


def environ(container: dict[str, Any]) -> dict[str, str]:
    return {**image_environ(), **{each["name"]: each["value"] for each in container.get("env", [])}}


def test_tailspan_understands_the_manifests() -> None:
    """Command lines, variables and the file; the tokens' paths are where the secret is mounted."""
    for _, containers in pods():
        for container in containers:
            program, *words = command(container)
            assert program == "tailspan"
            understood(words)
            settings_of({name: value for name, value in environ(container).items() if name.startswith("TAILSPAN_")})
    settings = settings_of({}, KUBERNETES / "base" / "config.toml")
    (tokens,) = [
        mount["mountPath"]
        for mount in read("base/statefulset.yaml")["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "tokens"
    ]
    assert str(settings.agent.token_file) == f"{tokens}/page"
    assert settings.services["fused"]["token_file"] == f"{tokens}/fused"
    (port,) = read("base/statefulset.yaml")["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert settings.agent.listen_address == ("0.0.0.0", port["containerPort"])


def test_the_agent_that_follows_jobs_has_the_rights_for_it() -> None:
    """Its configuration is understood, and its role gives what the service reads, and nothing that changes things."""
    settings = settings_of({}, KUBERNETES / "jobs" / "config.toml")
    assert open_service("kubernetes", settings).name == "kubernetes"
    found = yaml.safe_load_all((KUBERNETES / "jobs" / "rbac.yaml").read_text())
    roles = {one["metadata"]["name"]: one for one in found if one["kind"] == "ClusterRole"}
    given = {
        (group, resource, verb)
        for rule in roles["tailspan-jobs"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    needed = {
        (group, "/".join(one for one in (resource, part) if one), verb)
        for group, resource, part, verbs, *_ in RIGHTS
        for verb in verbs
    }
    assert needed - given == {("batch", "jobs", "delete"), ("batch", "jobs", "create")}
    assert {verb for _, _, verb in given} == {"get", "list", "watch"}


def test_the_fleet_shares_jobs_and_drains() -> None:
    """Three agents with the connection string from a secret; the pod has time for the drain before its stop."""
    found = yaml.safe_load((KUBERNETES / "fleet" / "kustomization.yaml").read_text())
    patches = {one["target"]["kind"]: yaml.safe_load(one["patch"]) for one in found["patches"]}
    changes = {one["path"]: one["value"] for one in patches["StatefulSet"]}
    assert (changes["/spec/replicas"], changes["/spec/podManagementPolicy"]) == (3, "Parallel")
    (variable,) = changes["/spec/template/spec/containers/0/env"]
    fleet = settings_of({variable["name"]: variable["value"]}).fleet
    mount = changes["/spec/template/spec/containers/0/volumeMounts/-"]
    assert (fleet.is_used, str(fleet.dsn_file)) == (True, f"{mount['mountPath']}/dsn")
    assert changes["/spec/template/spec/volumes/-"]["name"] == mount["name"]
    program, *words = changes["/spec/template/spec/containers/0/lifecycle"]["preStop"]["exec"]["command"]
    assert program == "tailspan"
    understood(words)
    base = read("base/statefulset.yaml")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert changes["/spec/template/spec/terminationGracePeriodSeconds"] >= base + float(words[-1])
    budget = read("fleet/poddisruptionbudget.yaml")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": read("base/statefulset.yaml")["spec"]["selector"]}
    (port,) = patches["NetworkPolicy"][0]["value"]["ports"]
    assert port == {"port": 5432}


def test_pods_fit_the_restricted_profile() -> None:
    """Pod Security Standards, "restricted", and a root that is read-only."""
    for pod, containers in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_pods_have_time_to_end() -> None:
    """The drain, the last metrics and the status server; in the sidecar, before that, what preStop waits for."""
    ours_s = settings_of({}).agent.drain_timeout + _LAST_PUSH_S + _STOP_GRACE_S
    (agent, _), (job, containers) = pods()
    assert agent["terminationGracePeriodSeconds"] > ours_s
    wait = containers[0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert job["terminationGracePeriodSeconds"] > ours_s + float(wait.partition("timeout ")[2].split()[0])


def test_the_parts_name_each_other() -> None:
    """Selectors, ports, secrets, the image's version; and a network policy for the agent's pods alone."""
    labels = {"app.kubernetes.io/name": "tailspan-agent"}
    workload = read("base/statefulset.yaml")["spec"]
    assert workload["template"]["metadata"]["labels"] == labels
    assert workload["selector"]["matchLabels"] == labels
    assert workload["serviceName"] == read("base/service.yaml")["metadata"]["name"]
    assert read("base/service.yaml")["spec"]["selector"] == labels
    assert read("base/networkpolicy.yaml")["spec"]["podSelector"] == {"matchLabels": labels}
    monitor = read("podmonitor/podmonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["spec"]["selector"] == {"matchLabels": labels}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    volumes = workload["template"]["spec"]["volumes"]
    (secret,) = [volume["secret"]["secretName"] for volume in volumes if "secret" in volume]
    assert endpoint["authorization"]["credentials"] == {"name": secret, "key": "page"}
    assert endpoint["port"] == workload["template"]["spec"]["containers"][0]["ports"][0]["name"]
    assert read("base/kustomization.yaml")["images"][0]["newTag"] == VERSION
    assert {container["image"] for _, containers in pods() for container in containers} == {
        "tailspan",
        f"tailspan:{VERSION}",
    }


@pytest.mark.parametrize("directory", BUILDS, ids=lambda path: path.name)
def test_each_kustomization_lists_its_files(directory: Path) -> None:
    """None is forgotten, none is missing."""
    build = yaml.safe_load((directory / "kustomization.yaml").read_text())
    listed = build["resources"] + [file for each in build.get("configMapGenerator", ()) for file in each["files"]]
    assert {name for name in listed if not name.startswith("..")} | {"kustomization.yaml"} == {
        path.name for path in directory.iterdir()
    }
    assert all((directory / name).exists() for name in listed)


def test_a_job_beside_its_sidecar_is_relayed_to_its_end(tmp_path: Path) -> None:
    """The pod's life in the order of Kubernetes: the sidecar starts, the job runs and ends, preStop, SIGTERM.

    The volume goes with the pod, so all must be at the endpoint by then: the last lines, and the run.
    """
    sidecar, job = list(pods())[1][1]
    script = sidecar["lifecycle"]["preStop"]["exec"]["command"]
    job["args"] = ["sh", "-c", "echo started; seq 1 2000; echo done; exit 3"]
    with Collector() as collector:

        def variables(container: dict[str, Any]) -> dict[str, str]:
            found = {
                name: value.replace("/var/lib/tailspan", str(tmp_path)).replace(
                    "http://otel-collector:4318", collector.http_url
                )
                for name, value in environ(container).items()
            }
            # the port is this test's own; a pod shares its ports with no other
            return {**os.environ, **found, "TAILSPAN_AGENT__LISTEN": f"127.0.0.1:{port}", "PATH": path}

        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        port = free_port()
        with subprocess.Popen(
            command(sidecar), env=variables(sidecar), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as agent:
            try:
                assert agent.stderr is not None
                assert "follows local" in next(line for line in agent.stderr if "follows" in line)
                ran = subprocess.run(command(job), env=variables(job), capture_output=True, timeout=60, check=False)
                assert ran.returncode == 3
                subprocess.run(script, env=variables(sidecar), capture_output=True, timeout=60, check=False)
                agent.terminate()
                assert agent.wait(PATIENCE_S) == 0
            finally:
                agent.kill()
        bodies = [row.body for row in collector.log_records() if not row.event_name]
        assert bodies == ["started", *map(str, range(1, 2001)), "done"]
        (run,) = [span for span in collector.spans() if span.name.startswith("RUN ")]
        assert run.attributes["cicd.pipeline.result"] == "failure"


@pytest.mark.services
@pytest.mark.parametrize("directory", BUILDS, ids=lambda path: path.name)
def test_manifests_fit_the_schemas(directory: Path, tools: Path, tmp_path: Path) -> None:
    """What kubectl builds, against Kubernetes' own schemas of the oldest and the newest version, nothing unknown."""
    built = subprocess.run(
        ["kubectl", "kustomize", directory], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    # A PodMonitor is not Kubernetes' own; test_the_parts_name_each_other reads it.
    ours = [each for each in yaml.safe_load_all(built) if each["kind"] != "PodMonitor"]
    (tmp_path / "built.yaml").write_text(yaml.safe_dump_all(ours))
    for version in ("1.30", "1.37"):
        said = subprocess.run(
            [tools / "kubernetes-validate", "--strict", "--kubernetes-version", version, tmp_path / "built.yaml"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert said.returncode == 0, said.stdout + said.stderr
        assert (said.stdout + said.stderr).count(" passed for resource ") == len(ours)
