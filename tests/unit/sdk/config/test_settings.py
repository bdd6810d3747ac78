"""The configuration: precedence, environment, units, and errors that name the key and its place."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies

from tailspan.config import (
    Options,
    Settings,
    SignalSettings,
    load_settings,
    parse_duration_s,
    parse_size_bytes,
    platform_state_dir,
    read_secret_file,
    validate_options,
)
from tailspan.errors import ConfigError
from tests.property.effort import fuzz

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TAILSPAN_", "OTEL_")):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    return write


def signal(loaded: Settings, name: str) -> SignalSettings:
    found = loaded.otlp.for_signal(name)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_nothing_needs_to_be_set() -> None:
    """Without file and environment there is the local service, watched whole, and telemetry goes to files."""
    loaded = load_settings()
    assert loaded.path is None
    assert loaded.services == {"local": {"type": "local"}}
    assert [(watch.service, watch.discover) for watch in loaded.agent.watch] == [("local", True)]
    assert loaded.agent.state_dir == platform_state_dir() / "agent"
    assert loaded.agent.listen_address == ("127.0.0.1", 8797)
    assert signal(loaded, "logs") == SignalSettings(signal="logs", url=None)


def test_defaults_of_a_watch_are_those_of_the_design(write: Write) -> None:
    """A watch that only says discover settles 10 s, looks back a day and reads a finished log once more."""
    (watch,) = load_settings(write("[[agent.watch]]\ndiscover = true")).agent.watch
    assert (watch.lookback, watch.settle, watch.late_window, watch.final_read) == (86400.0, 10.0, 10.0, True)
    assert watch.service == "local"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((), None),
        (("otel",), "http://otel/v1/logs"),
        (("otel", "file"), "http://file/v1/logs"),
        (("otel", "file", "environment"), "http://environment/v1/logs"),
        (("otel", "file", "environment", "command"), "http://command/v1/logs"),
        (("otel", "command"), "http://command/v1/logs"),
        (("otel_logs", "otel"), "http://otel-logs/custom"),
        # A general key of an upper layer beats the key for one signal in a lower layer.
        (("otel_logs", "file"), "http://file/v1/logs"),
        (("file_logs", "environment"), "http://environment/v1/logs"),
        (("file_logs", "file"), "http://file-logs/custom"),
        (("file_logs", "file", "otel", "otel_logs"), "http://file-logs/custom"),
        (("environment_logs", "environment", "file_logs"), "http://environment-logs/custom"),
        (("environment_logs", "command"), "http://command/v1/logs"),
    ],
)
def test_precedence(
    layers: tuple[str, ...], expected: str | None, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line, then TAILSPAN_*, then file, then OTEL_*, then default; within a layer the signal's own key."""
    text = ""
    if "file" in layers:
        text += '[otlp]\nendpoint = "http://file"\n'
    if "file_logs" in layers:
        text += '[otlp.logs]\nendpoint = "http://file-logs/custom"\n'
    for layer, variable, value in [
        ("otel", "OTEL_EXPORTER_OTLP_ENDPOINT", "http://otel/"),
        ("otel_logs", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://otel-logs/custom"),
        ("environment", "TAILSPAN_OTLP__ENDPOINT", "http://environment"),
        ("environment_logs", "TAILSPAN_OTLP__LOGS__ENDPOINT", "http://environment-logs/custom"),
    ]:
        if layer in layers:
            monkeypatch.setenv(variable, value)
    overrides = {"otlp": {"endpoint": "http://command"}} if "command" in layers else None
    assert signal(load_settings(write(text), overrides=overrides), "logs").url == expected


def test_the_environment_names_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """TAILSPAN_CONFIG is used where no path is given, and only there."""
    path = write('[agent]\nlisten = ""')
    monkeypatch.setenv("TAILSPAN_CONFIG", str(path))
    assert (load_settings().path, load_settings().agent.listen_address) == (path, None)
    other = path.with_name("other.toml")
    other.write_text("[files]\nkeep = 3")
    assert load_settings(other).path == other


def test_the_page_is_switched_off_by_environment(monkeypatch):
    """An empty variable counts as unset, so there is a word for it."""
    monkeypatch.setenv("TAILSPAN_AGENT__LISTEN", "off")
    assert load_settings().agent.listen_address is None


def test_nested_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested variables reach every kind of value, also in the tables of services, whatever their names' case."""
    for name, value in {
        "TAILSPAN_AGENT__STATE_DIR": "/var/lib/tailspan",
        "TAILSPAN_AGENT__ALLOW_CANCEL": "true",
        "TAILSPAN_AGENT__DRAIN_TIMEOUT": "1m",
        "TAILSPAN_AGENT__WATCH": '[{"service": "Prod", "jobs": ["a", "b"]}]',
        "TAILSPAN_OTLP__SIGNALS": "logs, traces",
        "TAILSPAN_OTLP__RESOURCE": "team=geo",
        "TAILSPAN_OTLP__HEADERS__AUTHORIZATION": "Bearer x",
        "TAILSPAN_SERVICES__PROD__TOKEN": "12345",
        "TAILSPAN_SERVICES__EXTRA__TYPE": "fused",
        "TAILSPAN_AGENT__LISTEN": "",
    }.items():
        monkeypatch.setenv(name, value)
    loaded = load_settings(write('[services.Prod]\ntype = "fused"\n[otlp.resource]\nstage = "prod"'))
    assert loaded.agent.state_dir == Path("/var/lib/tailspan")
    assert loaded.agent.allow_cancel is True
    assert loaded.agent.drain_timeout == 60.0
    assert loaded.agent.watch[0].jobs == ["a", "b"]
    assert loaded.agent.listen == "127.0.0.1:8797", "an empty variable counts as unset"
    assert loaded.otlp.signals == ["logs", "traces"]
    assert loaded.otlp.for_signal("metrics") is None
    assert loaded.otlp.resource == {"stage": "prod", "team": "geo"}
    assert signal(loaded, "logs").headers["authorization"].get_secret_value() == "Bearer x"
    assert loaded.services["Prod"] == {"type": "fused", "token": "12345"}, "a token of digits stays text"
    assert loaded.services["extra"] == {"type": "fused"}


def test_the_short_name_of_the_local_state_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """TAILSPAN_STATE_DIR sets the local service's directory and not the agent's; the full name wins over it."""
    monkeypatch.setenv("TAILSPAN_STATE_DIR", "/short")
    loaded = load_settings()
    assert loaded.services["local"]["state_dir"] == "/short"
    assert loaded.agent.state_dir == platform_state_dir() / "agent"
    monkeypatch.setenv("TAILSPAN_SERVICES__LOCAL__STATE_DIR", "/long")
    assert load_settings().services["local"]["state_dir"] == "/long"


def test_a_token_replaces_a_token_file_of_a_lower_layer(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token in the environment beats the token_file in the file, rather than both being set."""
    monkeypatch.setenv("TAILSPAN_SERVICES__FUSED__TOKEN", "t")
    monkeypatch.setenv("TAILSPAN_AGENT__TOKEN", "t")
    loaded = load_settings(write('[services.fused]\ntoken_file = "/x"\n[agent]\ntoken_file = "/x"'))
    assert loaded.services["fused"] == {"type": "fused", "token": "t"}
    assert (loaded.agent.token_file, loaded.agent.read_token()) == (None, "t")


def test_headers_of_a_lower_layer_do_not_leak_to_another_endpoint(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers are one value: those of OTEL_* are not mixed with those of the file."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    loaded = load_settings(write('[otlp]\nendpoint = "http://h"\nheaders = { x = "1" }'))
    assert list(signal(loaded, "logs").headers) == ["x"]


def test_every_otel_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each OTEL_EXPORTER_OTLP_* lands on its key; those of one signal win over the general ones."""
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://general:4318/base/",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=a%20b, x=1=2,",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2500",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": "/ca.pem",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "traces:4317",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "TRUE",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "only=traces",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "100",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://metrics",
        "OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE": "/client.pem",
        "OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY": "/client.key",
        "OTEL_RESOURCE_ATTRIBUTES": "team=geo,stage=a%2Cb",
        "OTEL_SERVICE_NAME": "my-agent",
        "OTEL_SDK_DISABLED": "True",
    }.items():
        monkeypatch.setenv(name, value)
    loaded = load_settings(overrides={"otlp": {"resource": {"team": "mine"}}})
    logs, traces, metrics = (signal(loaded, name) for name in ("logs", "traces", "metrics"))
    assert logs.url == "http://general:4318/base/v1/logs"
    assert {name: value.get_secret_value() for name, value in logs.headers.items()} == {"api-key": "a b", "x": "1=2"}
    assert (logs.timeout, logs.compression, logs.ca_file) == (2.5, "none", Path("/ca.pem"))
    assert (traces.url, traces.protocol, list(traces.headers)) == ("http://traces:4317", "grpc", ["only"])
    assert (traces.timeout, traces.compression, traces.ca_file) == (0.1, "gzip", Path("/ca.pem"))
    assert (metrics.url, metrics.protocol) == ("http://metrics/", "http/protobuf")
    assert (metrics.client_cert, metrics.client_key) == (Path("/client.pem"), Path("/client.key"))
    assert loaded.otlp.resource == {"team": "mine", "stage": "a,b"}
    assert (loaded.agent.service_name, loaded.otlp.disabled) == ("my-agent", True)


@pytest.mark.parametrize(
    ("endpoint", "insecure", "url"),
    [
        ("host:4317", "", "https://host:4317"),
        ("host:4317", "true", "http://host:4317"),
        ("http://host:4317", "", "http://host:4317"),
        ("https://host:4317/ignored", "true", "https://host:4317"),
        ("https://host", "", "https://host:443"),
        ("http://host", "", "http://host:4317"),
        ("http://[::1]:4317", "", "http://[::1]:4317"),
    ],
)
def test_grpc_endpoints(endpoint: str, insecure: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheme decides about TLS; `insecure` counts only without a scheme, by the specification."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", insecure)
    assert signal(load_settings(), "traces").url == url


@pytest.mark.parametrize(
    ("variable", "value", "key", "words"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "otlp.protocol", 'expected "http/protobuf" or "grpc"'),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "otlp.timeout", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318", "otlp.endpoint", "expected a URL"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://u:hidden@h", "otlp.logs.endpoint", "otlp.headers"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:99999", "otlp.endpoint", "expected a URL"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hidden", None, "key=value"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=hidden%0Ab", "otlp.headers", "one line"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli", "otlp.compression", "'gzip', 'none' or 'zstd', got 'brotli'"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/k", "otlp.client_key", "client_cert"),
        ("TAILSPAN_AGENT__STATDIR", "/x", "agent.statdir", "did you mean state_dir?"),
        ("TAILSPAN_AGNET__STATE_DIR", "/x", "agnet", "agent"),
        ("TAILSPAN_AGENT__WATCH", "[{", "agent.watch", "a JSON array"),
        ("TAILSPAN_AGENT", "hidden", "agent", "expected a table"),
        ("TAILSPAN_SERVICES__FUSED", "hidden", "services.fused", "expected a table"),
        ("TAILSPAN_OTLP__TIMEOUT", "soon", "otlp.timeout", "expected a duration"),
        ("TAILSPAN_FILES__KEEP", "0", "files.keep", "expected a number of 1 or more, got '0'"),
    ],
)
def test_errors_in_the_environment_name_the_variable(
    variable: str, value: str, key: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value from the environment that does not fit names variable and key, and shows no secret."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{variable}: ")
    assert words in str(caught.value)
    if variable != "TAILSPAN_AGENT":
        assert "hidden" not in str(caught.value)


