"""Real commands as local jobs: what they print, how they end, what they are given."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import anyio
import pytest

from tailspan._identity import span_id, trace_id
from tailspan.errors import ConfigError
from tailspan.local.launch import Request
from tailspan.logs.page import Stream
from tailspan.models import JobState
from tailspan.services import JobService, SubmitService
from tests.fakes.local_jobs import LocalJobs, until

PYTHON = sys.executable


@pytest.fixture
def local(tmp_path):
    """Return local jobs in a directory of their own."""
    with LocalJobs(tmp_path / "state") as jobs:
        yield jobs


def python(program: str) -> tuple[str, ...]:
    """Return the command that runs a program."""
    return (PYTHON, "-u", "-c", program)


def test_it_is_a_job_service(local):
    """The local service has all that the two protocols ask for."""
    assert isinstance(local.service, JobService)
    assert isinstance(local.service, SubmitService)


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        (b"no newline at the end", [b"no newline at the end"]),
        (b"\n\n", [b"", b""]),
        (b"x" * 1_000_000 + b"\nnext\n", [b"x" * 1_000_000, b"next"]),
        (b"y" * 2_500_000 + b"\n", [b"y" * (1 << 20), b"y" * (1 << 20), b"y" * (2_500_000 - (2 << 20))]),
        (b"bad \xff\xfe utf-8\n", [b"bad \xff\xfe utf-8"]),
        (b"nul \0 byte\n", [b"nul \0 byte"]),
        (b"10%\r50%\r100%\r\ndone\r\n", [b"10%\r50%\r100%\r", b"done\r"]),
        (b"\x1b[31mred\x1b[0m\n", [b"\x1b[31mred\x1b[0m"]),
        (b"", []),
    ],
)
def test_hostile_output_is_kept_as_it_is(local, tmp_path, output, lines):
    """Every byte stands in `log`, every line is read as printed."""
    (tmp_path / "output").write_bytes(output)
    job = local.run("cat", str(tmp_path / "output"))
    assert job.state is JobState.SUCCEEDED
    assert (local.directory(job.job_id) / "log").read_bytes() == output
    assert local.lines(job.job_id) == lines


def test_many_lines_arrive_in_order_each_with_its_own_time(local):
    """100,000 lines: none lost, none twice, all times different and sorted."""
    job = local.run("seq", "100000")
    pages = local.pages(job.job_id)
    assert [int(line) for page in pages for line in page.lines] == list(range(1, 100_001))
    times = [time for page in pages for time in page.times_unix_nano()]
    assert all(before < after for before, after in itertools.pairwise(times))
    assert len({uid for page in pages for uid in page.uids()}) == 100_000
    assert local.state(job.job_id)["lines"] == 100_000


def test_both_streams_are_told_apart_and_never_torn(local):
    """Lines of both streams stand whole in one log, each with its stream."""
    program = "import os\nfor i in range(2000):\n os.write(1, b'out %d\\n' % i)\n os.write(2, b'err %d\\n' % i)"
    job = local.run(*python(program))
    seen = {Stream.STDOUT: [], Stream.STDERR: []}
    for page in local.pages(job.job_id):
        position = 0
        for run in page.runs:
            seen[run.stream] += page.lines[position : position + run.lines]
            position += run.lines
    assert seen[Stream.STDOUT] == [b"out %d" % i for i in range(2000)]
    assert seen[Stream.STDERR] == [b"err %d" % i for i in range(2000)]
    assert sorted((local.directory(job.job_id) / "log").read_bytes().splitlines()) == sorted(
        [*seen[Stream.STDOUT], *seen[Stream.STDERR]]
    )


def test_lines_are_seen_while_the_job_runs(local):
    """A reader with a cursor gets new lines as they are printed, and each once."""
    reading, feed = os.pipe()
    job_id = local.start("cat", stdin_fd=reading)
    os.close(reading)
    cursor = None
    for line in (b"first", b"second"):
        os.write(feed, line + b"\n")
        (page,) = until(lambda at=cursor: local.pages(job_id, at))
        assert page.lines == [line]
        cursor = page.cursor
    assert local.service.status(job_id).state is JobState.RUNNING
    assert local.service.status(job_id).logs_complete is False
    os.close(feed)
    assert local.complete(job_id).state is JobState.SUCCEEDED


def test_exit_codes_and_signals(local):
    """The end of the main process is the end of the job, in the words that a shell would use."""
    job = local.run("sh", "-c", "exit 3")
    assert (job.state, job.exit_code, job.error) == (JobState.FAILED, 3, "exited with code 3")
    job = local.run("sh", "-c", "kill -9 $$")
    assert (job.state, job.exit_code) == (JobState.FAILED, 137)
    assert job.error == "killed by SIGKILL, perhaps because memory ran out"
    job = local.run("sh", "-c", "kill -TERM $$")
    assert (job.exit_code, job.error, local.state(job.job_id)["signal"]) == (143, "killed by SIGTERM", "SIGTERM")
    job = local.run("true")
    assert (job.state, job.exit_code, job.error, job.logs_complete) == (JobState.SUCCEEDED, 0, None, True)
    assert job.submitted_at <= job.started_at <= job.finished_at


def test_commands_that_cannot_be_executed_are_failed_jobs(local, tmp_path):
    """Whoever watches the pipeline sees that it failed, and why."""
    job = anyio.run(lambda: local.service.submit(["no-such-command-here"]))
    job = local.complete(job.job_id)
    assert (job.state, job.exit_code, job.logs_complete) == (JobState.FAILED, 127, True)
    assert local.lines(job.job_id) == [b"tailspan: no-such-command-here: command not found"]
    assert job.error.startswith("no-such-command-here: command not found")
    job = local.run(str(tmp_path))
    assert (job.exit_code, job.error) == (126, f"{tmp_path}: cannot be executed: Permission denied")
    assert local.lines(job.job_id) == [f"tailspan: {tmp_path}: Is a directory".encode()]


def test_a_script_without_first_line_runs_as_by_a_shell(local, tmp_path):
    """execvp(3) and every shell give it to /bin/sh."""
    script = tmp_path / "script"
    script.write_text("echo no first line: $1")
    script.chmod(0o755)
    job = local.run(str(script), "x")
    assert (job.exit_code, local.lines(job.job_id)) == (0, [b"no first line: x"])


@pytest.mark.parametrize(
    "options",
    [
        {"command": []},
        {"command": [""]},
        {"command": ["a\0b"]},
        {"command": "echo hi"},
        {"command": ["true"], "name": ""},
        {"command": ["true"], "name": "a\nb"},
        {"command": ["true"], "timeout_s": 0},
        {"command": ["true"], "timeout_s": float("nan")},
        {"command": ["true"], "cwd": "/no/such/directory"},
        {"command": ["true"], "env": {"A=B": "c"}},
        {"command": ["true"], "attributes": {"": "c"}},
        {"command": ["true"], "attributes": {"a": 1}},
    ],
)
def test_what_cannot_be_run_is_refused_at_once(local, options):
    """A wrong argument is the caller's error and leaves no job behind."""
    with pytest.raises(ConfigError):
        anyio.run(lambda: local.service.submit(**options))
    assert not list(local.state_dir.glob("jobs/*"))


