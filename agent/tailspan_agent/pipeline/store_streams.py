"""`StoreStreams`: which log stream of its pipeline a job's lines go to, so that a store accepts lines of any age.

Loki makes one stream of the jobs of a pipeline, and rejects lines that are more than an hour behind the newest line of
their stream. Jobs that print now share the main stream. A job that catches up (the agent was away, a backfill) writes
into a further stream, ``service.instance.id = backfill``, or ``backfill-1`` and so on while another job that overlaps
it in time has that one. Jobs that follow each other share a stream: `StreamOrder` lets the oldest one go first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain, count
from time import monotonic

from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES

__all__ = ["MAIN_STREAM", "LabelValues", "LogNames", "StoreStreams", "may_be_too_old"]

MAIN_STREAM = 0
_WINDOW_NS = 30 * 60 * 1_000_000_000
"""Half of Loki's out-of-order window (``max_chunk_age / 2``, one hour by default): room for what is in flight."""


_IDLE_S = 3600.0
"""After this time without a line, a store has closed a stream (Loki: ``ingester.chunk_idle_period``, 30 minutes)."""

# Source: Loki 3, `distributor.otlp_config.default_resource_attributes_as_index_labels`, without those that jobs cannot
# set.
_LABELS = frozenset(
    {
        *("cloud.availability_zone", "cloud.region", "container.name"),
        *("deployment.environment", "deployment.environment.name"),
        *("k8s.cluster.name", "k8s.container.name", "k8s.cronjob.name", "k8s.daemonset.name", "k8s.deployment.name"),
        *("k8s.job.name", "k8s.namespace.name", "k8s.pod.name", "k8s.replicaset.name", "k8s.statefulset.name"),
    }
)
_MANY_VALUES = 20
_MOST_LABELS = 1000
# A name may have a date or an id in it. What is dropped is read from the store again.
_MOST_PIPELINES = 4096

_log = logging.getLogger(__name__)


def may_be_too_old(times_ns: Sequence[int], span_ns: int) -> bool:
    """Return whether a store may reject some lines of a page, whatever their stream, and accept the others.

    Args:
        times_ns: The times of the lines in their order, in ns since the epoch.
        span_ns: The time between the oldest and the newest of them, in ns.
    """
    if span_ns <= _WINDOW_NS:
        return False
    newest_ns = accumulate(times_ns, max)
    return any(time_ns < newest - _WINDOW_NS for time_ns, newest in zip(times_ns, newest_ns, strict=True))


class LogNames:
    """The ``service.name`` of logs: the job's name, while a store takes a stream for it.

    A store limits its open streams (Loki: 5,000 by default) and rejects all logs beyond. So the number of names in use
    is limited, and the logs of further jobs share the name `OTHER_PIPELINES`; ``cicd.pipeline.name`` still differs.

    Args:
        limit: Maximum number of names in use.
        folded: Called for each job whose logs get the shared name.
        clock_s: Returns the time in seconds.
    """

    def __init__(self, limit: int, folded: Callable[[], object], *, clock_s: Callable[[], float] = monotonic) -> None:
        self._limit = limit
        self._folded = folded
        self._clock_s = clock_s
        self._used_s: dict[str, float] = {}
        self._warned = False

    def __len__(self) -> int:
        """Return the number of names in use."""
        return len(self._used_s)

    def choose(self, job_name: str, current: str = "") -> str:
        """Return the name for the next lines of a job.

        Args:
            job_name: The job's name.
            current: The name of its last lines; empty for the first ones.
        """
        now_s = self._clock_s()
        if job_name not in self._used_s and len(self._used_s) >= self._limit:
            self._used_s = {name: at_s for name, at_s in self._used_s.items() if at_s > now_s - _IDLE_S}
            if len(self._used_s) >= self._limit:
                if current != OTHER_PIPELINES:
                    self._fold()
                return OTHER_PIPELINES
        self._used_s[job_name] = now_s
        return job_name

    def _fold(self) -> None:
        self._folded()
        if not self._warned:
            self._warned = True
            _log.warning(
                "more than %d job names within an hour: logs of further jobs share service.name %s, as stores limit"
                " their streams (Loki: max_global_streams_per_user); raise agent.max_log_names if yours allows it",
                self._limit,
                OTHER_PIPELINES,
            )


class LabelValues:
    """Warns of attributes of jobs that make a stream for each run.

    Loki makes labels of some resource attributes: with the name of a pod, each run of a pipeline is a stream. Values
    are counted, because the same key may have a few values only.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], set[int]] = {}

    def note(self, job_name: str, attributes: Mapping[str, str]) -> None:
        """Note the attributes of a job; log a warning once a label of its pipeline has many values."""
        for key in _LABELS & attributes.keys():
            if len(self._values) < _MOST_LABELS:
                self._values.setdefault((job_name, key), set())
            values = self._values.get((job_name, key))
            if values is None or len(values) > _MANY_VALUES:
                continue
            values.add(hash(attributes[key]))
            if len(values) > _MANY_VALUES:
                _log.warning(
                    "attribute %s has more than %d values in pipeline %s: Loki makes a label of it, so a stream for"
                    " each value; use another key (`tailspan run --attr`, agent.watch.attributes)",
                    key,
                    _MANY_VALUES,
                    job_name,
                )


class StoreStreams:
    """The streams of all pipelines, and the newest line that was queued for each.

    Args:
        stored: Returns the newest line of each stream of a pipeline, as stored by an earlier process: stream number to
            ns since the epoch.
    """

    def __init__(self, stored: Callable[[str], Mapping[int, int]]) -> None:
        self._stored = stored
        self._newest: dict[tuple[str, str], dict[int, int]] = {}

    def choose(
        self,
        service_name: str,
        job_name: str,
        current: int,
        oldest_ns: int,
        newest_ns: int,
        *,
        ended: bool,
        now_ns: int,
    ) -> int:
        """Return the stream for some lines of a job, and note that they go there.

        Args:
            service_name: The service of the job.
            job_name: The job's name.
            current: The stream of the job's last lines.
            oldest_ns: The time of the oldest of the lines, in ns since the epoch.
            newest_ns: The time of the newest of them.
            ended: Whether the job has ended: then it does not return to the main stream.
            now_ns: The present time, in ns since the epoch.
        """
        if oldest_ns >= now_ns - _WINDOW_NS and not (ended and current):
            return MAIN_STREAM
        newest = self._newest.pop((service_name, job_name), None)
        if newest is None:
            newest = dict(self._stored(job_name))
            if len(self._newest) >= _MOST_PIPELINES:
                del self._newest[next(iter(self._newest))]
        self._newest[service_name, job_name] = newest
        candidates = chain([current] if current else [], count(1))
        stream = next(
            number for number in candidates if number not in newest or oldest_ns >= newest[number] - _WINDOW_NS
        )
        newest[stream] = max(newest.get(stream, newest_ns), newest_ns)
        return stream
