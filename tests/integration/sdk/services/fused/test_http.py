"""`tailspan.services.fused.http`: requests on the wire, retries, and the error for each fault."""

import asyncio
import math
import ssl
import time
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
import trustme

from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    ProtocolError,
    RequestRejectedError,
    ServiceUnavailableError,
)
from tailspan.models import JobState
from tailspan.services import JobService, _requests
from tailspan.services._requests import Pace
from tailspan.services.fused import FusedService
from tailspan.services.registry import open_service
from tests.fakes.job_api import HANG, HTML, RESET, TRUNCATED, FakeJobApi, Fault, status_fault


@pytest.fixture
def api():
    """A server with one running job of two lines."""
    with FakeJobApi() as fake:
        job = fake.add_job("j")
        job.line("one", 1_000)
        job.line("two", 2_000)
        yield fake


def ask(api, verb, *arguments, **options):
    """Make a service, await one of its methods (or gather what it yields), close it."""

    async def main():
        service = FusedService("prod", base_url=api.base_url, **options)
        try:
            answer = getattr(service, verb)(*arguments)
            return [item async for item in answer] if hasattr(answer, "__aiter__") else await answer
        finally:
            await service.aclose()

    return asyncio.run(main())


GETS = [("get_job", "status"), ("read_logs", "logs"), ("read_messages", "logs")]


def test_it_is_a_job_service():
    """The class has all that the protocol asks for, and needs no network to be made."""
    service = FusedService()
    assert isinstance(service, JobService)
    assert service.identity == "https://www.fused.io/server/v1"
    assert (service.poll_min_s, service.poll_max_s, service.final_read) == (1.0, 30.0, True)


def test_requests_on_the_wire(api):
    """Paths, queries and headers are those that the real server knows; a cancel has no body and no type."""
    ask(api, "get_job", "j", token="t")
    ask(api, "read_logs", "j")
    ask(api, "list_jobs")
    ask(api, "cancel", "j", token="t")
    lines = [f"{request.method} {request.target}" for request in api.requests]
    assert lines == [
        "GET /server/v1/run/by-id/j",
        "GET /server/v1/logs/j",
        "GET /server/v1/job/self?skip=0&limit=100",
        "GET /server/v1/job/self?skip=1&limit=100",
        "POST /server/v1/run/by-id/j/cancel",
    ]
    first, cancel = api.requests[0], api.requests[-1]
    assert first.headers["Authorization"] == "Fused-Env-Bearer t"
    assert first.headers["X-Fused-Cache-Disable"] == "true"
    assert first.headers["User-Agent"].startswith("tailspan/")
    assert "Authorization" not in api.requests[1].headers
    assert (cancel.body, cancel.headers.get("Content-Type")) == (b"", None)


@pytest.mark.parametrize("job_id", ["a/b?c=../x", "..", ".", "%2F", "#", "ü 😀", "a+b&c"])
def test_a_job_id_reaches_the_server_as_it_is(api, job_id):
    """Whatever is in an id, it is the id that the server sees, and no other path."""
    api.add_job(job_id).line("x", 1)
    assert ask(api, "get_job", job_id).job_id == job_id
    assert [page.lines for page in ask(api, "read_logs", job_id)] == [[b"x"]]
    assert ask(api, "cancel", job_id).state is JobState.CANCELED
    assert {request.job_id for request in api.requests} == {job_id}


@pytest.mark.parametrize("job_id", ["", "a\nb", "x" * 1_000])
def test_what_is_no_job_id_is_not_sent(api, job_id):
    """Empty, over-long and control characters are refused before a request."""
    for verb in ("get_job", "read_logs", "read_messages", "log_times_ms", "cancel"):
        with pytest.raises(ConfigError):
            ask(api, verb, job_id)
    assert api.requests == []


