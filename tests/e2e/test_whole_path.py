"""Real programs, the real agent, a real collector: every line at the end of the path."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tailspan.logs.clean import clean, split_long
from tests.e2e.conftest import Machine
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import LogRow, SpanRow
from tests.fakes.rotel import Rotel, rotel_binary

pytestmark = pytest.mark.skipif(rotel_binary() is None, reason="there is no rotel that runs here")

HOSTILE = [
    b"plain",
    b"same",
    b"same",
    b"same",
    b"",
    b"  indented\t",
    "grüße, 世界 🎉".encode(),
    b"invalid \xff\xfe utf-8",
    b"nul \x00 inside",
    b"\x1b[31mred\x1b[0m and \x1b]0;title\x07 bold \x1b[1mx",
    b" 10%|#   |\r 50%|##  |\r100%|####|",
    b"windows line\r",
    b'{"level": "error", "message": "json"}',
    b'}, {"message": "not an element"},',
    b"2026-01-02 03:04:05,678 WARNING root: watch out",
    b"x" * 1_000_000,
    b"\xe4\xb8\x96" * 200_000,
    b"last line without newline",
]
PROGRAM = """
import sys
lines = {lines!r}
for stream in (sys.stdout.buffer, sys.stderr.buffer):
    stream.write(b"\\n".join(lines))
    stream.flush()
"""


@pytest.fixture
def rotel(collector: Collector) -> Iterator[Rotel]:
    """A real collector in front of the receiver."""
    with Rotel(collector) as process:
        yield process


def expected_bodies(lines: list[bytes]) -> list[str]:
    """The bodies expected at the receiver: cleaned, long lines in parts."""
    return [part.decode() for line in lines for part in split_long(clean(line).encode())]


def lines_of(collector: Collector, job_id: str) -> list[LogRow]:
    """The records of a job's lines by their time, as in a store: the collector in between sends in parallel."""
    rows = [row for row in collector.log_records() if row.resource["cicd.pipeline.run.id"] == job_id]
    return sorted((row for row in rows if not row.event_name), key=lambda row: row.time_unix_nano)


def spans_of(collector: Collector, trace_id: str) -> dict[str, SpanRow]:
    """The spans of a trace by name; each name must be there once."""
    spans = [span for span in collector.spans() if span.trace_id == trace_id]
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def run_once(machine: Machine, endpoint: str, protocol: str, *, text: str = "") -> None:
    """Relay all local jobs."""
    machine.configure(f'{text}[otlp]\nendpoint = "{endpoint}"\nprotocol = "{protocol}"\n')
    machine.invoke("agent", "run", "--once", "--timeout", "60")


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_every_line_of_real_programs_arrives_once_through_a_real_collector(
    machine: Machine,
    collector: Collector,
    rotel: Rotel,
    script: Callable[[str], list[str]],
    protocol: str,
    tmp_path: Path,
) -> None:
    """Each line once, equal to clean(line), in order, under the job's trace; one run span; the metrics."""
    source = Path(sysconfig.get_path("stdlib"), "json")
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    for path in source.glob("*.py"):
        (compiled / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "compileall", "-f", str(compiled)]
    attached = machine.tailspan("run", "--name", "compile", "--attr", "team=geo", "--", *command)
    shown = attached.stdout.splitlines()
    assert len(shown) > len(list(compiled.glob("*.py")))
    corpus = machine.detach(*script(PROGRAM.format(lines=HOSTILE)), options=("--name", "corpus"))
    machine.invoke("wait", corpus)
    compile_id = next(row["job_id"] for row in jobs(machine) if row["job_name"] == "compile")

    endpoint = rotel.grpc_url if protocol == "grpc" else rotel.http_url
    run_once(machine, endpoint, protocol)

    compile_status, corpus_status = machine.status(compile_id), machine.status(corpus)
    collector.wait_until(lambda: len(lines_of(collector, corpus)) >= 2 * len(expected_bodies(HOSTILE)))
    collector.wait_until(lambda: len(collector.spans()) >= 8)
    rows = lines_of(collector, compile_id)
    assert [row.body for row in rows] == shown
    assert {row.trace_id for row in rows} == {compile_status["trace_id"]}
    assert {row.resource["team"] for row in rows} == {"geo"}
    for stream in ("stdout", "stderr"):
        rows = [row for row in lines_of(collector, corpus) if row.attributes["log.iostream"] == stream]
        assert [row.body for row in rows] == expected_bodies(HOSTILE)
        times = [row.time_unix_nano for row in rows]
        assert times == sorted(times)
    rows = lines_of(collector, corpus)
    assert {row.trace_id for row in rows} == {corpus_status["trace_id"]}
    uids = [(row.attributes["log.record.uid"], row.attributes.get("tailspan.line.part")) for row in rows]
    assert len(set(uids)) == len(uids)
    assert {row.severity_text for row in rows if "watch out" in row.body} == {"WARNING"}

    spans = spans_of(collector, compile_status["trace_id"])
    assert set(spans) == {"submitted", "queued", "executing", "RUN compile"}
    run = spans["RUN compile"]
    assert run.parent_span_id == ""
    assert {span.parent_span_id for name, span in spans.items() if name != "RUN compile"} == {run.span_id}
    assert {row.span_id for row in lines_of(collector, compile_id)} == {run.span_id}
    assert run.kind == "SERVER"
    assert run.attributes["cicd.pipeline.result"] == "success"
    assert run.resource["team"] == "geo"
    assert run.status == "UNSET"
    assert run.start_unix_nano // 1000 == micros(compile_status["submitted_at"])
    assert run.end_unix_nano // 1000 >= micros(compile_status["finished_at"])
    assert str(compiled) in run.attributes["process.command"] or "compileall" in str(run.attributes)

    expected = {"cicd.pipeline.run.duration", "tailspan.agent.records.acked"}
    collector.wait_until(lambda: expected <= {metric.name for metric in collector.metrics()})
    durations = [metric for metric in collector.metrics() if metric.name == "cicd.pipeline.run.duration"]
    assert {metric.attributes["cicd.pipeline.name"] for metric in durations} == {"compile", "corpus"}


