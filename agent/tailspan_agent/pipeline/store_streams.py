"""`StoreStreams`: which log stream of its pipeline a job's lines go to, so that a store accepts lines of any age.

Loki makes one stream of the jobs of a pipeline, and rejects lines that are more than an hour behind the newest line of
their stream. Jobs that print now share the main stream. A job that catches up (the agent was away, a backfill) writes
into a further stream, ``service.instance.id = backfill``, or ``backfill-1`` and so on while another job that overlaps
it in time has that one. Jobs that follow each other share a stream: `StreamOrder` lets the oldest one go first.

A store may have lines that were not acknowledged: those of a request whose answer was lost, or that was in flight when
the agent was killed. They are sent again. So the lines of a stream in one request are at most half an hour apart, or
Loki would reject the first ones as too far behind the last ones, which it has already. And the newest line of a stream
is stored before it is sent, so that the next process knows what the store may have.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from time import monotonic
from weakref import WeakValueDictionary

from tailspan.logs.page import LogPage
from tailspan_agent.analysis.pipeline_names import OTHER_PIPELINES

__all__ = ["MAIN_STREAM", "WINDOW_NS", "LabelValues", "LogNames", "StoreStreams", "may_be_too_old", "parts_in_time"]

MAIN_STREAM = 0
WINDOW_NS = 30 * 60 * 1_000_000_000
"""Half of Loki's out-of-order window (``max_chunk_age / 2``, one hour by default): room for what is in flight."""


_SEARCH_S = 10.0
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
_MOST_SHARED = 500
"""Further streams of the name that many jobs share."""

_log = logging.getLogger(__name__)


def may_be_too_old(times_ns: Sequence[int], span_ns: int) -> bool:
    """Return whether a store may reject some lines of a page, whatever their stream, and accept the others.

    Args:
        times_ns: The times of the lines in their order, in ns since the epoch.
        span_ns: The time between the oldest and the newest of them, in ns.
    """
    if span_ns <= WINDOW_NS:
        return False
    newest_ns = accumulate(times_ns, max)
    return any(time_ns < newest - WINDOW_NS for time_ns, newest in zip(times_ns, newest_ns, strict=True))


def parts_in_time(page: LogPage) -> Iterator[LogPage]:
    """Yield the lines of a page in parts that a store accepts again after it has stored them all.

    Args:
        page: A page in order of time; see `may_be_too_old`.
    """
    first, position, oldest_ns, newest_ns = 0, 0, page.runs[0].time_unix_nano, page.runs[0].time_unix_nano
    for number, run in enumerate(page.runs):
        oldest_ns, newest_ns = min(oldest_ns, run.time_unix_nano), max(newest_ns, run.time_unix_nano)
        if newest_ns - oldest_ns > WINDOW_NS:
            part = page.part(first, number, position)
            yield part
            first, position = number, position + part.line_count
            oldest_ns = newest_ns = run.time_unix_nano
    # Not cut without need: a page keeps its text in one piece, and a part of it does not.
    yield page.part(first, len(page.runs), position) if first else page