def test_one_connection_serves_all_requests(api):
    """Connections are kept alive, so that a call costs no new one."""

    async def main():
        service = FusedService("prod", base_url=api.base_url, requests_per_second=1_000)
        for _ in range(20):
            await service.get_job("j")
            [_ async for _ in service.read_logs("j")]
        await service.aclose()

    asyncio.run(main())
    assert api.connections == 1


def test_a_service_outlives_its_event_loop(api):
    """One object in two loops, as in a script that calls asyncio.run twice."""
    service = FusedService("prod", base_url=api.base_url)

    async def main():
        job = await service.get_job("j")
        await service.aclose()
        return job.job_id

    assert [asyncio.run(main()), asyncio.run(main())] == ["j", "j"]


@pytest.mark.parametrize(
    ("verb", "on", "fault"),
    [
        ("get_job", "status", status_fault(500)),
        ("get_job", "status", RESET),
        ("get_job", "status", TRUNCATED),
        ("read_logs", "logs", status_fault(500)),
        ("read_logs", "logs", TRUNCATED),
        ("read_messages", "logs", status_fault(429)),
    ],
)
def test_one_passing_fault_is_not_seen(api, verb, on, fault):
    """A 500, a reset or a torn reply is asked again."""
    api.fault(fault, on=on)
    assert ask(api, verb, "j")
    assert len(api.requests) == 2


@pytest.mark.parametrize(("verb", "on"), GETS)
def test_a_fault_that_stays_is_told_in_the_servers_words(api, verb, on):
    """Tries are few, and the error says what the server said."""
    api.fault(status_fault(503, "back at noon"), on=on, times=None)
    with pytest.raises(ServiceUnavailableError, match=r"503 .*back at noon") as caught:
        ask(api, verb, "j", tries=2)
    assert (caught.value.service, caught.value.job_id, caught.value.retryable) == ("prod", "j", True)
    assert len(api.requests) == 2


def test_a_caller_may_have_its_own_pace(api):
    """With one try there is no waiting at all."""
    api.fault(status_fault(503), times=None)
    with pytest.raises(ServiceUnavailableError):
        ask(api, "get_job", "j", tries=1)
    assert len(api.requests) == 1


def test_retry_after_is_obeyed(api):
    """A wish that can be granted is, and the next try comes no sooner."""
    api.fault(status_fault(429, headers={"Retry-After": "1"}), on="status")
    ask(api, "get_job", "j")
    first, second = api.requests
    assert second.at_s - first.at_s >= 1.0


def test_a_long_retry_after_is_handed_on(api):
    """A wish longer than our patience becomes an error at once, which carries it."""
    api.fault(status_fault(503, headers={"Retry-After": "3600"}), on="status", times=None)
    with pytest.raises(ServiceUnavailableError) as caught:
        ask(api, "get_job", "j")
    assert caught.value.retry_after_s == 3600
    assert len(api.requests) == 1


def test_the_callers_deadline_wins(api):
    """A hanging server does not hold a caller beyond its own deadline."""
    api.fault(HANG, times=None)

    async def main():
        service = FusedService("prod", base_url=api.base_url)
        with anyio.move_on_after(0.2) as status_scope:
            await service.get_job("j")
        with anyio.move_on_after(0.2) as logs_scope:
            [_ async for _ in service.read_logs("j")]
        await service.aclose()
        return status_scope.cancelled_caught, logs_scope.cancelled_caught

    assert asyncio.run(main()) == (True, True)


@pytest.mark.parametrize("verb", ["get_job", "cancel"])
def test_a_busy_server_is_told_before_the_deadline(api, verb, monkeypatch):
    """When the next try would come too late, the caller gets the server's words rather than a bare timeout."""
    monkeypatch.setattr("tailspan.services._requests._RETRY_FOR_S", math.inf)  # the deadline is what ends it
    api.fault(status_fault(503, "back at noon", headers={"Retry-After": "90"}), times=None)

    async def main():
        service = FusedService("prod", base_url=api.base_url)
        try:
            with anyio.fail_after(60):
                await getattr(service, verb)("j")
        finally:
            await service.aclose()

    with pytest.raises(ServiceUnavailableError, match="back at noon"):
        asyncio.run(main())


