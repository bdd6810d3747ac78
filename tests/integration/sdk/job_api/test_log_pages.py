"""Log pages of `tailspan serve`: a served job has the lines of the job itself, and one request does for many jobs."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import aclosing, asynccontextmanager, nullcontext

import pytest

from tailspan.errors import AuthError, CursorExpiredError, JobNotFoundError, ServiceUnavailableError
from tailspan.logs.page import LineRun, LogPage
from tailspan.logs.page_wire import CURSOR_MARK, MEDIA_TYPE, FrameError, FrameSplitter, cursor_text, encode_frame
from tailspan.services import MergingService
from tailspan.services.fused import FusedService
from tailspan.services.fused.pages import MessageSplitter, ServedPages
from tailspan.testing import FakeService
from tests.fakes.local_jobs import LocalJobs, until
from tests.fakes.scripted_service import ScriptedJob, ScriptedService, ask, serving
from tests.ports import free_port

LINES = [f"line {number}" for number in range(30)]


def run(server, work, **options):
    """Do some work with a Fused service of that server."""

    async def main():
        async with aclosing(FusedService(base_url=server.url, requests_per_second=10_000, **options)) as service:
            return await work(service)

    return asyncio.run(main())


async def read(service, job_id, cursor=None, **how):
    """Read to the present end; return the pages."""
    return [page async for page in service.read_logs(job_id, cursor, **how)]


def requests_of(server):
    """Return the paths that were asked for since the last call, without what the base URL has."""
    found = [request.target.removeprefix("/server/v1") for request in server.requests]
    server.requests.clear()
    return found


@pytest.fixture
def service():
    """Ten jobs of a service with cursors, three lines to a page."""
    made = FakeService(page_lines=3)
    for number in range(10):
        made.add_job(f"j{number}")
        made.add_lines(f"j{number}", *LINES[:number], timestamp_ms=1_700_000_000_000)
    return made


@pytest.fixture
def server(service):
    """The job API over them."""
    with serving(service) as running:
        yield running


def test_served_local_job_has_the_lines_times_streams_and_uids_of_the_job_itself(tmp_path):
    """So stores see one line, whether an agent beside the job or one far away relays it."""
    program = "for i in 1 2 3; do echo out $i; echo err $i >&2; done; printf 'a\\033[1mb\\r\\nno end'"
    with LocalJobs(tmp_path / "state") as local:
        job = local.run("sh", "-c", program)
        with serving(local.service) as server:

            async def work(service):
                await service.get_job(job.job_id)
                return await read(service, job.job_id)

            found = run(server, work)
        own = local.pages(job.job_id)
    assert [line for page in found for line in page.lines] == [line for page in own for line in page.lines]
    assert [uid for page in found for uid in page.uids()] == [uid for page in own for uid in page.uids()]
    assert [page.times_unix_nano() for page in found] == [page.times_unix_nano() for page in own]
    assert [[run.stream for run in page.runs] for page in found] == [[run.stream for run in page.runs] for page in own]


def test_reading_goes_on_after_a_cursor(service, server):
    """Nothing is repeated and nothing is left out, wherever reads end."""

    async def work(fused):
        await fused.get_job("j9")
        cursor, found = None, []
        for _ in range(4):
            pages = await read(fused, "j9", cursor)
            found += [line for page in pages for line in page.lines]
            cursor = pages[-1].cursor if pages else cursor
            service.add_lines("j9", f"further {len(found)}")
        return found

    assert run(server, work) == [text.encode() for text in [*LINES[:9], "further 9", "further 10", "further 11"]]


def test_lines_since_a_time(server, service):
    """As without pages, those at or after it."""
    service.add_lines("j0", "old", timestamp_ms=1000)
    service.add_lines("j0", "edge", "new", timestamp_ms=2000, step_ms=5)

    async def work(fused):
        await fused.get_job("j0")
        return [line for page in await read(fused, "j0", since_ms=2000) for line in page.lines]

    assert run(server, work) == [b"edge", b"new"]


@pytest.mark.parametrize("since", [None, 0, 2])
def test_messages_by_log_pages_are_those_of_the_json_reply(tmp_path, since):
    """Odd bytes, streams and times too; who asks for JSON gets it."""
    program = (
        "printf 'a\\033[1mb\\r\\n\\n\\377\\342\\202\\n'; echo err >&2;"
        f"until [ -e {tmp_path}/go ]; do sleep 0.01; done; printf 'x\\000y\\nno end'"
    )
    with LocalJobs(tmp_path / "state") as local:
        job_id = local.start("sh", "-c", program)
        until(lambda: b"err" in (local.directory(job_id) / "log").read_bytes())
        time.sleep(0.01)  # the other lines get another time
        (tmp_path / "go").touch()
        job = local.complete(job_id)
        path = f"/logs/{job.job_id}"
        as_json = ask(local.service, path)
        times = sorted({message["timestamp"] for message in as_json.json()})
        since_ms = None if since is None else times[0] + since
        as_pages = ask(local.service, path, headers={"Accept": f"application/json, {MEDIA_TYPE}"})
        with serving(local.service) as server:

            async def work(service):
                parts = [part async for part in service.read_messages(job.job_id, since_ms)]
                return [message for part in parts for message in part]

            found = run(server, work)
            assert [path.partition("?")[0] for path in requests_of(server)] == [path]
    assert len(times) > 1
    assert found == [m for m in as_json.json() if since_ms is None or m["timestamp"] >= since_ms]
    assert as_json.headers["content-type"] == "application/json"
    assert as_pages.headers["content-type"] == MEDIA_TYPE


def test_messages_of_a_service_without_log_pages_are_json(service):
    """Nothing else is known of its lines."""
    service.has_offsets = False
    assert ask(service, "/logs/j3", headers={"Accept": MEDIA_TYPE}).headers["content-type"] == "application/json"


def test_a_reply_of_messages_has_an_end():
    """What comes before is good."""
    splitter = MessageSplitter()
    page = LogPage([b"x", b"y"], [LineRun(1, 9_000_000, uid_prefix="u"), LineRun(1, 1, uid_prefix="u")], b"1")
    found = [{"message": "y", "timestamp": 0}, {"message": "x", "timestamp": 9}]
    assert splitter.feed(encode_frame(page) + encode_frame(page)) == found * 2
    with pytest.raises(FrameError, match="incomplete"):
        splitter.feed(encode_frame(None, more=True))
    with pytest.raises(FrameError, match="ends early"):
        MessageSplitter().close()


class GapOnce(FakeService):
    """A service that loses lines after the first page of the first read."""

    gaps = 1

    async def read_logs(self, job_id, cursor=None, **how):
        """Yield the lines, or break off."""
        async for page in super().read_logs(job_id, cursor, **how):
            yield page
            if self.gaps:
                self.gaps -= 1
                raise CursorExpiredError("gone", job_id=job_id)


def test_messages_of_a_log_that_loses_lines_meanwhile_are_a_reply_that_breaks_off():
    """As by JSON; the next read has all there is."""
    service = GapOnce(page_lines=2)
    service.add_job("late")
    service.add_lines("late", "a", "b", "c")

    async def work(fused):
        return [m["message"] async for part in fused.read_messages("late") for m in part]

    with serving(service) as server, pytest.raises(ServiceUnavailableError, match="broke off"):
        run(server, work)
    with serving(service) as server:
        assert run(server, work) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("accept", "is_pages"),
    [
        (f"{MEDIA_TYPE};q=0.9", True),
        (f"text/html,{MEDIA_TYPE}", True),
        (f"{MEDIA_TYPE}-v2", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_log_pages_are_for_those_who_accept_them(service, accept, is_pages):
    """By the whole name of their type."""
    found = ask(service, "/logs/j3", headers={"Accept": accept}).headers["content-type"]
    assert found == (MEDIA_TYPE if is_pages else "application/json")


def test_one_request_does_for_all_who_ask_at_once(service, server):
    """The jobs' next lines come to those who asked for them; the first, who is alone, does not wait for others."""

    async def work(fused):
        await fused.get_job("j0")
        cursors = {}
        for number in range(1, 10):
            cursors[f"j{number}"] = (await read(fused, f"j{number}"))[-1].cursor
        for number in range(1, 10, 2):
            service.add_lines(f"j{number}", f"more of {number}")
        requests_of(server)
        await read(fused, "j1", cursors["j1"])
        return await asyncio.gather(*(read(fused, job_id, cursor) for job_id, cursor in cursors.items()))

    found = run(server, work)
    alone, together = requests_of(server)
    assert alone.count("job=") == 1
    assert together.count("job=") == 9
    lines = [[line for page in pages for line in page.lines] for pages in found]
    assert lines == [[f"more of {number}".encode()] if number % 2 else [] for number in range(1, 10)]


