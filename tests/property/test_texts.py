"""Text of jobs and of configuration: what reads a line takes linear time; configuration loads or is refused."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.config import load_settings
from tailspan.errors import ConfigError
from tailspan.local.command_line import default_name, redact_command
from tailspan.local.environment import job_environment, parent_of
from tailspan.local.job_name import shell_name
from tailspan.logs.clean import clean, printable, split_long
from tailspan.services.registry import open_service
from tailspan_agent.analysis.failure import failure_of, fingerprint_of
from tailspan_agent.analysis.progress import read_line
from tailspan_agent.records.redact import Redactor
from tailspan_agent.records.severity import find_severities_in_python, find_severity
from tests.property.effort import assert_linear, fuzz

UNITS = (
    b" ",
    b"\t",
    b"a",
    b"-",
    b"[",
    b"|",
    b"=",
    b'"',
    b":",
    b"\x1b",
    b"\x1b[",
    b"\x1b]",
    b"\x9b",
    b"\r",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\n",
    b"ERROR ",
    b"level=",
    b'{"level": "',
    b"12:00:00 ",
    b"Traceback (most recent call last):\n",
    b"secret",
    b"secre",
    b"a.b.c.",
    b"--token",
    b"://a:b",
    b"eyJ",
    b'  File "x", line 1\n',
)
REDACTOR = Redactor(
    {"a": "secretsecret", "b": "secret", "c": "aaaa"}, [("eyJ", re.compile(r"eyJ[\w-]{1,200}+\.[\w-]+"))]
)
FUNCTIONS: dict[str, Callable[[bytes], object]] = {
    "clean": clean,
    "printable": lambda text: printable(text.decode("utf-8", "replace"), colours=True),
    "severity": find_severity,
    "learner": lambda text: find_severities_in_python([text, text]),
    "redact": lambda text: REDACTOR.redact(text.decode("utf-8", "replace")),
    "digest": lambda text: failure_of(text.decode("utf-8", "replace").split("\n")),
    "progress": lambda text: read_line(text.decode("utf-8", "replace")),
    "fingerprint": lambda text: fingerprint_of("x", text.decode("utf-8", "replace"), None),
    "split": split_long,
    "command": lambda text: redact_command(["x", text.decode("utf-8", "replace")]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hostile_lines_take_linear_time(name: str) -> None:
    """The same piece again and again, which is what makes backtracking quadratic, alone and behind a beginning."""
    for unit in UNITS:
        for head in (b"", b'{"a": 1, ', b"\x1b["):
            assert_linear(
                FUNCTIONS[name], lambda size, unit=unit, head=head: head + unit * (size // len(unit)) + b"!", 20_000
            )


@fuzz(200)
@given(lines=st.lists(st.lists(st.sampled_from(UNITS) | st.binary(max_size=6), max_size=12).map(b"".join), max_size=10))
def test_any_line(lines: list[bytes]) -> None:
    """No line stops what reads it."""
    for function in FUNCTIONS.values():
        for line in lines:
            function(line)
    failure_of([clean(line) for line in lines])
    REDACTOR.redact_lines(lines)


@fuzz(200)
@given(
    words=st.lists(st.text(min_size=1, max_size=20).filter(lambda word: "\0" not in word), min_size=1, max_size=5),
    value=st.text(max_size=40),
)
def test_any_command_and_environment(words: list[str], value: str) -> None:
    """A job has a name and an environment whatever it is given."""
    assert default_name(words)
    assert (shell_name(" ".join(words)) or "sh").isprintable()
    assert len(redact_command(words)) == len(words)
    inherited = {"TRACEPARENT": value, "OTEL_RESOURCE_ATTRIBUTES": value, "OTEL_SERVICE_NAME": value}
    parent_of(inherited)
    job_environment(inherited, job_id="j", name="n", trace_id="0" * 32, span_id="0" * 16, otlp={})


TABLES = [
    "agent",
    "otlp",
    "otlp.logs",
    "otlp.resource",
    "redact",
    "files",
    "links",
    "services.local",
    "services.f",
    "x",
    '"a b"',
]
KEYS = [
    "default_service",
    "type",
    "state_dir",
    "group",
    "keep_finished",
    "base_url",
    "token",
    "token_file",
    "scheme",
    "timeout",
    "ca_file",
    "client_key",
    "requests_per_second",
    "listen",
    "allowed_hosts",
    "drain_timeout",
    "max_pipeline_names",
    "watch",
    "expect",
    "endpoint",
    "protocol",
    "compression",
    "headers",
    "signals",
    "dead_letter_max",
    "env",
    "files",
    "patterns",
    "max_size",
    "keep",
    "trace",
    "zzz",
]
VALUES = [
    "1",
    "-1",
    "1e400",
    "nan",
    "inf",
    "true",
    '""',
    '"x"',
    '"10s"',
    '"9999999999999999999d"',
    '"1e9GiB"',
    '"http://x:99999"',
    '"http://["',
    '"127.0.0.1:0"',
    '"0.0.0.0:1"',
    '"\\u0000"',
    "[]",
    "[1]",
    '["a"]',
    "{}",
    "{ a = 1 }",
    "[{ regex = '(', literal = 'a' }]",
    "[{ service = 'f', discover = true }]",
    "1979-05-27",
    "07:32:00",
    '"fused"',
    '"local"',
    '"~nobody/x"',
    "'''\n'''",
    "9" * 5000,
]
CONFIGURATIONS = st.lists(
    st.tuples(
        st.sampled_from(["[{}]", "[[{}]]"]),
        st.sampled_from(TABLES),
        st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=4),
    ),
    max_size=4,
).map(
    lambda tables: "\n".join(
        "\n".join([head.format(name), *(f"{key} = {value}" for key, value in keys.items())])
        for head, name, keys in tables
    )
)


@fuzz(300)
@given(
    text=CONFIGURATIONS,
    environ=st.dictionaries(
        st.sampled_from(["TAILSPAN_AGENT__WATCH", "TAILSPAN_OTLP__HEADERS", "OTEL_EXPORTER_OTLP_ENDPOINT"]),
        st.sampled_from(["[", "x", "a=b", "{}", "http://x", "\x1b", "[" * 5000]),
    ),
)
@example(text="a = " + "[" * 100_000, environ={})
@example(text='"' * 3, environ={})
def test_any_configuration(text: str, environ: dict[str, str]) -> None:
    """It loads, and its services open, or one error says what is wrong."""
    with tempfile.TemporaryDirectory() as path, suppress(ConfigError), pytest.MonkeyPatch.context() as patch:
        file = Path(path) / "config.toml"
        file.write_text(text)
        for name, value in environ.items():
            patch.setenv(name, value)
        settings = load_settings(file)
        for signal in ("logs", "traces", "metrics"):
            settings.otlp.for_signal(signal)
        Redactor.from_settings(settings.redact)
        assert repr(settings)
        for name in settings.services:
            with suppress(ConfigError):
                open_service(name, settings)


@pytest.mark.parametrize(
    "unit", ["a = 1\n", "[a]\n", "[[a]]\n", "'''", '"', "# x\n", "a" * 50 + ".", "[[a.b]]\n[a.b.c]\n"]
)
def test_a_large_configuration_takes_linear_time(unit: str, tmp_path: Path) -> None:
    """The search for line numbers too."""

    def load(text: str) -> None:
        file = tmp_path / "config.toml"
        file.write_text(text)
        with suppress(ConfigError):
            load_settings(file)

    assert_linear(load, lambda size: unit * (size // len(unit)), 20_000)
