"""The configuration in a bug report, with a secret wherever people may write one."""

from __future__ import annotations

import re
import string
from urllib.parse import quote

from hypothesis import given
from hypothesis import strategies as st

from tailspan.config import Settings, load_settings
from tailspan_agent.commands.doctor.settings import known_secrets, safe_settings
from tailspan_agent.records.redact import REDACTED, Redactor

# Header values are ASCII; a secret of fewer than four characters would match in too many lines.
SECRETS = st.text(string.ascii_letters + string.digits + "/+=:@?#&%\\\"'<>{}|", min_size=8, max_size=40).map(
    lambda text: f"s{text}t"
)


def planted(secret: str) -> Settings:
    url = (
        f"http://user:{quote(secret, safe='')}@host.example/path?key={quote(secret, safe='')}#{quote(secret, safe='')}"
    )
    return load_settings(
        overrides={
            "services": {
                "fused": {"token": secret, "base_url": url},
                "raw": {"type": "fused", "base_url": f"http://user:{secret}@host.example/x"},
                "mistaken": {"type": "fused", "token_file": secret, "client_key": secret},
                "ours": {"type": "custom", "anything": secret, "list": [secret], "table": {"deep": secret}},
            },
            "agent": {
                "token": secret,
                "watch": [{"service": "fused", "discover": True, "attributes": {"dsn": secret}}],
            },
            "otlp": {
                "endpoint": f"http://collector.example:4318/otlp?key={quote(secret, safe='')}",
                "headers": {"authorization": f"Bearer {secret}"},
                "resource": {"note": secret},
                "logs": {"headers": {"x-key": secret}, "endpoint": "http://logs.example"},
            },
            "redact": {
                "env": [secret, "HOME"],
                "patterns": [{"literal": secret, "regex": re.escape(secret)}],
                "files": [secret],
            },
            "links": {"trace": f"http://u:{quote(secret, safe='')}@jaeger.example/trace/{{trace_id}}?k={secret}"},
        }
    )


@given(SECRETS)
def test_no_secret_is_shown_wherever_it_was_written(secret: str) -> None:
    """Neither as it is nor URL-encoded; what helps to understand the configuration stays."""
    safe = safe_settings(planted(secret), {"HOME": "/home/x"})
    assert [key for key, text in safe.items() if secret in text or quote(secret, safe="") in text] == []
    assert safe["agent.token"] == f"{REDACTED}  (command line)"
    assert safe["services.fused.base_url"].startswith(f"http://{REDACTED}@host.example/path?{REDACTED}")
    assert safe["otlp.endpoint"].startswith("http://collector.example:4318/otlp?")
    assert safe["redact.env"].startswith(f"[{REDACTED} (no such variable), HOME]")
    assert safe["services.mistaken.token_file"].startswith(f"{REDACTED} (no such file)")
    assert set(safe) >= {"otlp.headers.authorization", "agent.watch[0].attributes.dsn", "services.ours.table.deep"}


@given(SECRETS)
def test_a_secret_that_another_text_quotes_is_redacted(secret: str) -> None:
    """Errors of servers and lines of the agent's log may quote anything: the report's redactor knows the secrets."""
    redactor = Redactor(known_secrets(planted(secret), {}))
    for quoted in (secret, quote(secret, safe=""), f"Bearer {secret}"):
        assert secret not in redactor.redact(f"HTTP 401: what is {quoted}?")[0]
        assert quote(secret, safe="") not in redactor.redact(f"HTTP 401: what is {quoted}?")[0]


def test_secrets_in_files_and_in_the_environment_are_known(tmp_path) -> None:
    """The content of a token file, and variables whose name suggests a secret; paths stay readable."""
    (tmp_path / "token").write_text("from-the-file\n")
    settings = load_settings(overrides={"agent": {"token_file": str(tmp_path / "token")}})
    environ = {"DB_PASSWORD": "from-a-variable", "HTTPS_PROXY": "http://me:from-a-proxy@proxy:3128", "LANG": "C.UTF-8"}
    redactor = Redactor(known_secrets(settings, environ))
    text = f"{tmp_path}/token from-the-file from-a-variable from-a-proxy C.UTF-8"
    assert redactor.redact(text)[0] == f"{tmp_path}/token {REDACTED} {REDACTED} {REDACTED} C.UTF-8"
    assert safe_settings(settings)["agent.token_file"] == f"{tmp_path}/token  (command line)"


def test_each_key_has_its_source(tmp_path, monkeypatch) -> None:
    """File and line, or the variable; keys with their default are left out."""
    path = tmp_path / "config.toml"
    path.write_text('[agent]\nlisten = "127.0.0.1:9"\n[[agent.watch]]\ndiscover = true\nname = "etl-*"\n')
    monkeypatch.setenv("TAILSPAN_AGENT__DRAIN_TIMEOUT", "5s")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert safe_settings(load_settings(path)) == {
        "agent.listen": f"127.0.0.1:9  ({path}:2)",
        "agent.drain_timeout": "5.0  (TAILSPAN_AGENT__DRAIN_TIMEOUT)",
        "agent.watch[0].discover": f"True  ({path}:4)",
        "agent.watch[0].name": f"etl-*  ({path}:5)",
        "otlp.endpoint": "http://localhost:4318  (OTEL_EXPORTER_OTLP_ENDPOINT)",
    }
    monkeypatch.setenv("TAILSPAN_AGENT__WATCH", '[{"jobs": ["j1"]}]')
    assert safe_settings(load_settings(path))["agent.watch[0].jobs"] == "[j1]  (TAILSPAN_AGENT__WATCH)"
