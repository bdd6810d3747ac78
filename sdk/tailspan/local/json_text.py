"""JSON text without the `json` package, which costs 5 ms of every job's start.

The supervisor imports this: standard library only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["json_text"]


def _escape() -> Callable[[str], str]:
    try:
        from _json import encode_basestring_ascii
    except ImportError:
        from json.encoder import py_encode_basestring_ascii as encode_basestring_ascii
    return encode_basestring_ascii


_quoted = _escape()


def json_text(value: object) -> str:
    """Return a value as ``json.dumps`` writes it.

    Args:
        value: None, a bool, an int, a float that is finite, text, or a list or dict of these.

    Raises:
        TypeError: The value has another type.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{_quoted(str(key))}: {json_text(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join([json_text(item) for item in value]) + "]"
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
