"""`JobDiscovery`: which jobs are followed, and how many requests their discovery costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tailspan.config import Watch
from tailspan.errors import JobNotFoundError, ProtocolError, ServiceUnavailableError
from tailspan.models import ListedJob
from tailspan_agent.analysis.pipeline_names import PipelineNames
from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint.store import SqliteStore
from tailspan_agent.errors import AgentError
from tailspan_agent.metrics.agent import AgentMetrics, agent_resource
from tailspan_agent.pipeline.context import PipelineContext
from tailspan_agent.pipeline.store_streams import LogNames, StoreStreams
from tailspan_agent.pipeline.stream_order import StreamOrder
from tailspan_agent.receiver import discovery as discovery_module
from tailspan_agent.receiver.discovery import JobDiscovery, match
from tailspan_agent.receiver.lifecycle import TailState
from tailspan_agent.receiver.source import Source
from tailspan_agent.receiver.tailer import Tailer
from tests.fakes.agents import OddService, looped


def watch(**keys: Any) -> Watch:
    return Watch(service="fake", **({"discover": True} | keys))


@pytest.mark.parametrize(
    ("watches", "name", "found"),
    [
        ([watch(name="etl-*"), watch()], "etl-1", 0),
        ([watch(name="etl-*"), watch()], "web", 1),
        ([watch(name="etl-*"), watch(name="web")], "db", None),
        ([watch(name="etl-*", exclude=["*-test"]), watch(name="*-test")], "etl-test", 1),
        ([watch(exclude=["web", "db*"])], "db2", None),
        ([watch(exclude=["web", "db*"])], "Web", 0),
        ([watch(discover=False, jobs=["j1"])], "anything", 0),
        ([watch(discover=False, jobs=["other"])], "anything", None),
        ([watch(exclude=["*"], jobs=["j1"])], "named all the same", 0),
        ([watch(), watch(jobs=["j1"])], "", 0),
    ],
)
def test_the_first_watch_that_matches_wins(watches: list[Watch], name: str, found: int | None) -> None:
    """Case-sensitive globs on names, excluded names, and named jobs, in the order of the file."""
    assert match(watches, "j1", name) == (None if found is None else watches[found])


def test_the_largest_lookback_of_all_that_match_counts() -> None:
    """Watches that do not match do not count."""
    watches = [watch(name="etl", lookback=10, settle=3), watch(lookback=50), watch(name="web", lookback=99)]
    found = match(watches, "j1", "etl")
    assert found is not None
    assert (found.lookback, found.settle) == (50, 3)


def finish(tailer: Tailer) -> None:
    """Make a tailer that never ran one whose job is done."""
    tailer.lifecycle = tailer.lifecycle.to(TailState.DONE)


class Scene:
    """A discovery over a fake service whose list costs requests; its tailers never run."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.service = OddService("fake", page_lines=10, poll_max_s=30.0, polls_are_free=False)
        self.started: list[Tailer] = []
        self.relay = PipelineContext(
            store=store,
            queues=[],
            spans=None,
            stream_order=StreamOrder(),
            store_streams=StoreStreams(store.newest_by_stream),
            log_names=LogNames(100, lambda: None),
            health=AgentMetrics(agent_resource("tailspan-agent", "id", {})),
            redactor=None,
            otlp_resource={},
            names=PipelineNames(10),
            task_names=PipelineNames(10),
        )

    def discovery(self, *watches: Watch) -> JobDiscovery:
        return JobDiscovery(self.relay, Source(self.service), watches or (watch(),), start=self.started.append)

    def add(self, job_id: str, state: str = "RUNNING", *, hours_ago: float = 0, **fields: Any) -> None:
        when = datetime.now(UTC) - timedelta(hours=hours_ago)
        self.service.add_job(job_id, submitted_at=when, started_at=when)
        ended = {} if state in ("RUNNING", "PENDING") else {"finished_at": when}
        self.service.set_state(job_id, state, job_status_date=when, **ended, **fields)

    def ids(self) -> list[str]:
        """Return the jobs whose tailers were started since the last call."""
        found = sorted(tailer.job_id for tailer in self.started)
        self.started.clear()
        return found

    def asked(self, method: str) -> list[str]:
        """Return the job ids of the requests of a method since the last call."""
        found = [job_id for name, job_id in self.service.calls if name == method]
        self.service.calls[:] = [call for call in self.service.calls if call[0] != method]
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """See `Scene`."""
    store = SqliteStore(tmp_path)
    yield Scene(store)
    store.close()


@looped
async def test_jobs_are_found_once(scene: Scene) -> None:
    """Each list adds new jobs; known jobs are not started again, unwatched jobs never."""
    scene.add("j1")
    scene.add("other", job_name="web")
    discovery = scene.discovery(watch(name="j*"))
    await discovery.scan()
    assert scene.ids() == ["j1"]
    scene.add("j2")
    await discovery.scan()
    await discovery.scan()
    assert scene.ids() == ["j2"]
    assert sorted(discovery.tailers) == ["j1", "j2"]


