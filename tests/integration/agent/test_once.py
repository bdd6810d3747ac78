"""`agent run --once`: what is readable now is relayed, each line once, and the result is reported."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from tailspan.errors import (
    AuthError,
    ConfigError,
    CursorExpiredError,
    JobNotFoundError,
    ProtocolError,
    ServiceUnavailableError,
)
from tailspan.models import JobStatus, ListedJob
from tailspan.services._http_options import LoginOptions
from tailspan.services.airflow import AirflowService
from tailspan.testing import FakeService
from tailspan_agent.agent import Agent
from tailspan_agent.errors import AgentError, CheckpointError
from tests.fakes.agents import PATIENCE_S, Bench, OddService
from tests.fakes.airflow import FakeAirflow
from tests.fakes.collector import Reply


def ago(**delta: float) -> datetime:
    return datetime.now(UTC) - timedelta(**delta)


def ended(service: FakeService, job_id: str, *lines: str, state: str = "SUCCEEDED", **fields: object) -> None:
    """Add a job that has ended, with its lines."""
    service.add_job(job_id)
    service.add_lines(job_id, *lines)
    service.set_state(job_id, state, **fields)


def relayed_so_far(bench: Bench, *, step_ms: int) -> OddService:
    """Return a service without offsets, with a running job of which two lines were relayed."""
    bench.services["fake"] = service = OddService("fake")
    service.final_read = True
    service.add_job("j1")
    service.add_lines("j1", "a", "b", timestamp_ms=1_700_000_000_000, step_ms=step_ms)
    bench.once()
    return service


def test_an_ended_job_is_relayed_completely(bench: Bench) -> None:
    """Each line once and in order, the four spans of one trace, the run counted."""
    ended(bench.fake, "j1", "a", "b", "a", job_name="etl")
    result = bench.once()
    assert (result.jobs, result.acked, result.rejected, result.failures, result.delivered) == (1, 4, 0, (), True)
    assert bench.bodies() == ["a", "b", "a"]
    spans = bench.spans()
    assert sorted(spans) == ["executing", "queued", "run", "submitted"]
    assert {span.trace_id for span in spans.values()} == {row.trace_id for row in bench.lines()}
    assert spans["run"].attributes["cicd.pipeline.result"] == "success"
    assert bench.metric("cicd.pipeline.run.duration").count == 1


def test_a_second_pass_repeats_nothing(bench: Bench) -> None:
    """Acknowledged lines and spans are not sent again, and the run stays counted once."""
    ended(bench.fake, "j1", "a", "b")
    bench.once()
    lines, spans = bench.bodies(), len(bench.collector.spans())
    result = bench.once()
    assert (result.acked, result.delivered) == (0, True)
    assert bench.bodies() == lines
    assert len(bench.collector.spans()) == spans
    assert bench.metric("cicd.pipeline.run.duration").count == 1


def test_a_service_that_is_busy_at_times(bench: Bench) -> None:
    """A single pass has no later poll: the service sends a refused request again, so one 429 does not end the job."""
    with FakeAirflow() as airflow:
        keys = {"base_url": airflow.url, "requests_per_second": 1000}
        bench.services["fake"] = AirflowService("fake", LoginOptions.model_validate(keys))
        job_id = airflow.add_run(start=ago(minutes=1))
        task = airflow.add_task(job_id, "extract")
        task.start(ago(seconds=59))
        task.log("one", ago(seconds=58))
        task.end(ago(seconds=57))
        airflow.set_state(job_id, "success", ago(seconds=56))
        airflow.busy_each = 4
        result = bench.once()
    assert (result.jobs, result.failures, result.delivered) == (1, (), True)
    assert bench.bodies() == ["one"]


def test_before_during_and_after_a_job(bench: Bench) -> None:
    """Passes over a pending, a running and an ended job add up to each line once, with one run span at the end."""
    bench.fake.add_job("j1", state="PENDING", started_at=None)
    bench.once()
    assert list(bench.spans()) == ["submitted"]
    bench.fake.set_state("j1", "RUNNING", started_at=datetime.now(UTC))
    bench.fake.add_lines("j1", "a", "b")
    bench.once()
    assert bench.bodies() == ["a", "b"]
    assert "run" not in bench.spans()
    bench.fake.add_lines("j1", "c")
    bench.fake.set_state("j1", "FAILED")
    bench.once()
    assert bench.bodies() == ["a", "b", "c"]
    names = [span.name for span in bench.collector.spans()]
    assert sorted(names) == ["RUN j1", "executing", "queued", "submitted"]
    root = bench.spans()["run"]
    assert [event.attributes.get("tailspan.job.state") for event in root.events][:3] == ["PENDING", "RUNNING", "FAILED"]


def test_identical_lines_are_as_many_as_they_are(bench: Bench) -> None:
    """Equal text at equal times: repeated lines keep their number, and differ in uid and time."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", *["same"] * 5, timestamp_ms=1_700_000_000_000)
    bench.fake.set_state("j1", "SUCCEEDED")
    bench.once()
    assert bench.bodies() == ["same"] * 5
    records = bench.lines()
    assert len({record.attributes["log.record.uid"] for record in records}) == 5
    assert [record.time_unix_nano for record in records] == [1_700_000_000_000_000_000 + n for n in range(5)]


