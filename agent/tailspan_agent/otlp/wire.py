"""Protobuf fields as bytes, as far as OTLP needs them. Pure; `tailspan_agent.otlp.requests` explains the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from tailspan._native import compiled

__all__ = [
    "UINT64_MAX",
    "AttributeValue",
    "attributes_fields",
    "attributes_fields_in_python",
    "bytes_field",
    "fixed32_field",
    "fixed64_field",
    "in_uint64",
    "key_value",
    "string_field",
    "varint",
    "varint_at",
    "varint_field",
]

AttributeValue: TypeAlias = str | bool | int | float | Sequence[str]
"""The value of an attribute; a sequence has strings only."""

UINT64_MAX = (1 << 64) - 1
_INT64_MAX = (1 << 63) - 1
_VARINT_BYTES = 10


@lru_cache(maxsize=4096)  # few different tags and lengths occur
def varint(number: int) -> bytes:
    """Return a number from 0 to 2**64 - 1 as a varint."""
    if number < 0x80:
        return bytes((number,))
    octets = bytearray()
    while number >= 0x80:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    octets.append(number)
    return bytes(octets)


def varint_at(message: bytes, position: int) -> tuple[int, int]:
    """Return the varint at a position, and the position after it.

    Raises:
        ValueError: It is cut off, or longer than a varint can be.
    """
    value = 0
    for place, octet in enumerate(message[position : position + _VARINT_BYTES]):
        value |= (octet & 0x7F) << 7 * place
        if octet < 0x80:
            return value, position + place + 1
    raise ValueError("the varint is not whole")


def varint_field(number: int, value: int) -> bytes:
    """Return an integer field; a negative value is encoded as two's complement in 64 bits."""
    return varint(number << 3) + varint(value & UINT64_MAX)


def fixed64_field(number: int, value: int) -> bytes:
    """Return a fixed64 field; a value outside its range is replaced by the nearest one."""
    return varint(number << 3 | 1) + struct.pack("<Q", in_uint64(value))


def in_uint64(value: int) -> int:
    """Return the nearest number that 64 bits without a sign hold."""
    return value if 0 <= value <= UINT64_MAX else 0 if value < 0 else UINT64_MAX


def fixed32_field(number: int, value: int) -> bytes:
    """Return a fixed32 field."""
    return varint(number << 3 | 5) + struct.pack("<I", value)


def bytes_field(number: int, value: bytes) -> bytes:
    """Return a field of bytes or of an encoded message, also an empty one."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def string_field(number: int, value: str) -> bytes:
    """Return a string field, with a question mark for each lone surrogate."""
    return bytes_field(number, value.encode("utf-8", "replace"))


def _any_value(value: AttributeValue) -> bytes:
    match value:
        case str():
            return string_field(1, value)
        case bool():
            return varint_field(2, value)
        case int():
            return varint_field(3, value) if -_INT64_MAX - 1 <= value <= _INT64_MAX else string_field(1, str(value))
        case float():
            return varint(4 << 3 | 1) + struct.pack("<d", value)
        case _:
            return bytes_field(5, b"".join(bytes_field(1, string_field(1, item)) for item in value))


def key_value(key: str, value: AttributeValue) -> bytes:
    """Return a KeyValue message."""
    return string_field(1, key) + bytes_field(2, _any_value(value))


def attributes_fields(number: int, attributes: Mapping[str, AttributeValue]) -> bytes:
    """Return one field for each attribute, in the order of the mapping."""
    encoded = _usual_attributes(number, attributes)
    return attributes_fields_in_python(number, attributes) if encoded is None else encoded


def attributes_fields_in_python(number: int, attributes: Mapping[str, AttributeValue]) -> bytes:
    """Return the same without the function in C, which leaves sequences and very large numbers to this one."""
    return b"".join([bytes_field(number, key_value(key, value)) for key, value in attributes.items()])


def _nothing_usual(_number: int, _attributes: Mapping[str, AttributeValue], /) -> bytes | None:
    return None


_usual_attributes = compiled("usual_attributes", _nothing_usual)
