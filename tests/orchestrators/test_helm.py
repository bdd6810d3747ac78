"""The Helm chart on a real Kubernetes: its agent in a pod relays the Jobs of the cluster, through an upgrade."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_helm import CHART, EVERYTHING, SAME, helm, rendered
from tests.deploy.test_image import image_environ, last, make_environment
from tests.fakes.collector import Collector
from tests.fakes.postgres import Postgres
from tests.orchestrators.image import write_image
from tests.orchestrators.one_node import Cluster, built, running_cluster
from tests.orchestrators.test_kubernetes import bodies, counted, job, numbered, wait_for_lines
from tests.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

# The address of the node, which pods reach.
NODE = "192.0.2.10"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose pods have the tokens of their service accounts, and that has Tailspan's image.

    The image is made first: a process in the cluster's network reaches no package registry.
    """
    built()
    helm("version")
    directory = tmp_path_factory.mktemp("image")
    venv = make_environment(directory / "tailspan")
    write_image(directory / "image.tar", "tailspan:0.1.0", venv, image_environ(), json.loads(last("ENTRYPOINT")))
    with running_cluster(NO_ADMISSION="") as found:
        words = ["ctr", "-a", found.directory / "run" / "ctd.sock", "-n", "k8s.io", "images", "import"]
        subprocess.run(
            [*words, "--snapshotter", "native", directory / "image.tar"], check=True, timeout=300, capture_output=True
        )
        yield found


def install(cluster: Cluster, *words: str, values: Mapping[str, Any], namespace: str = "tailspan") -> None:
    """Run `helm` for the release `tailspan`; it waits until the agents are ready."""
    kubeconfig = ("--kubeconfig", str(cluster.kubeconfig), "--namespace", namespace)
    done = helm(*words, "tailspan", CHART, *kubeconfig, "--wait", "--timeout", "4m", values=values)
    assert done.returncode == 0, done.stdout + done.stderr


def make_volume(cluster: Cluster, directory: Path, name: str) -> None:
    """Make a volume that a claim of an agent can have."""
    volume = directory / name
    volume.mkdir()
    os.chown(volume, 10001, 10001)  # as a storage driver does for fsGroup
    for path in (*directory.parents, directory)[:3]:
        path.chmod(0o755)
    spec = {"capacity": {"storage": "12Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": str(volume)}}
    persistent = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec}
    cluster.kubectl("create", "-f", "-", content=yaml.safe_dump(persistent))


def values_of(collector: Collector) -> dict[str, Any]:
    """Return values for agents in pods of this cluster."""
    return {
        "config": {"otlp": {"endpoint": collector.http_url}},
        "kubernetesJobs": {"cluster": "test"},
        # the cluster has no kube-proxy, so the API server has no address of a service
        "extraEnv": [
            {"name": "KUBERNETES_SERVICE_HOST", "value": NODE},
            {"name": "KUBERNETES_SERVICE_PORT", "value": "6443"},
        ],
    }


def may(cluster: Cluster, verb: str, resource: str, namespace: str) -> bool:
    """Whether the agent's account has a right."""
    account = "--as=system:serviceaccount:tailspan:tailspan-agent"
    words = ["kubectl", f"--kubeconfig={cluster.kubeconfig}", "auth", "can-i", verb, resource, "-n", namespace, account]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout.strip() == "yes"


def test_the_chart_relays_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """Install, upgrade to one namespace, uninstall: lines arrive once, the token stays, rights are as set, and the
    volume outlives the release; the sidecar's example completes.
    """
    make_volume(cluster, tmp_path, "state")
    for name in ("tailspan", "etl", "other"):
        cluster.kubectl("create", "namespace", name)
    with Collector(http_host=NODE) as collector:
        values = values_of(collector)
        install(cluster, "install", values=values)
        assert [may(cluster, "list", "jobs", where) for where in ("etl", "other")] == [True, True]
        token = cluster.kubectl("-n", "tailspan", "get", "secret", "tailspan-agent-tokens", "-o", "jsonpath={.data}")
        cluster.apply(job("etl", "first", counted("first", 50)), job("other", "second", counted("second", 50)))
        expected = numbered("first", 50) + numbered("second", 50)
        wait_for_lines(collector, expected)

        values["kubernetesJobs"] |= {"namespace": "etl", "allowCancel": True}
        values["config"]["agent"] = {"max_log_names": 2_000_000}
        install(cluster, "upgrade", values=values)
        rights = [may(cluster, verb, "jobs", where) for verb in ("list", "delete") for where in ("etl", "other")]
        assert rights == [True, False, True, False]
        assert token == cluster.kubectl(
            "-n", "tailspan", "get", "secret", "tailspan-agent-tokens", "-o", "jsonpath={.data}"
        )
        check = ("exec", "tailspan-agent-0", "--", "tailspan", "agent", "check", "--config")
        assert "running agent: ready" in cluster.kubectl("-n", "tailspan", *check, "/etc/tailspan/config.toml")
        cluster.apply(job("other", "unseen", "echo unseen"), job("etl", "third", counted("third", 50)))
        expected += numbered("third", 50)
        wait_for_lines(collector, expected)
        assert Counter(row.body for row in collector.log_records() if not row.event_name) == expected

        sidecar = {"sidecarExample": {"enabled": True}, "config": {"otlp": {"endpoint": collector.http_url}}}
        (example,) = [each for each in rendered(sidecar) if each["kind"] == "Job"]
        cluster.kubectl("-n", "other", "create", "-f", "-", content=yaml.safe_dump(example))
        cluster.kubectl("-n", "other", "wait", "--for=condition=Complete", "job/nightly-etl", "--timeout=100s")
        assert bodies(collector) == expected + Counter(["started", "done"])

        kubeconfig = ("--kubeconfig", str(cluster.kubeconfig), "--namespace", "tailspan")
        assert helm("uninstall", "tailspan", *kubeconfig, "--wait").returncode == 0
        assert "Bound" in cluster.kubectl("-n", "tailspan", "get", "pvc", "state-tailspan-agent-0")
        assert not may(cluster, "list", "jobs", "etl")