def test_job_with_much_to_read_is_asked_for_alone(service, server):
    """A reply for many holds little of each; the rest comes by a reply of its own, and all of it once."""
    long = "x" * 40_000

    async def work(fused):
        await fused.get_job("j1")
        cursor = (await read(fused, "j1"))[-1].cursor
        service.add_lines("j1", *(f"{number}{long}" for number in range(5)))
        requests_of(server)
        pages = await read(fused, "j1", cursor)
        return [line for page in pages for line in page.lines]

    assert run(server, work) == [f"{number}{long}".encode() for number in range(5)]
    paths = [path.partition("?")[0] for path in requests_of(server)]
    assert paths == ["/log-pages", "/log-pages/j1"]


def test_what_is_wrong_with_one_of_many_is_told_to_who_asked_for_it(server):
    """The others have their lines."""

    async def work(fused):
        await fused.get_job("j1")
        cursor = (await read(fused, "j1"))[-1].cursor
        return await asyncio.gather(
            read(fused, "j2", CURSOR_MARK + b"0"),
            read(fused, "gone", cursor),
            read(fused, "j1", cursor),
            return_exceptions=True,
        )

    found, gone, nothing = run(server, work)
    assert [line for page in found for line in page.lines] == [b"line 0", b"line 1"]
    assert isinstance(gone, JobNotFoundError)
    assert nothing == []