def test_two_variables_for_one_table_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable for a table and one for a key in it: neither is dropped silently."""
    monkeypatch.setenv("TAILSPAN_AGENT", "{}")
    monkeypatch.setenv("TAILSPAN_AGENT__LISTEN", "")
    monkeypatch.setenv("TAILSPAN_AGENT__STATE_DIR", "/x")
    with pytest.raises(ConfigError, match="TAILSPAN_AGENT__STATE_DIR and TAILSPAN_AGENT are both set"):
        load_settings()


def test_variables_that_are_not_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs may use TAILSPAN_ variables of one level, such as TAILSPAN_JOB_ID."""
    monkeypatch.setenv("TAILSPAN_JOB_ID", "x")
    assert load_settings() == load_settings()


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ('defualt_service = "local"', 1, "defualt_service", "there is no such key; did you mean default_service?"),
        ("\n[otpl]\n", 2, "otpl", "did you mean otlp?"),
        ('[agent]\n\nstat_dir = "/x"', 3, "agent.stat_dir", "did you mean state_dir?"),
        ('[agent]\n"stat_dir" = "/x"', 2, "agent.stat_dir", "did you mean state_dir?"),
        ('agent.stat_dir = "/x"', 1, "agent.stat_dir", "did you mean state_dir?"),
        ("[otlp]\nlogs = { zzz = 1 }", 2, "otlp.logs.zzz", "known here: ca_file, "),
        ('[otlp.logs]\nendpiont = "x"', 2, "otlp.logs.endpiont", "did you mean endpoint?"),
        (
            "[[agent.watch]]\ndiscover = true\n[[agent.watch]]\ndiscover = true\nlokback = 1",
            5,
            "agent.watch[1].lokback",
            "did you mean lookback?",
        ),
        ('[[agent.watch]]\nname = "x"', 1, "agent.watch[0]", "jobs = [...]"),
        ('[[agent.watch]]\nservice = "nope"\ndiscover = true', 2, "agent.watch[0].service", "there is: local"),
        ('[[agent.expect]]\nname = "x"', 1, "agent.expect[0].every", "is missing"),
        ("[agent]\nallow_cancel = 3", 2, "agent.allow_cancel", "expected true or false, got 3"),
        ("[agent]\nmax_pipeline_names = 1.5", 2, "agent.max_pipeline_names", "expected a whole number, got 1.5"),
        ("[agent]\nlisten = 8797", 2, "agent.listen", "expected text in quotes, got 8797"),
        ('[agent]\nlisten = "8797"', 2, "agent.listen", "HOST:PORT"),
        ('[agent]\nlisten = "0.0.0.0:8797"', 2, "agent.listen", "agent.token_file"),
        ('[agent]\nlisten = ":8797"', 2, "agent.listen", "agent.token_file"),
        ('[agent]\ntoken = "hidden"\ntoken_file = "/x"', 2, "agent.token", "keep one"),
        ('[agent]\ntoken = ["hidden"]', 2, "agent.token", "expected text in quotes"),
        ('agent = "hidden but no secret"', 1, "agent", "expected a table"),
        ('[services]\nfused = "hidden"', 2, "services.fused", "expected a table"),
        ("[services.fused]\ntype = 3", 2, "services.fused.type", "expected text"),
        ('default_service = "nope"', 1, "default_service", "no service 'nope' is configured"),
        ('[files]\nmax_size = "big"', 2, "files.max_size", "expected a size"),
        ('[otlp]\ntimeout = "-1s"', 2, "otlp.timeout", "expected a duration"),
        ('[otlp]\ntimeout = "0s"', 2, "otlp.timeout", "expected more than 0, got 0"),
        ("[otlp]\nsignals = []", 2, "otlp.signals", "expected at least one"),
        ("[otlp]\nheaders = { a = 5 }", 2, "otlp.headers.a", "expected text in quotes"),
        ('[otlp]\nsignals = ["logs", "spans"]', 2, "otlp.signals[1]", "'logs', 'traces' or 'metrics', got 'spans'"),
        ('[otlp.resource]\n"a.b" = [1]', 2, 'otlp.resource."a.b"', "expected text in quotes, got a list"),
        ('[redact]\npatterns = [{ regex = "a" }]', 2, "redact.patterns[0]", "slow = true"),
        ('[redact]\npatterns = [{ literal = "a", regex = "(a" }]', 2, "redact.patterns[0].regex", "not a regular"),
        ('[links]\ntrace = "javascript:x"', 2, "links.trace", "http://"),
        ('[agent]\nstate_dir = ""', 2, "agent.state_dir", "expected the path"),
        ('[agent]\nstate_dir = "a\\u0000"', 2, "agent.state_dir", "expected the path"),
        ('a = """\n[agent]\nlistn = 1\n"""\n[agent]\nlistn = 1', 1, "a", "config.toml:6: agent.listn"),
    ],
)
def test_errors_in_the_file_name_key_and_line(text: str, line: int, key: str, words: str, write: Write) -> None:
    """A key that is unknown or does not fit is named with its path and line; secrets are not shown."""
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    errors = {part.split(": ")[1]: part for part in str(caught.value).split("\n")}
    assert caught.value.key in errors
    assert errors[key].startswith(f"{path}:{line}: {key}: ")
    assert words in str(caught.value)
    assert '"hidden"' not in str(caught.value)
    assert "'hidden'" not in str(caught.value)