def test_a_program_whose_name_is_no_utf8_runs(local, tmp_path):
    """A file's name and an argument are any bytes; the job's name, which all services share, is text."""
    program = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    os.symlink("/bin/echo", program)
    job = local.complete(local.start(program, "na\udcefve"))
    assert (job.state, job.job_name) == (JobState.SUCCEEDED, "caf?")
    assert local.lines(job.job_id) == [b"na\xefve"]


def test_timeout_ends_the_job(local):
    """A job that runs too long is ended and says so."""
    job = local.run("sleep", "600", timeout_s=0.2)
    assert (job.state, job.exit_code, job.error) == (
        JobState.TIMED_OUT,
        143,
        "ran longer than its timeout of 200 ms",
    )


GRANDCHILD = """
import os, signal, sys, time
{prepare}
if os.fork() == 0:
    print("grandchild", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Return whether a process has ended (a zombie nobody waits for has, too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def grandchild_of(local: LocalJobs, job_id: str) -> int:
    """Return the process id that a grandchild has printed."""
    (line,) = until(lambda: local.lines(job_id))
    return int(line.split()[1])


def test_cancel_ends_all_processes_of_the_job(local):
    """SIGTERM goes to the whole group, not to the main process alone."""
    job_id = local.start(*python(GRANDCHILD.format(prepare="")))
    pid = grandchild_of(local, job_id)
    job = local.cancel(job_id)
    assert (job.state, job.exit_code, job.error) == (JobState.CANCELED, 143, "canceled")
    until(lambda: gone(pid))
    assert local.complete(job_id).state is JobState.CANCELED


def test_what_ignores_the_cancel_is_killed_after_the_grace_time(tmp_path):
    """SIGKILL comes where SIGTERM is ignored, also for processes that outlive the main one."""
    with LocalJobs(tmp_path / "state", cancel_grace_s=0.2) as local:
        ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        job_id = local.start(*python(GRANDCHILD.format(prepare=ignore)))
        pid = grandchild_of(local, job_id)
        local.cancel(job_id)
        job = local.complete(job_id)
        assert (job.state, job.exit_code) == (JobState.CANCELED, 137)
        until(lambda: gone(pid))
        # Only the grandchild ignores it, and it has closed its output: nothing else would keep the supervisor waiting.
        program = (
            "import os, signal, time\n"
            "if os.fork() == 0:\n"
            "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "    print('grandchild', os.getpid(), flush=True)\n"
            "    os.close(1); os.close(2)\n"
            "    time.sleep(600)\n"
            "time.sleep(600)\n"
        )
        job_id = local.start(*python(program))
        pid = grandchild_of(local, job_id)
        assert local.cancel(job_id).exit_code == 143
        assert local.complete(job_id).state is JobState.CANCELED
        until(lambda: gone(pid))


def test_a_stopped_job_can_be_canceled(local):
    """A job that was suspended wakes up to end."""
    job_id = local.start("sleep", "600")
    os.kill(local.state(job_id)["pid"], signal.SIGSTOP)
    assert local.cancel(job_id).state is JobState.CANCELED


def test_cancelling_an_ended_job_changes_nothing(local):
    """The state of a job that has ended stays."""
    job = local.run("true")
    assert local.cancel(job.job_id) == job
    assert not (local.directory(job.job_id) / "cancel").exists()


def test_a_job_can_be_canceled_before_it_has_started(local):
    """As soon as its directory is there, a job can be canceled, though there is no process to signal yet."""
    canceled: list[str] = []

    def cancel() -> None:
        (path,) = until(lambda: list(local.state_dir.glob("jobs/2*")))
        canceled.append(local.cancel(path.name).job_id)

    thread = threading.Thread(target=cancel)
    thread.start()
    job_id = local.start("sleep", "600")
    assert local.ended(job_id).state is JobState.CANCELED
    thread.join()
    assert canceled == [job_id]


def test_a_killed_supervisor_makes_the_job_lost(local):
    """Not RUNNING for ever: LOST, with all lines, and the command does not live on unwatched."""
    job_id = local.start("sh", "-c", "echo one; echo two >&2; exec sleep 600")
    until(lambda: len(local.lines(job_id)) == 2)
    pid = local.state(job_id)["pid"]
    job = local.lose(job_id)
    assert (job.logs_complete, job.exit_code) == (True, None)
    assert "supervisor was killed" in job.error
    assert job.finished_at >= job.started_at
    assert local.lines(job_id) == [b"one", b"two"]
    assert local.cancel(job_id) == job
    if sys.platform == "linux":
        until(lambda: gone(pid))


def test_text_that_a_killed_supervisor_had_not_entered_is_read(local):
    """Bytes in `log` behind the last entry become lines once the job is lost; while it runs they are not seen."""
    job_id = local.start("sh", "-c", "echo one; exec sleep 600")
    until(lambda: local.lines(job_id))
    with open(local.directory(job_id) / "log", "ab") as log:
        log.write(b"two\nthr")
    assert local.lines(job_id) == [b"one"]
    (page,) = local.pages(job_id)
    local.lose(job_id)
    assert local.lines(job_id, page.cursor) == [b"two", b"thr"]
    rows = anyio.run(first_page, local)
    assert [(row.state, row.lines) for row in rows] == [(JobState.LOST, 3)]


async def first_page(local: LocalJobs):
    """Return the first page of the list."""
    return await anext(local.service.list_jobs())


def test_a_background_process_keeps_the_log_open_not_the_job(local, tmp_path):
    """The job ends with its main process; lines that come later are read, and then the log is complete."""
    os.mkfifo(tmp_path / "go")
    job_id = local.start("sh", "-c", f"(read x < {tmp_path}/go; echo late) & echo early")
    job = local.ended(job_id)
    assert (job.state, job.logs_complete) == (JobState.SUCCEEDED, False)
    assert local.lines(job_id) == [b"early"]
    (tmp_path / "go").write_text("\n")
    job = local.complete(job_id)
    assert (job.state, job.logs_complete) == (JobState.SUCCEEDED, True)
    assert local.lines(job_id) == [b"early", b"late"]


def test_a_supervisor_that_is_told_to_go_ends_the_log(local, tmp_path):
    """At a shutdown only background processes may be left to it: it writes the end and goes."""
    os.mkfifo(tmp_path / "go")
    job_id = local.start("sh", "-c", f"(read x < {tmp_path}/go) & echo early")
    local.ended(job_id)
    os.kill(local.state(job_id)["supervisor_pid"], signal.SIGTERM)
    job = local.complete(job_id)
    assert (job.state, local.state(job_id)["end"] is not None) == (JobState.SUCCEEDED, True)
    (tmp_path / "go").write_text("\n")


def test_a_partial_line_is_read_when_the_main_process_ends(local, tmp_path):
    """The last words of the main process do not wait for a background process."""
    os.mkfifo(tmp_path / "go")
    job_id = local.start("sh", "-c", f"(read x < {tmp_path}/go) & printf 'last words'")
    local.ended(job_id)
    assert local.lines(job_id) == [b"last words"]
    (tmp_path / "go").write_text("\n")
    local.complete(job_id)


def test_a_job_may_close_its_output_and_go_on(local, tmp_path):
    """Closed pipes are not the end of a job."""
    os.mkfifo(tmp_path / "go")
    job_id = local.start("sh", "-c", f"echo one; exec >&- 2>&-; read x < {tmp_path}/go; exit 5")
    until(lambda: local.lines(job_id))
    assert local.service.status(job_id).state is JobState.RUNNING
    (tmp_path / "go").write_text("\n")
    assert local.complete(job_id).exit_code == 5


def test_signals_and_files_are_as_a_shell_would_leave_them(local):
    """A command dies of a closed pipe, and has no file open that is not its own."""
    job = local.run("sh", "-c", "yes | head -n 1; ls /proc/self/fd | wc -l; grep SigBlk /proc/self/status")
    lines = local.lines(job.job_id)
    assert lines[0] == b"y"
    if sys.platform == "linux":
        # 0, 1, 2 and the directory that ls reads.
        assert lines[1:] == [b"4", b"SigBlk:\t0000000000000000"]


def test_environment_and_directory_pass_through(local, tmp_path, monkeypatch):
    """What the submitter has, with `env` on top, in `cwd`."""
    monkeypatch.setenv("FROM_SUBMITTER", "a b\udcff")
    monkeypatch.setenv("REPLACED", "old")
    job = local.run(
        PYTHON,
        "-c",
        "import os; print(os.getcwd()); print(ascii(os.environ['FROM_SUBMITTER']), os.environ['REPLACED'])",
        cwd=str(tmp_path),
        env={"REPLACED": "new"},
    )
    assert local.lines(job.job_id) == [os.fsencode(tmp_path), b"'a b\\udcff' new"]
    assert job.details["process.working_directory"] == str(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
def test_the_supervisor_keeps_its_memory_and_the_job_knows_nothing_of_it(local, monkeypatch):
    """What glibc is told is in the environment of one, and not of the other."""
    names = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    program = (
        "import os; found = open(f'/proc/{os.getppid()}/environ').read(); "
        f"print([(name in found, name in os.environ) for name in {names}])"
    )
    job = local.run(PYTHON, "-c", program)
    assert local.lines(job.job_id) == [b"[(True, False), (True, False)]"]


def test_a_job_gets_its_trace(local, monkeypatch):
    """An instrumented program's spans come below the job's; the submitter's own trace becomes a link."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    monkeypatch.setenv("TRACEPARENT", parent)
    monkeypatch.setenv("TRACESTATE", "a=b")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=geo,cicd.pipeline.name=outer")
    program = "import os, json; print(json.dumps({k: v for k, v in os.environ.items() if k[:5] in ('TRACE', 'OTEL_')}))"
    job = local.run(*python(program), name="my pipeline, ü")
    identity = local.service.identity
    assert job.trace_id == trace_id(identity, job.job_id)
    found = json.loads(local.lines(job.job_id)[0])
    # Only where this interpreter's installation has the API of OpenTelemetry.
    assert found.pop("OTEL_PYTHON_CONTEXT", "tailspan") == "tailspan"
    assert found == {
        "TRACEPARENT": f"00-{job.trace_id}-{span_id(identity, job.job_id, 'executing')}-01",
        "OTEL_SERVICE_NAME": "my pipeline, ü",
        "OTEL_RESOURCE_ATTRIBUTES": (
            f"team=geo,cicd.pipeline.name=my%20pipeline%2C%20%C3%BC,cicd.pipeline.run.id={job.job_id}"
        ),
    }
    assert job.parent == parent


