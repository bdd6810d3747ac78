"""OTLP requests as lines of OTLP JSON, and back: the files mode, the dead letter and replay.

One line is one Export*ServiceRequest, as the collector's file exporter writes and its ``otlpjsonfile`` receiver reads:
``{"resourceLogs":[...]}``. A line may carry a first key ``tailspan`` of our own (the dead letter's reasons); readers of
OTLP JSON have to ignore keys that they do not know.

How OTLP JSON differs from protobuf's own JSON mapping: trace and span ids are hex, enums are numbers. google's
json_format would need both translated and takes four times as long, hence the small walk over descriptors here.

Source: OpenTelemetry protocol specification 1.9, "JSON Protobuf Encoding"; protobuf's ProtoJSON format for the rest.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tailspan_agent.otlp.signals import SIGNALS, parse_request

__all__ = ["UnreadableLineError", "decode_line", "decode_response", "encode_line"]

_HEX_FIELDS: Final = frozenset({"trace_id", "span_id", "parent_span_id"})
_INT64_TYPES: Final = frozenset(
    {
        FieldDescriptor.TYPE_INT64,
        FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_FIXED64,
        FieldDescriptor.TYPE_SFIXED64,
        FieldDescriptor.TYPE_SINT64,
    }
)
_INT32_TYPES: Final = frozenset(
    {
        FieldDescriptor.TYPE_INT32,
        FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_FIXED32,
        FieldDescriptor.TYPE_SFIXED32,
        FieldDescriptor.TYPE_SINT32,
    }
)
_FLOAT_TYPES: Final = frozenset({FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT})

_Convert = Callable[[Any], Any]


class UnreadableLineError(ValueError):
    """The text is no OTLP JSON; the message says why."""


def encode_line(signal: str, payload: bytes, note: Any = None) -> bytes:
    """Return a request as one line of OTLP JSON, with its newline.

    Args:
        signal: ``logs``, ``traces`` or ``metrics``.
        payload: A serialized Export*ServiceRequest.
        note: For the key ``tailspan``, in front of the rest; None: no such key.

    Raises:
        DecodeError: The payload is no such request.
    """
    document = _to_json(parse_request(signal, payload))
    document.setdefault(SIGNALS[signal].json_key, [])
    if note is not None:
        document = {"tailspan": note, **document}
    return msgspec.json.encode(document) + b"\n"


def decode_line(line: bytes) -> tuple[str, bytes]:
    """Return the signal and the serialized request of one line of OTLP JSON.

    Raises:
        UnreadableLineError: It is no JSON, or no OTLP request.
    """
    document = _load(line)
    found = [signal for signal, kind in SIGNALS.items() if kind.json_key in document]
    if len(found) != 1:
        keys = ", ".join(kind.json_key for kind in SIGNALS.values())
        raise UnreadableLineError(f"no OTLP JSON: it needs one of the keys {keys}")
    kind = SIGNALS[found[0]]
    return found[0], _build(kind.request, document).SerializeToString()


def decode_response(signal: str, body: bytes) -> Any:
    """Return an Export*ServiceResponse that came as JSON.

    Raises:
        UnreadableLineError: It is none.
    """
    return _build(SIGNALS[signal].response, _load(body))


def _load(text: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableLineError(f"no JSON: {error}") from error
    if not isinstance(document, dict):
        raise UnreadableLineError("no OTLP JSON: not an object")
    return document


def _build(message_type: type[Any], document: dict[str, Any]) -> Any:
    try:
        return message_type(**_from_json(message_type.DESCRIPTOR, document))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableLineError(f"no OTLP JSON: {error}") from error


def _to_json(message: Message) -> dict[str, Any]:
    document = {}
    for field, value in message.ListFields():
        name, convert, repeated = _writer(field)
        if convert is None:
            document[name] = list(value) if repeated else value
        else:
            document[name] = [convert(item) for item in value] if repeated else convert(value)
    return document


@cache
def _writer(field: FieldDescriptor) -> tuple[str, _Convert | None, bool]:
    convert: _Convert | None = None
    if field.message_type is not None:
        convert = _to_json
    elif field.type in _INT64_TYPES:
        convert = str
    elif field.type == FieldDescriptor.TYPE_BYTES:
        convert = bytes.hex if field.name in _HEX_FIELDS else _to_base64
    elif field.type in _FLOAT_TYPES:
        convert = _from_float
    return field.json_name, convert, field.is_repeated


def _from_json(descriptor: Descriptor, document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise TypeError(f"{descriptor.name} is no object")
    fields = _readers(descriptor)
    values: dict[str, Any] = {}
    for key, value in document.items():
        # Unknown keys are to be ignored, and null means the default.
        if value is None or key not in fields:
            continue
        name, convert, repeated = fields[key]
        if not repeated:
            values[name] = convert(value)
        elif isinstance(value, list):
            values[name] = [convert(item) for item in value]
        else:
            raise TypeError(f"{key} is no array")
    return values


@cache
def _readers(descriptor: Descriptor) -> dict[str, tuple[str, _Convert, bool]]:
    return {field.json_name: (field.name, _reader(field), field.is_repeated) for field in descriptor.fields}


def _reader(field: FieldDescriptor) -> _Convert:
    if (message_type := field.message_type) is not None:
        return lambda value: _from_json(message_type, value)
    if field.type in _INT64_TYPES or field.type in _INT32_TYPES:
        return _to_int
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes.fromhex if field.name in _HEX_FIELDS else _from_base64
    if field.type in _FLOAT_TYPES:
        # Reads "NaN", "Infinity" and "-Infinity" too.
        return float
    if field.type == FieldDescriptor.TYPE_ENUM:
        numbers = {name: value.number for name, value in field.enum_type.values_by_name.items()}
        return lambda value: numbers[value] if value in numbers else _to_int(value)
    return _same


def _same(value: Any) -> Any:
    return value


def _to_int(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no integer")
    return int(value)


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _from_base64(value: str) -> bytes:
    return base64.b64decode(value, validate=True)


def _from_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
