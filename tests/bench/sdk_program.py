"""One measured piece of work of W5, in a process of its own: its memory is its own, too.

    python -m tests.bench.sdk_program VERB WAY CALLS BASE_URL JOB

The verb is ``status``, ``logs`` or ``tail``, which prints the lines of a job until it has ended. The last line printed
has the medians of all calls but the first, which connects: wall time and CPU time, in ms; of a single call its own. The
ways are Tailspan; json with requests, or with the standard library's HTTP client; and the published ``fused`` client,
where the interpreter has it, with a HOME of its own. Each loads no more than it needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Do it."""
    verb, way, calls, base_url, job = sys.argv[1:]
    ask = WAYS[way](base_url, job, verb)
    walls, cpus = [], []
    for _ in range(int(calls)):
        begun, used = time.perf_counter(), time.process_time()
        ask()
        walls.append((time.perf_counter() - begun) * 1000)
        cpus.append((time.process_time() - used) * 1000)
    print(*(sorted(seen[1:] or seen)[len(seen[1:]) // 2] for seen in (walls, cpus)))


def _tailspan(base_url: str, job: str, verb: str) -> Callable[[], object]:
    import tailspan
    from tailspan.services.fused import FusedService

    # As fast as the others: by default it asks 20 times a second at most.
    service = FusedService(base_url=base_url, requests_per_second=1e6)
    if verb == "status":
        return lambda: tailspan.job_get_status(job, service=service)
    if verb == "logs":
        return lambda: tailspan.job_get_logs(job, service=service)
    return lambda: tailspan.job_tail_logs(job, sample_logs=False, service=service)


def _requests(base_url: str, job: str, verb: str) -> Callable[[], object]:
    import json

    import requests

    session = requests.Session()
    return _plain(lambda path: json.loads(session.get(f"{base_url}{path}", timeout=60).content), job, verb)


def _http(base_url: str, job: str, verb: str) -> Callable[[], object]:
    import json
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    url = urlsplit(base_url)
    connection = HTTPConnection(url.hostname or "", url.port)

    def fetch(path: str) -> Any:
        connection.request("GET", f"{url.path}{path}")
        return json.loads(connection.getresponse().read())

    return _plain(fetch, job, verb)


def _plain(fetch: Callable[[str], Any], job: str, verb: str) -> Callable[[], object]:
    if verb == "status":
        return lambda: fetch(f"/run/by-id/{job}")
    if verb == "logs":
        return lambda: fetch(f"/logs/{job}")
    return lambda: _tail(fetch, job)


def _tail(fetch: Callable[[str], Any], job: str) -> None:
    """As one would write it, and as the published client does: from the newest time on, until the job has ended."""
    newest = -1
    while True:
        ended = fetch(f"/run/by-id/{job}")["finished_job_status"]
        found = fetch(f"/logs/{job}?since_ms={max(newest, 0)}")
        for line in found:
            if line["timestamp"] > newest:
                print(line["message"])
        newest = max([newest, *(line["timestamp"] for line in found)])
        if ended:
            return
        time.sleep(1)


def _fused(base_url: str, job: str, verb: str) -> Callable[[], object]:
    from tests.fakes.fused_client_program import write_credentials

    write_credentials("unused")
    import fused
    from fused import api

    fused.options.base_url = base_url
    if verb == "tail":
        return lambda: api.job_tail_logs(job, sample_logs=False)
    return lambda: {"status": api.job_get_status, "logs": api.job_get_logs}[verb](job)


WAYS = {"tailspan": _tailspan, "requests": _requests, "http": _http, "fused": _fused}

if __name__ == "__main__":
    main()
