"""OTLP requests as lines of OTLP JSON, and back: for files mode, the dead letter and replay.

Each line is one Export*ServiceRequest, as the collector's file exporter writes and its ``otlpjsonfile`` receiver reads:
``{"resourceLogs":[...]}``. A line may start with a key ``tailspan`` of our own (why a batch was rejected); readers of
OTLP JSON must ignore unknown keys.

The mapping is protobuf's own, with two differences: trace and span ids are hex, and enums are numbers.

Source: OpenTelemetry protocol specification 1.9, "JSON Protobuf Encoding".
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from tailspan.config.signals import Signal
from tailspan_agent.otlp.messages import MESSAGES, parse_request

__all__ = ["UnreadableLineError", "decode_line", "decode_response", "encode_line", "encode_undecodable"]

_ID_KEYS: Final = ("traceId", "spanId", "parentSpanId")


class UnreadableLineError(ValueError):
    """The text is not valid OTLP JSON; the message has the reason."""


def encode_line(signal: Signal, payload: bytes, note: Any = None) -> bytes:
    """Return a request as one line of OTLP JSON, including its newline.

    Args:
        signal: The signal.
        payload: A serialized Export*ServiceRequest.
        note: The value of the first key, ``tailspan``; None for no such key.

    Raises:
        DecodeError: The payload is not a valid request.
    """
    document = MessageToDict(parse_request(signal, payload), use_integers_for_enums=True)
    _convert_ids(document, _hex_from_base64)
    document.setdefault(MESSAGES[signal].json_key, [])
    if note is not None:
        document = {"tailspan": note, **document}
    return msgspec.json.encode(document) + b"\n"


def encode_undecodable(signal: Signal, payload: bytes, note: Any) -> bytes:
    """Return a line without records that has the payload as base64, for a request that is not valid.

    Args:
        signal: The signal.
        payload: The request.
        note: The value of the first key, ``tailspan``.
    """
    document = {"tailspan": note, "undecodable": base64.b64encode(payload).decode(), MESSAGES[signal].json_key: []}
    return msgspec.json.encode(document) + b"\n"


def decode_line(line: bytes) -> tuple[Signal, bytes]:
    """Return the signal and the serialized request of one line of OTLP JSON.

    Raises:
        UnreadableLineError: The line is not JSON, or not an OTLP request.
    """
    document = _load(line)
    found = [signal for signal, messages in MESSAGES.items() if messages.json_key in document]
    if len(found) != 1:
        keys = ", ".join(messages.json_key for messages in MESSAGES.values())
        raise UnreadableLineError(f"not OTLP JSON: it needs exactly one of the keys {keys}")
    return found[0], _parse(MESSAGES[found[0]].request, document).SerializeToString()


def decode_response(signal: Signal, body: bytes) -> Any:
    """Return the Export*ServiceResponse of a JSON response.

    Raises:
        UnreadableLineError: The body is not JSON, or not such a response.
    """
    return _parse(MESSAGES[signal].response, _load(body))


def _load(text: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableLineError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UnreadableLineError("not OTLP JSON: not an object")
    return document


def _parse(message_type: type[Any], document: dict[str, Any]) -> Any:
    try:
        _convert_ids(document, _base64_from_hex)
        return ParseDict(document, message_type(), ignore_unknown_fields=True)
    except (ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableLineError(f"not OTLP JSON: {error}") from error


def _convert_ids(document: dict[str, Any], convert: Callable[[str], str]) -> None:
    """Convert all trace and span ids in place. Attributes cannot be mistaken for ids: their keys are values here."""
    for message in _objects(document):
        for key in _ID_KEYS:
            if message.get(key):
                message[key] = convert(message[key])


def _objects(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all JSON objects in a document; without recursion, since an endpoint may nest them deeply."""
    open_values: list[Any] = [document]
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            yield value
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value


def _hex_from_base64(text: str) -> str:
    return base64.b64decode(text).hex()


def _base64_from_hex(text: str) -> str:
    return base64.b64encode(bytes.fromhex(text)).decode("ascii")