def test_the_endpoint_is_passed_on(tmp_path):
    """A program that was given no endpoint gets the configured one."""
    otlp = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with LocalJobs(tmp_path / "state", otlp=otlp) as local:
        job = local.run("sh", "-c", "echo $OTEL_EXPORTER_OTLP_ENDPOINT $OTEL_EXPORTER_OTLP_PROTOCOL")
        assert local.lines(job.job_id) == [b"http://c:4318 http/protobuf"]
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://own"}
        job = local.run("sh", "-c", "echo $OTEL_EXPORTER_OTLP_ENDPOINT $OTEL_EXPORTER_OTLP_PROTOCOL", env=env)
        assert local.lines(job.job_id) == [b"http://own"]


def test_what_was_submitted_is_told_without_secrets(local):
    """Attributes and the command line are on the status; the environment is nowhere, secrets are hidden."""
    job = local.run("true", "--token", "hunter2", "--ok", attributes={"team": "geo"}, env={"MY_SECRET": "hunter2"})
    assert job.attributes == {"team": "geo"}
    assert job.job_name == "true"
    assert job.details["process.command_line"] == "true --token '***' --ok"
    assert job.details["host.name"] == job.instance_id == os.uname().nodename
    for path in local.directory(job.job_id).iterdir():
        assert b"hunter2" not in path.read_bytes()