@pytest.fixture
def database() -> Iterator[str]:
    """The address of a PostgreSQL that pods reach."""
    port = free_port()
    with Postgres(port=port) as server:
        server.stop()
        with (server.home / "data" / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = '{NODE}'\n")
        with (server.home / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 trust\n")
        server.start()
        yield f"postgresql://postgres@{NODE}:{port}/postgres"


def test_a_fleet_relays_jobs(cluster: Cluster, database: str, tmp_path: Path) -> None:
    """Three agents with one PostgreSQL: one is killed, one is drained by its preStop, and no line is missing."""
    for name in ("fleet", "fleet-jobs"):
        cluster.kubectl("create", "namespace", name)
    for number in range(3):
        make_volume(cluster, tmp_path, f"fleet-{number}")
    cluster.kubectl("-n", "fleet", "create", "secret", "generic", "tailspan-fleet", f"--from-literal=dsn={database}")
    with Collector(http_host=NODE) as collector:
        values = {**values_of(collector), "fleet": {"enabled": True}}
        values["kubernetesJobs"] = {"cluster": "test", "namespace": "fleet-jobs"}
        install(cluster, "install", values=values, namespace="fleet")
        words = ("-n", "fleet", "exec", "tailspan-agent-0", "--", "tailspan", "agent", "fleet", "--config")
        assert cluster.kubectl(*words, "/etc/tailspan/config.toml").count("shards") == 3
        allowed = ("get", "poddisruptionbudget", "tailspan-agent", "-o", "jsonpath={.status.disruptionsAllowed}")
        assert cluster.kubectl("-n", "fleet", *allowed) == "1"

        expected: Counter[str] = Counter()

        def start(name: str) -> None:
            for number in range(6):
                expected.update(numbered(f"{name} {number}", 60))
                cluster.apply(job("fleet-jobs", f"{name}-{number}", counted(f"{name} {number}", 60, "0.2")))

        start("killed")
        cluster.kubectl("-n", "fleet", "delete", "pod", "tailspan-agent-1", "--grace-period=0", "--force")
        start("drained")
        cluster.kubectl("-n", "fleet", "delete", "pod", "tailspan-agent-2")
        start("after")
        wait_for_lines(collector, expected, 300)

        def runs() -> set[str]:
            return {span.trace_id for span in collector.spans() if span.name.startswith("RUN ")}

        cluster.wait_until(lambda: len(runs()) == 18, "all runs")
        kubeconfig = ("--kubeconfig", str(cluster.kubeconfig), "--namespace", "fleet")
        assert helm("uninstall", "tailspan", *kubeconfig, "--wait").returncode == 0


@pytest.mark.parametrize("values", [SAME["fleet"], {**EVERYTHING, "monitor": {}}], ids=["fleet", "everything"])
def test_the_server_accepts_what_is_rendered(cluster: Cluster, values: dict[str, Any]) -> None:
    """`kubectl apply --dry-run=server`, which also checks what schemas do not."""
    for name in ("tailspan", "etl"):
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        cluster.kubectl("apply", "-f", "-", content=yaml.safe_dump(manifest))
    found = rendered(values)
    said = cluster.kubectl(
        "-n",
        "tailspan",
        "apply",
        "--dry-run=server",
        "-f",
        "-",
        content=yaml.safe_dump_all([each for each in found if "namespace" not in each["metadata"]]),
    )
    said += "".join(
        cluster.kubectl("apply", "--dry-run=server", "-f", "-", content=yaml.safe_dump(each))
        for each in found
        if "namespace" in each["metadata"]
    )
    assert said.count("server dry run") == len(found)
