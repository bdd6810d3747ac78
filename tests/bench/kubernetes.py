"""W16: a thousand running pods whose logs are followed, among ten thousand ended jobs of a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import Usage, cpu_of, peak_rss, started, tailspan
from tests.bench.receiver import RECORD, Receiver, receiving
from tests.bench.scale import Scale
from tests.bench.table import MIB, Goal, Row
from tests.fakes.kubernetes import FakeJob, FakeKubernetes

__all__ = ["followed_pods"]

_RUNNING, _ENDED = 1_000, 10_000
_SETTLE_S, _WATCH_S = 20.0, 60.0


def followed_pods(scale: Scale, directory: Path) -> Iterator[Row]:
    """Yield what an agent costs whose pods are silent, then with a line a second from each."""
    with receiving(directory) as receiver, FakeKubernetes() as cluster:
        _add_ended(cluster, scale.of(_ENDED))
        jobs = [cluster.add_job(f"running-{number}") for number in range(scale.of(_RUNNING))]
        for job in jobs:
            job.add_pod().main.write("started")
        config = _config(cluster, receiver, directory)
        begun_s = time.monotonic()
        with started(tailspan("agent", "run", "--config", str(config)), log=directory / "agent.log") as (pid, _):
            while cluster.open_streams() < len(jobs):
                if time.monotonic() - begun_s > 300:
                    raise RuntimeError(f"W16: {cluster.open_streams()} of {len(jobs)} logs are followed")
                time.sleep(0.2)
            yield Row(case="W16 kubernetes, all logs followed after", figure=time.monotonic() - begun_s, unit="s")
            yield Row(case="W16 kubernetes, requests until then", figure=len(cluster.requests), unit="requests")
            time.sleep(_SETTLE_S)
            yield from _silent(cluster, pid, _WATCH_S if scale.factor >= 1 else _WATCH_S / 3)
            receiver.counts()
            yield _speaking(jobs, receiver, pid)
            yield Row(case="W16 kubernetes, peak memory", figure=peak_rss(pid) / MIB, unit="MiB", goal=Goal(400))


def _silent(cluster: FakeKubernetes, pid: int, watched_s: float) -> Iterator[Row]:
    requests, sent, cpu_s = len(cluster.requests), cluster.sent_bytes, cpu_of(pid)
    time.sleep(watched_s)
    share = (cpu_of(pid) - cpu_s) / watched_s * 100
    yield Row(case="W16 kubernetes, silent", figure=share, unit="% of a core", goal=Goal(10))
    for what, count in (("requests", len(cluster.requests) - requests), ("bytes", cluster.sent_bytes - sent)):
        yield Row(case=f"W16 kubernetes, silent, {what}", figure=count * 60 / watched_s, unit=f"{what}/min")


def _speaking(jobs: list[FakeJob], receiver: Receiver, pid: int) -> Row:
    cpu_s, begun_s, lines = cpu_of(pid), time.monotonic(), 0
    for second in range(10):
        for job in jobs:
            job.pods[0].main.write(f"line{RECORD.decode()}{second} of a job that says something each second")
        lines += len(jobs)
        time.sleep(max(0.0, begun_s + second + 1 - time.monotonic()))
    arrived, deadline_s = 0, time.monotonic() + 60
    while arrived < lines and time.monotonic() < deadline_s:
        time.sleep(0.1)
        arrived += receiver.counts()["records"]
    if arrived < lines:
        raise RuntimeError(f"W16: {arrived} records came of {lines} lines")
    usage = Usage(cpu_of(pid) - cpu_s, time.monotonic() - begun_s, peak_rss(pid))
    return Row(case="W16 kubernetes, a line a second each", usage=usage, lines=lines)


def _add_ended(cluster: FakeKubernetes, count: int) -> None:
    for number in range(count):
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 30 * 86400 - number))
        job = cluster.add_job(f"ended-{number}", creationTimestamp=made, publish=False)
        condition = {"type": "Complete", "status": "True", "lastTransitionTime": made}
        job.status |= {"conditions": [condition], "completionTime": made, "succeeded": 1}
        job.publish("ADDED")
        pod = job.add_pod()
        pod.main.end(publish=False)
        pod.end()


def _config(cluster: FakeKubernetes, receiver: Receiver, directory: Path) -> Path:
    path = directory / "config.toml"
    path.write_text(
        f'[services.kubernetes]\nkubeconfig = "{cluster.kubeconfig(directory)}"\nrequests_per_second = 200\n'
        f'[agent]\nstate_dir = "{directory}/agent"\nlisten = ""\n'
        '[[agent.watch]]\nservice = "kubernetes"\ndiscover = true\nlookback = "1d"\n'
        f'[otlp]\nendpoint = "{receiver.http_url}"\n'
    )
    return path
