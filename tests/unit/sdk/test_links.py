"""`[links]`: URLs of a job's telemetry."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tailspan.config import LinksSettings
from tailspan.models import JobState, JobStatus

T0 = datetime.fromtimestamp(1_000_000, UTC)
HOSTILE = 'a/b c&d="{trace_id}"\n#\ud800'


def job(state: JobState = JobState.SUCCEEDED, **fields: Any) -> JobStatus:
    ended = {"finished_at": T0 + timedelta(seconds=60)} if state.is_terminal else {}
    known = {"job_id": "j-1", "job_name": "etl", "identity": "id", "trace_id": "ab" * 16, "submitted_at": T0, **ended}
    return JobStatus.from_state(state, **{**known, **fields})


def test_placeholders_are_filled_in() -> None:
    """Ids and names, and five minutes around the job; a running job's range ends now."""
    links = LinksSettings(
        trace="http://j/{trace_id}", logs="http://g/?q={job_id},{job_name}&from={start_ms}&to={end_ms}"
    )
    assert links.of(job()) == {
        "trace": f"http://j/{'ab' * 16}",
        "logs": "http://g/?q=j-1,etl&from=999700000&to=1000360000",
    }
    assert links.of(job(JobState.RUNNING))["logs"].endswith("&to=now")
    assert LinksSettings().of(job()) == {}


def test_values_are_escaped_and_other_braces_stay() -> None:
    """A name cannot leave its place in the URL, nor bring placeholders of its own; JSON in a URL keeps its braces."""
    links = LinksSettings(logs='http://g/?p={"a":{"q":"{job_name}"}}&x={unknown}')
    url = links.of(job(job_name=HOSTILE))["logs"]
    assert url == 'http://g/?p={"a":{"q":"a%2Fb%20c%26d%3D%22%7Btrace_id%7D%22%0A%23%3F"}}&x={unknown}'


def test_the_grafana_explore_urls_of_the_example() -> None:
    """What config.example.toml shows is what Explore reads: panes as JSON, with query and range of the job."""
    example = (Path(__file__).parents[3] / "config.example.toml").read_text()
    found = dict(re.findall(r'^#   (trace|logs) = "(.*explore.*)"$', example, re.MULTILINE))
    links = LinksSettings(**found).of(job())
    panes = {name: json.loads(parse_qs(urlsplit(url).query)["panes"][0])["a"] for name, url in links.items()}
    assert panes["trace"]["queries"][0]["query"] == "ab" * 16
    assert panes["logs"]["queries"][0]["expr"] == f'{{service_name!=""}}|trace_id="{"ab" * 16}"'
    assert {(pane["range"]["from"], pane["range"]["to"]) for pane in panes.values()} == {("999700000", "1000360000")}
