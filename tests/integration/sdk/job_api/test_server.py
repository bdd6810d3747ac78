"""`tailspan.job_api`: the replies for a job, and the replies for each error."""

import http.client
import json
import re
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan import errors
from tailspan.job_api.replies import encode_lines
from tailspan.logs.page import LineRun, LogPage, Stream
from tailspan.models import JobState
from tests.fakes.scripted_service import START_MS, ScriptedJob, ScriptedService, ask, serving

REPOSITORY = Path(__file__).parents[4]
FUSED_FIELDS = {
    JobState.PENDING: ("pending", False, "Pending", False),
    JobState.RUNNING: ("running", False, "Running", False),
    JobState.SUCCEEDED: ("terminated", True, "Done", True),
    JobState.FAILED: ("terminated", True, "Failed", True),
    JobState.CANCELED: ("terminated", True, "Canceled", True),
    JobState.TIMED_OUT: ("terminated", True, "Failed", True),
    JobState.LOST: ("terminated", True, "Failed", True),
}


@pytest.fixture
def service():
    """Three jobs: one that has ended, one that runs for ever, one without lines."""
    return ScriptedService(
        {
            "done": ScriptedJob(lines=["one", "two", "three", "four", "five"]),
            "forever": ScriptedJob(lines=["a"], statuses=None),
            "silent": ScriptedJob(),
        }
    )


@pytest.fixture
def server(service):
    """The job API over those jobs, open to this machine without a token."""
    with serving(service) as running:
        yield running


@pytest.fixture
def api(server):
    """A client of that server."""
    with httpx.Client(base_url=server.url, verify=False) as client:
        yield client


def test_status_has_the_twelve_fields_and_ours(api):
    """A status says what the clients require and what Tailspan adds, with a trace id that the service made."""
    reply = api.get("/run/by-id/done").json()
    assert reply == {
        "job_id": "done",
        "job_name": "nightly-etl",
        "instance_id": None,
        "instance_type": None,
        "status": "terminated",
        "terminal_status": True,
        "last_heartbeat": None,
        "job_status": "Done",
        "job_status_date": "2026-03-01T12:00:00+00:00",
        "finished_job_status": True,
        "total_tasks": 0,
        "finished_tasks": 0,
        "state": "SUCCEEDED",
        "submitted_at": "2026-03-01T12:00:00+00:00",
        "started_at": "2026-03-01T12:00:00+00:00",
        "finished_at": "2026-03-01T12:00:00+00:00",
        "exit_code": 0,
        "error": None,
        "attributes": {"team": "geo"},
        "details": {},
        "parent": None,
        "url": None,
        "identity": "scripted-identity",
        "attempt": 1,
        "retry_of": None,
        "trace_id": reply["trace_id"],
        "logs_complete": True,
        "stale": False,
        "first_line_ms": START_MS,
        "last_line_ms": START_MS + 4,
        "log_pages": True,
    }
    assert re.fullmatch("[0-9a-f]{32}", reply["trace_id"])


@pytest.mark.parametrize("state", FUSED_FIELDS)
def test_each_state_is_said_in_the_words_of_the_fused_api(state):
    """Status and list report every state by the strings that the published clients know."""
    service = ScriptedService({"job": ScriptedJob(state=state)})
    status = ask(service, "/run/by-id/job").json()
    (row,) = ask(service, "/job/self").json()
    fields = tuple(status[key] for key in ("status", "terminal_status", "job_status", "finished_job_status"))
    assert fields == FUSED_FIELDS[state]
    assert (row["job_status"], row["state"]) == (FUSED_FIELDS[state][2], state)


def test_status_of_a_service_that_knows_only_times_does_not_read_its_log(service, api):
    """Where first and last time would cost a read of the log, the status leaves them out."""
    service.has_offsets = False
    reply = api.get("/run/by-id/done").json()
    assert (reply["first_line_ms"], reply["last_line_ms"]) == (None, None)


def test_name_that_is_no_unicode_does_not_break_a_status():
    """A job named by an undecodable argument is still shown."""
    reply = ask(ScriptedService({"job": ScriptedJob(name="etl-\udcff")}), "/run/by-id/job")
    assert reply.json()["job_name"] == "etl-?"


