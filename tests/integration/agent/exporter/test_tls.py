"""TLS and mutual TLS over both protocols, with a private authority."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import trustme

from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome
from tests.fakes.collector import Collector, Tls
from tests.fakes.otlp_samples import exporter_to, logs_payload

PROTOCOLS = {"http/protobuf": "http_url", "grpc": "grpc_url"}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority for the server's and the client's certificates."""
    return trustme.CA()


@pytest.fixture(scope="module")
def server(authority: trustme.CA) -> Tls:
    """A certificate for 127.0.0.1."""
    return tls(authority)


def tls(authority: trustme.CA, client_authority: trustme.CA | None = None) -> Tls:
    certificate = authority.issue_cert("127.0.0.1")
    return Tls(
        cert_pem=b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
        key_pem=certificate.private_key_pem.bytes(),
        client_ca_pem=client_authority.cert_pem.bytes() if client_authority else None,
    )


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    """The file for ``otlp.ca_file``."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def export(collector: Collector, protocol: str, **keys: Any) -> Outcome:
    async def run() -> Outcome:
        url = getattr(collector, PROTOCOLS[protocol])
        assert url.startswith("https://")
        exporter = exporter_to(url, protocol=protocol, **keys)
        try:
            return await exporter.export(logs_payload(2), 2)
        finally:
            await exporter.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ca_file_is_trusted(server: Tls, ca_file: Path, protocol: str) -> None:
    """Most collectors inside a company have a private authority."""
    with Collector(tls=server) as collector:
        assert export(collector, protocol, ca_file=ca_file) == Delivered()
        assert len(collector.log_records()) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_authority_is_an_endpoint_fault(server: Tls, protocol: str) -> None:
    """Retrying does not make a certificate valid, and nothing may be sent."""
    with Collector(tls=server) as collector:
        outcome = export(collector, protocol)
        assert isinstance(outcome, EndpointFault)
        assert "certificate" in outcome.reason.lower()
        assert collector.requests == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_to_a_server_without_it_is_an_endpoint_fault(ca_file: Path, protocol: str) -> None:
    """The endpoint is https:// instead of http://."""
    with Collector() as collector:

        async def run() -> Outcome:
            url = getattr(collector, PROTOCOLS[protocol]).replace("http://", "https://")
            exporter = exporter_to(url, protocol=protocol, ca_file=ca_file)
            try:
                return await exporter.export(logs_payload(2), 2)
            finally:
                await exporter.aclose()

        assert isinstance(asyncio.run(run()), EndpointFault)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("one_file", [True, False])
def test_mutual_tls(authority: trustme.CA, ca_file: Path, tmp_path: Path, protocol: str, one_file: bool) -> None:
    """The client presents its certificate, from one file or from two."""
    client = authority.issue_cert("agent@example.org")
    both, cert, key = tmp_path / "both.pem", tmp_path / "cert.pem", tmp_path / "key.pem"
    client.private_key_and_cert_chain_pem.write_to_path(both)
    client.cert_chain_pems[0].write_to_path(cert)
    client.private_key_pem.write_to_path(key)
    keys = {"client_cert": both} if one_file else {"client_cert": cert, "client_key": key}
    with Collector(tls=tls(authority, authority)) as collector:
        assert export(collector, protocol, ca_file=ca_file, **keys) == Delivered()
        assert len(collector.log_records()) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_missing_client_certificate_is_no_ack(authority: trustme.CA, ca_file: Path, protocol: str) -> None:
    """A server that requires a certificate accepts nothing without."""
    with Collector(tls=tls(authority, authority)) as collector:
        outcome = export(collector, protocol, ca_file=ca_file)
        assert not isinstance(outcome, Delivered)
        assert collector.requests == []
