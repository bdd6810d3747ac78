"""The start page's pure parts: the filter in a URL, the order, the counts and the timeline."""

from __future__ import annotations

import pytest
from starlette.datastructures import QueryParams

from tailspan.models import JobState, JobStatus
from tailspan_agent.analysis.assessment import JobSnapshot
from tailspan_agent.web.ended_jobs import EndedJob
from tailspan_agent.web.job_counts import job_counts
from tailspan_agent.web.job_filter import JobEntry, JobFilter, list_jobs, matching_jobs
from tailspan_agent.web.run_timeline import MAX_LANES, run_timeline

S = 1_000_000_000
HOUR = 3600 * S
NOW = 1_795_954_336 * S


def done(
    job_id: str, name: str = "etl", state: JobState = JobState.SUCCEEDED, ago_s: int = 60, took_s: int = 30, **more
):
    """Return the entry of an ended job."""
    ended_ns = NOW - ago_s * S
    job = EndedJob(
        identity="i", job_id=job_id, name=name, state=state, started_ns=ended_ns - took_s * S, ended_ns=ended_ns,
        lines=1, last_line="", alerts=(), **more,
    )  # fmt: skip
    return JobEntry("fake", job_id, name, state, ended_ns, job)


def live(job_id: str, name: str = "etl", *alerts: str, state: JobState = JobState.RUNNING):
    """Return the entry of a job that has been running for a minute."""
    status = JobStatus.from_state(state, job_id=job_id, job_name=name, identity="i", trace_id="0" * 32)
    job = JobSnapshot(service="fake", status=status, first_line_unix_nano=NOW - 60 * S)
    return JobEntry("fake", job_id, name, state, NOW - 60 * S, job, None, alerts)


ALL = [
    done("ok", took_s=500, attributes={"team": "geo", "env": "prod"}),
    done("bad", "load", JobState.FAILED, ago_s=2 * 3600, attributes={"team": "geo"}),
    done("old", "load", JobState.LOST, ago_s=30 * 3600),
    done("off", "tiles", JobState.CANCELED, ago_s=10),
    live("busy", "train", "slow"),
    live("quiet", "train", "silent"),
    live("next", "etl", state=JobState.PENDING),
]


def ids(query: str) -> list[str]:
    """Return the ids of the jobs that a query shows, in order."""
    job_filter = JobFilter.from_query(QueryParams(query))
    matching = matching_jobs(ALL, job_filter, NOW, lambda entry: getattr(entry.job, "attributes", {}))
    return [entry.job_id for entry in list_jobs(matching, job_filter, NOW).entries]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["busy", "next", "quiet", "off", "ok", "bad", "old"]),
        ("pipeline=load", ["bad", "old"]),
        ("pipeline=loa", []),
        ("range=24h&pipeline=load", ["bad"]),
        ("range=1h", ["busy", "next", "quiet", "off", "ok"]),
        ("range=never&pipeline=load", ["bad", "old"]),
        ("attr=team%3Dgeo", ["ok", "bad"]),
        ("attr=team%3Dgeo&attr=env%3Dprod", ["ok"]),
        ("attr=env", ["ok"]),
        ("attr=team%3D", []),
        ("attr=", ["busy", "next", "quiet", "off", "ok", "bad", "old"]),
        ("state=late", ["busy"]),
        ("state=silent", ["quiet"]),
        ("state=failed", ["bad", "old"]),
        ("sort=name&range=24h&state=running", ["busy", "quiet"]),
        ("sort=-duration", ["ok", "busy", "next", "quiet", "off", "bad", "old"]),
        ("sort=duration&state=failed", ["bad", "old"]),
        ("sort=when&state=failed", ["old", "bad"]),
        ("sort=drop%20table", ["busy", "next", "quiet", "off", "ok", "bad", "old"]),
    ],
)
def test_a_filter_in_a_url_selects_and_orders_jobs(query, found) -> None:
    """All parts hold at once; what is invalid is ignored; a canceled job has not failed."""
    assert ids(query) == found


def test_the_query_of_a_filter_is_the_filter() -> None:
    """A link keeps the filter; a change starts at the first page; a chip leaves one part out."""
    text = "q=a&state=failed&service=s&pipeline=p&attr=k%3Dv&attr=x&range=7d&sort=-duration&page=3"
    job_filter = JobFilter.from_query(QueryParams(text))
    assert JobFilter.from_query(QueryParams(job_filter.query())) == job_filter
    assert job_filter.query(state="") == text.replace("state=failed&", "").removesuffix("&page=3")
    assert [chip.label for chip in job_filter.chips] == ["service: s", "pipeline: p", "k=v", "x"]
    assert JobFilter.from_query(QueryParams(job_filter.chips[2].query)).attributes == ("x",)
    assert not job_filter.is_empty
    assert JobFilter(sort="name", page=2).is_empty


def test_the_counts_say_what_is_wrong_now() -> None:
    """Of failures those of the last day, of running jobs the late and the silent ones; no canceled ones."""
    counts = job_counts(ALL, missing=["report"], troubles=2, now_ns=NOW)
    found = (counts.failed, counts.running, counts.late, list(counts.missing), counts.silent, counts.troubles)
    assert found == (1, 2, 1, ["report"], 1, 2)


def test_a_timeline_has_a_lane_for_each_pipeline_failures_first() -> None:
    """Bars lie where the jobs ran, those in one place are one bar of the worst state, and old jobs are left out."""
    found = run_timeline(ALL, "", NOW)
    assert [(lane.name, lane.jobs, lane.failed) for lane in found.lanes] == [
        ("load", 1, 1),
        ("etl", 2, 0),
        ("train", 2, 0),
        ("tiles", 1, 0),
    ]
    (bar,) = found.lanes[0].bars
    assert (bar.kind, bar.jobs, bar.path) == ("failed", 1, "/job?service=fake&id=bad")
    assert bar.x == pytest.approx(1000 * 22 / 24, abs=5)
    assert found.lanes[2].bars[0].jobs == 2
    assert all(bar.x >= 0 and bar.x + bar.width <= 1000 for lane in found.lanes for bar in lane.bars)
    hour = run_timeline([done("a", took_s=1800, ago_s=0), done("b", ago_s=7200)], "1h", NOW)
    assert [(bar.x, bar.width) for bar in hour.lanes[0].bars] == [(500, 500)]


def test_a_timeline_of_many_jobs_is_small() -> None:
    """Ten thousand jobs of fifty pipelines: some lanes with some bars each, and a note of the rest."""
    jobs = [done(f"j{number}", f"p{number % 50}", ago_s=number * 8) for number in range(10_000)]
    found = run_timeline(jobs, "24h", NOW)
    assert (len(found.lanes), found.left_out) == (MAX_LANES, 50 - MAX_LANES)
    assert all(len(lane.bars) <= 250 for lane in found.lanes)
    assert run_timeline([], "", NOW).lanes == []