def test_list_rows_have_what_the_clients_require_and_ours(api):
    """A row has the eight Fused keys, and name, state and number of lines, which save requests."""
    assert api.get("/job/self").json()[0] == {
        "id": "done",
        "user_id": "scripted",
        "creation_date": "2026-03-01T12:00:00+00:00",
        "execution_environment_id": "scripted-identity",
        "job_status": "Done",
        "job_status_date": None,
        "instance_id": None,
        "instance_type": None,
        "job_name": "nightly-etl",
        "state": "SUCCEEDED",
        "lines": 5,
    }


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", range(25)),
        ("?skip=0&limit=3", range(3)),
        ("?skip=8&limit=5", range(8, 13)),
        ("?skip=10&limit=10", range(10, 20)),
        ("?skip=28&limit=25", range(28, 33)),
        ("?limit=10000", range(33)),
        ("?skip=33", []),
        ("?skip=1000000", []),
        ("?limit=0", []),
    ],
)
def test_list_is_paged_by_skip_and_limit(query, expected):
    """Any window of the list is what the service lists there; past its end the array is empty."""
    reply = ask(ScriptedService({str(number): ScriptedJob() for number in range(33)}), f"/job/self{query}")
    assert [row["id"] for row in reply.json()] == [str(number) for number in expected]


def test_logs_are_the_lines_as_they_were_written():
    """Times, stream and text go through unchanged; only bytes that are no text are replaced."""
    lines = [
        "\x1b[31mred\x1b[0m",
        "10%\r20%\r",
        b"\xff\xfe caf\xc3",
        "NUL \0",
        "  indented ",
        "",
        'a "quote" \\',
        "\x7f",
    ]
    reply = ask(ScriptedService({"job": ScriptedJob(lines=lines)}), "/logs/job").json()
    shown = [line.decode("utf-8", "replace") if isinstance(line, bytes) else line for line in lines]
    assert reply == [
        {"message": line, "timestamp": START_MS + number, "stream": "stdout"} for number, line in enumerate(shown)
    ]


@pytest.mark.parametrize("since_ms", [-5, 0, START_MS, START_MS + 2, START_MS + 5, 9_000_000_000_000])
def test_since_ms_is_inclusive(api, since_ms):
    """The lines at or after the time are returned, each once."""
    reply = api.get("/logs/done", params={"since_ms": since_ms}).json()
    assert [line["timestamp"] for line in reply] == [ms for ms in range(START_MS, START_MS + 5) if ms >= since_ms]


def test_log_without_lines_is_an_empty_array(api):
    """No line is no error."""
    assert api.get("/logs/silent").content == b"[]"


@given(
    st.lists(
        st.tuples(
            st.lists(st.binary() | st.text().map(str.encode), min_size=1, max_size=4),
            st.integers(0, 2**63 - 5),
            st.sampled_from([Stream.NONE, Stream.STDOUT, Stream.STDERR]),
        ),
        min_size=1,
    ),
    st.sampled_from([1, 20]),
)
def test_encoded_page_is_the_json_of_its_messages(groups, repeats):
    """The fast ways to write a page give what writing message by message gives, for any bytes, times and runs."""
    groups = [(lines * repeats, time_unix_nano, stream) for lines, time_unix_nano, stream in groups]
    runs = [LineRun(len(lines), time_unix_nano, stream) for lines, time_unix_nano, stream in groups]
    lines = [line for lines, _, _ in groups for line in lines]
    page = LogPage(lines, runs, b"")
    assert json.loads(b"[" + encode_lines(page) + b"]") == list(page.messages())
    text = b"".join(line.replace(b"\n", b"") + b"\n" for line in lines)
    page = LogPage(None, runs, b"", text=text)
    assert json.loads(b"[" + encode_lines(page) + b"]") == list(page.messages())


def test_run_of_lines_that_crosses_a_millisecond_keeps_its_times():
    """Lines count up in ns within a run, and each shows the ms that it is in."""
    page = LogPage([b"a", b"b", b"c"], [LineRun(3, 1_999_999, Stream.STDERR)], b"")
    assert json.loads(b"[" + encode_lines(page) + b"]") == list(page.messages())
    assert [message["timestamp"] for message in page.messages()] == [1, 2, 2]


def test_cancel_ends_a_job_and_leaves_an_ended_one(api):
    """Cancel answers with the new status, also when there was nothing left to cancel."""
    assert api.post("/run/by-id/forever/cancel").json()["state"] == "CANCELED"
    assert api.get("/run/by-id/forever").json()["state"] == "CANCELED"
    assert api.post("/run/by-id/done/cancel").json()["state"] == "SUCCEEDED"


@pytest.mark.parametrize("job_id", ["a/b", "..", "../../etc/passwd", "a?b=c#d", "a%2Fb", "größe 1", "a/cancel", "+"])
def test_any_printable_text_is_one_id(job_id):
    """An escaped id reaches the service as one id, whatever is in it."""
    escaped = quote(job_id, safe="").replace(".", "%2E")
    with serving(ScriptedService({job_id: ScriptedJob(lines=["x"], statuses=None)})) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port)
        for method, path in [
            ("GET", f"/run/by-id/{escaped}"),
            ("GET", f"/logs/{escaped}"),
            ("POST", f"/run/by-id/{escaped}/cancel"),
        ]:
            connection.request(method, f"/server/v1{path}")
            reply = connection.getresponse()
            assert (reply.status, job_id in reply.read().decode()) == (200, "run" in path)
        connection.close()


