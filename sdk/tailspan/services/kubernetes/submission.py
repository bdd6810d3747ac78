"""The manifest of a job that is submitted: from a CronJob, or a command in a template. Pure but for the template."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailspan.errors import ConfigError
from tailspan.services.kubernetes.kubeconfig import read_manifest
from tailspan.services.kubernetes.objects import ATTRIBUTES

__all__ = ["job_manifest"]

_MANUAL = "cronjob.kubernetes.io/instantiate"
_NO_NAME = re.compile(r"[^a-z0-9.-]+")
_MAX_NAME_CHARS = 52  # a suffix of the job's pods follows


def job_manifest(
    template: Path | None,
    cron_job: Mapping[str, Any] | None,
    command: Sequence[str],
    *,
    name: str | None,
    attributes: Mapping[str, str] | None,
    timeout_s: float | None,
    cwd: str | None,
    env: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return the manifest of a job.

    Args:
        template: The file with a Job; its first container runs the command.
        cron_job: The CronJob to run now instead; the command is then its name and ``KEY=VALUE`` pairs.
        command: See `KubernetesService.submit`.
        name: See `KubernetesService.submit`.
        attributes: See `KubernetesService.submit`.
        timeout_s: See `KubernetesService.submit`.
        cwd: See `KubernetesService.submit`.
        env: See `KubernetesService.submit`.

    Raises:
        ConfigError: There is no template, or it has no container, or a variable has no value.
    """
    variables = dict(env or {})
    if cron_job is not None:
        pairs = [pair.partition("=") for pair in command[1:]]
        if not all(equals for _, equals, _ in pairs):
            raise ConfigError("the command of a run of a CronJob is cronjob/NAME, then KEY=VALUE for each variable")
        variables |= {key: value for key, _, value in pairs}
        made = copy.deepcopy(dict(cron_job.get("spec", {}).get("jobTemplate") or {}))
        owner = cron_job["metadata"]
        reference = {"apiVersion": "batch/v1", "kind": "CronJob", "name": owner["name"], "uid": owner.get("uid")}
        metadata = made.setdefault("metadata", {})
        metadata |= {"namespace": owner.get("namespace"), "ownerReferences": [reference]}
        metadata.setdefault("annotations", {})[_MANUAL] = "manual"
        usual_name = str(owner["name"])
    else:
        if template is None:
            raise ConfigError(
                "submitting a command needs a template: set services.NAME.template to a Job manifest, or submit "
                "cronjob/NAME",
                key="template",
            )
        made = read_manifest(template, "template")
        if made.get("kind") != "Job":
            raise ConfigError(f"template: {template} is not a Job", key="template")
        metadata = made.setdefault("metadata", {})
        usual_name = str(metadata.pop("name", None) or metadata.get("generateName") or "job").rstrip("-")
    made |= {"apiVersion": "batch/v1", "kind": "Job"}
    made.pop("status", None)
    prefix = _NO_NAME.sub("-", (name or usual_name).lower()).strip("-.")[:_MAX_NAME_CHARS] or "job"
    metadata["generateName"] = f"{prefix}-"
    if attributes:
        metadata.setdefault("annotations", {})[ATTRIBUTES] = json.dumps(dict(attributes))
    if timeout_s is not None:
        made.setdefault("spec", {})["activeDeadlineSeconds"] = max(1, round(timeout_s))
    _set_container(made, [] if cron_job is not None else list(command), variables, cwd)
    return made


def _set_container(made: Mapping[str, Any], command: list[str], variables: Mapping[str, str], cwd: str | None) -> None:
    try:
        container = made["spec"]["template"]["spec"]["containers"][0]
    except (KeyError, IndexError, TypeError):
        raise ConfigError("template: the Job has no container", key="template") from None
    if command:
        container["command"] = command
        container.pop("args", None)
    if cwd is not None:
        container["workingDir"] = cwd
    if variables:
        kept = [one for one in container.get("env") or () if one.get("name") not in variables]
        container["env"] = kept + [{"name": key, "value": value} for key, value in variables.items()]
