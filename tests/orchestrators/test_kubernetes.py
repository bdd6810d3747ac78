"""Jobs of a real Kubernetes, relayed by a real agent: equal to what the containers printed.

The cluster runs in namespaces of its own, which this process enters; see `kubernetes.sh`. What the containers print
follows from the manifests, so a line that is missing, extra or of another attempt is seen.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.collector import Collector
from tests.orchestrators.harness import Relay, by_task, results
from tests.orchestrators.one_node import Cluster, running_cluster

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

_ROTATION = {"LOG_MAX_SIZE": "100Ki", "LOG_MAX_FILES": "2", "LOG_MONITOR": "3s"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster for all tests of this module, whose network this process is in meanwhile."""
    with running_cluster(**_ROTATION) as found:
        yield found


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test."""
    name = request.function.__name__.removeprefix("test_").replace("_", "-")[:40]
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def job(
    namespace: str, name: str, script: str, *, policy: str = "Never", pod: dict[str, Any] | None = None, **spec: Any
) -> Any:
    """Return the manifest of a job whose container runs a shell script."""
    container = {"name": "main", "image": "busybox:1", "imagePullPolicy": "Never", "command": ["sh", "-c", script]}
    found = {"restartPolicy": policy, "containers": [container], "dnsPolicy": "None", **(pod or {})}
    found["dnsConfig"] = {"nameservers": ["192.0.2.1"]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"template": {"spec": found}, **spec},
    }


def counted(prefix: str, count: int, pause: str = "0") -> str:
    """Return a script that prints numbered lines."""
    return f"i=0; while [ $i -lt {count} ]; do echo {prefix} $i; i=$((i+1)); sleep {pause}; done"


def numbered(prefix: str, count: int) -> Counter[str]:
    """Return what `counted` prints."""
    return Counter(f"{prefix} {number}" for number in range(count))


def relay_of(cluster: Cluster, namespace: str, collector: Collector, directory: Path, **keys: str) -> Relay:
    """Return agents for one namespace."""
    found = {"kubeconfig": str(cluster.kubeconfig), "namespace": namespace, **keys}
    section = "\n".join(f'{key} = "{value}"' for key, value in found.items())
    return Relay("kubernetes", section, collector, directory)


def bodies(collector: Collector) -> Counter[str]:
    """Return the texts that arrived, each uid once."""
    rows = {row.attributes["log.record.uid"]: row.body for row in collector.log_records() if not row.event_name}
    return Counter(rows.values())


HELLO = Counter(["hello"])


def wait_for_lines(collector: Collector, expected: Counter[str], seconds: float = 180) -> None:
    """Wait until the expected lines are there; fail if other ones are."""
    deadline = time.monotonic() + seconds
    while bodies(collector) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    found = bodies(collector)
    missing, extra = expected - found, found - expected
    assert (list(missing)[:20], list(extra)[:20]) == ([], []), f"{missing.total()} missing, {extra.total()} extra"


def start_ready(cluster: Cluster, namespace: str, collector: Collector, relay: Relay) -> None:
    """Start an agent, and wait until it relays: what was rotated away or deleted before is lost."""
    relay.start()
    cluster.apply(job(namespace, "hello", "echo hello"))
    cluster.wait_until(lambda: bodies(collector)["hello"] == 1, "the first line")


def wait_for_runs(relay: Relay, runs: int, attempts: int) -> tuple[dict[str, str], dict[tuple[str, str, int], str]]:
    """Return the results of runs by name, and of attempts by run, task and attempt."""
    spans = relay.spans(runs=runs, attempts=attempts)
    tasks = {
        (key[0].partition("/")[2].partition(":")[0], *key[1:]): span.attributes["cicd.pipeline.task.run.result"]
        for key, span in by_task(spans).items()
    }
    return {key.partition("/")[2].partition(":")[0]: value for key, value in results(spans).items()}, tasks


def test_kinds_of_jobs(cluster: Cluster, namespace: str, collector: Collector, tmp_path: Path) -> None:
    """Every kind of job and of end: states, attempts and lines; meanwhile agents are killed and stopped."""
    long = job(namespace, "long", counted("long", 200, "0.1") + "; echo to-stderr >&2; printf no-newline")
    spec = long["spec"]["template"]["spec"]
    spec["initContainers"] = [{**spec["containers"][0], "name": "prep", "command": ["sh", "-c", "echo prepared"]}]
    spec["containers"].append(
        {**spec["containers"][0], "name": "second", "command": ["sh", "-c", counted("second", 50)]}
    )
    with relay_of(cluster, namespace, collector, tmp_path) as relay:
        cluster.apply(long)
        relay.interrupt(signal.SIGKILL)
        relay.interrupt(signal.SIGTERM)
        relay.start()
        cluster.apply(
            job(namespace, "retries", "echo attempt; exit 3", backoffLimit=2),
            job(namespace, "in-place", "echo in place; sleep 1; exit 4", policy="OnFailure", backoffLimit=2),
            job(namespace, "at-once", "echo at once; exit 5", policy="OnFailure", backoffLimit=1),
            job(
                namespace,
                "indexed",
                "echo index $JOB_COMPLETION_INDEX; [ $JOB_COMPLETION_INDEX != 1 ]",
                completions=3,
                parallelism=2,
                completionMode="Indexed",
                backoffLimitPerIndex=1,
                maxFailedIndexes=2,
            ),
            job(
                namespace,
                "deadline",
                "trap 'echo got TERM; echo last; exit 1' TERM; echo begun; while true; do sleep 0.1; done",
                activeDeadlineSeconds=6,
                pod={"terminationGracePeriodSeconds": 10},
            ),
            job(namespace, "gone", "echo gone soon", ttlSecondsAfterFinished=0),
            job(namespace, "binary", r"printf '\377\376\000x\n\n\033[31mred\033[0m\na\rb\n'"),
            job(namespace, "wide", "head -c 1000000 /dev/zero | tr '\\000' x; echo; echo after"),
            job(namespace, "parallel", "echo of many", completions=6, parallelism=6),
        )
        expected = numbered("long", 200) + numbered("second", 50) + Counter({"attempt": 3, "in place": 3, "at once": 2})
        expected += Counter(["prepared", "to-stderr", "no-newline", "index 0", "index 2", "begun", "got TERM", "last"])
        expected += Counter({"index 1": 2, "gone soon": 1, "after": 1, "of many": 6})
        expected += Counter(["\ufffd\ufffdx", "", "red", "b"])
        cluster.wait_until(lambda: sum(bodies(collector).values()) > expected.total(), "all lines")
        runs, tasks = wait_for_runs(relay, 10, 26)
    found = bodies(collector)
    # A long line comes in several records.
    long_parts = {text: number for text, number in found.items() if text and not text.strip("x")}
    assert sum(len(text) * number for text, number in long_parts.items()) == 1_000_000
    found -= Counter(long_parts)
    assert (dict(expected - found), dict(found - expected)) == ({}, {})
    assert runs == {
        "long": "success",
        "retries": "failure",
        "in-place": "failure",
        "at-once": "failure",
        "indexed": "failure",
        "deadline": "timeout",
        "gone": "success",
        "binary": "success",
        "wide": "success",
        "parallel": "success",
    }
    assert {key[1:] for key in tasks if key[0] == "long"} == {("main", 1), ("prep", 1), ("second", 1)}
    for name, attempts in (("retries", 3), ("in-place", 3), ("at-once", 2)):
        assert {key: value for key, value in tasks.items() if key[0] == name} == {
            (name, "main", attempt): "failure" for attempt in range(1, attempts + 1)
        }
    assert {key[1:]: value for key, value in tasks.items() if key[0] == "indexed"} == {
        ("0/main", 1): "success",
        ("1/main", 1): "failure",
        ("1/main", 2): "failure",
        ("2/main", 1): "success",
    }
    assert tasks["deadline", "main", 1] in ("timeout", "failure")


def test_rotation(cluster: Cluster, namespace: str, collector: Collector, tmp_path: Path) -> None:
    """The kubelet rotates logs every few seconds and keeps two files: a poll would lose most, a follower nothing.

    In between the agent is stopped and starts again at once.
    """
    count, line = 30_000, "y" * 80
    script = (
        f"i=0; while [ $i -lt {count} ]; do echo {line} $i; i=$((i+1)); [ $((i % 150)) = 0 ] && sleep 0.1; done; true"
    )
    with relay_of(cluster, namespace, collector, tmp_path) as relay:
        start_ready(cluster, namespace, collector, relay)
        cluster.apply(job(namespace, "noisy", script), job(namespace, "noisy-too", script.replace("yyy ", "zzz ")))
        expected = HELLO + numbered(line, count) + numbered(line[:-3] + "zzz", count)
        cluster.wait_for_pods(namespace, "Succeeded", 3)
        wait_for_lines(collector, expected)
        runs, _ = wait_for_runs(relay, 3, 3)
    assert set(runs.values()) == {"success"}


def test_two_hundred_jobs_at_once(cluster: Cluster, namespace: str, collector: Collector, tmp_path: Path) -> None:
    """Short jobs, each third one deleted at its end: each line, state and attempt once."""
    count = 200
    with relay_of(cluster, namespace, collector, tmp_path) as relay:
        start_ready(cluster, namespace, collector, relay)
        cluster.apply(
            *(
                job(
                    namespace,
                    f"short-{number}",
                    f"echo first of {number}; echo last of {number}; exit {number % 2}",
                    backoffLimit=0,
                    **({"ttlSecondsAfterFinished": 0} if number % 3 == 0 else {}),
                )
                for number in range(count)
            )
        )
        expected = HELLO + Counter(f"{word} of {number}" for number in range(count) for word in ("first", "last"))
        cluster.wait_until(lambda: sum(bodies(collector).values()) >= expected.total(), "all lines", 900)
        wait_for_lines(collector, expected)
        runs, tasks = wait_for_runs(relay, count + 1, count + 1)
    assert runs.pop("hello") == "success"
    assert runs == {f"short-{number}": "failure" if number % 2 else "success" for number in range(count)}
    # One each; its number is 2 if the kubelet could not create the container in time, and tried again.
    assert sorted(key[:2] for key in tasks) == sorted((name, "main") for name in [*runs, "hello"])


def test_jobs_that_are_deleted(cluster: Cluster, namespace: str, collector: Collector, tmp_path: Path) -> None:
    """A job that is deleted while it prints: its last lines are there, and it is canceled; its name is used again."""
    script = (
        "trap 'echo got TERM; i=0; while [ $i -lt 50 ]; do echo late $i; i=$((i+1)); done; exit 0' TERM;"
        "echo begun; while true; do sleep 0.1; done"
    )
    with relay_of(cluster, namespace, collector, tmp_path) as relay:
        start_ready(cluster, namespace, collector, relay)
        for turn in range(2):
            cluster.apply(job(namespace, "deleted", script))
            cluster.wait_until(lambda turn=turn: bodies(collector)["begun"] == turn + 1, "its first line")
            cluster.kubectl("-n", namespace, "delete", "job", "deleted")
            cluster.wait_until(lambda turn=turn: bodies(collector)["late 49"] == turn + 1, "its last line", 60)
        one = Counter(["begun", "got TERM"]) + numbered("late", 50)
        wait_for_lines(collector, HELLO + one + one)
        spans = relay.spans(runs=3, attempts=3)
    assert sorted(results(spans).values()) == ["cancellation", "cancellation", "success"]


def test_parts_that_are_away(cluster: Cluster, namespace: str, collector: Collector, tmp_path: Path) -> None:
    """The API server is away for a minute and comes back with other tokens; then the kubelet restarts."""
    token = tmp_path / "token"
    token.write_text("agenttoken")
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"] = [{"name": "u", "user": {"tokenFile": str(token)}}]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    tokens = cluster.directory / "run" / "tokens.csv"
    with relay_of(cluster, namespace, collector, tmp_path, kubeconfig=str(tmp_path / "kubeconfig")) as relay:
        start_ready(cluster, namespace, collector, relay)
        cluster.apply(
            job(namespace, "steady", counted("steady", 1200, "0.1")),
            job(namespace, "short", counted("short", 150, "0.1")),
        )
        cluster.wait_until(lambda: bodies(collector)["short 20"] == 1, "the first lines")
        cluster.run("stop", "kube-apiserver")
        tokens.write_text(tokens.read_text().replace("agenttoken", "another-token"))
        time.sleep(60)
        cluster.run("start", "kube-apiserver")
        # The token of the agent is refused until its file is replaced.
        time.sleep(5)
        token.write_text("another-token")
        cluster.wait_until(lambda: bodies(collector)["short 149"] == 1, "the end of the short job")
        cluster.run("stop", "kubelet")
        time.sleep(5)
        cluster.run("start", "kubelet")
        wait_for_lines(collector, HELLO + numbered("steady", 1200) + numbered("short", 150), 240)
        runs, _ = wait_for_runs(relay, 3, 3)
    assert runs == {"hello": "success", "steady": "success", "short": "success"}


def test_unusual_jobs(cluster: Cluster, namespace: str, collector: Collector, tmp_path: Path) -> None:
    """Sidecars, a job that is parked and goes on, pods that are deleted, memory limits, jobs that cannot start."""
    sidecar = job(namespace, "sidecar", "sleep 3; echo main is done")
    spec = sidecar["spec"]["template"]["spec"]
    script = "trap 'echo side ends; exit 0' TERM; echo side begins; while true; do sleep 0.1; done"
    spec["initContainers"] = [
        {**spec["containers"][0], "name": "side", "command": ["sh", "-c", script], "restartPolicy": "Always"}
    ]
    memory = job(namespace, "memory", "echo eats; tail /dev/zero", backoffLimit=0)
    memory["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "16Mi"}}
    nowhere = job(namespace, "nowhere", "true", pod={"nodeSelector": {"there-is": "no-such-node"}})
    unpullable = job(namespace, "unpullable", "true")
    unpullable["spec"]["template"]["spec"]["containers"][0]["image"] = "no-such-image:1"
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "nightly", "namespace": namespace},
        "spec": {
            "schedule": "* * * * *",
            "jobTemplate": {"spec": job(namespace, "x", "echo it is night")["spec"]},
        },
    }
    ignored = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42]}}]}
    with relay_of(cluster, namespace, collector, tmp_path) as relay:
        start_ready(cluster, namespace, collector, relay)
        cluster.apply(
            sidecar,
            memory,
            nowhere,
            unpullable,
            cron,
            job(namespace, "parked", "echo ran at last", suspend=True),
            job(namespace, "moved", "echo try; sleep 15; echo end of try", backoffLimit=3),
            job(namespace, "left-alone", "echo alone; sleep 12; echo still alone"),
            job(namespace, "policy", "echo never again; exit 42", backoffLimit=5, podFailurePolicy=ignored),
            job(namespace, "silent", "true"),
        )
        cluster.wait_until(lambda: bodies(collector)["try"] == 1 and bodies(collector)["alone"] == 1, "first lines")
        cluster.kubectl("-n", namespace, "delete", "pod", "-l", "job-name=moved", "--grace-period=1")
        cluster.kubectl("-n", namespace, "delete", "job", "left-alone", "--cascade=orphan")
        patch = '{"spec":{"suspend":false}}'
        cluster.kubectl("-n", namespace, "patch", "job", "parked", "-p", patch)
        cluster.wait_until(lambda: bodies(collector)["it is night"] >= 1, "a run of the CronJob")
        cluster.kubectl("-n", namespace, "delete", "cronjob", "nightly", "--cascade=orphan")
        cluster.wait_until(lambda: bodies(collector)["end of try"] == 1, "the second try")
        cluster.kubectl("-n", namespace, "delete", "job", "nowhere", "unpullable")
        expected = HELLO + Counter({"try": 2, "it is night": bodies(collector)["it is night"]})
        expected += Counter(
            ["side begins", "main is done", "side ends", "eats", "ran at last", "end of try", "alone", "still alone"]
        )
        expected += Counter(["never again"])
        wait_for_lines(collector, expected)
        runs, tasks = wait_for_runs(relay, 10 + bodies(collector)["it is night"], 0)
    nights = [value for name, value in runs.items() if name.startswith("nightly-")]
    assert set(nights) == {"success"}
    assert {name: value for name, value in runs.items() if not name.startswith("nightly-")} == {
        "hello": "success",
        "sidecar": "success",
        "memory": "failure",
        "nowhere": "cancellation",
        "unpullable": "cancellation",
        "parked": "success",
        "moved": "success",
        "left-alone": "cancellation",
        "policy": "failure",
        "silent": "success",
    }
    named = ("moved", "sidecar", "memory", "policy", "left-alone")
    assert {key: value for key, value in tasks.items() if key[0] in named} == {
        ("left-alone", "main", 1): "success",
        ("moved", "main", 1): "failure",
        ("moved", "main", 2): "success",
        ("sidecar", "main", 1): "success",
        ("sidecar", "side", 1): "success",
        ("memory", "main", 1): "failure",
        ("policy", "main", 1): "failure",
    }