@pytest.mark.parametrize("escaped", ["%00", "a%0ab", "%ff", "x" * 513])
def test_what_cannot_be_an_id_is_a_bad_request(api, escaped):
    """Control characters, invalid UTF-8 and endless ids do not reach the service."""
    for path in (f"/run/by-id/{escaped}", f"/logs/{escaped}"):
        reply = api.get(path)
        assert reply.status_code == 400
        assert "job id" in reply.json()["message"]


@pytest.mark.parametrize(
    "path", ["/logs/done", "/server/v1/../../etc/passwd", "/server/v1/logs/", "/server/v1/logs/a/b", "/"]
)
def test_other_paths_do_not_exist(server, path):
    """What is not in the wire is 404 in JSON, unescaped slashes and dots included."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", path)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Content-Type"]) == (404, "application/json")
    assert path in json.loads(reply.read())["message"]
    connection.close()


@pytest.mark.parametrize("path", ["/run/by-id/done", "/logs/done", "/job/self"])
@pytest.mark.parametrize("method", ["POST", "HEAD", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(service, method, path):
    """Reading is GET and nothing else; no preflight is answered."""
    reply = ask(service, path, method=method)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "query",
    [
        *(f"/logs/done?since_ms={text}" for text in ("", "now", "1.5", "1e3", "-", "١", "9" * 14, "9" * 5000, "0x1")),
        *(f"/job/self?skip={text}" for text in ("", "-1", "a", "9" * 30)),
        *(f"/job/self?limit={text}" for text in ("", "-1", "a", "10001")),
    ],
)
def test_numbers_that_are_none_are_told(service, query):
    """A parameter that cannot be meant is an error that names it, not a guess."""
    reply = ask(service, query)
    assert reply.status_code == 400
    assert query.split("?")[1].split("=")[0] in reply.json()["message"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.JobNotFoundError("it says: no such job"), 404),
        (errors.RequestRejectedError("it says: gone", status_code=410), 410),
        (errors.RequestRejectedError("it says: no"), 400),
        (errors.ConfigError("it says: what?"), 400),
        (errors.ServiceUnavailableError("it says: later"), 503),
        (errors.ProtocolError("it says: <html>"), 502),
        (errors.AuthError("it says: who are you?"), 502),
        (errors.CursorExpiredError("it says: gone"), 410),
    ],
)
def test_errors_of_the_service_have_their_status_and_text(error, status):
    """What the service said reaches the client, with a status that says whose fault it is."""
    for path, page in (("/run/by-id/job", None), ("/logs/job", 0)):
        reply = ask(ScriptedService({"job": ScriptedJob(error=error, fails_at_page=page)}), path)
        assert (reply.status_code, reply.json()) == (status, {"message": str(error)})
        assert reply.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(("asked_s", "header"), [(None, "1"), (0.2, "1"), (30.5, "31")])
def test_unavailable_service_says_when_to_come_back(asked_s, header):
    """Retry-After is whole seconds, never earlier than the service asked for."""
    error = errors.ServiceUnavailableError("later", retry_after_s=asked_s)
    reply = ask(ScriptedService({"job": ScriptedJob(error=error)}), "/run/by-id/job")
    assert reply.headers["Retry-After"] == header


def test_a_bug_in_a_service_is_in_the_log_only():
    """An unforeseen error is a JSON 500 without its text; the server logs it."""
    reply = ask(ScriptedService({"job": ScriptedJob(error=RuntimeError("/home/secret"))}), "/run/by-id/job")
    assert (reply.status_code, reply.json()) == (500, {"message": "the server failed; see its log"})


def test_log_that_fails_in_the_middle_is_cut_off(caplog):
    """Lines that were sent stay sent, but no client can take them for the whole log."""
    job = ScriptedJob(lines=["a"] * 6, fails_at_page=2, error=errors.ServiceUnavailableError("the disk is gone"))
    received = []
    with serving(ScriptedService({"job": job})) as running, httpx.stream("GET", f"{running.url}/logs/job") as reply:
        with pytest.raises(httpx.RemoteProtocolError):
            received.extend(reply.iter_raw())
        assert reply.status_code == 200
    assert b"".join(received).count(b"message") == 4
    assert not b"".join(received).endswith(b"]")
    (record,) = caplog.records
    assert record.getMessage() == "reading the log of job 'job' failed; the reply was cut off: the disk is gone"


def test_whole_huge_log_arrives():
    """A log of many pages is one valid array with every line, in order."""
    lines = [f"line {number}" for number in range(50_000)]
    reply = ask(ScriptedService({"huge": ScriptedJob(lines=lines, page_lines=5000)}), "/logs/huge")
    assert [line["message"] for line in reply.json()] == lines
