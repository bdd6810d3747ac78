"""A scriptable OTLP receiver for tests: HTTP and gRPC on 127.0.0.1, in threads of the test's own process.

    with Collector() as collector:
        ...                                     # point the agent at collector.http_url or collector.grpc_url
        collector.wait_until(lambda: len(collector.log_records()) == 5)
        assert [row.body for row in collector.log_records()] == [...]

Addresses: `Collector.http_url` and `Collector.grpc_url` (gRPC starts when first asked for). HTTP takes any path that
ends in ``/v1/logs``, ``/v1/traces`` or ``/v1/metrics``, as protobuf or JSON, plain, gzip, deflate or zstd.

What came: `Collector.requests` is every decoded request, answered well or not, in order of arrival; `log_records()`,
`spans()` and `metrics()` flatten those that were *taken* (answered with success, or cut off after being taken).

What it answers: success, unless scripted. Signals are ``logs``, ``traces`` and ``metrics``.

    collector.script("logs", Reply(503, retry_after_s=1), Reply(rejected=2, message="too old"), Reply(cut="answer"))
    collector.always("traces", Reply(404))                # once that signal's script is used up
    collector.always("logs", lambda request: Reply(413) if request.count > 100 else Reply())
    collector.script("logs", Reply(grpc="RESOURCE_EXHAUSTED", retry_after_s=0.1))

`Reply` lists all that can go wrong. `Collector.stop` (or leaving the ``with``) ends every thread and connection,
hanging ones too; `Collector.connections` counts HTTP connections accepted so far (keep-alive).
``Collector(tls=Tls(...))`` speaks TLS on both, and asks for client certificates where `Tls.client_ca_pem` is given.
``Collector(http_port=N, grpc_port=M)`` comes back on known ports, for a collector that was away. The rows are in
`otlp_rows`.
"""

from __future__ import annotations

import binascii
import contextlib
import gzip
import socket
import ssl
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from tailspan.config.signals import SIGNALS
from tests.fakes.otlp_rows import (
    REQUESTS,
    LogRow,
    MetricRow,
    SpanRow,
    count_records,
    log_rows,
    metric_rows,
    parse_json,
    span_rows,
)

RESPONSES: Mapping[str, type[Message]] = {
    "logs": logs_service_pb2.ExportLogsServiceResponse,
    "traces": trace_service_pb2.ExportTraceServiceResponse,
    "metrics": metrics_service_pb2.ExportMetricsServiceResponse,
}
_REJECTED_FIELD = {
    "logs": "rejected_log_records",
    "traces": "rejected_spans",
    "metrics": "rejected_data_points",
}
_SERVICES = {
    "opentelemetry.proto.collector.logs.v1.LogsService": "logs",
    "opentelemetry.proto.collector.trace.v1.TraceService": "traces",
    "opentelemetry.proto.collector.metrics.v1.MetricsService": "metrics",
}


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        status: HTTP status; over gRPC anything but 2xx becomes UNAVAILABLE unless `grpc` says otherwise.
        headers: Further HTTP headers.
        body: Raw HTTP body; None: the right one.
        rejected: ``partial_success.rejected_*``; with `message`, or alone.
        message: ``partial_success.error_message``, or the text of an error.
        retry_after_s: ``Retry-After`` over HTTP, RetryInfo over gRPC.
        grpc: Name of a gRPC status code, for example ``UNAVAILABLE``.
        delay_s: Answer only after so long.
        hang: Never answer (until the collector stops).
        cut: ``request``: close the connection without an answer, nothing taken; ``answer``: take the request, send
            half of the answer's header and drop the connection (HTTP only).
        raw: These bytes instead of an answer of ours (HTTP only).
        close: Close the connection after the answer, without a word (HTTP only).
        sent: Called once the answer is written (HTTP only).
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    rejected: int = 0
    message: str = ""
    retry_after_s: float | None = None
    grpc: str = ""
    delay_s: float = 0.0
    hang: bool = False
    cut: str = ""
    raw: bytes | None = None
    close: bool = False
    sent: Callable[[], object] | None = None

    @property
    def takes(self) -> bool:
        """Whether the request's records arrived, as far as a store is concerned."""
        return 200 <= self.status < 300 and not self.grpc and not self.hang and self.cut != "request"


