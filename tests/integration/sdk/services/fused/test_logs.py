"""Reading logs through the Fused service: what the official client loses or repeats, and ours must not.

With servers whose since_ms is inclusive and exclusive, because it is unknown which the hosted one is.
"""

import asyncio
import itertools
from collections import Counter
from contextlib import aclosing
from datetime import UTC, datetime

import pytest

from tailspan.errors import ProtocolError, ServiceUnavailableError
from tailspan.services.fused import FusedService
from tests.fakes.job_api import TRUNCATED, FakeJobApi, status_fault

NOW_MS = 1_767_225_600_000


@pytest.fixture(params=[True, False], ids=["inclusive", "exclusive"])
def api(request):
    """A server of either kind."""
    with FakeJobApi(inclusive=request.param) as fake:
        yield fake


def run(api, work, **options):
    """Do some work with a service of that server."""

    async def main():
        service = FusedService("fused", base_url=api.base_url, requests_per_second=10_000, **options)
        try:
            return await work(service)
        finally:
            await service.aclose()

    return asyncio.run(main())


async def read(service, job_id="j", cursor=None, **how):
    """Read to the present end; returns the pages and the cursor after them."""
    pages = [page async for page in service.read_logs(job_id, cursor, **how)]
    return pages, pages[-1].cursor if pages else cursor


def follow(api, reads, **how):
    """Read again and again as a tailer does; returns (ms, text) of every line in the order in which they came."""

    async def work(service):
        cursor = None
        out = []
        for _ in range(reads):
            pages, cursor = await read(service, cursor=cursor, **how)
            out += [(m["timestamp"], m["message"]) for page in pages for m in page.messages()]
        return out

    return run(api, work)


def test_lines_that_share_the_newest_ms(api):
    """Five lines, three in the newest ms, two of these late: none is lost, none is repeated."""
    job = api.add_job("j")
    for text, ms, visible in [("a", 1, 1), ("b", 2, 1), ("c", 3, 1), ("d", 3, 2), ("e", 3, 3)]:
        job.line(text, NOW_MS + ms, from_read=visible)
    assert [text for _, text in follow(api, 5)] == ["a", "b", "c", "d", "e"]


