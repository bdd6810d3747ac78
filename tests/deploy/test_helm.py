"""The Helm chart: what its values say to Tailspan, and that it makes what `deploy/kubernetes` has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tailspan.config import Settings
from tailspan.services.registry import open_service
from tests.deploy.configured import DEPLOY, settings_of, understood

CHART = DEPLOY / "helm" / "tailspan"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
TEMPLATES = sorted((CHART / "templates").iterdir())
KUSTOMIZATIONS = DEPLOY / "kubernetes"

# The values of each kustomization; its tokens come from the same Secret.
TOKENS = {"tokens": {"existingSecret": "tailspan-tokens"}}
FUSED = {
    "services": {"fused": {"type": "fused", "token_file": "/run/secrets/tailspan/fused"}},
    "agent": {"watch": [{"service": "fused", "discover": True}]},
}
REMOTE = {**TOKENS, "kubernetesJobs": {"enabled": False}, "config": FUSED}
SAME = {
    "base": REMOTE,
    "jobs": {**TOKENS, "kubernetesJobs": {"cluster": "example"}},
    "fleet": {**REMOTE, "fleet": {"enabled": True}},
    "podmonitor": {**REMOTE, "monitor": {"enabled": True}},
    "sidecar": {"sidecarExample": {"enabled": True}},
}
EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example/tailspan", "digest": f"sha256:{'a' * 64}", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "fullnameOverride": "relay",
    "config": {
        "agent": {"max_log_names": 2_000_000, "drain_timeout": 10, "public_url": "https://tailspan.example"},
        "services": {"kubernetes": {"label_selector": "team=geo", "max_streams": 500}},
        "otlp": {"endpoint": "https://otlp.example", "dead_letter_max": 10_737_418_240},
        "redact": {"patterns": [{"regex": "[0-9]{16}", "slow": True}]},
    },
    "kubernetesJobs": {"cluster": "prod", "namespace": "etl", "allowCancel": True},
    "fleet": {"enabled": True, "replicas": 5, "port": 6432, "drainSeconds": 60},
    "persistence": {"size": "20Gi", "storageClass": "fast"},
    "serviceAccount": {"annotations": {"example.org/role": "relay"}},
    "monitor": {"enabled": True, "kind": "ServiceMonitor", "labels": {"release": "prometheus"}},
    "networkPolicy": {"monitoringNamespace": "metrics", "extraEgress": [{"ports": [{"port": 8080}]}]},
    "extraEnv": [{"name": "TAILSPAN_OTLP__HEADERS", "value": "a=b"}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/ours"}],
    "podAnnotations": {"example.org/a": "b"},
    "podLabels": {"team": "geo"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "batch", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "high",
    "sidecarExample": {"enabled": True},
}
VALUE_SETS = {**SAME, "defaults": {}, "everything": EVERYTHING, "no-volume": {"persistence": {"enabled": False}}}


def paths_of(values: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key of the values and of the schema, with where it is missing."""
    properties = schema.get("properties")
    if properties is None or schema.get("additionalProperties") is not False:
        return
    for key in {*values, *properties} - {"global"}:
        if key not in values or key not in properties:
            yield key, "the schema" if key in values else "values.yaml"
        elif isinstance(values[key], dict):
            yield from ((f"{key}.{inner}", where) for inner, where in paths_of(values[key], properties[key]))


def test_the_schema_has_the_values() -> None:
    """Each value is in values.yaml, with its default, and in the schema; config has the tables of the configuration."""
    config = SCHEMA["properties"]["config"]
    assert set(config["properties"]) == set(Settings.model_fields)
    found = {path: where for path, where in paths_of(VALUES, SCHEMA) if not path.startswith("config.")}
    assert found == {}


def test_templates_use_values_that_exist() -> None:
    """A misspelt value would be empty, without an error."""
    used = {name for path in TEMPLATES for name in re.findall(r"\.Values\.([\w.]+)", path.read_text())}
    assert len(used) > 30

    def is_there(name: str) -> bool:
        found: Any = VALUES
        for part in name.split("."):
            if not isinstance(found, dict) or part not in found:
                return False
            found = found[part]
        return True

    assert sorted(name for name in used if not is_there(name)) == []
    assert sorted(name for name in VALUES if name not in {one.split(".")[0] for one in used}) == []


def test_the_chart_has_the_version_of_tailspan() -> None:
    """The chart's version and the image's default tag."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["version"]
    assert (chart["version"], str(chart["appVersion"])) == (version, version)


@pytest.mark.parametrize("values", [VALUES, *VALUE_SETS.values()], ids=["values.yaml", *VALUE_SETS])
def test_tailspan_understands_config(values: dict[str, Any]) -> None:
    """The loader accepts what `config` has; the chart adds to it."""
    Settings(**values.get("config", {}))


def helm(*words: str | Path, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm, with values as a file."""
    program = Path(sys.prefix) / "go" / "helm"
    if not program.exists():
        pytest.skip(f"{program} is missing: make test-services SERVICES=helm, which needs Go")
    command = [str(word) for word in (program, *words)] + (["--values", "-"] if values is not None else [])
    return subprocess.run(
        command, input=yaml.safe_dump(values), capture_output=True, text=True, timeout=120, check=False
    )


