"""Mutual TLS with a Fused job API; verification itself: tests/integration/sdk/services/fused/test_http.py."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tailspan.errors import ConfigError, ServiceUnavailableError
from tailspan.services.fused import FusedService
from tests.fakes.job_api import FakeJobApi


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Signs both certificates."""
    return trustme.CA()


@pytest.fixture
def api(authority: trustme.CA) -> Iterator[FakeJobApi]:
    """A server that talks only to clients with a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with FakeJobApi(tls=context) as fake:
        fake.add_job("j")
        yield fake


@pytest.fixture
def pem(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    """The files: the authority, and a certificate in one file and in two."""
    client = authority.issue_cert("agent@example.org")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "both", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    client.private_key_and_cert_chain_pem.write_to_path(files["both"])
    client.cert_chain_pems[0].write_to_path(files["cert"])
    client.private_key_pem.write_to_path(files["key"])
    return files


def job_id(api: FakeJobApi, **options: Any) -> str:
    async def main() -> str:
        service = FusedService("prod", base_url=api.base_url, token="t", tries=1, **options)
        try:
            return (await service.get_job("j")).job_id
        finally:
            await service.aclose()

    return asyncio.run(main())


def test_the_certificate_is_shown_from_one_file_or_two(api: FakeJobApi, pem: dict[str, Path]) -> None:
    """With the key in the same file or in its own."""
    assert job_id(api, ca_file=pem["ca"], client_cert=pem["both"]) == "j"
    assert job_id(api, ca_file=pem["ca"], client_cert=pem["cert"], client_key=pem["key"]) == "j"


def test_without_a_certificate_nothing_is_sent(api: FakeJobApi, pem: dict[str, Path]) -> None:
    """The token does not reach a server that wants a certificate first."""
    with pytest.raises(ServiceUnavailableError):
        job_id(api, ca_file=pem["ca"])
    assert api.requests == []


def test_a_certificate_does_not_turn_verification_off(api: FakeJobApi, pem: dict[str, Path]) -> None:
    """Who shows a certificate still checks the other side's."""
    with pytest.raises(ServiceUnavailableError, match=r"services\.prod\.ca_file"):
        job_id(api, client_cert=pem["both"])
    assert api.requests == []


def test_files_that_cannot_be_used_name_their_key(api: FakeJobApi, pem: dict[str, Path]) -> None:
    """A key that does not fit, or no certificate at all."""
    for options in ({"client_cert": pem["ca"]}, {"client_cert": pem["ca"].with_name("nowhere")}):
        with pytest.raises(ConfigError, match=r"services\.prod\.client_cert"):
            job_id(api, ca_file=pem["ca"], **options)