def test_a_hanging_server_ends_the_request(api):
    """Without a caller's deadline the configured timeout counts, and the error names it."""
    api.fault(HANG, times=None)
    with pytest.raises(ServiceUnavailableError, match=r"no answer within 0\.2 s"):
        ask(api, "get_job", "j", timeout_s=0.2, tries=1)


def test_a_server_that_is_not_there(api):
    """A refused connection is a passing fault whose error shows where it was looked for."""
    gone = FusedService("prod", base_url="http://127.0.0.1:9/server/v1", tries=1)
    with pytest.raises(ServiceUnavailableError, match=r"127\.0\.0\.1:9/server/v1/run/by-id/j"):
        asyncio.run(gone.get_job("j"))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault(body=b"{"), ProtocolError, "base_url"),
        (Fault(body=b"["), ProtocolError, "JSON"),
        (Fault(body=b""), ProtocolError, "empty"),
        (HTML, ProtocolError, "HTML"),
        (Fault(body=b'{"message": "hello"}'), ProtocolError, "base_url"),
        (Fault(body=b"7"), ProtocolError, "base_url"),
        (Fault(status=302, headers={"Location": "/login"}), ProtocolError, "base_url"),
        (Fault(status=404, body=b"<html>", headers={"Content-Type": "text/html"}), ProtocolError, "base_url"),
        (status_fault(404, "no such run"), JobNotFoundError, "no such run"),
        (status_fault(401), AuthError, "none was sent"),
        (status_fault(403, "not yours"), AuthError, "not yours"),
        (status_fault(418, "tea"), RequestRejectedError, "tea"),
        (
            Fault(status=422, body=b'{"detail":[{"loc":["a"],"msg":"bad"}]}', headers={"Content-Type": "x; charset=u"}),
            RequestRejectedError,
            "a: bad",
        ),
        (status_fault(501, "never"), ServiceUnavailableError, "never"),
    ],
)
@pytest.mark.parametrize(("verb", "on"), [*GETS, ("log_times_ms", "logs"), ("cancel", "cancel")])
def test_each_fault_becomes_one_error(api, verb, on, fault, error, words):
    """Every fault is one of our errors, with the path and a cure, and never an answer."""
    if verb == "cancel":
        api.fault(status_fault(418, words), on="status")
    api.fault(fault, on=on, times=None)
    with pytest.raises(error, match=words) as caught:
        ask(api, verb, "j", tries=1)
    assert caught.value.job_id == "j"
    assert type(caught.value) is error


def test_a_list_of_another_shape(api):
    """An invalid list is an error, not an empty list."""
    for body in (b"{}", b'[{"name": "x"}]', b"[7]", b"null"):
        api.fault(Fault(body=body), on="list")
        with pytest.raises(ProtocolError, match="array of jobs"):
            ask(api, "list_jobs")


def test_no_list_is_not_no_job(api):
    """A 404 on the list is no unknown job."""
    api.fault(status_fault(404), on="list")
    with pytest.raises(RequestRejectedError):
        ask(api, "list_jobs")


@pytest.mark.parametrize("fault", [status_fault(503), status_fault(429), RESET, TRUNCATED])
def test_cancel_is_sent_once(api, fault):
    """A cancel that may have arrived is not repeated."""
    api.fault(fault, on="cancel")
    with pytest.raises(ServiceUnavailableError):
        ask(api, "cancel", "j")
    assert len(api.asked("cancel")) == 1


def test_cancel_of_an_ended_job_is_no_error(api):
    """A server that refuses to cancel what has ended makes no error; one that refuses otherwise does."""
    api.add_job("done", job_status="Done")
    api.fault(status_fault(409, "already ended"), on="cancel", times=None)
    assert ask(api, "cancel", "done").state is JobState.SUCCEEDED
    with pytest.raises(RequestRejectedError, match="already ended"):
        ask(api, "cancel", "j")


