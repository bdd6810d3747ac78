"""A real Kubernetes with one node, in namespaces of its own: see `kubernetes.sh`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = Path(__file__).parent / "kubernetes.sh"
BUILT = Path(__file__).parents[2] / ".venv" / "kubernetes"
_CLONE_NEWNET = 0x40000000


class Cluster:
    """A one-node Kubernetes."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        """Start nothing yet.

        Args:
            directory: Where it was built, and where its files will be.
            environ: Settings of the script.
        """
        self.directory = directory
        self._environ = environ
        self.kubeconfig = directory / "run" / "kubeconfig"

    def run(self, *words: str) -> None:
        """Run the script."""
        subprocess.run(
            [SCRIPT, *words, str(self.directory)], check=True, env={**os.environ, **self._environ}, timeout=300
        )

    def enter(self) -> None:
        """Move this thread, and what it starts from now on, into the network of the cluster."""
        pid = (self.directory / "run" / "namespace").read_text().strip()
        _set_network(Path(f"/proc/{pid}/ns/net"))

    def kubectl(self, *words: str, content: str | None = None) -> str:
        """Run kubectl."""
        command = ["kubectl", f"--kubeconfig={self.kubeconfig}", *words]
        done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, *jobs: dict[str, Any]) -> None:
        """Create jobs."""
        self.kubectl("create", "-f", "-", content=yaml.safe_dump_all(jobs))

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.5)

    def wait_for_pods(self, namespace: str, phase: str, count: int = 1) -> None:
        """Wait until a number of pods are in a phase."""

        def there() -> bool:
            found = self.kubectl("-n", namespace, "get", "pods", "-o", "jsonpath={.items[*].status.phase}")
            return found.split().count(phase) >= count

        self.wait_until(there, f"{count} pods that are {phase}")


def _set_network(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {path}")
    finally:
        os.close(descriptor)


def built() -> Path:
    """Return where the cluster is built; skip the test where it is not, or cannot run."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the cluster runs in namespaces of its own")
    missing = [one for one in ("containerd", "etcd", "kubectl", "nsenter", "unshare") if shutil.which(one) is None]
    directory = Path(os.environ.get("KUBERNETES_DIR", BUILT))
    if missing or not (directory / "kube").exists():
        pytest.skip(f"{SCRIPT.name} build has not run: {', '.join(missing) or f'{directory}/kube'} is missing")
    return directory


@contextmanager
def running_cluster(**environ: str) -> Iterator[Cluster]:
    """Start a cluster, and move this process into its network meanwhile; skip the test where none is built.

    Args:
        **environ: Settings of the script.
    """
    found = Cluster(built(), environ)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        found.run("up")
        found.enter()
        yield found
    finally:
        _set_network(Path(f"/proc/self/fd/{own}"))
        os.close(own)
        found.run("down")