def test_lookback_bounds_how_old_an_ended_job_may_be(bench: Bench) -> None:
    """Jobs that ended within it are backfilled, older ones are not, running ones always are."""
    ended(bench.fake, "old", "x", finished_at=ago(hours=3), job_status_date=ago(hours=3))
    ended(bench.fake, "recent", "y", finished_at=ago(minutes=30), job_status_date=ago(minutes=30))
    bench.fake.add_job("running", submitted_at=ago(days=9), started_at=ago(days=9))
    bench.fake.add_lines("running", "z")
    bench.once({"discover": True, "lookback": "1h"})
    assert sorted(bench.bodies()) == ["y", "z"]


def test_a_job_taken_up_once_is_finished_however_old(bench: Bench) -> None:
    """A job that was followed before and ended before the lookback still gets its last lines and its root span."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.once({"discover": True, "lookback": "1h"})
    bench.fake.add_lines("j1", "b")
    bench.fake.set_state("j1", "SUCCEEDED", finished_at=ago(hours=5), job_status_date=ago(hours=5))
    bench.once({"discover": True, "lookback": "1h"})
    assert bench.bodies() == ["a", "b"]
    assert "run" in bench.spans()


def test_named_jobs_need_no_discovery(bench: Bench) -> None:
    """Only the named job is relayed, however old it is, and the list is not requested."""
    ended(bench.fake, "mine", "a", finished_at=ago(days=9), job_status_date=ago(days=9))
    ended(bench.fake, "other", "b")
    bench.once({"jobs": ["mine"]})
    assert bench.bodies() == ["a"]
    assert ("list_jobs", "") not in bench.fake.calls


def test_the_first_watch_that_matches_wins(bench: Bench) -> None:
    """A job of several watches is relayed once, with the attributes of the first, even if a later one names it."""
    ended(bench.fake, "j1", "a", job_name="etl-1")
    bench.once(
        {"discover": True, "name": "etl-*", "attributes": {"team": "geo"}},
        {"jobs": ["j1"], "attributes": {"team": "ops"}},
        {"discover": True, "attributes": {"team": "all"}},
    )
    assert bench.bodies() == ["a"]
    assert bench.lines()[0].resource["team"] == "geo"


def test_min_severity_drops_and_counts(bench: Bench) -> None:
    """Lines below it are not sent, lines without a severity are; the run span still counts all lines read."""
    ended(bench.fake, "j1", "[INFO] fine", "plain", "[ERROR] bad")
    bench.once({"discover": True, "min_severity": "WARN"})
    assert bench.bodies() == ["plain", "[ERROR] bad"]
    assert bench.spans()["run"].attributes["tailspan.lines.read"] == 3
    assert bench.once().acked == 0


def test_a_job_whose_lines_are_all_dropped_is_done(bench: Bench) -> None:
    """With nothing to send, the job is done, and the next pass does not read it again."""
    ended(bench.fake, "j1", "[INFO] fine")
    assert bench.once({"discover": True, "min_severity": "ERROR"}).delivered
    bench.fake.calls.clear()
    bench.once({"discover": True, "min_severity": "ERROR"})
    assert ("read_logs", "j1") not in bench.fake.calls


def test_old_jobs_are_a_stream_of_their_own_and_stay_so(bench: Bench) -> None:
    """Whether a job is backfill is decided before its first line is sent, and stored."""
    ended(bench.fake, "old", "a", finished_at=ago(hours=2), job_status_date=ago(hours=2))
    ended(bench.fake, "new", "b")
    bench.collector.always("logs", Reply(503))
    bench.once_until(
        lambda: any(
            row.body == "a"
            for request in bench.collector.requests
            if request.signal == "logs"
            for row in request.log_rows
        )
    )
    bench.collector.always("logs", Reply())
    bench.fake.set_state("old", "SUCCEEDED")
    bench.once()
    streams = {row.body: row.resource.get("service.instance.id") for row in bench.lines()}
    assert streams["b"] is None
    assert streams["a"].startswith("backfill-")


def test_settle_waits_for_lines_that_come_after_the_end(bench: Bench) -> None:
    """A service without end marks is read until quiet: lines visible after the status are relayed."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a")
    bench.fake.set_state("j1", "SUCCEEDED", logs_complete=None)
    bench.fake.before_next(
        "read_logs", lambda: None, lambda: bench.fake.add_lines("j1", "b"), lambda: bench.fake.add_lines("j1", "c")
    )
    bench.once({"discover": True, "settle": 1.5})
    assert bench.bodies() == ["a", "b", "c"]