def test_the_list_is_read_to_its_end_once(api):
    """Every job comes once and newest first, though jobs that begin meanwhile shift the pages."""
    for number in range(60):
        api.add_job(f"job-{number}")
    api.max_limit = 25
    api.on_list = lambda number: api.add_job(f"meanwhile-{number}") if number > 1 else None
    ids = [job.job_id for page in ask(api, "list_jobs") for job in page]
    assert len(ids) == len(set(ids))
    assert [job_id for job_id in ids if job_id.startswith("job-")] == [f"job-{n}" for n in reversed(range(60))]


def test_pages_of_the_list_grow(api):
    """A long list takes few requests; a server that allows no more rows than it likes is asked for those."""
    for number in range(700):
        api.add_job(f"job-{number}")
    assert sum(len(page) for page in ask(api, "list_jobs")) == 701
    asked = [request.target.partition("?")[2] for request in api.requests]
    assert asked[:3] == ["skip=0&limit=100", "skip=90&limit=400", "skip=480&limit=1600"]
    api.requests.clear()
    api.on_list = lambda number: api.fault(Fault(status=422), on="list") if len(api.requests) == 1 else None
    assert sum(len(page) for page in ask(api, "list_jobs")) == 701
    asked = [request.target.partition("?")[2] for request in api.requests]
    assert asked[:4] == ["skip=0&limit=100", "skip=90&limit=400", "skip=90&limit=100", "skip=180&limit=100"]


def test_a_whole_page_of_new_jobs_hides_none(api):
    """More new jobs than a page has, between two pages, do not end the list early."""
    for number in range(60):
        api.add_job(f"job-{number}")
    api.max_limit = 20
    api.on_list = lambda number: [api.add_job(f"new-{n}") for n in range(20)] if number == 3 else None
    ids = {job.job_id for page in ask(api, "list_jobs") for job in page}
    assert {f"job-{number}" for number in range(60)} <= ids


def test_a_server_without_paging_ends(api):
    """A server that ignores skip sends its rows for ever; each is listed once."""
    rows = b'[{"id": "a"}, {"id": "b"}, {"id": "a"}]'
    api.fault(Fault(body=rows), on="list", times=None)
    assert [[job.job_id for job in page] for page in ask(api, "list_jobs")] == [["a", "b"]]


def test_a_list_that_is_read_again_tells_what_changed(api):
    """A row that is as it was is the one that it was; one that changed, and one that is no text, are read."""
    before = (
        b'[{"id": "a", "job_status": "Running", "lines": 1}, {"id": "b", "job_status": "Running", "job_name": "\xff"}]'
    )
    after = before.replace(b'"lines": 1', b'"lines": 2')

    async def main():
        service = FusedService("prod", base_url=api.base_url)
        found = []
        for body in (before, before, after, before):
            # A server that ignores skip, so that each list takes two requests.
            api.fault(Fault(body=body), on="list", times=2)
            found.append([row async for page in service.list_jobs() for row in page])
        await service.aclose()
        return found

    first, second, third, fourth = asyncio.run(main())
    assert [(row.job_id, row.state, row.lines) for row in first] == [
        ("a", JobState.RUNNING, 1),
        ("b", JobState.RUNNING, None),
    ]
    assert first[1].job_name == "\ufffd"
    assert all(row is known for row, known in zip(second, first, strict=True))
    assert third[0].lines == 2
    assert third[1] is first[1]
    assert fourth == first


def test_a_list_without_end_is_not_remembered_without_end(api, monkeypatch):
    """A service object in a notebook must not hold every job that it was ever shown."""
    monkeypatch.setattr("tailspan.services.fused.service._REMEMBERED_BYTES", 30)
    body = b'[{"id": "a", "lines": 1}, {"id": "b", "lines": 1}]'

    async def main():
        service = FusedService("prod", base_url=api.base_url)
        found = []
        for _ in range(2):
            api.fault(Fault(body=body), on="list", times=2)
            found.append([row async for page in service.list_jobs() for row in page])
        await service.aclose()
        return found

    first, second = asyncio.run(main())
    assert first == second
    assert [row is known for row, known in zip(second, first, strict=True)] == [True, False]