def test_all_errors_are_told_at_once(write: Write) -> None:
    """Two wrong keys are two lines, so that one run shows both."""
    with pytest.raises(ConfigError) as caught:
        load_settings(write("[agent]\nfoo = 1\n[files]\nkeep = 0"))
    assert [sentence.split(": ")[1] for sentence in str(caught.value).split("\n")] == ["agent.foo", "files.keep"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[agent]\nlisten = "x', ":2:12: broken TOML"),
        (b"[agent]\nlisten = \n", ":2:10: broken TOML: Invalid value"),
        (b"a = \xff", "not UTF-8 text (byte 4)"),
        (b"a = " + b"[" * 20_000, "too deeply nested"),
        (b"a = " + b"9" * 10_000, "broken TOML"),
    ],
)
def test_broken_files(content: bytes, words: str, tmp_path: Path) -> None:
    """What cannot be read as TOML names the file and, where known, line and column."""
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    """A missing file and a directory have different messages."""
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_settings(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_settings(tmp_path)
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        load_settings(Path("a\0b"))


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    """A file saved by a Windows editor loads."""
    path = tmp_path / "config.toml"
    path.write_bytes(b'\xef\xbb\xbf[agent]\r\nlisten = ""\r\n')
    assert load_settings(path).agent.listen == ""


def test_secrets_are_not_in_the_repr(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither settings nor a service's raw table show tokens or headers."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hidden")
    loaded = load_settings(write('[services.fused]\ntoken = "hidden"\n[agent]\ntoken = "hidden"'))
    shown = f"{loaded!r} {loaded} {loaded.services!r} {loaded.services['fused']} {loaded.otlp.for_signal('logs')!r}"
    assert "hidden" not in shown


class ExampleOptions(Options):
    base_url: str
    token: str | None = None
    timeout: float = 1.0


def test_services_validate_their_own_table(write: Write) -> None:
    """A service type's own model names the full key and the line; `type` needs no field."""
    path = write('[services.one]\ntype = "x"\nbase_url = "http://h"\n[services."two.2"]\ntype = "x"\nbse_url = "h"')
    services = load_settings(path).services
    assert validate_options(ExampleOptions, "services.one", services["one"]).base_url == "http://h"
    with pytest.raises(ConfigError) as caught:
        validate_options(ExampleOptions, "services.two.2", services["two.2"])
    assert str(caught.value) == (
        f'{path}:4: services."two.2".base_url: is missing\n'
        f'{path}:6: services."two.2".bse_url: there is no such key; did you mean base_url?'
    )


def test_a_plain_table_has_no_place_but_a_key() -> None:
    """`validate_options` takes any mapping; a wrong secret is not shown."""
    with pytest.raises(ConfigError) as caught:
        validate_options(ExampleOptions, "services.one", {"base_url": "h", "token": 7, "timeout": "soon"})
    assert caught.value.key == "services.one.token"
    assert str(caught.value) == (
        "services.one.token: expected text in quotes\nservices.one.timeout: expected a number, got 'soon'"
    )


def test_two_sections_of_one_type(write: Write) -> None:
    """A type can be configured more than once, under different names."""
    loaded = load_settings(write('[services.a]\ntype = "fused"\n[services.b]\ntype = "fused"'))
    assert {name: table["type"] for name, table in loaded.services.items()} == {
        "local": "local",
        "a": "fused",
        "b": "fused",
    }


def test_secret_files(tmp_path: Path) -> None:
    """A token file is read when asked, without the newline an editor leaves; other content is an error."""
    path = tmp_path / "token"
    path.write_text(" abc\n")
    assert read_secret_file(path, key="k") == "abc"
    for content in (b"", b"a\nb", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^k: "):
            read_secret_file(path, key="k")
    with pytest.raises(ConfigError, match=r"^k: cannot read .*none"):
        read_secret_file(tmp_path / "none", key="k")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("10s", 10), ("500ms", 0.5), ("24h", 86400), ("30d", 2592000), ("1h30m", 5400), (5, 5), (0.25, 0.25), (" 7 ", 7)],
)
def test_durations(value: object, seconds: float) -> None:
    """Units add up; a number is seconds."""
    assert parse_duration_s(value) == seconds


@pytest.mark.parametrize("value", ["", "10 parsecs", "s", "-1s", -1, True, None, float("nan"), float("inf"), 10**400])
def test_not_durations(value: object) -> None:
    """Everything else is an error that says how to write one."""
    with pytest.raises(ConfigError, match="expected a duration"):
        parse_duration_s(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("100MiB", 100 * 2**20),
        ("10GiB", 10 * 2**30),
        ("3MB", 3_000_000),
        ("1.5 kib", 1536),
        ("7", 7),
        (9, 9),
        ("2k", 2000),
    ],
)
def test_sizes(value: object, size: int) -> None:
    """Units with an i are powers of 1024, those without are powers of 1000."""
    assert parse_size_bytes(value) == size