def test_gap_at_the_server_is_a_gap_here(service, server):
    """A client learns that lines are gone, and where to go on."""

    async def work(fused):
        await fused.get_job("j9")
        cursor = (await read(fused, "j5"))[0].cursor
        service.expire("j5", 4)
        with pytest.raises(CursorExpiredError) as caught:
            await read(fused, "j5", cursor)
        return await read(fused, "j5", caught.value.resume_cursor)

    assert [line for page in run(server, work) for line in page.lines] == [b"line 4"]


def test_gap_in_the_middle_of_a_reply_ends_it_in_good_order():
    """The reply has the lines before it; the next request gets the error."""
    gap = CursorExpiredError("gone", resume_cursor=b"9")
    scripted = ScriptedService({"job": ScriptedJob(lines=["a", "b", "c"], fails_at_page=1, error=gap)})
    reply = ask(scripted, "/log-pages/job")
    page, end = FrameSplitter().feed(reply.content)
    assert (page.page.lines, end) == ([b"a", b"b"], (0, True, None))
    scripted.jobs["job"].fails_at_page = 0
    reply = ask(scripted, "/log-pages/job")
    assert (reply.status_code, reply.headers["Tailspan-Resume-Cursor"]) == (410, cursor_text(b"9"))
    assert reply.json() == {"message": "gone"}


def test_service_that_knows_only_times_serves_no_pages(service):
    """Its lines become visible late, which only those who compare them by time find."""
    service.has_offsets = False
    with serving(service) as server:

        async def work(fused):
            await fused.get_job("j5")
            pages = await read(fused, "j5")
            return fused.merges(pages[-1].cursor), pages

        merges, pages = run(server, work)
    assert not merges
    assert [line for page in pages for line in page.lines] == [text.encode() for text in LINES[:5]]
    assert requests_of(server) == ["/run/by-id/j5", "/logs/j5"]
    assert ask(service, "/log-pages/j5").status_code == 404


def test_server_that_does_not_send_pages_any_more(service):
    """With an older server on the same port, the log is read again from its start."""
    with serving(service) as server:

        async def work(fused):
            await fused.get_job("j5")
            cursor = (await read(fused, "j5"))[0].cursor
            service.has_offsets = False
            await fused.get_job("j5")
            with pytest.raises(CursorExpiredError) as caught:
                await read(fused, "j5", cursor)
            return await read(fused, "j5", caught.value.resume_cursor)

        pages = run(server, work)
    assert [line for page in pages for line in page.lines] == [text.encode() for text in LINES[:5]]


