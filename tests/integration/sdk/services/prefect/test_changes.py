"""Change notifications of Prefect: events for states, one request for the new lines of all followed runs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import aclosing, asynccontextmanager

import pytest

from tailspan.errors import ProtocolError, ServiceError, ServiceUnavailableError
from tailspan.services._requests import Authorization, Authorizer, ServiceRequests
from tailspan.services.prefect import PrefectOptions, PrefectService
from tailspan.services.prefect.changes import PrefectChanges
from tests.fakes.agents import Bench, looped, until
from tests.fakes.prefect import START, FakePrefect


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePrefect]:
    """A server without runs; its logs are probed all the time."""
    monkeypatch.setattr(PrefectChanges, "probe_s", 0.02)
    with FakePrefect() as fake:
        yield fake


def service_of(prefect: FakePrefect, **options: object) -> PrefectService:
    """The service of that server."""
    keys = {"base_url": prefect.url, "requests_per_second": 10_000, **options}
    return PrefectService("fake", PrefectOptions.model_validate(keys), environ={})


async def connection_ends() -> None:
    """Wait until the tasks of closed connections are gone."""
    await until(lambda: len(asyncio.all_tasks()) == 1)


@asynccontextmanager
async def feed_of(prefect: FakePrefect, *jobs: str, **options: object) -> AsyncIterator[PrefectChanges]:
    """A connected feed that follows jobs, whose sub flows are known."""
    async with aclosing(service_of(prefect, **options)) as service:
        feed = service.open_changes()
        try:
            for job_id in jobs:
                assert feed.follow(job_id)
                await service.list_tasks(job_id)
            assert await feed.wait() is None
            await until(lambda: prefect.subscribers)
            yield feed
        finally:
            feed.close()
            await connection_ends()


async def changes(feed: PrefectChanges, change: Callable[[], object]) -> Collection[str] | None:
    """What the feed reports after a change."""
    change()
    return await feed.wait()


@looped
async def test_events_report_runs_their_tasks_and_sub_flows(prefect: FakePrefect) -> None:
    """A state of the run, of its tasks and of a known sub flow is a change of the run; a new run is reported."""
    job_id = prefect.add_flow_run()
    call = prefect.add_task_run(job_id, "child", ("RUNNING", "", 1))
    child = prefect.add_flow_run(parent=call)
    prefect.task_runs[call]["state"]["state_details"]["child_flow_run_id"] = child
    async with feed_of(prefect, job_id) as feed:
        assert await changes(feed, lambda: prefect.set_state(job_id, "CANCELLING", 2)) == {job_id}
        assert await changes(feed, lambda: prefect.add_task_run(job_id, "load", ("RUNNING", "", 3))) == {job_id}
        assert await changes(feed, lambda: prefect.set_state(child, "COMPLETED", 4)) == {job_id}
        # Neither a heartbeat nor a sub flow that is not known yet is a change.
        prefect.notify("prefect.flow-run.heartbeat", f"prefect.flow-run.{job_id}")
        prefect.add_flow_run(parent="another task run")
        new: list[str] = []
        assert await changes(feed, lambda: new.append(prefect.add_flow_run())) == set(new)


@looped
async def test_new_lines_are_found_by_one_request(prefect: FakePrefect) -> None:
    """Lines cause no event: followed runs with new lines are reported, also of sub flows and with late lines, once."""
    jobs = [prefect.add_flow_run() for _ in range(3)]
    prefect.log(jobs[0], "read by polls", 50)
    async with feed_of(prefect, *jobs[:2]) as feed:
        probes = prefect.requests.count("POST /api/logs/filter")
        waiting = asyncio.ensure_future(feed.wait())
        await until(lambda: prefect.requests.count("POST /api/logs/filter") >= probes + 4)
        prefect.refusals.append((429, {}))  # a probe that fails is made up for by the next one
        prefect.log(jobs[2], "of a run that nobody follows", 51)
        prefect.log(jobs[1], "late", 49, visible_after_s=0.1)
        assert await waiting == {jobs[1]}
        feed.leave(jobs[1])
        for number in range(450):
            prefect.log(jobs[0], str(number), 52)
        assert await feed.wait() == {jobs[0]}
        assert "GET" not in {one.partition(" ")[0] for one in prefect.requests[probes:]}


@pytest.mark.parametrize("options", [{"token": "secret"}, {"user": "admin", "password": "pw"}])
@looped
async def test_the_token_is_sent_as_a_message(prefect: FakePrefect, options: dict[str, str]) -> None:
    """An API key as it is, user and password as the server's authentication string."""
    prefect.token = options.get("token", "admin:pw")
    async with aclosing(service_of(prefect, **options)) as service:
        feed = service.open_changes()
        assert await feed.wait() is None
        feed.close()
        assert await service.find_problems() == ()
        await connection_ends()


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda prefect: setattr(prefect, "token", "other"), r"closed the connection \(1008\): Invalid token"),
        (lambda prefect: prefect.socket_refusals.extend([403, 403]), "HTTP 403"),
        (lambda prefect: prefect.socket_refusals.append(302), "HTTP 302"),
    ],
)
@looped
async def test_a_refused_connection_says_why(
    prefect: FakePrefect, prepare: Callable[[FakePrefect], object], text: str
) -> None:
    """A wrong token, a proxy that knows no WebSocket, a redirect to elsewhere."""
    prepare(prefect)
    async with aclosing(service_of(prefect, token="secret")) as service:
        with pytest.raises(ServiceUnavailableError, match=text):
            await service.open_changes().wait()
        prepare(prefect)
        (problem,) = await service.find_problems()
        assert re.search(text, problem.text)
        assert not problem.is_fatal
        await connection_ends()