def test_missed_lines_are_found_by_the_final_read(bench: Bench) -> None:
    """A service without offsets is read once more in full: missing lines are relayed, and counted as late."""
    service = relayed_so_far(bench, step_ms=400)
    service.add_late("j1", "between", timestamp_ms=1_700_000_000_100)
    service.add_lines("j1", "c", timestamp_ms=1_700_000_009_000)
    service.set_state("j1", "SUCCEEDED")
    bench.once()
    assert bench.bodies() == ["a", "b", "c", "between"]
    assert bench.metric("tailspan.agent.lines.late", service="fake") == 1
    assert bench.spans()["run"].attributes["tailspan.lines.read"] == 4


def test_lines_that_the_service_has_deleted_are_not_missed(bench: Bench) -> None:
    """Relayed lines that are gone at the service are no difference; a late line after them is found."""
    service = relayed_so_far(bench, step_ms=5_000)
    service.add_late("j1", "between", timestamp_ms=1_700_000_005_100)
    service.add_lines("j1", "c", timestamp_ms=1_700_000_019_000)
    service.expire("j1", 1)
    service.set_state("j1", "SUCCEEDED")
    bench.once()
    assert bench.bodies() == ["a", "b", "c", "between"]
    assert bench.metric("tailspan.agent.lines.late", service="fake") == 1
    assert bench.spans()["run"].attributes["tailspan.lines.read"] == 4


def test_many_missed_lines_of_one_second_are_all_found(bench: Bench) -> None:
    """If the sums cannot identify the missing lines, the second is sent again: no loss, each line counted once."""
    service = relayed_so_far(bench, step_ms=100)
    for number in range(4):
        service.add_late("j1", f"late {number}", timestamp_ms=1_700_000_000_050 + number)
    service.add_lines("j1", "end", timestamp_ms=1_700_000_003_000)
    service.set_state("j1", "SUCCEEDED")
    bench.once()
    assert set(bench.bodies()) == {"a", "b", "late 0", "late 1", "late 2", "late 3", "end"}
    uids = {row.attributes["log.record.uid"] for row in bench.lines()}
    assert len(uids) == 7
    assert bench.spans()["run"].attributes["tailspan.lines.read"] == 7


@pytest.mark.parametrize(("watch", "offsets"), [({"final_read": False}, False), ({}, True)])
def test_no_final_read_where_there_is_none(bench: Bench, watch: dict[str, object], offsets: bool) -> None:
    """Switched off, or with a service that needs none: new lines are read once."""
    bench.services["fake"] = service = OddService("fake")
    service.final_read = not offsets
    service.add_job("j1")
    service.add_lines("j1", "a")
    bench.once({"discover": True, **watch})
    service.set_state("j1", "SUCCEEDED")
    service.calls.clear()
    bench.once({"discover": True, **watch})
    assert service.calls.count(("read_logs", "j1")) == 1


def test_a_log_that_was_read_whole_after_its_end_is_not_read_again(bench: Bench) -> None:
    """The final read finds lines missed while the job was followed: a job that had ended before is read once."""
    bench.services["fake"] = service = OddService("fake")
    service.final_read = True
    ended(service, "j1", "a", "b")
    bench.once()
    assert service.calls.count(("read_logs", "j1")) == 1
    assert bench.bodies() == ["a", "b"]


def test_a_job_without_a_log_has_a_trace(bench: Bench) -> None:
    """A 404 for the log of a job that never wrote does not mean that the job is gone."""
    bench.fake.add_job("j1", state="CANCELED", started_at=None)
    bench.fake.fail_next("read_logs", *[JobNotFoundError("no log")] * 9)
    result = bench.once()
    assert (result.failures, result.delivered) == ((), True)
    assert bench.spans()["run"].attributes["cicd.pipeline.result"] == "cancellation"