def test_job_whose_reading_began_without_pages_goes_on_so(service):
    """A cursor that knows times stays good when the server learns to send pages."""
    service.has_offsets = False
    with serving(service) as server:

        async def work(fused):
            await fused.get_job("j5")
            cursor = (await read(fused, "j5"))[-1].cursor
            service.has_offsets = True
            await fused.get_job("j5")
            service.add_lines("j5", "one more")
            return await read(fused, "j5", cursor)

        pages = run(server, work)
    assert [line for page in pages for line in page.lines] == [b"one more"]


def test_all_who_asked_learn_that_the_server_is_away():
    """In one try for all of them, not one after the other; each has an error of its own."""
    base_url = f"http://127.0.0.1:{free_port()}/server/v1"

    async def work():
        async with aclosing(FusedService(base_url=base_url, requests_per_second=1, tries=1)) as fused:
            asks = [read(fused, f"j{number}", CURSOR_MARK + b"0") for number in range(50)]
            return await asyncio.gather(*asks, return_exceptions=True)

    found = asyncio.run(work())
    assert {type(error) for error in found} == {ServiceUnavailableError}
    assert len({id(error) for error in found}) == 50


def test_who_asks_for_all_may_give_up(service, server):
    """The others of its request have their answers all the same."""

    async def work(fused):
        await fused.get_job("j1")
        cursors = {f"j{number}": (await read(fused, f"j{number}"))[-1].cursor for number in range(1, 5)}
        await read(fused, "j1", cursors.pop("j1"))
        for job_id in cursors:
            service.add_lines(job_id, f"more of {job_id}")
        asks = [asyncio.create_task(read(fused, job_id, cursor)) for job_id, cursor in cursors.items()]
        for _ in range(3):
            await asyncio.sleep(0)  # the first has the turn now, and waits for others
        asks[0].cancel()
        return await asyncio.gather(*asks, return_exceptions=True)

    cancelled, *others = run(server, work)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [page.lines for pages in others for page in pages] == [[b"more of j3"], [b"more of j4"]]


def test_many_jobs_go_in_several_requests(server, service):
    """No request line is longer than servers take."""
    names = [f"a-job-with-a-name-of-some-length-{number:04d}" for number in range(300)]
    for name in names:
        service.add_job(name)
        service.add_lines(name, name)

    async def work(fused):
        await fused.get_job("j1")
        return await asyncio.gather(*(read(fused, name, CURSOR_MARK + b"0") for name in names))

    found = run(server, work)
    assert [page.lines for pages in found for page in pages] == [[name.encode()] for name in names]
    targets = requests_of(server)
    assert len(targets) < 10
    assert max(map(len, targets)) < 8000


def test_pages_need_the_token_too(service):
    """As every other request."""
    with serving(service, token="s3cret") as server:

        async def work(fused):
            return await read(fused, "j1", CURSOR_MARK + b"0")

        with pytest.raises(AuthError):
            run(server, work, token="wrong")


@pytest.mark.parametrize(
    "query",
    ["", "?job=j1", "?cursor=MA==", "?job=j1&cursor=MA==&job=j2", "?job=j1&cursor=!", "?job=%00&cursor=MA=="],
)
def test_request_for_many_that_cannot_be_meant(service, query):
    """It is an error, whatever the jobs are."""
    assert ask(service, f"/log-pages{query}").status_code == 400


def test_a_request_has_a_limit_of_jobs(service):
    """Nobody makes the server read a million logs by one request."""
    query = "&".join(itertools.repeat("job=j1&cursor=MA==", 201))
    assert ask(service, f"/log-pages?{query}").status_code == 400


