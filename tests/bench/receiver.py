"""The OTLP receiver of the benchmarks: a process of its own that does as little as it can and counts.

It answers HTTP and gRPC. Every benchmark line has ``RECORD`` once in it, so that records are counted by a search for
bytes. With ``--latency``, lines that end in ``at=`` and 19 digits (ns since the epoch) have their age noted; with
``--ends``, run spans and receipts have: how long after the end of their job they came.

    GET /counts    {"requests": n, "bytes": n as sent, "records": n, "ages_ms": [...], "run_span_ages_ms": [...],
                   "receipt_ages_ms": [...]}, and sets all to 0
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.bench.measure import started

__all__ = ["RECORD", "Receiver", "receiving"]

RECORD = b" rec="
_RUN, _RECEIPT = b"RUN bench", b"tailspan.receipt"
_AT = re.compile(rb" at=(\d{19})")
_MAX_MESSAGE = 64 << 20
_PORTS = "PORTS "


@dataclass(frozen=True, slots=True)
class Receiver:
    """A receiver that runs.

    Attributes:
        http_url: Its endpoint for OTLP over HTTP.
        grpc_url: Its endpoint for OTLP over gRPC.
        pid: Its process.
    """

    http_url: str
    grpc_url: str
    pid: int

    def counts(self) -> dict[str, Any]:
        """Return what came since the last call; see the module."""
        with urllib.request.urlopen(f"{self.http_url}/counts", timeout=60) as reply:
            counts: dict[str, Any] = json.load(reply)
            return counts


@contextmanager
def receiving(directory: Path, *, latency: bool = False, ends: bool = False) -> Iterator[Receiver]:
    """Run a receiver while the block runs; its log goes into the directory."""
    options = [*(["--latency"] if latency else []), *(["--ends"] if ends else [])]
    command = [sys.executable, "-m", "tests.bench.receiver", *options]
    with started(command, log=directory / "receiver.log", says=_PORTS) as (pid, line):
        http, grpc = line.removeprefix(_PORTS).split()
        yield Receiver(f"http://127.0.0.1:{http}", f"http://127.0.0.1:{grpc}", pid)


class _Counts:
    def __init__(self, *, latency: bool, ends: bool) -> None:
        self._latency = latency
        self._ends = ends
        self.reset()

    def reset(self) -> None:
        self.requests = self.bytes = self.records = 0
        self.ages_ms: list[float] = []
        self.run_span_ages_ms: list[float] = []
        self.receipt_ages_ms: list[float] = []

    def take(self, body: bytes, encoding: str) -> None:
        self.requests += 1
        self.bytes += len(body)
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "zstd":
            import zstandard

            body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
        self.records += body.count(RECORD)
        if self._latency:
            now_ns = time.time_ns()
            self.ages_ms += [(now_ns - int(written)) / 1e6 for written in _AT.findall(body)]
        if self._ends:
            self._note_ends(body)

    def _note_ends(self, body: bytes) -> None:
        now_ns = time.time_ns()
        if _RUN in body:
            spans = ExportTraceServiceRequest.FromString(body)
            ends = [
                span.end_time_unix_nano
                for resource in spans.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
                if span.name.startswith("RUN ")
            ]
            self.run_span_ages_ms += [(now_ns - end) / 1e6 for end in ends]
        elif _RECEIPT in body:
            logs = ExportLogsServiceRequest.FromString(body)
            ends = [
                record.time_unix_nano
                for resource in logs.resource_logs
                for scope in resource.scope_logs
                for record in scope.log_records
                if record.event_name == _RECEIPT.decode()
            ]
            self.receipt_ages_ms += [(now_ns - end) / 1e6 for end in ends]


async def _serve_http(counts: _Counts, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            if "100-continue" in fields.get("expect", ""):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(fields.get("content-length", "0")))
            answer, kind = b"", b"application/x-protobuf"
            if head.startswith("get /counts"):
                answer, kind = json.dumps({k: v for k, v in vars(counts).items() if k[0] != "_"}).encode(), b"text/json"
                counts.reset()
            else:
                counts.take(body, fields.get("content-encoding", ""))
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(answer), answer)
            )
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _grpc_server(counts: _Counts) -> tuple[Any, int]:
    import grpc

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            async def answer(request: bytes, context: Any) -> bytes:
                counts.take(request, "")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MAX_MESSAGE)])
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


async def _main() -> None:
    counts = _Counts(latency="--latency" in sys.argv, ends="--ends" in sys.argv)
    server = await asyncio.start_server(
        lambda reader, writer: _serve_http(counts, reader, writer), "127.0.0.1", 0, limit=_MAX_MESSAGE
    )
    _keep, grpc_port = await _grpc_server(counts)
    print(f"{_PORTS}{server.sockets[0].getsockname()[1]} {grpc_port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