def test_a_job_whose_texts_are_no_utf8_is_relayed(bench: Bench) -> None:
    """A name, an attribute, a command or an error may have an undecodable byte or a lone surrogate."""
    text = "caf\udce9\ud800"
    texts = {"job_name": text, "error": text, "attributes": {text: text}, "details": {"process.command_line": text}}
    ended(bench.fake, "j1", f"ERROR {text}", state="FAILED", **texts)
    ended(bench.fake, "j2", "fine")
    assert bench.once().failures == ()
    assert bench.spans("j1")["run"].attributes["cicd.pipeline.name"] == "caf??"
    assert bench.bodies("j2") == ["fine"]


def test_what_was_rejected_is_said(bench: Bench) -> None:
    """Rejected records are counted, written to the dead letter, and not sent again."""
    ended(bench.fake, "j1", "a", "b", "c")
    bench.collector.script("logs", Reply(rejected=2, message="too old"))
    result = bench.once()
    assert (result.acked, result.rejected, result.delivered) == (2, 2, True)
    assert list((bench.state_dir / "dead-letter").glob("logs*.jsonl"))
    assert bench.metric("tailspan.agent.records.rejected", reason="partial") == 2
    assert bench.once().acked == 0


def test_an_endpoint_that_is_away_is_not_waited_for_beyond_the_timeout(bench: Bench) -> None:
    """Unacknowledged lines are reported as undelivered, and the next pass sends them: each line once."""
    ended(bench.fake, "j1", "a", "b")
    bench.collector.always("logs", Reply(503))
    bench.collector.always("traces", Reply(503))
    result = bench.once(timeout_s=0.3)
    assert (result.acked, result.delivered) == (0, False)
    bench.collector.always("logs", Reply())
    bench.collector.always("traces", Reply())
    assert bench.once().delivered
    assert bench.bodies() == ["a", "b"]
    assert len(bench.collector.spans()) == 4


def test_spans_do_not_wait_for_the_logs_endpoint(bench: Bench) -> None:
    """The whole trace of an ended job is sent while the logs endpoint is down."""
    ended(bench.fake, "j1", "a", state="FAILED")
    bench.collector.always("logs", Reply(503))
    assert not bench.once_until(lambda: len(bench.spans()) == 4).delivered
    assert sorted(bench.spans()) == ["executing", "queued", "run", "submitted"]
    bench.collector.always("logs", Reply())
    assert bench.once().delivered
    assert bench.bodies() == ["a"]
    # The first pass may end before the last acknowledgement is stored.
    assert len({span.span_id for span in bench.collector.spans()}) == 4


def test_logs_do_not_wait_for_the_traces_endpoint(bench: Bench) -> None:
    """All lines are acknowledged while the traces endpoint is down; the same bytes of spans are sent later."""
    ended(bench.fake, "j1", "a")
    bench.collector.always("traces", Reply(503))

    def spans(requests: list[object]) -> set[bytes]:
        return {
            span.SerializeToString()
            for request in requests
            if request.signal == "traces"
            for resource in request.message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }

    assert not bench.once_until(lambda: bench.bodies() and len(spans(bench.collector.requests)) == 4).delivered
    assert bench.bodies() == ["a"]
    refused = bench.collector.requests
    bench.collector.always("traces", Reply())
    assert bench.once().delivered
    assert bench.bodies() == ["a"]

    assert spans(refused) <= spans(bench.collector.requests)
    assert len(spans(bench.collector.requests)) == 4


def test_traces_switched_on_later_get_all_that_was_kept(bench: Bench) -> None:
    """The store keeps the spans while traces are not sent."""
    ended(bench.fake, "j1", "a")
    bench.once(otlp={"signals": ["logs"]})
    assert bench.collector.spans() == []
    bench.once()
    assert sorted(bench.spans()) == ["executing", "queued", "run", "submitted"]
    assert bench.bodies() == ["a"]


def test_logs_switched_on_later_backfill_from_their_own_cursor(bench: Bench) -> None:
    """The traces of a job are complete; its lines are sent from the first one on, and its run is not counted twice."""
    ended(bench.fake, "j1", "a", "b")
    for _ in range(2):
        assert bench.once(otlp={"signals": ["traces", "metrics"]}).delivered
    assert bench.bodies() == []
    bench.once()
    bench.once()
    assert bench.bodies() == ["a", "b"]
    assert len(bench.collector.spans()) == 4
    assert bench.spans()["run"].attributes["tailspan.lines.read"] == 2
    assert bench.metric("cicd.pipeline.run.duration").count == 1