def test_service_says_what_it_merges_and_for_how_long_it_gathers(server):
    """Only reads that go on, by pages; and only while others ask, too."""

    async def work(fused):
        assert isinstance(fused, MergingService)
        by_times = (await read(fused, "j1"))[-1].cursor
        await fused.get_job("j1")
        by_pages = (await read(fused, "j1"))[-1].cursor
        await read(fused, "j1", by_pages)
        alone = fused.gather_s
        await asyncio.gather(read(fused, "j1", by_pages), read(fused, "j2", by_pages), read(fused, "j3", by_pages))
        return [fused.merges(cursor) for cursor in (None, by_times, by_pages)], alone, fused.gather_s > 0

    assert run(server, work) == ([False, False, True], 0, True)


def test_short_page_is_not_taken_for_the_end_of_a_log(service, server):
    """A page ends early for many reasons: what is behind it comes all the same, by the same read."""

    async def work(fused):
        await fused.get_job("j1")
        cursor = (await read(fused, "j1"))[-1].cursor
        service.add_lines("j1", *LINES)
        requests_of(server)
        return await read(fused, "j1", cursor)

    pages = run(server, work)
    assert len(pages) > 3
    assert [line for page in pages for line in page.lines] == [text.encode() for text in LINES]
    paths = [path.partition("?")[0] for path in requests_of(server)]
    assert paths == ["/log-pages", "/log-pages/j1"]


def test_gap_in_the_middle_of_a_reply_is_told_by_the_same_read(service, server):
    """After the lines before it: an ended job is not read again."""
    gap = CursorExpiredError("lines are gone", resume_cursor=b"9")
    scripted = ScriptedService({"job": ScriptedJob(lines=["a", "b", "c"], fails_at_page=1, error=gap)})
    with serving(scripted) as gapped:

        async def work(fused):
            await fused.get_job("job")
            log = fused.read_logs("job")
            found = (await anext(log)).lines
            await asyncio.to_thread(scripted.read_ended.wait, 30)
            scripted.jobs["job"].fails_at_page = 0  # the reply has ended before it: now its rest is asked for
            with pytest.raises(CursorExpiredError, match="lines are gone") as caught:
                await anext(log)
            return found, caught.value.resume_cursor

        assert run(gapped, work) == ([b"a", b"b"], CURSOR_MARK + b"9")


def test_reply_without_its_end_is_no_log(service, server):
    """A proxy may end a reply in good order that broke off behind it."""
    whole = ask(service, "/log-pages/j9").content
    end = len(encode_frame(None))
    for cut in (whole[:-end], b""):
        splitter = FrameSplitter(for_one=True)
        splitter.feed(cut)
        with pytest.raises(FrameError, match="ends early"):
            splitter.close()
    splitter = FrameSplitter(for_one=True)
    assert [frame.page is None for frame in splitter.feed(whole) + splitter.close()] == [False, False, False, True]


def test_any_number_of_logs_can_be_read_side_by_side(service, server):
    """A reader that pauses after a page does not make the others wait."""

    async def work(fused):
        await fused.get_job("j1")
        for number in range(20):
            service.add_job(f"k{number}")
            service.add_lines(f"k{number}", *LINES)
        logs = [fused.read_logs(f"k{number}") for number in range(20)]
        firsts = [await asyncio.wait_for(anext(log), 30) for log in logs]
        for log in logs:
            await log.aclose()
        return {tuple(page.lines) for page in firsts}

    assert run(server, work) == {(b"line 0", b"line 1", b"line 2")}


def test_long_replies_are_limited_by_who_asks(service, server):
    """A gathered read enters the limit only for what does not fit a reply for many."""
    entered = []

    @asynccontextmanager
    async def long_reads():
        entered.append("long")
        yield

    async def work(fused):
        await fused.get_job("j1")
        cursor = (await read(fused, "j1"))[-1].cursor
        service.add_lines("j1", "short")
        cursor = (await read(fused, "j1", cursor, long_reads=long_reads()))[-1].cursor
        assert entered == []
        service.add_lines("j1", *LINES)
        await read(fused, "j1", cursor, long_reads=long_reads())

    run(server, work)
    assert entered == ["long"]


class FirstHangs:
    """A job API whose first answer never comes."""

    tries = 1

    def __init__(self):
        self.asked = 0

    async def parts(self, path, query, make_splitter, expected, *, job_id):
        """Wait for ever, the first time."""
        self.asked += 1
        if self.asked == 1:
            await asyncio.sleep(3600)
        yield make_splitter().feed(encode_frame(LogPage([b"x"], [LineRun(1, 1, uid_prefix="u")], b"1")))