def test_times_come_from_the_index(local):
    """First and last line in ms; none without lines."""
    job = local.run("sh", "-c", "echo a; echo b >&2")
    first, last = anyio.run(local.service.log_times_ms, job.job_id)
    assert job.started_at.timestamp() * 1000 - 1 <= first <= last <= time.time() * 1000
    assert anyio.run(local.service.log_times_ms, local.run("true").job_id) is None


def test_messages_have_time_and_stream(local):
    """The verbs get dicts, oldest first, and since_ms chooses."""
    job = local.run("sh", "-c", "echo a; sleep 0.05; echo ' b' >&2")

    async def messages(since_ms: int | None):
        return [one async for part in local.service.read_messages(job.job_id, since_ms) for one in part]

    first, second = anyio.run(messages, None)
    assert (first["message"], first["stream"], second["message"], second["stream"]) == ("a", "stdout", " b", "stderr")
    assert anyio.run(messages, second["timestamp"]) == [second]
    assert anyio.run(messages, second["timestamp"] + 1) == []


def test_jobs_are_submitted_from_threads_and_after_fork(local):
    """Each gets its own job; none waits for another's supervisor."""
    ids: list[str] = []

    def submit() -> None:
        ids.append(anyio.run(lambda: local.service.submit(["sh", "-c", "echo $0", "thread"])).job_id)

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            job = anyio.run(lambda: local.service.submit(["sh", "-c", "echo $0", "thread"]))
            os.write(writing, job.job_id.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    ids.append(os.read(reading, 100).decode())
    os.close(reading)
    os.close(writing)
    assert len(set(ids)) == 7
    for job_id in ids:
        assert local.complete(job_id).state is JobState.SUCCEEDED
        assert local.lines(job_id) == [b"thread"]


def test_a_fork_elsewhere_does_not_keep_a_job_alive(local):
    """A child that was forked while jobs were started holds none of their locks: a lost job is LOST."""
    stop = threading.Event()
    children: list[int] = []
    blocked, hold = os.pipe()

    def fork_often() -> None:
        while not stop.is_set() and len(children) < 20:
            pid = os.fork()
            if pid == 0:
                os.close(hold)
                os.read(blocked, 1)
                os._exit(0)
            children.append(pid)

    forking = threading.Thread(target=fork_often)
    forking.start()
    try:
        job_ids = [local.start("sleep", "600") for _ in range(4)]
        stop.set()
        forking.join()
        assert children
        for job_id in job_ids:
            assert local.lose(job_id).state is JobState.LOST
    finally:
        stop.set()
        forking.join()
        os.close(hold)
        os.close(blocked)
        for pid in children:
            os.waitpid(pid, 0)


def test_the_supervisor_is_small(local):
    """It is an orphan in a session of its own that has imported next to nothing and holds no file of the submitter."""
    with open(os.devnull) as other:
        os.set_inheritable(other.fileno(), True)
        job_id = local.start("sleep", "600")
    state = local.state(job_id)
    if sys.platform != "linux":
        return
    proc = Path(f"/proc/{state['supervisor_pid']}")
    status = dict(line.split(":\t") for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert int(status["VmRSS"].split()[0]) < 15 * 1024
    assert int(status["PPid"]) != os.getpid()
    assert os.readlink(proc / "cwd") == "/"
    assert {os.readlink(fd) for fd in (proc / "fd").iterdir() if int(fd.name) <= 2} == {os.devnull}
    assert os.getsid(state["pid"]) == state["pid"] != os.getsid(state["supervisor_pid"])


def test_the_supervisor_imports_the_standard_library_only():
    """Neither httpx nor pydantic nor anything else that is slow or may be missing."""
    program = (
        "import sys; sys.path.append(sys.argv[1]); import tailspan.local.supervisor; "
        "print(*(m for m in sys.modules if m.split('.')[0] not in sys.stdlib_module_names))"
    )
    root = str(Path(sys.modules["tailspan"].__file__).parents[1])
    done = subprocess.run([PYTHON, "-I", "-S", "-c", program, root], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()} == {"tailspan", "__main__"}


def test_a_supervisor_that_cannot_start_is_an_error_that_says_why(local, monkeypatch):
    """The interpreter's own words are in the error."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Exception, match="did not start: it said nothing"):
        local.service.start(Request(command=["true"]))
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(Exception, match="No such file or directory: '/no/such/python'"):
        local.service.start(Request(command=["true"]))
    (newest, older) = anyio.run(first_page, local)
    assert (older.state, newest.state) == (JobState.LOST, JobState.FAILED)


def test_a_retry_is_the_next_attempt(local, tmp_path):
    """Same command, directory, name and attributes; a trace of its own, which the program can continue, and a link."""
    program = "import os; print(os.getcwd(), os.environ['TRACEPARENT'])"
    first = local.run(*python(program), name="etl", attributes={"team": "geo"}, cwd=str(tmp_path), timeout_s=60)
    second = anyio.run(local.service.retry, first.job_id)
    third = anyio.run(local.service.retry, second.job_id)
    ended = local.complete(third.job_id)
    assert (ended.attempt, ended.retry_of, second.retry_of) == (3, second.job_id, first.job_id)
    assert (ended.job_name, ended.attributes, ended.state) == ("etl", {"team": "geo"}, JobState.SUCCEEDED)
    identity = local.service.identity
    assert ended.trace_id == trace_id(identity, ended.job_id, 3)
    span = span_id(identity, ended.job_id, "executing", 3)
    assert local.lines(ended.job_id) == [f"{tmp_path} 00-{ended.trace_id}-{span}-01".encode()]
    secret = local.run("true", "--password", "hunter2")
    with pytest.raises(ConfigError, match="has a secret, which is not recorded"):
        anyio.run(local.service.retry, secret.job_id)