def jobs(machine: Machine) -> list[dict[str, str]]:
    """The rows of ``tailspan jobs --json``."""
    import json

    rows: list[dict[str, str]] = json.loads(machine.invoke("jobs", "--json").stdout)
    return rows


def _line(row: LogRow) -> tuple[object, ...]:
    """A line's identity, time and text."""
    return row.attributes["log.record.uid"], row.attributes.get("tailspan.line.part"), row.time_unix_nano, row.body


def micros(text: str) -> int:
    """Microseconds since the epoch of an ISO time."""
    from datetime import UTC, datetime, timedelta

    return (datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def test_the_same_job_through_the_job_api_has_the_same_trace(
    machine: Machine, collector: Collector, rotel: Rotel, script: Callable[[str], list[str]]
) -> None:
    """Reached through `tailspan serve` and the Fused service, a job has the same records and the same trace."""
    job_id = machine.detach(*script(PROGRAM.format(lines=HOSTILE[:15])), options=("--name", "corpus"))
    machine.invoke("wait", job_id)
    direct = machine.status(job_id)
    token = machine.home / "token"
    token.write_text("s3cret-token\n")
    server = machine.start("serve", "--port", "0", "--token-file", str(token))
    assert server.stderr is not None
    url = re.search(r"http://\S+/server/v1", server.stderr.readline())
    assert url is not None
    remote = (
        f'[services.remote]\ntype = "fused"\nbase_url = "{url[0]}"\ntoken_file = "{token}"\n'
        '[[agent.watch]]\nservice = "remote"\ndiscover = true\n'
    )
    run_once(machine, rotel.http_url, "http/protobuf", text=remote)
    assert machine.status(job_id, "--service", "remote")["trace_id"] == direct["trace_id"]
    collector.wait_until(lambda: len(lines_of(collector, job_id)) >= 30)
    collector.wait_until(lambda: len(collector.spans()) >= 4)
    rows = lines_of(collector, job_id)
    for stream in ("stdout", "stderr"):
        bodies = [row.body for row in rows if row.attributes["log.iostream"] == stream]
        assert bodies == expected_bodies(HOSTILE[:15])
    assert {row.trace_id for row in rows} == {direct["trace_id"]}
    run = spans_of(collector, direct["trace_id"])["RUN corpus"]
    assert run.attributes["cicd.pipeline.result"] == "success"
    run_once(machine, rotel.http_url, "http/protobuf", text='[[agent.watch]]\nservice = "local"\ndiscover = true\n')
    collector.wait_until(lambda: len(lines_of(collector, job_id)) >= 60)
    both = lines_of(collector, job_id)
    assert {row.span_id for row in both} == {run.span_id}
    assert Counter(map(_line, both)) == Counter({_line(row): 2 for row in rows})


INSTRUMENTED = """
import os
from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
context = propagate.extract({"traceparent": os.environ["TRACEPARENT"]})
with provider.get_tracer("job").start_as_current_span("load table", context=context):
    print("working")
provider.shutdown()
"""


def test_spans_of_an_instrumented_program_nest_under_its_job(
    machine: Machine, collector: Collector, rotel: Rotel, script: Callable[[str], list[str]]
) -> None:
    """The job's environment carries TRACEPARENT and the endpoint, so its own spans are children of `executing`."""
    machine.configure(f'[otlp]\nendpoint = "{rotel.http_url}"\n')
    machine.tailspan("run", "--name", "traced", "--", *script(INSTRUMENTED))
    run_once(machine, rotel.http_url, "http/protobuf")
    collector.wait_until(lambda: len(collector.spans()) >= 5)
    (job,) = jobs(machine)
    spans = spans_of(collector, machine.status(job["job_id"])["trace_id"])
    assert spans["load table"].parent_span_id == spans["executing"].span_id
    assert spans["executing"].parent_span_id == spans["RUN traced"].span_id
    executing = spans["executing"]
    assert executing.start_unix_nano <= spans["load table"].start_unix_nano
    assert spans["load table"].end_unix_nano <= executing.end_unix_nano
