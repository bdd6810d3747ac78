"""`tailspan._net`: addresses, TLS files and secret files."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tailspan._net import default_tls, host_port, is_loopback, tls_context
from tailspan.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("h", None, "h"),
        ("h", 80, "h:80"),
        ("127.0.0.1", 0, "127.0.0.1:0"),
        ("::1", None, "[::1]"),
        ("fe80::1%eth0", 8797, "[fe80::1%eth0]:8797"),
    ],
)
def test_host_and_port_are_written_as_in_a_url(host: str, port: int | None, expected: str) -> None:
    """Only an IPv6 address has brackets."""
    assert host_port(host, port) == expected


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback(host: str) -> None:
    """These reach only this host."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "localhost.example", "x.localhost", "10.0.0.1", "0.0.0.0", "::", "[::1]"])
def test_not_loopback(host: str) -> None:
    """Another host, every interface, or a name whose address only a resolver knows."""
    assert not is_loopback(host)


def test_the_default_context_is_made_once_for_each_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading the authorities is slow; a changed SSL_CERT_FILE still counts."""
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    usual = default_tls()
    assert default_tls() is usual
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert len(default_tls().get_ca_certs()) == 1 != len(usual.get_ca_certs())


def test_every_tls_file_that_cannot_be_used_is_named_with_its_key(tmp_path: Path) -> None:
    """The message begins with the key, as all errors of the configuration do."""
    ca = trustme.CA()
    one, other = ca.issue_cert("a"), ca.issue_cert("b")
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    one.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    other.private_key_pem.write_to_path(str(tmp_path / "other-key"))
    (tmp_path / "text").write_text("no PEM")

    def error(**names: str) -> str:
        paths = {
            key: tmp_path / names[key] if key in names else None for key in ("ca_file", "client_cert", "client_key")
        }
        with pytest.raises(ConfigError) as caught:
            tls_context(**paths, table="t")
        assert str(caught.value).startswith(f"{caught.value.key}: ")
        return str(caught.value)

    assert "t.ca_file: cannot read" in error(ca_file="none")
    assert "t.ca_file: " in (text := error(ca_file="text"))
    assert "has no PEM certificate" in text
    assert "t.client_cert: cannot read" in error(client_cert="none")
    assert "t.client_key: cannot read" in error(client_cert="cert", client_key="none")
    assert "do not match" in error(ca_file="ca", client_cert="cert", client_key="other-key")


@pytest.mark.parametrize("text", [None, "no PEM"])
def test_authorities_of_the_environment_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    """ssl's own error names neither the file nor the variable."""
    if text is not None:
        (tmp_path / "ca").write_text(text)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca"))
    with pytest.raises(ConfigError, match=rf"^SSL_CERT_FILE: cannot use {tmp_path / 'ca'}: \S") as caught:
        default_tls()
    assert caught.value.key == "SSL_CERT_FILE"