def rendered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifests that the chart makes for a release `tailspan` in the namespace `tailspan`."""
    done = helm("template", "tailspan", CHART, "--namespace", "tailspan", values=values)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def without_labels(manifest: Any) -> Any:
    """Return a manifest without what names a release."""
    if isinstance(manifest, dict):
        left_out = {"labels", "annotations", "app.kubernetes.io/instance"}
        return {key: without_labels(value) for key, value in manifest.items() if key not in left_out}
    return [without_labels(value) for value in manifest] if isinstance(manifest, list) else manifest


def comparable(manifest: dict[str, Any]) -> Any:
    """Return a manifest without labels, the namespace, and the names of roles and of the configuration."""
    found = without_labels(manifest)
    found["metadata"].pop("namespace", None)
    if "Role" in found["kind"]:
        del found["metadata"]
        found.get("roleRef", {}).pop("name", None)
    if found["kind"] == "ConfigMap":
        del found["metadata"]["name"]
        found["data"] = tomllib.loads(found["data"]["config.toml"])
    if found["kind"] == "StatefulSet":
        (config,) = [
            one["configMap"] for one in found["spec"]["template"]["spec"]["volumes"] if one["name"] == "config"
        ]
        del config["name"]
    return found


@pytest.mark.services
@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_helm_lint_finds_no_fault(values: dict[str, Any]) -> None:
    """`helm lint --strict`, which also checks the values by their schema."""
    done = helm("lint", "--strict", CHART, values=values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.services
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_what_is_rendered_fits_the_schemas(version: str, tools: Path, tmp_path: Path) -> None:
    """Kubernetes' own schemas of the oldest and the newest version, nothing unknown."""
    manifests = [each for values in VALUE_SETS.values() for each in rendered(values)]
    ours = [each for each in manifests if each["kind"] not in {"PodMonitor", "ServiceMonitor"}]
    (tmp_path / "rendered.yaml").write_text(yaml.safe_dump_all(ours))
    command = [tools / "kubernetes-validate", "--strict", "--kubernetes-version", version, tmp_path / "rendered.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.services
@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_tailspan_understands_what_is_rendered(values: dict[str, Any], tmp_path: Path) -> None:
    """Command lines, variables and the file; numbers are as they were written."""
    manifests = rendered(values)
    (config,) = [each["data"]["config.toml"] for each in manifests if each["kind"] == "ConfigMap"]
    (tmp_path / "config.toml").write_text(config)
    settings = settings_of({}, tmp_path / "config.toml")
    for service in {watch.service for watch in settings.agent.watch if watch.service} - {"fused"}:
        open_service(service, settings)
    for key, value in values.get("config", {}).get("agent", {}).items():
        if isinstance(value, int):
            assert tomllib.loads(config)["agent"][key] == value
    for each in manifests:
        pod = each.get("spec", {}).get("template", {}).get("spec", {})
        for container in pod.get("initContainers", []) + pod.get("containers", []):
            words = [*container.get("command", ["tailspan"]), *container.get("args", [])]
            assert words[0] == "tailspan"
            understood(words[1:])
            settings_of({one["name"]: one["value"] for one in container.get("env", ())})


@pytest.mark.services
@pytest.mark.parametrize("directory", SAME)
def test_the_chart_makes_what_kustomize_makes(directory: str) -> None:
    """Each kustomization and the chart with its values: the same manifests, but for labels and the names of roles."""
    built = subprocess.run(
        ["kubectl", "kustomize", KUSTOMIZATIONS / directory], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    others, ours = list(yaml.safe_load_all(built)), rendered(SAME[directory])
    for each in others:
        assert comparable(each) in [comparable(one) for one in ours if one["kind"] == each["kind"]]
    if directory != "sidecar":
        assert sorted(each["kind"] for each in others) == sorted(each["kind"] for each in ours)


@pytest.mark.services
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"replicas": 3}, "additional properties 'replicas' not allowed"),
        ({"config": {"agent": {"listen": "127.0.0.1:1"}}}, "/config/agent/listen"),
        ({"config": {"services": {"kubernetes": {"namespace": "etl"}}}}, "/config/services/kubernetes/namespace"),
        ({"config": {"agents": {}}}, "additional properties 'agents' not allowed"),
        ({"fleet": {"enabled": True, "replicas": 0}}, "/fleet/replicas"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
    ],
)
def test_wrong_values_are_rejected(values: dict[str, Any], reason: str) -> None:
    """The message names the value."""
    done = helm("template", "tailspan", CHART, values=values)
    assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