def test_run_counts_survive_restarts(bench: Bench) -> None:
    """Each ended run counts once, whichever agent reports it."""
    for number in range(3):
        ended(bench.fake, f"j{number}", "a", job_name="etl")
        bench.once()
        bench.once()
    assert bench.metric("cicd.pipeline.run.duration", **{"cicd.pipeline.name": "etl"}).count == 3


def test_what_outlives_a_job_is_relayed_by_later_passes(bench: Bench) -> None:
    """The first pass sends the trace and the receipt; lines of a background process amend the receipt."""
    ended(bench.fake, "j1", "a", state="FAILED", exit_code=3, finished_at=ago(minutes=5), logs_complete=False)
    assert bench.once().acked == 3
    assert bench.spans()["run"].attributes["tailspan.logs.complete"] is False
    bench.fake.add_lines("j1", "b")
    bench.once()
    bench.once()
    events = [row.event_name for row in bench.collector.log_records()]
    assert events == ["", "exception", "tailspan.receipt", "", "tailspan.receipt"]
    bench.fake.add_lines("j1", "c")
    bench.fake.set_state("j1", "FAILED", logs_complete=True)
    bench.once()
    assert bench.once().jobs == 0
    assert receipt(bench, "j1")["lines.read"] == 3
    assert bench.bodies() == ["a", "b", "c"]
    assert len(bench.collector.spans()) == 4
    assert bench.metric("cicd.pipeline.run.duration").count == 1


def test_a_run_counts_with_the_time_it_ran(bench: Bench) -> None:
    """The run span begins at submission; the duration in metrics excludes the time in the queue."""
    start = ago(minutes=5).replace(microsecond=0)
    bench.fake.add_job("j1", submitted_at=start - timedelta(minutes=10), started_at=start)
    bench.fake.set_state("j1", "SUCCEEDED", finished_at=start + timedelta(seconds=5))
    bench.once()
    assert bench.metric("cicd.pipeline.run.duration").sum == 5.0
    assert bench.spans()["run"].end_unix_nano - bench.spans()["run"].start_unix_nano == 605 * 10**9


def test_an_unreachable_service_fails_the_pass(bench: Bench) -> None:
    """Its jobs are not relayed, the failure is reported, and no job becomes LOST."""
    bench.fake.add_job("j1")
    bench.fake.fail_next("list_jobs", ServiceUnavailableError("away", service="fake"))
    result = bench.once()
    assert [type(failure) for failure in result.failures] == [ServiceUnavailableError]
    assert bench.spans() == {}


def test_one_service_that_is_away_does_not_keep_another(bench: Bench) -> None:
    """Jobs of the other service are relayed in the same pass."""
    bench.services["other"] = other = FakeService("other", identity="other")
    bench.fake.fail_next("list_jobs", AuthError("who?", service="fake"))
    ended(other, "j1", "a")
    result = bench.once({"discover": True}, {"service": "other", "discover": True})
    assert bench.bodies() == ["a"]
    assert [type(failure) for failure in result.failures] == [AuthError]


def test_a_tailer_that_fails_in_between_is_a_failure_of_the_pass(bench: Bench) -> None:
    """What was read is acknowledged, the failure is reported, and the next pass continues from there."""
    bench.services["fake"] = service = OddService("fake", page_lines=2)
    ended(service, "j1", "a", "b", "c", "d")
    ended(service, "j2", "x")
    service.cut = ("j1", 1, ServiceUnavailableError("cut"))
    result = bench.once()
    assert [str(failure) for failure in result.failures] == ["cut"]
    assert result.delivered
    assert sorted(bench.bodies()) == ["a", "b", "x"]
    service.cut = None
    assert bench.once().failures == ()
    assert bench.bodies("j1") == ["a", "b", "c", "d"]


