"""The keys of services of type ``kubernetes``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from tailspan.config import Options, PositiveDuration, UserPath
from tailspan.errors import ConfigError

__all__ = ["KubernetesOptions"]


class KubernetesOptions(Options):
    """The table ``services.NAME`` of type ``kubernetes``.

    Attributes:
        cluster: Name of the cluster, the service's identity; by default the address of its API server.
        kubeconfig: File with address and credentials; by default ``KUBECONFIG``, ``~/.kube/config``, or inside a pod
            its service account.
        context: Context of the kubeconfig; by default its current one.
        namespace: Namespace of the jobs; by default that of the context, or of the pod.
        all_namespaces: Whether jobs of all namespaces are listed.
        label_selector: Which jobs are listed, such as ``team=geo,tier!=test``.
        job_url: Page of a job, with ``{namespace}``, ``{name}`` and ``{uid}``.
        template: A Job manifest (YAML or JSON) for jobs that are submitted as commands.
        max_streams: Number of log streams that are open at a time; other containers are polled.
        requests_per_second: Average rate of all requests.
        timeout: Time limit for connecting and for each part of an answer.
    """

    cluster: str | None = None
    kubeconfig: UserPath | None = None
    context: str | None = None
    namespace: str | None = None
    all_namespaces: bool = False
    label_selector: str = ""
    job_url: str | None = None
    template: UserPath | None = None
    max_streams: int = Field(default=1000, ge=0)
    requests_per_second: float = Field(default=50.0, gt=0)
    timeout: PositiveDuration = 10.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.namespace is not None and self.all_namespaces:
            raise ConfigError("namespace and all_namespaces are both set: keep one of them")
        if self.job_url is not None:
            try:
                self.job_url.format(namespace="", name="", uid="")
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(f"job_url has a field other than {{namespace}}, {{name}}, {{uid}}: {error}") from None
        return self