class Renewing(Authorizer):
    """A token that is refused once."""

    async def authorization(self) -> Authorization:
        """Return the first token."""
        return Authorization("Bearer one", "the test")

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return the second token."""
        return Authorization("Bearer two", "the test")


@looped
async def test_a_refusal_renews_the_credentials_once(prefect: FakePrefect) -> None:
    """A gateway may check the header of the request: one with another token follows, not a third one."""
    async with aclosing(ServiceRequests("prefect", prefect.url, Renewing())) as http:
        prefect.socket_refusals.append(401)
        socket = await http.open_socket("/events/out", subprotocol="prefect")
        socket.close()
        assert prefect.requests.count("SOCKET /api/events/out") == 2
        prefect.socket_refusals += [401, 401]
        with pytest.raises(ServiceUnavailableError, match="HTTP 401"):
            await http.open_socket("/events/out")
    await connection_ends()


@pytest.mark.parametrize("message", [{}, [], None, {"type": "event", "event": {"event": 1}}])
@looped
async def test_an_unknown_message_is_an_error_of_the_service(prefect: FakePrefect, message: object) -> None:
    """What is not an event ends the feed, not the agent."""
    async with feed_of(prefect) as feed:
        prefect.subscribers[0].send(message)
        with pytest.raises(ProtocolError):
            await feed.wait()


@looped
async def test_a_feed_that_breaks_off_is_an_error_of_the_service(prefect: FakePrefect) -> None:
    """The agent polls, and opens another."""
    async with feed_of(prefect) as feed:
        prefect.subscribers[0].close(1001, "restart")
        with pytest.raises(ServiceError, match="restart"):
            await feed.wait()


@looped
async def test_a_silent_run_is_not_polled(prefect: FakePrefect, bench: Bench) -> None:
    """Its lines and its end arrive by notifications alone: the delay of polls is an hour."""
    service = service_of(prefect)
    service.poll_min_s = service.poll_max_s = 3600.0
    bench.services["fake"] = service  # type: ignore[assignment]
    start_s = time.time() - START.timestamp()
    job_id = prefect.add_flow_run(start_s=start_s)
    async with bench.running():
        await until(lambda: prefect.subscribers)
        await until(lambda: f"GET /api/flow_runs/{job_id}" in prefect.requests)
        prefect.log(job_id, "a line", start_s + 1)
        await bench.received(lambda: bench.bodies() == ["a line"])
        asked = prefect.requests.count("POST /api/logs/filter")
        polled = prefect.requests.count(f"GET /api/flow_runs/{job_id}")
        await until(lambda: prefect.requests.count("POST /api/logs/filter") >= asked + 20)
        assert prefect.requests.count(f"GET /api/flow_runs/{job_id}") <= polled + 3
        prefect.set_state(job_id, "COMPLETED", start_s + 2)
        await bench.received(lambda: "run" in bench.spans(job_id))
