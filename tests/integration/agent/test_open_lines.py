"""Open lines of real local jobs: visible at once in telemetry and on the page, and one line once they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.agents import Bench, looped, until
from tests.fakes.local_jobs import LocalJobs
from tests.integration.agent.web.test_page import next_event

WATCH = {"service": "local", "discover": True}
GATE = "gate() { until [ -e $1 ]; do sleep 0.05; done; }; "


@pytest.fixture
def local(tmp_path: Path, bench: Bench) -> Iterator[LocalJobs]:
    """Return local jobs that the bench's agents follow."""
    with LocalJobs(tmp_path / "jobs") as jobs:
        bench.services["local"] = jobs.service
        yield jobs


def open_texts(bench: Bench) -> list[str]:
    """Return the open lines received, in order."""
    return [row.body for row in bench.collector.log_records() if row.event_name == "tailspan.line.open"]


@looped
async def test_a_question_is_visible_and_becomes_one_line(tmp_path: Path, bench: Bench, local: LocalJobs) -> None:
    """Also what is added to it; a restarted agent sends nothing twice, and the receipt counts one line."""
    script = (
        GATE + "echo first; printf 'Continue? '; gate a; printf '[y] '; gate b; echo yes; printf 'Continue? '; gate c"
    )
    job_id = local.start("sh", "-c", script, cwd=str(tmp_path))
    async with bench.running(WATCH) as agent:
        await bench.received(lambda: open_texts(bench) == ["Continue? "])
        (row,) = (row for row in bench.collector.log_records() if row.event_name)
        assert row.attributes["tailspan.line.open"] is True
        assert agent.followed_jobs()[0][0].last_line == "Continue? "
    async with bench.running(WATCH) as agent:
        await until(lambda: any(tailer.followed for tailer in agent.tailers))
        (tmp_path / "a").touch()
        await bench.received(lambda: open_texts(bench) == ["Continue? ", "Continue? [y] "])
        (tmp_path / "b").touch()
        await bench.received(lambda: open_texts(bench)[2:] == ["Continue? "])
        (tmp_path / "c").touch()
        await bench.received(bench.receipts)
    assert bench.bodies() == ["first", "Continue? [y] yes", "Continue? "]
    assert open_texts(bench) == ["Continue? ", "Continue? [y] ", "Continue? "]
    uids = [row.attributes["log.record.uid"] for row in bench.collector.log_records()]
    assert len(set(uids)) == len(uids)
    assert bench.receipts()[job_id].attributes["tailspan.lines.read"] == 3


@looped
async def test_a_supervisor_killed_within_a_line(tmp_path: Path, bench: Bench, local: LocalJobs) -> None:
    """What the job had written of it is its last line."""
    job_id = local.start("sh", "-c", "printf 'Loading... '; sleep 987")
    async with bench.running(WATCH):
        await bench.received(lambda: open_texts(bench) == ["Loading... "])
        local.kill(local.state(job_id))
        await bench.received(bench.receipts)
    assert bench.bodies() == ["Loading... "]


@looped
async def test_a_progress_bar_and_a_long_line_are_no_flood(tmp_path: Path, bench: Bench, local: LocalJobs) -> None:
    """Of thirty states of a bar few are records; a line of a megabyte is whole, and its open text is cut."""
    bar = 'i=0; while [ $i -lt 30 ]; do i=$((i+1)); printf "$i%%\\r"; sleep 0.1; done; echo'
    script = f"{bar}; head -c 1000000 /dev/zero | tr '\\0' x; until [ -e go ]; do sleep 0.05; done; echo"
    local.start("sh", "-c", script, cwd=str(tmp_path))
    async with bench.running(WATCH):
        await bench.received(lambda: open_texts(bench)[-1:] == ["x" * 65536])
        (tmp_path / "go").touch()
        await bench.received(bench.receipts)
    assert len(open_texts(bench)) <= 10
    assert "".join(bench.bodies()).endswith("x" * 1_000_000)


@looped
async def test_secrets_are_not_in_open_lines(
    tmp_path: Path, bench: Bench, local: LocalJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in telemetry nor on the page, also if the line ends within one."""
    monkeypatch.setenv("TOKEN", "hunter22")
    local.start("sh", "-c", "printf 'login hunter22 hunte'; sleep 987")
    async with bench.running(WATCH, more='[redact]\nenv = ["TOKEN"]', listen="127.0.0.1:0") as agent:
        await bench.received(lambda: open_texts(bench))
        assert open_texts(bench) == ["login [REDACTED] "]
        assert agent.server is not None
        async with httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False, timeout=20) as client:
            (job,) = agent.followed_jobs()
            page = await client.get("/job", params={"service": "local", "id": job[0].status.job_id})
    assert ">login [REDACTED] </td>" in page.text
    log = page.text.partition('id="lines"')[2].partition("<aside")[0]
    assert log
    assert "hunte" not in log


@looped
async def test_the_page_shows_the_open_line(tmp_path: Path, bench: Bench, local: LocalJobs) -> None:
    """Without JavaScript, and live; once it is complete it is a line."""
    job_id = local.start(
        "sh", "-c", GATE + "echo first; printf 'Continue <now>? '; gate a; echo yes; sleep 987", cwd=str(tmp_path)
    )
    async with (
        bench.running(WATCH, listen="127.0.0.1:0") as agent,
        httpx.AsyncClient(base_url=agent.server.url, trust_env=False, verify=False, timeout=20) as client,
    ):
        await bench.received(lambda: open_texts(bench))
        page = (await client.get("/job", params={"service": "local", "id": job_id})).text
        assert ">Continue &lt;now&gt;? </td>" in page.partition('id="open"')[2]
        async with client.stream("GET", "/events/job", params={"service": "local", "id": job_id}) as answer:
            lines = answer.aiter_lines()
            assert "Continue &lt;now&gt;? " in (await next_event(lines, "open_line"))["html"]
            (tmp_path / "a").touch()
            assert "Continue &lt;now&gt;? yes" in (await next_event(lines, "lines"))["html"]
            assert (await next_event(lines, "open_line"))["html"].strip() == ""