def test_a_fault_of_the_agent_is_no_success(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A service plugin that raises an unexpected error is not mistaken for one without lines."""
    ended(bench.fake, "j1", "a")
    bench.fake.fail_next("read_logs", ZeroDivisionError("bug"))
    result = bench.once()
    assert [type(failure) for failure in result.failures] == [AgentError]
    assert "bug" in str(result.failures[0])


class BrokenService(FakeService):
    """A plugin with a mistake in one method."""

    def __init__(self, method: str) -> None:
        super().__init__("broken", identity="broken")
        self.method = method

    async def get_job(self, job_id: str) -> JobStatus:
        """Divide by zero."""
        return await super().get_job(job_id) if self.method != "get_job" else 1 / 0  # type: ignore[return-value]

    async def list_jobs(self) -> AsyncGenerator[Sequence[ListedJob], None]:
        """Divide by zero."""
        if self.method == "list_jobs":
            raise ZeroDivisionError("bug")
        async for page in super().list_jobs():
            yield page


@pytest.mark.parametrize("method", ["get_job", "list_jobs"])
def test_a_mistake_in_a_plugin_is_named_with_its_line(
    bench: Bench, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Without a traceback; the jobs of other services are relayed."""
    ended(bench.fake, "j1", "a")
    bench.services["broken"] = broken = BrokenService(method)
    ended(broken, "b1", "b")
    result = bench.once({"discover": True}, {"service": "broken", "discover": True})
    assert bench.bodies() == ["a"]
    (failure,) = result.failures
    assert re.search(rf"BrokenService failed: ZeroDivisionError: .* \({__file__}:\d+\)", str(failure))
    assert "Traceback" not in caplog.text


def test_one_job_that_cannot_be_read_does_not_hide_the_others(bench: Bench) -> None:
    """A listed job with an invalid status is left out, with its reason, and the others are relayed."""
    bench.services["fake"] = service = OddService("fake")
    service.lists_names = False
    ended(service, "good", "a")
    ended(service, "bad", "b")
    service.fail_next("get_job", ProtocolError("no status"))
    result = bench.once()
    assert bench.bodies() == ["a"]
    assert [type(failure) for failure in result.failures] == [ProtocolError]


def test_a_named_job_that_does_not_exist_is_a_failure(bench: Bench) -> None:
    """A misspelt id is reported; a listed job that was deleted meanwhile is not."""
    ended(bench.fake, "j1", "a")
    result = bench.once({"jobs": ["j1", "typo"]})
    assert [failure.job_id for failure in result.failures] == ["typo"]
    assert isinstance(result.failures[0], JobNotFoundError)
    assert bench.bodies() == ["a"]


def test_a_job_deleted_after_it_was_taken_up_gets_its_root_span(bench: Bench) -> None:
    """Its trace has no orphans: the next pass writes its end, reports that lines may be lost, and forgets it."""
    bench.fake.add_job("j1", job_name="etl")
    bench.fake.add_lines("j1", "a")
    bench.once()
    bench.services["fake"] = FakeService("fake")
    result = bench.once()
    assert (result.failures, result.delivered) == ((), True)
    root = bench.spans()["run"]
    assert (root.name, root.attributes["cicd.pipeline.result"]) == ("RUN etl", "error")
    assert root.attributes["tailspan.logs.complete"] is False
    assert {span.parent_span_id for span in bench.collector.spans()} == {"", root.span_id}
    assert bench.metric("tailspan.agent.gaps", service="fake") == 1
    assert bench.once().jobs == 0


def test_expired_lines_are_a_gap_and_the_rest_is_read(bench: Bench) -> None:
    """A service dropped lines behind the cursor: the rest of the job is relayed, and the gap is counted."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a", "b")
    bench.once()
    bench.fake.add_lines("j1", "gone", "c", "d")
    bench.fake.expire("j1", 3)
    bench.fake.set_state("j1", "SUCCEEDED")
    assert bench.once().delivered
    assert bench.bodies() == ["a", "b", "c", "d"]
    assert bench.metric("tailspan.agent.gaps", service="fake") == 1


def test_two_services_of_one_identity_are_refused(bench: Bench) -> None:
    """One job would be relayed twice; the message names both, and the state directory is free again."""
    bench.services["twin"] = FakeService("twin")
    with pytest.raises(ConfigError, match=r"services\.fake and services\.twin"):
        bench.once({"discover": True}, {"service": "twin", "discover": True})
    bench.once()


def test_an_agent_that_cannot_be_made_leaves_the_directory_free(bench: Bench) -> None:
    """A wrong certificate, then a correct configuration in the same process."""
    with pytest.raises(ConfigError):
        bench.agent(otlp={"ca_file": str(bench.directory / "missing.pem")})
    bench.once()


def test_a_second_agent_is_refused_with_the_holder_of_the_directory(bench: Bench) -> None:
    """Two agents on one state directory would each relay everything."""
    first = bench.agent()
    with pytest.raises(CheckpointError, match=r"in use by agent pid \d+ on .*another state_dir"):
        bench.agent()
    asyncio.run(first.run_once(PATIENCE_S))
    bench.once()


def test_the_sdk_switched_off_means_no_relay(bench: Bench) -> None:
    """OTEL_SDK_DISABLED concerns everything that sends OTLP: the agent exits with an error instead of idling."""
    settings = bench.settings()
    off = settings.model_copy(update={"otlp": settings.otlp.model_copy(update={"disabled": True})})
    with pytest.raises(ConfigError, match="OTEL_SDK_DISABLED"):
        Agent(off, bench.open)


def test_a_store_that_takes_no_writes_is_waited_for(bench: Bench) -> None:
    """A disk that fails for a while costs neither lines nor duplicates."""
    ended(bench.fake, "j1", "a", "b")
    agent = bench.agent()
    with closing(sqlite3.connect(agent.store.path, isolation_level=None, check_same_thread=False)) as other:

        def refuse(_: object) -> Reply:
            other.execute("BEGIN IMMEDIATE")
            asyncio.run_coroutine_threadsafe(release(), loop[0])
            return Reply()

        async def release() -> None:
            await asyncio.sleep(0.5)
            other.execute("ROLLBACK")

        loop: list[asyncio.AbstractEventLoop] = []

        async def relay() -> object:
            loop.append(asyncio.get_running_loop())
            return await agent.run_once(PATIENCE_S)

        bench.collector.script("logs", refuse)
        result = asyncio.run(relay())
    assert result.delivered
    assert bench.once().acked == 0
    assert bench.bodies() == ["a", "b"]


def test_a_store_that_refuses_to_take_up_a_job_is_a_failure_of_the_pass(bench: Bench) -> None:
    """A job whose checkpoint cannot be made is not read: its lines would be relayed twice."""
    ended(bench.fake, "j1", "a")
    agent = bench.agent()
    with closing(sqlite3.connect(agent.store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        result = asyncio.run(agent.run_once(PATIENCE_S))
    assert [type(failure) for failure in result.failures] == [CheckpointError]
    assert bench.bodies() == []
    assert bench.once().acked == 2


def test_a_damaged_store_heals(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The agent starts, reports the damage, and relays again within the lookback: the same lines have the same uids."""
    ended(bench.fake, "j1", "a")
    bench.once()
    (bench.state_dir / "checkpoints.db").write_bytes(b"not a database, whatever it was")
    assert bench.once().delivered
    assert "the checkpoint store was damaged" in caplog.text
    assert bench.bodies() == ["a", "a"]
    assert len({row.attributes["log.record.uid"] for row in bench.lines()}) == 1


def test_without_an_endpoint_everything_goes_to_files(bench: Bench) -> None:
    """The files mode acknowledges what is on disk."""
    ended(bench.fake, "j1", "a")
    result = bench.once(otlp={"endpoint": None})
    assert (result.acked, result.delivered) == (2, True)
    assert {path.name for path in (bench.state_dir / "otlp").iterdir()} == {
        "logs.jsonl",
        "traces.jsonl",
        "metrics.jsonl",
    }


def test_a_long_backlog_is_read_no_further_than_the_queue_holds(bench: Bench) -> None:
    """An endpoint that hangs pauses the reader: memory stays bounded, however long the log is."""
    bench.services["fake"] = service = OddService("fake", page_lines=1000)
    service.add_job("j1")
    service.add_lines("j1", *["x" * 1000] * 20_000)
    bench.collector.always("logs", Reply(hang=True))
    seen, quiet_since_s = 0, time.monotonic()

    def reader_is_paused() -> bool:
        nonlocal seen, quiet_since_s
        if seen != service.pages:
            seen, quiet_since_s = service.pages, time.monotonic()
        return bench.refused() and time.monotonic() - quiet_since_s > 0.3

    assert not bench.once_until(reader_is_paused).delivered
    assert 0 < service.pages < 12
    assert service.open_reads == 0


def receipt(bench: Bench, job_id: str) -> dict[str, object]:
    """Return the attributes of a job's receipt without their common prefix, and without times and ids."""
    row = bench.receipts()[job_id]
    names = {name.removeprefix("tailspan."): value for name, value in row.attributes.items()}
    return {name: value for name, value in names.items() if not name.endswith(("uid", "unix_nano", "hash"))}


def test_a_receipt_says_what_became_of_each_line(bench: Bench) -> None:
    """Read, acknowledged, rejected by reason, sent again; the run span has the same."""
    ended(bench.fake, "j1", "a", "b", "c")
    bench.collector.script("logs", Reply(503), Reply(503), Reply(rejected=2, message="too old"))
    bench.once()
    assert receipt(bench, "j1") == {
        "logs.complete": True,
        "lines.read": 3,
        "records.acked": 1,
        "records.rejected": 2,
        "records.rejected.partial": 2,
        "records.resent": 6,
    }
    assert bench.receipts()["j1"].severity_text == "WARN"
    root = bench.spans()["run"].attributes
    assert {name: root[name] for name in ("tailspan.records.acked", "tailspan.records.rejected")} == {
        "tailspan.records.acked": 1,
        "tailspan.records.rejected": 2,
    }


def test_a_receipt_adds_up_over_restarts(bench: Bench) -> None:
    """It includes what an earlier agent delivered."""
    bench.fake.add_job("j1", state="RUNNING")
    bench.fake.add_lines("j1", "a", "b")
    bench.once()
    bench.fake.add_lines("j1", "c")
    bench.fake.set_state("j1", "SUCCEEDED")
    bench.once()
    found = receipt(bench, "j1")
    assert (found["lines.read"], found["records.acked"], found["records.resent"]) == (3, 3, 0)


def test_a_receipt_marks_rejected_records_of_unknown_jobs(bench: Bench) -> None:
    """For a batch of several jobs, an endpoint returns only the number of rejected records."""
    for job_id in map(str, range(20)):
        ended(bench.fake, job_id, "a")
    bench.collector.script("logs", Reply(rejected=1, message="too old"))
    bench.once()
    receipts = [receipt(bench, job_id) for job_id in map(str, range(20))]
    assert sum(int(str(one["records.rejected"])) for one in receipts) == 1
    refused = [one for one in receipts if one.get("records.rejected.unidentified")]
    assert len(refused) > 1


def test_lines_that_become_visible_after_the_receipt_amend_it(bench: Bench) -> None:
    """A service without end marks is polled for late lines for an hour, by later passes too."""
    ended(bench.fake, "j1", "a", finished_at=ago(minutes=50), logs_complete=None)
    bench.once()
    assert (receipt(bench, "j1")["lines.read"], "amends" in receipt(bench, "j1")) == (1, False)
    bench.fake.add_lines("j1", "b")
    bench.once()
    assert bench.bodies() == ["a", "b"]
    assert (receipt(bench, "j1")["lines.read"], bench.receipts()["j1"].attributes["tailspan.receipt.amends"]) == (2, 1)
    records = len(bench.collector.log_records())
    bench.once()
    assert len(bench.collector.log_records()) == records, "no late line, so no amended receipt"
    assert len(bench.collector.spans()) == 4
    assert bench.metric("cicd.pipeline.run.duration").count == 1
    uids = [row.attributes["log.record.uid"] for row in bench.collector.log_records()]
    assert len(set(uids)) == len(uids)


def test_a_job_that_ended_long_ago_is_done_at_once(bench: Bench) -> None:
    """An hour after its end, a job costs no request."""
    ended(bench.fake, "j1", "a", finished_at=ago(minutes=70), logs_complete=None)
    bench.once()
    assert bench.once().jobs == 0


def test_a_late_service_is_compared_once_more_when_its_time_is_over(bench: Bench) -> None:
    """The service showed lines late, so the whole log is read an hour after the end."""
    bench.services["fake"] = service = OddService("fake")
    service.final_read = True
    ended(service, "j1", "a", finished_at=ago(minutes=50), logs_complete=None)
    bench.once()
    service.set_state("j1", "SUCCEEDED", finished_at=ago(minutes=61), logs_complete=None)
    service.add_lines("j1", "b")
    service.add_late("j1", "old", timestamp_ms=1_000)
    bench.once()
    assert bench.bodies() == ["a", "b", "old"]
    assert receipt(bench, "j1")["lines.read"] == 3
    assert bench.once().jobs == 0


def test_a_log_with_two_gaps_is_read_to_its_end(bench: Bench) -> None:
    """Each gap is counted, and the lines after both are relayed."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", *"abcdef")
    bench.fake.set_state("j1", "SUCCEEDED")
    bench.fake.fail_next(
        "read_logs",
        CursorExpiredError("gone", resume_cursor=b"2"),
        CursorExpiredError("gone", resume_cursor=b"4"),
    )
    assert bench.once().failures == ()
    assert bench.bodies() == ["e", "f"]
    assert bench.metric("tailspan.agent.gaps", service="fake") == 2


def test_a_failed_job_whose_last_lines_are_gone_gets_its_end(bench: Bench) -> None:
    """They are gone when they are read again for the failure digest: the run span is written without one."""
    bench.fake.add_job("j1")
    bench.fake.add_lines("j1", "a", "b")
    bench.fake.set_state("j1", "FAILED")

    def empty() -> None:
        bench.fake.fail_next("read_logs", CursorExpiredError("gone", resume_cursor=b"2"))

    bench.fake.before_next("read_logs", lambda: None, empty)
    assert bench.once().failures == ()
    assert bench.bodies() == ["a", "b"]
    assert "run" in bench.spans("j1")
