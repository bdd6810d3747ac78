"""The job API of ``tailspan serve``, with its requests counted: ``GET /requests`` says how many, and sets it to 0.

    python -m tests.bench.job_server STATE_DIR [--plain]

With ``--plain`` it sends no log pages, as any other server of this API.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tailspan.job_api.server import BASE_PATH, create_app, listen, make_server
from tailspan.services.local import LocalService

SERVING = "SERVING "


def base_url(said: str) -> str:
    """Return the base URL of its job API.

    Args:
        said: The line with which it says that it serves.
    """
    return said.removeprefix(SERVING) + BASE_PATH


class Counting:
    """Counts the requests of an application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/requests":
            answer = PlainTextResponse(str(self._requests))
            self._requests = 0
            await answer(scope, receive, send)
            return
        self._requests += 1
        await self._app(scope, receive, send)


def main() -> None:
    """Serve until SIGTERM."""
    service = LocalService(state_dir=Path(sys.argv[1]))
    service.has_offsets = "--plain" not in sys.argv
    with listen("127.0.0.1", 0, None) as listener:
        print(f"{SERVING}http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        asyncio.run(make_server(Counting(create_app(service))).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
