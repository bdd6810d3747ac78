"""One measured piece of work of W5, in a process of its own: its memory is its own, too. Prints one number.

    python -m tests.bench.sdk_program WHAT BASE_URL JOB

``status-*`` prints ms per call, ``logs-*`` how many lines there were. ``*-requests`` and ``*-http`` do the same with
requests, or with the standard library's HTTP client, and json. Each loads no more than its own way needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sized

_CALLS = 200


def main() -> None:
    """Do it."""
    what, base_url, job = sys.argv[1:]
    verb, way = what.split("-")
    ask = WAYS[way](base_url, job, "status" if verb == "status" else "logs")
    if verb == "status":
        ask()  # connects
        found = []
        for _ in range(_CALLS):
            begun = time.perf_counter()
            ask()
            found.append((time.perf_counter() - begun) * 1000)
        print(sorted(found)[_CALLS // 2])
    else:
        print(len(ask()))


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