def test_many_lines_in_each_ms(api):
    """120 lines, 4 in each ms, 7 more at each read: 0 lost, 0 repeated, in order."""
    job = api.add_job("j")
    for number in range(120):
        job.line(f"line {number}", NOW_MS + number // 4, from_read=1 + number // 7)
    assert [text for _, text in follow(api, 20)] == [f"line {number}" for number in range(120)]


def test_the_newest_line_is_always_the_same_text(api):
    """Twelve heartbeats, some in one ms, are twelve lines, and the history is not fetched at each turn."""
    job = api.add_job("j")
    for number in range(12):
        job.line("heartbeat", NOW_MS + 20_000 * (number // 2), from_read=1 + number)
    assert follow(api, 14) == [(NOW_MS + 20_000 * (number // 2), "heartbeat") for number in range(12)]
    assert api.asked("logs")[-1].query == {"since_ms": str(NOW_MS + 89_999)}


def test_lines_that_become_visible_late(api):
    """Lines seen only 2 s after they were written, behind newer ones: 0 of 41 lost."""
    job = api.add_job("j")
    for number in range(41):
        late = 4 if number % 2 else 0
        job.line(f"line {number}", NOW_MS + 500 * number, from_read=1 + number + late)
    found = follow(api, 47)
    assert Counter(text for _, text in found) == Counter(f"line {number}" for number in range(41))


def test_a_line_later_than_the_window_is_left_to_the_final_read(api):
    """Beyond the window a late line is not found by reading on, but by reading once more from the start."""
    job = api.add_job("j")
    job.line("new", NOW_MS)
    job.line("very late", NOW_MS - 11_000, from_read=2)
    assert follow(api, 3) == [(NOW_MS, "new")]
    assert len(follow(api, 1)) == 2


def test_an_ended_job_gives_all_its_lines(api):
    """Whoever comes after the end still reads everything."""
    job = api.add_job("j", job_status="Done")
    for number in range(30):
        job.line(f"line {number}", NOW_MS + number)
    assert len(follow(api, 2)) == 30


def test_uids_and_times_are_the_same_after_a_restart(api):
    """A line has the same uid and the same time whether it came in one read or in many, by another service object."""
    job = api.add_job("j")
    for number in range(60):
        job.line("tick" if number % 3 else "tock", NOW_MS + number // 6, from_read=1 + number // 5)

    async def work(service):
        cursor = None
        ids = []
        for _ in range(13):
            other = FusedService("another name", base_url=f"{api.base_url}/")
            pages, cursor = await read(other, cursor=cursor)
            await other.aclose()
            ids += [pair for page in pages for pair in zip(page.uids(), page.times_unix_nano(), strict=True)]
        pages, _ = await read(service)
        return ids, [pair for page in pages for pair in zip(page.uids(), page.times_unix_nano(), strict=True)]

    in_parts, at_once = run(api, work)
    assert in_parts == at_once
    assert len(set(in_parts)) == 60


def test_a_late_window_of_its_own(api):
    """A narrower window asks for less."""
    api.add_job("j").line("x", NOW_MS)
    follow(api, 2, late_window_s=0.5)
    assert api.asked("logs")[-1].query == {"since_ms": str(NOW_MS - 501)}


def test_since_is_inclusive_whatever_the_server_does(api):
    """Lines at since_ms are there, each once, those before it are not, in pages and as messages."""
    job = api.add_job("j")
    for ms in (1, 2, 2, 3):
        job.line("x", ms)

    async def work(service):
        pages, _ = await read(service, since_ms=2)
        found = [message async for part in service.read_messages("j", 2) for message in part]
        return [m["timestamp"] for page in pages for m in page.messages()], [m["timestamp"] for m in found]

    assert run(api, work) == ([2, 2, 3], [2, 2, 3])


@pytest.mark.parametrize("since_ms", [None, 2])
def test_messages_are_oldest_first_whatever_the_server_does(since_ms):
    """Of one time they keep the server's order."""

    async def work(service):
        return [[m["message"] for m in part] async for part in service.read_messages("j", since_ms)]

    with FakeJobApi(sort=False) as api:
        job = api.add_job("j")
        for line, ms in (("d", 4), ("b", 2), ("c", 4), ("a", 2)):
            job.line(line, ms)
        assert run(api, work) == [["b", "a", "d", "c"]]


@pytest.mark.parametrize("since_ms", [None, 0, -5])
def test_since_the_beginning(api, since_ms):
    """No since, zero or less is everything, and asks for everything."""
    api.add_job("j").line("x", 0)

    async def work(service):
        pages, _ = await read(service, since_ms=since_ms)
        return [line for page in pages for line in page.lines], [m async for m in service.read_messages("j", since_ms)]

    assert run(api, work) == ([b"x"], [[{"message": "x", "timestamp": 0}]])
    assert [request.query for request in api.asked("logs")] == [{}, {}]


def test_messages_keep_all_keys_and_spaces(api):
    """Messages come as the server sent them: indentation, newlines and further keys."""
    job = api.add_job("j")
    job.line("  indented\n", 1, level="INFO", stream="stderr", extra={"a": [1]})

    async def work(service):
        return [message async for part in service.read_messages("j") for message in part]

    [message] = run(api, work)
    assert message == {
        "message": "  indented\n",
        "timestamp": 1,
        "level": "INFO",
        "stream": "stderr",
        "extra": {"a": [1]},
    }


def test_no_lines_are_no_pages(api):
    """A silent job gives no page, and reading on from a cursor gives none when there is nothing new."""
    job = api.add_job("j")

    async def work(service):
        nothing, cursor = await read(service)
        job.line("x", NOW_MS)
        first, cursor = await read(service, cursor=cursor)
        again, _ = await read(service, cursor=cursor)
        return nothing, len(first), again, await service.log_times_ms("j")

    assert run(api, work) == ([], 1, [], (NOW_MS, NOW_MS))


def big_body(count, *, step_ms=1, chunk_lines=500):
    """Return a job's log as a function of since_ms, made as it is sent; and a list of how many lines were made."""
    made = []

    def body(since_ms):
        first = 0 if since_ms is None else max(0, (since_ms - NOW_MS) // step_ms)
        opening = b"["
        for start in range(first, count, chunk_lines):
            numbers = range(start, min(count, start + chunk_lines))
            made.append(len(numbers))
            yield opening + b",".join(
                b'{"message":"line %d","timestamp":%d}' % (number, NOW_MS + number * step_ms) for number in numbers
            )
            opening = b","
        yield b"]" if opening == b"," else b"[]"

    return body, made


def test_closing_early_stops_the_server(api):
    """A long log is not fetched whole by a reader who leaves: the connection is closed, the next request works."""
    job = api.add_job("j")
    job.body, made = big_body(10**9)

    async def work(service):
        async with aclosing(service.read_logs("j")) as pages:
            first = await anext(pages)
        return len(first.lines), (await service.get_job("j")).job_id

    lines, job_id = run(api, work)
    assert 0 < lines <= 5_000
    assert job_id == "j"
    assert sum(made) < 10**8


def test_reading_goes_on_from_any_page_of_a_long_reply(api):
    """Whoever dies after the third page of a long reply resumes after it, without losing or repeating a line."""
    job = api.add_job("j")
    job.body, _ = big_body(40_000)

    async def work(service):
        async with aclosing(service.read_logs("j")) as pages:
            some = [await anext(pages) for _ in range(3)]
        rest, _ = await read(service, cursor=some[-1].cursor)
        return [line for page in some + rest for line in page.lines]

    assert run(api, work) == [b"line %d" % number for number in range(40_000)]


def test_a_long_reply_that_breaks_off_is_kept_as_far_as_it_came(api):
    """Pages before the break are good; the break is an error; reading on gives the rest."""
    job = api.add_job("j")
    whole, _ = big_body(40_000)
    job.body = lambda since_ms: itertools.chain(itertools.islice(whole(since_ms), 60), [b', {"mess'])

    async def work(service):
        lines, cursor = [], None
        try:
            async for page in service.read_logs("j"):
                lines += page.lines
                cursor = page.cursor
        except ProtocolError as error:
            broke = error
        job.body = whole
        rest, _ = await read(service, cursor=cursor)
        return lines, broke, [line for page in rest for line in page.lines]

    lines, broke, rest = run(api, work)
    assert "/logs/j" in str(broke)
    assert 10_000 < len(lines) < 30_000
    assert lines + rest == [b"line %d" % number for number in range(40_000)]


def test_a_torn_reply_is_not_the_end(api):
    """A reply cut by a closed connection is a passing fault, never a shorter log."""
    job = api.add_job("j")
    for number in range(50):
        job.line(f"line {number}", NOW_MS + number)
    api.fault(TRUNCATED, on="logs", times=None)
    with pytest.raises(ServiceUnavailableError, match="broke off"):
        run(api, read, tries=1)


def test_times_of_a_short_log_are_read_from_it(api):
    """One log request finds first and last line, also out of order: never a negative time."""
    job = api.add_job("j")
    api._sort = False
    for ms in (500, 900, 100, 300):
        job.line("x", NOW_MS + ms)
    assert run(api, lambda service: service.log_times_ms("j")) == (NOW_MS + 100, NOW_MS + 900)
    assert len(api.asked("logs")) == 1


def test_times_are_taken_from_the_status_where_it_tells_them(api):
    """Our own server reports both times, so no log is read."""
    api.add_job("j", first_line_ms=5, last_line_ms=9)
    assert run(api, lambda service: service.log_times_ms("j")) == (5, 9)
    assert api.asked("logs") == []


def test_times_of_no_lines(api):
    """Without lines there are no times."""
    api.add_job("j", first_line_ms=None, last_line_ms=None)
    assert run(api, lambda service: service.log_times_ms("j")) is None


@pytest.mark.parametrize(
    ("date_ms", "status"),
    [
        (NOW_MS + 30 * 1_000_000, "Done"),  # ended when the last line was written
        (NOW_MS + 30 * 1_000_000 + 86_400_000, "Done"),  # ended a day later
        (NOW_MS + 1_000, "Done"),  # the date is of another clock
        (None, "Running"),
    ],
)
def test_times_of_a_long_log_are_probed(api, date_ms, status):
    """Of a million lines a small part is decoded, wherever the end is."""
    date = None if date_ms is None else datetime.fromtimestamp(date_ms / 1000, UTC).isoformat()
    job = api.add_job("j", job_status=status, job_status_date=date)
    job.body, made = big_body(1_000_000, step_ms=30)
    first, last = run(api, lambda service: service.log_times_ms("j"))
    assert (first, last) == (NOW_MS, NOW_MS + 30 * 999_999)
    assert sum(made) < 500_000
    assert len(api.asked("logs")) < 40


def test_one_500_is_not_seen_by_a_tailer(api):
    """A passing fault on a log request loses and repeats nothing."""
    job = api.add_job("j")
    for number in range(6):
        job.line(f"line {number}", NOW_MS + number, from_read=1 + number)
    api.fault(status_fault(500), on="logs")
    assert [text for _, text in follow(api, 8)] == [f"line {number}" for number in range(6)]