def test_reads_go_on_in_another_loop_while_one_waits_for_ever():
    """As after a fork: no read waits for a turn that never ends."""
    api = FirstHangs()
    pages = ServedPages(api)

    async def look():
        return [page.lines async for page in pages.read("j", CURSOR_MARK + b"0", None, nullcontext())]

    loop = asyncio.new_event_loop()
    waiting = loop.create_task(look())
    while not api.asked:
        loop.run_until_complete(asyncio.sleep(0.005))
    assert asyncio.run(asyncio.wait_for(look(), 30)) == [[b"x"]]
    waiting.cancel()
    loop.run_until_complete(asyncio.wait([waiting]))
    loop.close()


class Faulty(FakeService):
    """A service with jobs of a line each, some with faults of its own."""

    def __init__(self, *job_ids):
        super().__init__()
        for job_id in job_ids:
            self.add_job(job_id)
            self.add_lines(job_id, "a line")

    async def read_logs(self, job_id, cursor=None, **how):
        """Fail, or yield a page that cannot be sent, or nothing."""
        if job_id == "bug":
            raise KeyError("a bug")
        if job_id == "hangs":
            await asyncio.sleep(3600)
        async for page in super().read_logs(job_id, cursor, **how):
            if job_id == "broken":
                runs = [LineRun(len(page.lines), 1, uid_prefix="\udcff")]
                yield LogPage(page.lines, runs, page.cursor)
            else:
                yield LogPage([], [], page.cursor)
                yield page


def test_fault_in_one_job_does_not_touch_the_others(server):
    """Nor do pages without lines, which a service need not yield."""
    with serving(Faulty("good", "bug", "broken")) as running:

        async def work(fused):
            await fused.get_job("good")
            asks = [read(fused, job_id, CURSOR_MARK + b"0") for job_id in ("good", "bug", "broken")]
            return await asyncio.gather(*asks, read(fused, "good"), return_exceptions=True)

        good, bug, broken, alone = run(running, work, tries=1)
    assert [page.lines for page in good] == [page.lines for page in alone] == [[b"a line"]]
    assert isinstance(bug, ServiceUnavailableError)
    assert isinstance(broken, ServiceUnavailableError)


def test_log_that_cannot_be_read_now_does_not_keep_the_others():
    """Those before it and after it are answered in time, by the same request or by one of their own."""
    with serving(Faulty("a", "hangs", "z")) as running:

        async def work(fused):
            await fused.get_job("a")
            asks = [asyncio.create_task(read(fused, job_id, CURSOR_MARK + b"0")) for job_id in ("a", "hangs", "z")]
            await asyncio.wait([asks[0], asks[2]], timeout=30)
            asks[1].cancel()
            return await asyncio.gather(*asks, return_exceptions=True)

        first, hung, last = run(running, work)
    assert [page.lines for page in first] == [page.lines for page in last] == [[b"a line"]]
    assert isinstance(hung, asyncio.CancelledError)


def test_reply_for_many_stays_small(service, server):
    """However much there is to read: the rest goes into replies for one job, at the pace of its reader."""
    for number in range(150):
        service.add_job(f"big{number}")
        service.add_lines(f"big{number}", "x" * 60_000)
    query = "&".join(f"job=big{number}&cursor=MA==" for number in range(150))
    reply = ask(service, f"/log-pages?{query}")
    frames = FrameSplitter().feed(reply.content)
    assert [frame.job for frame in frames] == list(range(150))
    assert len(reply.content) < 5 << 20
    assert all(frame.more or frame.page for frame in frames)


@pytest.mark.parametrize("cursor", ["x", "9" * 5000, "-1"])
def test_cursor_that_is_not_of_the_log(tmp_path, cursor):
    """Any such reply is reported as one."""
    with LocalJobs(tmp_path / "state") as local:
        job = local.run("echo", "x")
        reply = ask(local.service, f"/log-pages/{job.job_id}?cursor={cursor_text(cursor.encode())}")
    assert (reply.status_code, reply.headers["Tailspan-Resume-Cursor"]) == (410, "")