def test_closing_the_list_early_asks_no_more(api):
    """Whoever has seen enough pages costs no further request."""
    for number in range(200):
        api.add_job(f"job-{number}")

    async def main():
        service = FusedService("prod", base_url=api.base_url)
        pages = service.list_jobs()
        await anext(pages)
        await pages.aclose()
        await service.aclose()

    asyncio.run(main())
    assert len(api.requests) == 1


def test_requests_are_paced():
    """After a second's worth at once, each request waits for its turn."""

    async def main():
        pace = Pace(50)
        started = time.monotonic()
        for _ in range(60):
            await pace.wait()
        return time.monotonic() - started

    assert asyncio.run(main()) >= 0.15


def test_turns_of_a_larger_share_do_not_wait_for_those_of_the_smaller(monkeypatch):
    """An agent that gets its shards sends at its new rate at once, and never above the rate of its share."""
    now_s, grows_s = 1000.0, 1104.0
    monkeypatch.setattr(Pace, "share", 1 / 256)

    async def sleep(seconds):
        nonlocal now_s
        now_s += seconds
        if now_s >= grows_s:
            monkeypatch.setattr(Pace, "share", 1.0)

    monkeypatch.setattr(_requests, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(_requests.anyio, "sleep", sleep)

    async def turns(pace, until_s):
        taken = 0
        while now_s < until_s:
            await pace.wait()
            taken += 1
        return taken

    async def main():
        pace = Pace(20)
        few = await turns(pace, grows_s)
        return few, now_s, await turns(pace, grows_s + 11.0)

    few, after_s, many = asyncio.run(main())
    assert 7 <= few <= 9
    assert after_s <= grows_s + 2.0
    assert 190 <= many <= 245


def test_a_private_authority(tmp_path):
    """A server with a certificate of one's own is verified by ca_file, and refused without, saying so."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    with FakeJobApi(tls=context) as fake:
        fake.add_job("j")
        assert ask(fake, "get_job", "j", token="t", ca_file=ca_file).job_id == "j"
        with pytest.raises(ServiceUnavailableError, match=r"services\.prod\.ca_file"):
            ask(fake, "get_job", "j", token="t", tries=1)
        with pytest.raises(ConfigError, match=r"services\.prod\.ca_file"):
            ask(fake, "get_job", "j", token="t", ca_file=Path("nowhere.pem"))


class Configured:
    """The part of the settings that a service is opened with."""

    def __init__(self, **options):
        self.services = {"prod": {"type": "fused", **options}}


def test_options_of_the_configuration(api, tmp_path):
    """A section of the configuration makes the service: its token, scheme and base URL reach the server."""
    token_file = tmp_path / "token"
    token_file.write_text("from-file")
    service = open_service(
        "prod",
        Configured(base_url=api.base_url, token_file=str(token_file), scheme="Bearer", timeout="2s", ca_file="x"),
    )
    assert isinstance(service, FusedService)
    assert service.name == "prod"

    async def main():
        await service.get_job("j")
        await service.aclose()

    asyncio.run(main())
    assert api.requests[0].headers["Authorization"] == "Bearer from-file"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"base_url": "nonsense"}, "base_url"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": 0}, "timeout"),
        ({"requests_per_second": 0}, "requests_per_second"),
        ({"scheme": "Two words"}, "scheme"),
        ({"tokne": "x"}, "tokne"),
        ({"token": "x", "token_file": "y"}, ""),
    ],
)
def test_wrong_options_name_their_key(options, key):
    """What is wrong in the section is said with the key's path."""
    with pytest.raises(ConfigError) as caught:
        open_service("prod", Configured(**options))
    assert f"services.prod.{key}".rstrip(".") in str(caught.value)
