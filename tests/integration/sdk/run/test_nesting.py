"""Section 5: an instrumented program's spans come below the job that runs it, checked with the real Python SDK."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest

from tests.fakes.variants import Variants

PROGRAM = """
import os, sys, threading
{first}
from opentelemetry.sdk.trace import TracerProvider
tracer = TracerProvider().get_tracer("program")
def work():
    {second}
    with tracer.start_as_current_span("outer") as outer:
        with tracer.start_as_current_span("inner") as inner:
            pass
    found = f"00-{{outer.context.trace_id:032x}}-{{outer.parent.span_id:016x}}-01" if outer.parent else "none"
    print(found == os.environ.get("TRACEPARENT", "none"), inner.parent.span_id == outer.context.span_id)
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
IS_ANNOUNCED = bool(entry_points(group="opentelemetry_context", name="tailspan"))


@pytest.mark.skipif(not IS_ANNOUNCED, reason="an older installation: run `make test` again")
@pytest.mark.parametrize("through", [[], ["sh", "-c", '"$0" "$@"'], ["env"]])
def test_an_unchanged_program_nests(variants: Variants, through: list[str]) -> None:
    """In every thread, also when a script starts the program."""
    program = PROGRAM.format(first="", second="")
    path = f"{sys.prefix}/bin:{variants.env['PATH']}"
    done = variants.run("tailspan", [*through, sys.executable, "-c", program], env={**variants.env, "PATH": path})
    assert done.stdout == b"True True\nTrue True\n", done.stderr
    assert done.stderr == b""


def test_attach_is_enough(variants: Variants) -> None:
    """Where the variable is another's, one line does it."""
    program = PROGRAM.format(first="import tailspan.otel", second="assert tailspan.otel.attach()")
    env = {**variants.env, "OTEL_PYTHON_CONTEXT": "contextvars_context"}
    done = variants.run("tailspan", [sys.executable, "-c", program], env=env)
    assert done.stdout == b"True True\nTrue True\n", done.stderr


def test_without_a_job_nothing_changes(variants: Variants) -> None:
    """A program with `attach` also runs alone."""
    program = PROGRAM.format(first="import tailspan.otel", second="assert not tailspan.otel.attach()")
    env = {key: value for key, value in variants.env.items() if key != "TRACEPARENT"}
    done = variants.run("plain", [sys.executable, "-c", program], env={**env, "OTEL_PYTHON_CONTEXT": "tailspan"})
    assert done.stdout == b"True True\nTrue True\n", done.stderr


def test_python_without_tailspan_is_left_alone(variants: Variants) -> None:
    """The variable would make its SDK report an unknown context."""
    done = variants.run(
        "tailspan", ["/bin/sh", "-c", "echo $OTEL_PYTHON_CONTEXT"], env={**variants.env, "PATH": "/bin"}
    )
    assert done.stdout == b"\n"


def test_endpoints_attributes_and_resource_reach_the_job(variants: Variants) -> None:
    """Per-signal endpoints, `--attr`, `[otlp.resource]` and the namespace, as the program's SDK reads them."""
    config = variants.directory / "config.toml"
    config.write_text(
        '[otlp]\nendpoint = "http://c:4318"\nprotocol = "grpc"\n'
        '[otlp.traces]\nendpoint = "http://t:4318/v1/traces"\nprotocol = "http/protobuf"\n'
        '[otlp.resource]\ndeployment = "a, b"\n'
    )
    script = "env | grep ^OTEL_ | grep -v _CONTEXT | sort"
    options = ("--config", str(config), "--name", "etl", "--attr", "team=geo=1")
    done = variants.run("tailspan", ["sh", "-c", script], *options)
    job = variants.jobs()[0].name
    assert done.stdout.decode().splitlines() == [
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://t:4318/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf",
        "OTEL_RESOURCE_ATTRIBUTES=service.namespace=local,deployment=a%2C%20b,team=geo%3D1,"
        f"cicd.pipeline.name=etl,cicd.pipeline.run.id={job}",
        "OTEL_SERVICE_NAME=etl",
    ]


def test_a_service_that_the_environment_names_stays(variants: Variants) -> None:
    """Also where `OTEL_RESOURCE_ATTRIBUTES` names it."""
    env = {**variants.env, "OTEL_RESOURCE_ATTRIBUTES": "service.name=mine"}
    done = variants.run("tailspan", ["sh", "-c", "echo $OTEL_SERVICE_NAME"], env=env)
    assert done.stdout == b"\n"
