"""The `Exporter` protocol, and what its implementations share.

    Exporter (protocol)
      HttpExporter    OTLP/HTTP with protobuf                    tailspan_agent.exporter.http
      GrpcExporter    OTLP/gRPC                                  tailspan_agent.exporter.grpc
      FileExporter    OTLP JSON lines, if there is no endpoint   tailspan_agent.exporter.file

An exporter makes one attempt and returns its outcome; it raises nothing for a failure of the endpoint or the disk.
`tailspan_agent.exporter.retry.RetryingExporter` retries.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Protocol
from urllib.parse import urlsplit

from tailspan._secrets import MASK, add_secret, mask
from tailspan.config import SignalSettings
from tailspan_agent.exporter.outcome import Delivered, Outcome

__all__ = ["Exporter", "header_values", "public_url", "scrub"]

# Shorter header values (`1`, `true`) occur in any message.
_MIN_SECRET_CHARS = 6
# The values of these headers are masked in all messages, and those of others (a tenant's name) only where quoted as is.
_CREDENTIAL = re.compile(r"auth|key|token|secret|passw|credential|cookie|session|sign", re.IGNORECASE)


class Exporter(Protocol):
    """Sends serialized requests of one signal to one destination.

    Attributes:
        endpoint: The destination, to be shown; without credentials.
    """

    endpoint: str

    async def export(self, payload: bytes, count: int) -> Outcome:
        """Send one serialized Export*ServiceRequest once.

        Args:
            payload: The request; sent unchanged, so that a retry sends the same bytes.
            count: Number of records in the request.
        """
        ...

    async def aclose(self) -> None:
        """Close connections and files."""
        ...


def header_values(settings: SignalSettings) -> dict[str, str]:
    """Return the configured headers without the spaces around a value (RFC 9110, 5.5)."""
    values = {name: value.get_secret_value().strip() for name, value in settings.headers.items()}
    for name, value in values.items():
        if _CREDENTIAL.search(name):
            add_secret(value)
    return values


def public_url(url: str) -> str:
    """Return the URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def scrub(outcome: Outcome, secrets: list[str]) -> Outcome:
    """Return the outcome without the header values that an endpoint quoted in its message, in whatever form.

    Args:
        outcome: The outcome of an export.
        secrets: The header values; those shorter than 6 characters are left.
    """
    before = (outcome.warning if isinstance(outcome, Delivered) else outcome.reason) or ""
    text = mask(before)
    for secret in secrets:
        if len(secret) >= _MIN_SECRET_CHARS:
            text = text.replace(secret, MASK)
    if text == before:
        return outcome
    if isinstance(outcome, Delivered):
        return replace(outcome, warning=text)
    return replace(outcome, reason=text)
