"""Addresses, TLS contexts and secret files: what clients and servers of both packages share. No I/O but those files."""

from __future__ import annotations

import functools
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tailspan.errors import ConfigError

if TYPE_CHECKING:
    import ssl

__all__ = ["default_tls", "host_port", "is_loopback", "read_secret_file", "tls_context"]


def host_port(host: str, port: int | None = None) -> str:
    """Return ``HOST:PORT`` as a URL has it: an IPv6 address in brackets, no colon without a port."""
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether a host is ``localhost`` or a loopback address (without brackets); looks up no name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_tls() -> ssl.SSLContext:
    """Return a context that trusts what httpx trusts: ``SSL_CERT_FILE``, ``SSL_CERT_DIR``, or certifi's authorities.

    Raises:
        ConfigError: The file is missing, or not PEM.
    """
    return _default_tls(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


# Loading the authorities takes 50 ms: once for all clients.
@functools.lru_cache(maxsize=4)
def _default_tls(ca_file: str | None, ca_directory: str | None) -> ssl.SSLContext:
    import ssl

    import certifi

    try:
        return ssl.create_default_context(
            cafile=ca_file or (None if ca_directory else certifi.where()), capath=ca_directory
        )
    except OSError as error:
        # ssl's own error names no file.
        key = "SSL_CERT_FILE"
        raise ConfigError(f"{key}: cannot use {ca_file}: {error.strerror or error}", key=key) from error


def tls_context(
    *, ca_file: Path | None, client_cert: Path | None, client_key: Path | None, table: str
) -> ssl.SSLContext:
    """Return a client's TLS context.

    Args:
        ca_file: PEM certificates to trust instead of the default ones.
        client_cert: PEM certificate to show to the server, for mutual TLS.
        client_key: Its key, where it is not in the same file.
        table: The configuration table that has these three keys, for errors.

    Raises:
        ConfigError: A file cannot be read or is not usable PEM; names its key.
    """
    import ssl

    if ca_file is None and client_cert is None:
        return default_tls()
    for key, path in (("ca_file", ca_file), ("client_cert", client_cert), ("client_key", client_key)):
        if path is not None:
            _check_readable(path, f"{table}.{key}")
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        key = f"{table}.ca_file"
        raise ConfigError(f"{key}: {ca_file} has no PEM certificate: {error.reason or error}", key=key) from error
    if client_cert is not None:
        try:
            # Without a passphrase of its own, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(client_cert, client_key, password="")
        except ssl.SSLError as error:
            key = f"{table}.client_cert"
            raise ConfigError(
                f"{key}: {client_cert} and its key do not match or are not PEM: {error.reason or error}", key=key
            ) from error
    return context


def _check_readable(path: Path, key: str) -> None:
    # OpenSSL's own error names no file.
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}", key=key) from error


def read_secret_file(path: Path, *, key: str) -> str:
    """Return the content of a file that holds one secret, without the space around it.

    Args:
        path: The file.
        key: The configuration key or option that names it, for errors.

    Raises:
        ConfigError: The file cannot be read, is empty, or is not one line of text.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{key}: cannot read {path}: {reason}", key=key) from None
    if not text or not text.isprintable():
        raise ConfigError(f"{key}: {path} must hold the token on one line, and nothing else", key=key)
    return text
