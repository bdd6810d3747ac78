"""The portal: async code from plain functions, wherever they are called."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from tailspan._portal import Portal

FAKE_JOB = """
from tailspan import job_get_status, job_wait_for_job, job_tail_logs
from tailspan.testing import FakeService
service = FakeService()
service.add_job("j")
"""


class Counter:
    """A resource of one event loop."""

    def __init__(self) -> None:
        self.calls = 0

    async def add(self, number: int) -> int:
        """Return the sum so far."""
        await anyio.sleep(0)
        self.calls += number
        return self.calls

    async def fail(self) -> None:
        """Raise what the service would."""
        raise TimeoutError("as it was")

    async def count(self, to: int):
        """Yield numbers, holding a cancel scope all the while."""
        with anyio.fail_after(30):
            for number in range(to):
                yield number
        if to > 2:
            raise ValueError("too far")


@pytest.fixture
def portal():
    """Return a portal with a counter, closed afterwards."""
    exited = []

    @asynccontextmanager
    async def counter():
        yield Counter()
        exited.append(True)

    portal = Portal(counter)
    portal.exited = exited
    yield portal
    portal.close()


def test_the_resource_is_kept_between_calls_and_exited_at_the_end(portal):
    """Two calls share one resource; close exits it; a later call makes another."""
    assert portal.call(Counter.add, 1) == 1
    assert portal.call(Counter.add, 1) == 2
    portal.close()
    assert portal.exited == [True]
    assert portal.call(Counter.add, 1) == 1


def test_errors_arrive_as_they_are(portal):
    """An exception in the loop is the caller's, also one that looks like a timeout of the wait itself."""
    with pytest.raises(TimeoutError, match="as it was"):
        portal.call(Counter.fail)

    async def inside_a_loop() -> None:
        portal.call(Counter.fail)

    with pytest.raises(TimeoutError, match="as it was"):
        asyncio.run(inside_a_loop())


def test_it_works_inside_a_running_event_loop(portal):
    """A notebook's loop runs already; a call from it blocks and answers."""

    async def cell() -> int:
        return portal.call(Counter.add, 5)

    assert asyncio.run(cell()) == 5


def test_threads_share_it(portal):
    """Calls from many threads at once all arrive, in one resource."""
    threads = [threading.Thread(target=portal.call, args=(Counter.add, 1)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert portal.call(Counter.add, 0) == 20


def test_items_come_one_by_one_and_then_the_error(portal):
    """An async generator is iterated in one task; its error comes after its items."""
    assert list(portal.iterate(Counter.count, 2)) == [0, 1]
    seen = []
    with pytest.raises(ValueError, match="too far"):
        seen.extend(number for number in portal.iterate(Counter.count, 3))
    for number in portal.iterate(Counter.count, 1000):
        if number == 5:
            break
    assert portal.call(Counter.add, 1) == 1


def test_closing_cancels_what_runs_while_the_resource_is_there(portal):
    """A call in another thread ends at once, and may use the resource to clean up; an iterator raises an error."""
    begun, seen = threading.Event(), []

    async def wait(counter: Counter) -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            seen.append(list(portal.exited))

    def call() -> None:
        try:
            portal.call(wait)
        except concurrent.futures.CancelledError:
            seen.append("cancelled")

    thread = threading.Thread(target=call)
    thread.start()
    numbers = portal.iterate(Counter.count, 1000)
    assert next(numbers) == 0
    assert begun.wait(30)
    portal.close()
    thread.join(30)
    assert seen == [[], "cancelled"]
    with pytest.raises(RuntimeError, match="closed during the call"):
        next(numbers)


def test_a_call_from_its_own_loop_is_refused(portal):
    """A service that calls a verb would wait for itself; that is an error instead."""

    class Nested(Counter):
        pass

    async def call_again(counter: Counter) -> int:
        return portal.call(Counter.add, 1)

    with pytest.raises(RuntimeError, match="event loop thread"):
        portal.call(call_again)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_use_starts_anew(portal):
    """The child's first call makes its own loop; the parent's continues, also when the child has ended."""
    assert portal.call(Counter.add, 1) == 1
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.write(write_end, b"%d" % portal.call(Counter.add, 10))
        portal.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read_end, 10) == b"10"
    os.close(read_end)
    os.close(write_end)
    assert portal.call(Counter.add, 1) == 2


def _in_worker(number: int) -> str:
    from tailspan import job_get_status
    from tailspan.testing import FakeService

    service = FakeService()
    service.add_job(f"job-{number}")
    return job_get_status(f"job-{number}", service=service).job_id


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_verbs_work_in_forked_worker_processes():
    """A multiprocessing pool that was forked after use, and used from threads, answers."""
    assert _in_worker(0) == "job-0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_in_worker, range(4)) == [f"job-{number}" for number in range(4)]


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "import threading"])
def test_the_interpreter_exits_without_a_word(ending):
    """Neither warnings nor a hang at exit, in development mode too."""
    done = run_python(FAKE_JOB + "print(job_get_status('j', service=service).state)\n" + ending, "-X", "dev")
    assert (done.returncode, done.stdout, done.stderr) == (0, "RUNNING\n", "")


def test_a_forked_child_exits_without_harm_to_its_parent():
    """Child and parent both use the verbs and exit in the ordinary way."""
    done = run_python(
        FAKE_JOB
        + """
import os, sys
job_get_status("j", service=service)
pid = os.fork()
print(job_get_status("j", service=service).state, flush=True)
if pid:
    os.waitpid(pid, 0)
    print(job_get_status("j", service=service).state)
""",
        "-W",
        "ignore::DeprecationWarning",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "RUNNING\n" * 3, "")


WAITERS = {
    "wait": "job_wait_for_job('j', service=service)",
    "tail": "job_tail_logs('j', service=service)",
    "wait inside asyncio.run": """
import asyncio
async def main():
    job_wait_for_job('j', service=service)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("waiter", WAITERS)
def test_ctrl_c_returns_at_once(waiter, tmp_path: Path):
    """SIGINT while a verb waits raises KeyboardInterrupt, and the interpreter ends without a hang."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-X",
            "dev",
            "-c",
            FAKE_JOB + "service.before_next('get_job', lambda: print('asked', flush=True))\n" + WAITERS[waiter],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Warning" not in errors
