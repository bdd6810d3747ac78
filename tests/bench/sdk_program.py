"""One measured piece of work of W5, in a process of its own: its memory is its own, too. Prints two numbers.

    python -m tests.bench.sdk_program VERB WAY CALLS BASE_URL JOB

The verb is ``status`` or ``logs``. It prints the medians of all calls but the first, which connects: wall time and
CPU time, in ms; of a single call its own. The ways are Tailspan, and json with requests or with the standard library's
HTTP client. Each loads no more than it needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized


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


def _tailspan(base_url: str, job: str, verb: str) -> Callable[[], Sized]:
    import tailspan
    from tailspan.services.fused import FusedService

    # As fast as the others: by default it asks 20 times a second at most.
    service = FusedService(base_url=base_url, requests_per_second=1e6)
    if verb == "status":
        return lambda: tailspan.job_get_status(job, service=service)
    return lambda: tailspan.job_get_logs(job, service=service)


def _requests(base_url: str, job: str, verb: str) -> Callable[[], Sized]:
    import json

    import requests

    session = requests.Session()
    return lambda: json.loads(session.get(f"{base_url}{_path(job, verb)}", timeout=60).content)


def _http(base_url: str, job: str, verb: str) -> Callable[[], Sized]:
    import json
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    url = urlsplit(base_url)
    connection = HTTPConnection(url.hostname or "", url.port)

    def ask() -> Sized:
        connection.request("GET", f"{url.path}{_path(job, verb)}")
        return json.loads(connection.getresponse().read())

    return ask


def _path(job: str, verb: str) -> str:
    return f"/run/by-id/{job}" if verb == "status" else f"/logs/{job}"


WAYS = {"tailspan": _tailspan, "requests": _requests, "http": _http}

if __name__ == "__main__":
    main()