@pytest.mark.parametrize("value", ["", "MB", "-1", -1, 1.5, True, None, "1iB", "9" * 400, 10**400])
def test_not_sizes(value: object) -> None:
    """Everything else is an error that says how to write one."""
    with pytest.raises(ConfigError, match="expected a size"):
        parse_size_bytes(value)


def test_severity_words() -> None:
    """Severities are written in any case, also as Python calls them."""
    for word, name in [("info", "INFO"), ("Warning", "WARN"), ("CRITICAL", "FATAL")]:
        loaded = load_settings(overrides={"agent": {"watch": [{"discover": True, "min_severity": word}]}})
        assert loaded.agent.watch[0].min_severity == name


keys = strategies.sampled_from(
    ["agent", "otlp", "services", "watch", "logs", "token", "headers", "listen", "endpoint", "resource", "a", '"b.c"']
)
values = strategies.recursive(
    strategies.sampled_from(["1", "-1", "1.5", "true", '"x"', '"10s"', '"http://h:1"', "1979-05-27", "nan", '"[::"']),
    lambda inner: (
        strategies.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | strategies.dictionaries(keys, inner, max_size=3).map(
            lambda table: "{ " + ", ".join(f"{key} = {value}" for key, value in table.items()) + " }"
        )
    ),
    max_leaves=6,
)
lines = (
    strategies.tuples(keys, values).map(" = ".join)
    | strategies.lists(keys, min_size=1, max_size=3).map(lambda parts: f"[{'.'.join(parts)}]")
    | strategies.lists(keys, min_size=1, max_size=3).map(lambda parts: f"[[{'.'.join(parts)}]]")
)


@fuzz(150)
@given(text=strategies.text() | strategies.lists(lines).map("\n".join))
def test_any_text_loads_or_is_a_config_error(text: str, write: Write) -> None:
    """No text makes the loader raise anything but ConfigError."""
    with contextlib.suppress(ConfigError):
        load_settings(write(text))


def test_importing_the_package_does_not_import_pydantic() -> None:
    """Only `tailspan.config` pays for pydantic: `import tailspan` stays light."""
    code = "import sys, tailspan; sys.exit(any(name.split('.')[0] == 'pydantic' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