@dataclass(frozen=True)
class Tls:
    """PEM texts for a TLS collector; with `client_ca_pem`, clients must show a certificate of that authority."""

    cert_pem: bytes
    key_pem: bytes
    client_ca_pem: bytes | None = None


@dataclass(frozen=True)
class Request:
    """One request as it came, decoded; header names are lower-case."""

    signal: str
    protocol: str
    path: str
    headers: Mapping[str, str]
    message: Any
    payload: bytes
    wire_bytes: int
    count: int
    taken: bool

    @cached_property
    def log_rows(self) -> list[LogRow]:
        """Its log records; a test's condition reads those of all requests whenever one arrives."""
        return list(log_rows(self.message))


Answer = Reply | Callable[[Request], Reply]


class Collector:
    """See the module's docstring.

    Attributes:
        open_requests: HTTP requests whose head has come and whose answer is not written.
        on_begin: Called with the signal when the head of an HTTP request has come, before its body is read.
    """

    def __init__(
        self, *, tls: Tls | None = None, http_port: int = 0, grpc_port: int = 0, http_host: str = "127.0.0.1"
    ) -> None:
        self._tls = tls
        self._http_port = http_port
        self._http_host = http_host
        self._wanted_grpc_port = grpc_port
        self._scripts: dict[str, deque[Answer]] = {signal: deque() for signal in SIGNALS}
        self._always: dict[str, Answer] = {signal: Reply() for signal in SIGNALS}
        self._arrived = threading.Condition()
        self.stopping = threading.Event()
        self._requests: list[Request] = []
        self.open_requests = 0
        self.on_begin: Callable[[str], object] = lambda signal: None
        self._http: _HttpServer | None = None
        self._http_thread: threading.Thread | None = None
        self._grpc: Any = None
        self._grpc_port = 0
        self._grpc_threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="fake-collector-grpc")

    def __enter__(self) -> Collector:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen over HTTP; gRPC starts with the first use of `grpc_url`."""
        self._http = _HttpServer(self, self._http_host, self._http_port, self._tls)
        self._http_thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="fake-collector")
        self._http_thread.start()

    def stop(self) -> None:
        """End all threads and connections. Calling it twice is fine."""
        self.stopping.set()
        if self._http is not None and self._http_thread is not None:
            self._http.shutdown()
            self._http.close_connections()
            self._http_thread.join()
            self._http.server_close()
            self._http = None
        if self._grpc is not None:
            self._grpc.stop(grace=0).wait()
            self._grpc = None
        self._grpc_threads.shutdown()

    @property
    def http_port(self) -> int:
        """The port that HTTP listens on."""
        assert self._http is not None, "the collector is stopped"
        return int(self._http.server_address[1])

    @property
    def http_url(self) -> str:
        """Base URL for ``otlp.endpoint`` over HTTP (without ``/v1/...``)."""
        return f"{'https' if self._tls else 'http'}://{self._http_host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Base URL for ``otlp.endpoint`` over gRPC."""
        if self._grpc is None:
            self._grpc, self._grpc_port = _start_grpc(self, self._tls, self._grpc_threads, self._wanted_grpc_port)
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._grpc_port}"

    def close_connections(self) -> None:
        """Close all HTTP connections that are open now."""
        assert self._http is not None, "the collector is stopped"
        self._http.close_connections()

    @property
    def connections(self) -> int:
        """How many HTTP connections were accepted so far."""
        assert self._http is not None, "the collector is stopped"
        return self._http.accepted

    def script(self, signal: str, *answers: Answer) -> None:
        """Answer that signal's next requests so, one answer each, in this order."""
        with self._arrived:
            self._scripts[signal].extend(answers)

    def always(self, signal: str, answer: Answer) -> None:
        """Answer so whenever that signal's script is used up."""
        with self._arrived:
            self._always[signal] = answer

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in order of arrival."""
        with self._arrived:
            return list(self._requests)

    def taken(self, signal: str) -> list[Any]:
        """The decoded messages of that signal whose records arrived, in order."""
        return [request.message for request in self.requests if request.signal == signal and request.taken]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
        """Wait until the condition holds; it is evaluated after each request.

        Raises:
            TimeoutError: It did not hold in time; the message says what had arrived.
        """
        with self._arrived:
            if self._arrived.wait_for(condition, timeout_s):
                return
            counts = {signal: sum(r.count for r in self._requests if r.signal == signal) for signal in SIGNALS}
        raise TimeoutError(f"not within {timeout_s} s; records received (refused ones too): {counts}")

    def clear(self) -> None:
        """Forget what came; scripts stay."""
        self.drain()

    def drain(self) -> list[Request]:
        """Return what came since the last time, and forget it; scripts stay."""
        with self._arrived:
            came, self._requests = self._requests, []
            return came

    @contextlib.contextmanager
    def receiving(self, signal: str) -> Iterator[None]:
        """Count a request as open. For the HTTP server below."""
        with self._arrived:
            self.open_requests += 1
        try:
            self.on_begin(signal)
            yield
        finally:
            with self._arrived:
                self.open_requests -= 1
                self._arrived.notify_all()

    def log_records(self) -> list[LogRow]:
        """Every log record taken so far, in order of arrival."""
        return [
            row for request in self.requests if request.signal == "logs" and request.taken for row in request.log_rows
        ]

    def spans(self) -> list[SpanRow]:
        """Every span taken so far, in order of arrival."""
        return [row for message in self.taken("traces") for row in span_rows(message)]

    def metrics(self) -> list[MetricRow]:
        """Every metric data point taken so far, in order of arrival."""
        return [row for message in self.taken("metrics") for row in metric_rows(message)]

    def receive(
        self, signal: str, protocol: str, path: str, headers: Mapping[str, str], payload: bytes, wire_bytes: int,
        message: Message,
    ) -> Reply:  # fmt: skip
        """Record a decoded request and choose its answer. For the servers below."""
        with self._arrived:
            script = self._scripts[signal]
            answer = script.popleft() if script else self._always[signal]
            count = count_records(signal, message)
            request = Request(signal, protocol, path, headers, message, payload, wire_bytes, count, True)
            reply = answer if isinstance(answer, Reply) else answer(request)
            if not reply.takes:
                request = Request(signal, protocol, path, headers, message, payload, wire_bytes, count, False)
            self._requests.append(request)
            self._arrived.notify_all()
        if reply.delay_s:
            self.stopping.wait(reply.delay_s)
        if reply.hang:
            self.stopping.wait()
        return reply


def success_body(signal: str, reply: Reply) -> Message:
    """Return the response message of a success, with ``partial_success`` where the reply has one."""
    response = RESPONSES[signal]()
    if reply.rejected or reply.message:
        partial = response.partial_success  # type: ignore[attr-defined]
        setattr(partial, _REJECTED_FIELD[signal], reply.rejected)
        partial.error_message = reply.message
    return response


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    allow_reuse_address = True

    def __init__(self, collector: Collector, host: str, port: int, tls: Tls | None) -> None:
        self.collector = collector
        self.accepted = 0
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        self._context = _server_context(tls) if tls else None
        super().__init__((host, port), _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self.accepted += 1
            self._open.add(request)
        if self.collector.stopping.is_set():
            self.shutdown_request(request)
            return
        try:
            if self._context is None:
                super().process_request_thread(request, client_address)
                return
            # The handshake belongs to the connection's own thread: a client that sends nothing must not stop the rest.
            try:
                secure = self._context.wrap_socket(request, server_side=True)
            except OSError:
                request.close()
                return
            with self._guard:
                self._open.add(secure)
            super().process_request_thread(secure, client_address)
        finally:
            with self._guard:
                self._open = {item for item in self._open if item.fileno() != -1}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: clients that go away in the middle are what many tests are about."""

    def close_connections(self) -> None:
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer

    def log_message(self, *args: Any) -> None:
        """Stay silent."""

    def do_POST(self) -> None:
        signal = next((name for name in SIGNALS if self.path.split("?")[0].endswith(f"/v1/{name}")), None)
        with self.server.collector.receiving(signal or ""):
            self._answer(signal)

    do_GET = do_POST  # noqa: N815 (the name that http.server calls)

    def _answer(self, signal: str | None) -> None:
        wire = self._read_body()
        if signal is None:
            self._send(404, {}, b"404 page not found\n")
            return
        is_json = (self.headers.get("Content-Type") or "").startswith("application/json")
        try:
            payload = _decompress(wire, self.headers.get("Content-Encoding", ""))
            if is_json:
                message = parse_json(signal, payload)
            else:
                message = REQUESTS[signal]()
                message.ParseFromString(payload)
        except (DecodeError, json_format.ParseError, ValueError, OSError, zlib.error, binascii.Error) as error:
            self._send(400, {}, str(error).encode())
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        collector = self.server.collector
        reply = collector.receive(
            signal, "http/json" if is_json else "http/protobuf", self.path, headers, payload, len(wire), message
        )
        if reply.hang or reply.cut == "request":
            self.close_connection = True
            return
        if reply.cut == "answer":
            self._drop_in_answer()
            return
        self.close_connection = self.close_connection or reply.close
        if reply.raw is not None:
            self.wfile.write(reply.raw)
            return
        more = dict(reply.headers)
        if reply.retry_after_s is not None:
            more["Retry-After"] = f"{reply.retry_after_s:g}"
        body = reply.body
        if body is None and 200 <= reply.status < 300:
            response = success_body(signal, reply)
            body = json_format.MessageToJson(response).encode() if is_json else response.SerializeToString()
            more.setdefault("Content-Type", "application/json" if is_json else "application/x-protobuf")
        self._send(reply.status, more, body if body is not None else reply.message.encode())
        if reply.sent is not None:
            reply.sent()

    def _read_body(self) -> bytes:
        if (self.headers.get("Transfer-Encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        # 204 and 304 have no body and no length (RFC 9110, 8.6).
        if status not in {204, 304}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in {204, 304}:
            self.wfile.write(body)

    def _drop_in_answer(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        self.wfile.flush()
        self.close_connection = True


def _decompress(wire: bytes, encoding: str) -> bytes:
    match encoding.lower():
        case "" | "identity":
            return wire
        case "gzip":
            return gzip.decompress(wire)
        case "deflate":
            return zlib.decompress(wire)
        case "zstd":
            import zstandard

            try:
                return zstandard.ZstdDecompressor().decompress(wire, max_output_size=1 << 28)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
    raise ValueError(f"unknown Content-Encoding {encoding!r}")


def _server_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as directory:
        pem = Path(directory, "server.pem")
        pem.touch(0o600)
        pem.write_bytes(tls.key_pem + b"\n" + tls.cert_pem)
        context.load_cert_chain(pem)
    if tls.client_ca_pem:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=tls.client_ca_pem.decode())
    return context


def _start_grpc(
    collector: Collector, tls: Tls | None, threads: ThreadPoolExecutor, wanted_port: int
) -> tuple[Any, int]:
    import grpc
    from google.protobuf.duration_pb2 import Duration
    from google.rpc.error_details_pb2 import RetryInfo
    from google.rpc.status_pb2 import Status

    def export(signal: str, payload: bytes, context: Any) -> bytes:
        headers = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        message = REQUESTS[signal]()
        try:
            message.ParseFromString(payload)
        except DecodeError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        reply = collector.receive(signal, "grpc", f"/v1/{signal}", headers, payload, len(payload), message)
        if reply.takes:
            return success_body(signal, reply).SerializeToString() if reply.body is None else reply.body
        code = grpc.StatusCode[reply.grpc or "UNAVAILABLE"]
        if reply.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(reply.retry_after_s * 1e9))
            status = Status(code=code.value[0], message=reply.message)
            status.details.add().Pack(RetryInfo(retry_delay=delay))
            context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
        context.abort(code, reply.message)
        raise AssertionError("abort always raises")

    class Export(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            service, _, method = details.method.lstrip("/").partition("/")
            signal = _SERVICES.get(service)
            if signal is None or method != "Export":
                return None
            return grpc.unary_unary_rpc_method_handler(
                lambda payload, context: export(signal, payload, context),
                request_deserializer=None,
                response_serializer=None,
            )

    server = grpc.server(
        threads,
        handlers=[Export()],
        options=[("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)],
    )
    if tls is None:
        port = server.add_insecure_port(f"127.0.0.1:{wanted_port}")
    else:
        credentials = grpc.ssl_server_credentials(
            [(tls.key_pem, tls.cert_pem)],
            root_certificates=tls.client_ca_pem,
            require_client_auth=tls.client_ca_pem is not None,
        )
        port = server.add_secure_port(f"127.0.0.1:{wanted_port}", credentials)
    server.start()
    return server, port
