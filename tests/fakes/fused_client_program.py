"""Drives the job functions of an installed ``fused`` client and prints what each returned, as JSON.

Run by an interpreter that has some version of ``fused`` but not Tailspan:

    python fused_client_program.py BASE_URL TOKEN SINCE_MS

HOME is a directory of its own: the client reads its credentials there. The jobs are those of
`test_server_fused_client`.
"""

import contextlib
import io
import json
import pathlib
import sys
import urllib.parse
import urllib.request
import warnings


def write_credentials(token):
    """Write the file that every version of the client reads its token from."""
    path = pathlib.Path.home() / ".fused" / "credentials"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "access_token": token,
        "auth_scheme": "Bearer",
        "refresh_token": "unused",
        "id_token": "unused",
        "scope": "openid",
        "expires_in": 3600,
        "token_type": "Bearer",
        "expires_at": "2199-01-01T00:00:00+00:00",
    }
    path.write_text(json.dumps(fields))


def as_json(value):
    """Turn what a job function returns into JSON; versions before 1.8 use pydantic 1 models."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "json"):
        return json.loads(value.json())
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    return value


def main(base_url, token, since_ms):
    """Call every job function."""
    write_credentials(token)
    warnings.simplefilter("ignore")
    import fused
    from fused import api
    from fused._global_api import get_api

    fused.options.base_url = base_url
    client = get_api()
    soon = {"refresh_seconds": 0.01}
    calls = {
        "status": lambda: api.job_get_status("done"),
        "status of running": lambda: api.job_get_status("forever"),
        "status of an id with a space": lambda: api.job_get_status("größe 1"),
        "status of nobody": lambda: api.job_get_status("nobody"),
        "logs": lambda: api.job_get_logs("done"),
        "logs since": lambda: api.job_get_logs("done", since_ms=int(since_ms)),
        "print": lambda: api.job_print_logs("done"),
        "tail of ended": lambda: api.job_tail_logs("done", **soon),
        "tail": lambda: api.job_tail_logs("growing", **soon),
        "tail all": lambda: api.job_tail_logs("growing too", sample_logs=False, **soon),
        "exec time": lambda: api.job_get_exec_time("done"),
        "wait": lambda: api.job_wait_for_job("waited", poll_interval_seconds=0.01),
        "cancel": lambda: api.job_cancel("forever"),
        "cancel again": lambda: api.job_cancel("forever"),
        "jobs": lambda: client.get_jobs(n=5),
        "jobs paged": lambda: client.get_jobs(n=40, per_request=3, max_requests=None),
        "jobs skipped": lambda: client.get_jobs(n=2, skip=2),
    }
    results = {}
    for name, call in calls.items():
        # A request that no server knows: it marks which function the next requests belong to.
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{base_url}/begin/{urllib.parse.quote(name)}")
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                results[name] = {"value": as_json(call())}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["printed"] = printed.getvalue()
    print(json.dumps({"version": fused.__version__, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
