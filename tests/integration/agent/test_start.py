"""What a start of the agent imports: modules are most of its time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, os, signal, sys
from tailspan_agent.agent import Agent
from tailspan.cli.start import main
follow, drain = Agent._follow, Agent._drain
async def followed(self):
    await follow(self)
    print(*sorted({name for name in sys.modules if name.startswith(UNUSED)}), flush=True)
    reader, writer = await asyncio.open_connection(*self.server.address)
    writer.write(b"GET /healthz HTTP/1.1\\r\\nhost: localhost\\r\\nconnection: close\\r\\n\\r\\n")
    print((await reader.read()).split()[1].decode(), "uvicorn" in sys.modules, flush=True)
    writer.close()
    os.kill(os.getpid(), signal.SIGTERM)
async def drained(self):
    await drain(self)
    print(*sorted({name for name in sys.modules if name.startswith(ALONE)}), flush=True)
Agent._follow, Agent._drain = followed, drained
sys.argv[1:] = ["agent", "run", "--no-token", "--config", sys.argv[1]]
main()
"""

ALONE = ("psycopg", "tailspan_agent.fleet")
UNUSED = (
    *ALONE,
    "anyio",
    "certifi",
    "click",
    "email",
    "google",
    "grpc",
    "httpcore",
    "httpx",
    "importlib.metadata",
    "jinja2",
    "logging.handlers",
    "opentelemetry",
    "pickle",
    "prometheus_client",
    "pydantic_settings",
    "rich",
    "starlette",
    "tailspan.services.fused",
    "uvicorn",
    "websockets",
    "yaml",
    "zstandard",
)


def test_a_start_imports_only_what_it_uses(tmp_path: Path) -> None:
    """The page's libraries come with its first request, and those of metrics, gRPC and fleets only with their use."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[services.local]\nstate_dir = "{tmp_path}/jobs"\n[agent]\nstate_dir = "{tmp_path}/agent"\n'
        'listen = "127.0.0.1:0"\n[[agent.watch]]\nservice = "local"\ndiscover = true\n'
        '[otlp]\nendpoint = "http://127.0.0.1:1"\n'
    )
    program = f"ALONE, UNUSED = {ALONE!r}, {UNUSED!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "\n200 True\n\n"), done.stderr