class LogNames:
    """The ``service.name`` of logs: the job's name, while a store takes a stream for it.

    A store limits its open streams (Loki: 5,000 by default) and rejects all logs beyond. So the number of names in use
    is limited, and the logs of further jobs share the name `OTHER_PIPELINES`; ``cicd.pipeline.name`` still differs.
    Each further stream of a name counts as a name; see `StoreStreams`.

    Args:
        limit: Maximum number of names in use.
        folded: Called for each job whose logs get the shared name.
        clock_s: Returns the time in seconds.
    """

    def __init__(self, limit: int, folded: Callable[[], object], *, clock_s: Callable[[], float] = monotonic) -> None:
        self._limit = limit
        self._folded = folded
        self._clock_s = clock_s
        self._used_s: dict[tuple[str, int], float] = {}
        self._searched_s = float("-inf")
        self._warned = False

    def __len__(self) -> int:
        """Return the number of names in use."""
        return len(self._used_s)

    def take(self, job_name: str, stream: int = MAIN_STREAM, *, is_shared: bool = False) -> bool:
        """Use a name for the next lines of a job; return False if they must share one.

        Args:
            job_name: The job's name.
            stream: The stream of the name.
            is_shared: Whether its last lines share a name already, so that the job is counted.
        """
        used, now_s = (job_name, stream), self._clock_s()
        if used not in self._used_s and len(self._used_s) >= self._limit:
            # A hundred thousand jobs may each have a name of their own: not for each of them.
            if now_s - self._searched_s >= _SEARCH_S:
                self._used_s = {known: at_s for known, at_s in self._used_s.items() if at_s > now_s - _IDLE_S}
                self._searched_s = now_s
            if len(self._used_s) >= self._limit:
                if not is_shared:
                    self._fold()
                return False
        self._used_s[used] = now_s
        return True

    def _fold(self) -> None:
        self._folded()
        if not self._warned:
            self._warned = True
            _log.warning(
                "more than %d log streams (of job names, their failures, their old lines) within an hour: logs of"
                " further jobs share service.name %s, as stores limit their streams (Loki:"
                " max_global_streams_per_user); raise agent.max_log_names if yours allows it",
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
        stored: Returns the newest line that was sent to each stream of a pipeline, also by an earlier process: stream
            number to ns since the epoch.
    """

    def __init__(self, stored: Callable[[str], Mapping[int, int]]) -> None:
        self._stored = stored
        self._newest: dict[tuple[str, str], dict[int, int]] = {}
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def hold(self, service_name: str, log_name: str) -> asyncio.Lock:
        """Return the lock of the streams of a name: what is chosen in an order must be queued in this order.

        Args:
            service_name: The service of the jobs.
            log_name: The job's name, or the one that many jobs share.
        """
        return self._locks.setdefault((service_name, log_name), asyncio.Lock())

    def find(
        self,
        service_name: str,
        log_name: str,
        current: int,
        oldest_ns: int,
        *,
        is_past: bool,
        now_ns: int,
    ) -> int:
        """Return the stream for some lines of a job.

        Args:
            service_name: The service of the job.
            log_name: The job's name, or the one that many jobs share.
            current: The stream of the job's last lines.
            oldest_ns: The time of the oldest of the lines, in ns since the epoch.
            is_past: Whether the job does not return to the main stream.
            now_ns: The present time, in ns since the epoch.
        """
        if oldest_ns >= now_ns - WINDOW_NS and not is_past:
            return MAIN_STREAM
        newest = self._newest_of(service_name, log_name)
        for stream in sorted(newest, key=lambda number: (number != current, number)):
            if oldest_ns >= newest[stream] - WINDOW_NS:
                return stream
        if log_name == OTHER_PIPELINES and len(newest) >= _MOST_SHARED:
            return min(newest, key=newest.__getitem__)
        return next(number for number in count(len(newest) + 1) if number not in newest)

    def note(self, service_name: str, log_name: str, stream: int, oldest_ns: int, newest_ns: int) -> bool:
        """Note that some lines go to a stream; return whether they are too far behind others there.

        Args:
            service_name: The service of the job.
            log_name: The job's name, or the one that many jobs share.
            stream: The stream.
            oldest_ns: The time of the oldest of the lines, in ns since the epoch.
            newest_ns: The time of the newest of them.
        """
        if stream == MAIN_STREAM:
            return False
        newest = self._newest_of(service_name, log_name)
        before_ns = newest.get(stream, oldest_ns)
        newest[stream] = max(before_ns, newest_ns)
        return oldest_ns < before_ns - WINDOW_NS

    def _newest_of(self, service_name: str, job_name: str) -> dict[int, int]:
        newest = self._newest.pop((service_name, job_name), None)
        if newest is None:
            newest = dict(self._stored(job_name))
            if len(self._newest) >= _MOST_PIPELINES:
                del self._newest[next(iter(self._newest))]
        self._newest[service_name, job_name] = newest
        return newest