@looped
async def test_jobs_that_are_dropped_while_they_are_listed_hold_up_no_other(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent lost them before their tailers were started: other jobs of their pipeline do not wait for them."""
    for number in range(12):
        scene.add(f"j{number}", job_name="etl")
    discovery, list_jobs = scene.discovery(), scene.service.list_jobs

    async def list_and_lose() -> AsyncIterator[Sequence[ListedJob]]:
        async for rows in list_jobs():
            yield rows
            assert discovery.drop(lambda job_id: False) == []

    monkeypatch.setattr(scene.service, "list_jobs", list_and_lose)
    await discovery.scan()
    assert (scene.ids(), discovery.tailers) == ([], {})
    order, newer = scene.relay.stream_order, object()
    order.join("fake/etl", newer, 10**18)
    async with asyncio.timeout(10):
        await order.turn("fake/etl", newer)


@looped
async def test_a_scan_reads_the_list_only_as_far_as_it_changed(scene: Scene) -> None:
    """After the first time, the list is read until all followed jobs were listed and a page had nothing new."""
    for number in range(95):
        scene.add(f"done-{number}", "SUCCEEDED", hours_ago=100)
    scene.add("long", hours_ago=1)
    for number in range(12):
        scene.add(f"recent-{number}", "SUCCEEDED", hours_ago=0.5)
    discovery = scene.discovery()
    await discovery.scan()
    assert scene.ids() == sorted(["long", *(f"recent-{number}" for number in range(12))])
    assert scene.service.list_pages == 2, "as far as lookback reaches"
    for tailer in list(discovery.tailers.values()):
        if tailer.job_id != "long":
            finish(tailer)
            discovery.forget(tailer)
    scene.service.list_pages = 0
    await discovery.scan()
    assert scene.service.list_pages == 2, "as far as the job that is followed"
    assert scene.ids() == []


@looped
async def test_the_search_for_an_unlisted_job_ends(scene: Scene) -> None:
    """A named job that is not listed makes one scan read the whole list, not each."""
    for number in range(40):
        scene.add(f"j{number}", "SUCCEEDED", hours_ago=100)
    scene.add("named")
    scene.service.unlisted.add("named")
    discovery = scene.discovery(watch(jobs=["named"]))
    await discovery.scan()
    assert scene.service.list_pages == 5
    scene.service.list_pages = 0
    await discovery.scan()
    assert scene.service.list_pages == 1


@looped
async def test_names_are_requested_once(scene: Scene) -> None:
    """A list without names costs one request per job, stored over restarts; none for jobs that are too old."""
    scene.service.lists_names = False
    scene.add("old", "SUCCEEDED", hours_ago=100)
    scene.add("j1", job_name="etl")
    scene.add("j2", job_name="web")
    discovery = scene.discovery(watch(name="etl"))
    await discovery.scan()
    await discovery.scan()
    assert (scene.ids(), sorted(scene.asked("get_job"))) == (["j1"], ["j1", "j2"])
    again = scene.discovery(watch(name="etl"))
    await again.scan()
    assert (scene.ids(), scene.asked("get_job")) == (["j1"], [])


@looped
async def test_a_named_job_belongs_to_the_watch_that_discovers_it_first(scene: Scene) -> None:
    """Its name is requested only if an earlier watch may match it."""
    scene.add("j1", job_name="etl")
    first = watch(name="etl", min_severity="WARN")
    await scene.discovery(first, watch(discover=False, jobs=["j1"])).scan()
    assert scene.started[0].watch == first
    scene.asked("get_job")
    await scene.discovery(watch(discover=False, jobs=["j1"])).scan()
    assert scene.asked("get_job") == []


@looped
async def test_lookback_is_that_of_the_watch(scene: Scene) -> None:
    """A job that ended before it is left out for good; a job that the store has is followed however old."""
    scene.add("old", "SUCCEEDED", hours_ago=5)
    scene.add("begun", "SUCCEEDED", hours_ago=500)
    scene.add("recent", "FAILED", hours_ago=1)
    scene.add("web", "SUCCEEDED", job_name="web", hours_ago=5)
    scene.store.add_job("fake", "begun", "begun", stream=0, ledger="{}")
    watches = (watch(name="web", lookback=6 * 3600), watch(lookback=2 * 3600))
    await scene.discovery(*watches).scan()
    assert scene.ids() == ["begun", "recent", "web"]


@looped
async def test_unfinished_jobs_need_no_list(scene: Scene) -> None:
    """A job that an earlier agent began is followed even if it is not listed; a finished one is not."""
    for job_id in ("begun", "done"):
        key = scene.store.add_job("fake", job_id, job_id, stream=0, ledger="{}").key
        if job_id == "done":
            scene.store.end_job(key, [], RunTotals("etl", "success"))
            scene.store.complete_logs(key)
            scene.add(job_id, "SUCCEEDED")
    await scene.discovery().scan()
    assert scene.ids() == ["begun"]


@looped
async def test_a_tailer_that_stopped_unfinished_is_started_again(scene: Scene) -> None:
    """A job whose tailer failed is found again; a finished one is not, and a deleted one only after a full scan."""
    for job_id in ("failed", "done", "missing"):
        scene.add(job_id)
    discovery = scene.discovery(watch(jobs=["missing"]))
    await discovery.scan()
    scene.ids()
    finish(discovery.tailers["done"])
    discovery.tailers["missing"].failure = JobNotFoundError("gone")
    for tailer in list(discovery.tailers.values()):
        discovery.forget(tailer)
    await discovery.scan()
    assert scene.ids() == ["failed"]


@looped
async def test_a_list_that_breaks_off_loses_nothing(scene: Scene) -> None:
    """Jobs found before the error are followed; the next scan finds the others."""
    scene.service.lists_names = False
    scene.add("second")
    scene.add("first")
    discovery = scene.discovery()
    scene.service.before_next("get_job", lambda: None, lambda: scene.service.fail_next("get_job", _AWAY))
    with pytest.raises(ServiceUnavailableError):
        await discovery.scan()
    assert scene.ids() == ["first"]
    await discovery.scan()
    assert scene.ids() == ["second"]


_AWAY = ServiceUnavailableError("away")


@looped
async def test_a_service_that_breaks_its_promises(scene: Scene) -> None:
    """A bug in a service plugin is an error like others: the next scan works."""
    scene.add("j1")
    scene.service.fail_next("list_jobs", KeyError("bug"))
    discovery = scene.discovery()
    with pytest.raises(AgentError, match="bug"):
        await discovery.scan()
    await discovery.scan()
    assert scene.ids() == ["j1"]


class _Sparse(OddService):
    async def list_jobs(self) -> AsyncIterator[Sequence[ListedJob]]:
        yield []
        async for page in super().list_jobs():
            yield page


@looped
async def test_a_page_of_the_list_may_be_empty(scene: Scene) -> None:
    """It is neither an error nor the end of the list: all jobs of a page may be gone."""
    scene.service = _Sparse("fake", page_lines=10, poll_max_s=30.0, polls_are_free=False)
    scene.add("j1")
    discovery = scene.discovery()
    await discovery.scan()
    assert scene.ids() == ["j1"]
    scene.add("j2")
    await discovery.scan()
    assert scene.ids() == ["j2"]


@looped
async def test_a_job_that_cannot_be_read_is_left_out_and_retried(scene: Scene) -> None:
    """It hides no other job, and is followed once it answers."""
    scene.service.lists_names = False
    scene.add("good")
    scene.add("bad")
    scene.service.fail_next("get_job", ProtocolError("no status"))
    discovery = scene.discovery()
    await discovery.scan()
    assert (scene.ids(), list(discovery.skipped)) == (["good"], ["bad"])
    await discovery.scan()
    assert (scene.ids(), list(discovery.skipped)) == (["bad"], [])


@looped
async def test_an_id_that_is_no_text_hides_no_other_job(scene: Scene) -> None:
    """A lone surrogate can be neither stored nor sent: such a job is reported and left out."""
    for job_id in ("before", "caf\udce9", "after"):
        scene.add(job_id, "SUCCEEDED", hours_ago=5)
    discovery = scene.discovery(watch(discover=True, lookback=86400))
    await discovery.scan()
    assert (set(scene.ids()), list(discovery.skipped)) == ({"before", "after"}, ["caf\udce9"])


@looped
async def test_changed_watches_match_every_job_again(scene: Scene) -> None:
    """Jobs that were left out before may match them."""
    scene.add("j1", "SUCCEEDED", hours_ago=5)
    discovery = scene.discovery(watch(lookback=3600))
    await discovery.scan()
    assert scene.ids() == []
    discovery.apply_watches([watch(lookback=10 * 3600)])
    await discovery.scan()
    assert scene.ids() == ["j1"]


def test_a_busy_agent_gathers_more_notifications(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line waits 30 ms at most, 50 ms while the agent uses over half of a core: then it polls less often."""
    now = {"monotonic": 100.0, "thread_time": 5.0}
    monkeypatch.setattr(discovery_module, "time", SimpleNamespace(**{n: partial(now.get, n) for n in now}, time=float))
    discovery, gathers = scene.discovery(), []
    for used_s in (0.001, 0.02, 0.04, 0.002):
        now["monotonic"] += 0.05
        now["thread_time"] += used_s
        gathers.append(discovery._gather_s())
    assert gathers == [0.03, 0.03, 0.05, 0.03]
