"""The `Exporter` protocol, and what its implementations share.

    Exporter (protocol)
      HttpExporter    OTLP/HTTP with protobuf                    tailspan_agent.exporter.http
      GrpcExporter    OTLP/gRPC                                  tailspan_agent.exporter.grpc
      FileExporter    OTLP JSON lines, if there is no endpoint   tailspan_agent.exporter.file

An exporter makes one attempt and returns its outcome; it raises nothing for a failure of the endpoint or the disk.
`tailspan_agent.exporter.retry.RetryingExporter` retries.
"""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlsplit

from tailspan.config import SignalSettings
from tailspan_agent.exporter.outcome import Delivered, EndpointFault, Outcome, Rejected, Retry, TooLarge

__all__ = ["Exporter", "header_values", "public_url", "scrub"]

# Shorter header values (`1`, `true`) occur in any message.
_MIN_SECRET_CHARS = 6


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
    return {name: value.get_secret_value().strip() for name, value in settings.headers.items()}


def public_url(url: str) -> str:
    """Return the URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def scrub(outcome: Outcome, secrets: list[str]) -> Outcome:
    """Return the outcome without the header values that an endpoint quoted in its message.

    Args:
        outcome: The outcome of an export.
        secrets: The header values; those shorter than 6 characters are left.
    """
    text = (outcome.warning if isinstance(outcome, Delivered) else outcome.reason) or ""
    found = [secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS and secret in text]
    if not found:
        return outcome
    for secret in found:
        text = text.replace(secret, "***")
    match outcome:
        case Delivered():
            return Delivered(text)
        case Retry():
            return Retry(text, outcome.after_s, outcome.server_error)
        case Rejected():
            return Rejected(outcome.rejected, text, outcome.kind)
        case EndpointFault():
            return EndpointFault(text, outcome.unsupported)
        case TooLarge():
            return TooLarge(text)
