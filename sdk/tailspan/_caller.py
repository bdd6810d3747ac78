"""What a caller sees of a call that fails: arguments of a wrong type by name, and no frames of Tailspan.

CPython adds a frame to a traceback where an exception is raised or comes out of a call, and not where a bare ``raise``
raises it again. So an outermost function that empties the traceback before its bare ``raise`` is not in it either, and
the traceback ends at the line of the caller.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar, cast

from tailspan.errors import ConfigError, TailspanError

__all__ = ["for_callers", "for_callers_of"]

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200
"""Flags of code objects, as `inspect` has them."""

_SHOWN_CHARS = 60

# Ctrl-C too: it is how a notebook ends a wait.
_HIDDEN = (TailspanError, TypeError, KeyboardInterrupt)


def for_callers(function: F) -> F:
    """Make a function check the types of its arguments, and raise errors whose traceback ends at the caller's line.

    The traceback is logged at level DEBUG before. Errors that are bugs keep theirs.

    Args:
        function: A function, method, generator function or coroutine function.
    """
    code = function.__code__
    checks = _checks_of(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], code.co_argcount)
    if code.co_flags & _ASYNC_GENERATOR:
        make = _async_generator
    elif code.co_flags & _COROUTINE:
        make = _coroutine
    elif code.co_flags & _GENERATOR:
        make = _generator
    else:
        make = _plain
    return cast("F", wraps(function)(make(function, checks)))


def for_callers_of(kind: C) -> C:
    """Do for the public methods of a class, inherited ones included, what `for_callers` does for a function."""
    made: dict[object, object] = {}
    for name in dir(kind):
        method = getattr(kind, name)
        if not name.startswith("_") and isinstance(method, FunctionType):
            if method not in made:
                made[method] = for_callers(method)
            setattr(kind, name, made[method])
    return kind


class _Checks:
    """The checks of one function's arguments, by position and by name."""

    def __init__(self, positions: list[tuple[int, str]], names: frozenset[str]) -> None:
        self._positions = positions
        self._names = names

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise a `ConfigError` for the first argument of a wrong type."""
        for position, name in self._positions:
            if position >= len(args):
                break
            _check(name, args[position])
        for name, value in kwargs.items():
            if name in self._names:
                _check(name, value)


def _checks_of(names: tuple[str, ...], positional: int) -> _Checks:
    known = [(position, name) for position, name in enumerate(names) if name in _EXPECTED]
    return _Checks([one for one in known if one[0] < positional], frozenset(name for _, name in known))


def _plain(function: Callable[..., Any], check: _Checks) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        handled = sys.exception()
        try:
            check(args, kwargs)
            return function(*args, **kwargs)
        except _HIDDEN as error:
            _hide_frames(error, handled)
            raise

    return call


def _coroutine(function: Callable[..., Any], check: _Checks) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        handled = sys.exception()
        try:
            check(args, kwargs)
            return await function(*args, **kwargs)
        except _HIDDEN as error:
            _hide_frames(error, handled)
            raise

    return call


def _generator(function: Callable[..., Any], check: _Checks) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        handled = sys.exception()
        try:
            check(args, kwargs)
            return (yield from function(*args, **kwargs))
        except _HIDDEN as error:
            _hide_frames(error, handled)
            raise

    return call


def _async_generator(function: Callable[..., Any], check: _Checks) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        handled = sys.exception()
        try:
            check(args, kwargs)
            async with aclosing(function(*args, **kwargs)) as items:
                async for item in items:
                    yield item
        except _HIDDEN as error:
            _hide_frames(error, handled)
            raise

    return call


def _hide_frames(error: BaseException, handled: BaseException | None) -> None:
    """Empty the traceback of an error that a function for callers raises again, and hide what caused it.

    Its message names the cause; the exception itself stays reachable as ``__context__``.

    Args:
        error: The error.
        handled: The exception that the caller was handling, if any.
    """
    if isinstance(error, TypeError) and not isinstance(error, TailspanError):
        # Raised by the call itself: wrong names or a wrong number of arguments. Others are bugs.
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            error.__traceback__ = None
        return
    if not hasattr(error, "_traceback_hidden"):
        error._traceback_hidden = True  # type: ignore[attr-defined]
        import logging

        logging.getLogger("tailspan").debug("an error reaches the caller", exc_info=error)
    error.__traceback__ = None
    if error.__cause__ is not None:
        error.__context__, error.__cause__ = error.__cause__, None
    error.__suppress_context__ = True
    if handled is not None and handled is not error:
        error.__context__, error.__suppress_context__ = handled, False


def _check(name: str, value: object) -> None:
    accepts, expected = _EXPECTED[name]
    if accepts(value):
        return
    given = f"{name} is {_shown(value)}"
    if accepts is _is_command and isinstance(value, Sequence) and not isinstance(value, bytes):
        place, part = next((place, part) for place, part in enumerate(value) if not isinstance(part, str))
        given, expected = f"{name}[{place}] is {_shown(part)}", "a string"
    elif accepts is _is_texts and isinstance(value, Mapping):
        key, text = next(item for item in value.items() if not all(isinstance(part, str) for part in item))
        # Without the value: it may be a secret of `env`.
        given = f"{name}[{key!r}] is of type {type(text).__name__}"
        expected = "a string" if isinstance(key, str) else "strings as keys"
    raise ConfigError(f"{given}: expected {expected}", key=name)


def _shown(value: object) -> str:
    """Return a value that was given, shortened, and its type."""
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
    return f"{text} ({type(value).__name__})"


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_seconds(value: object) -> bool:
    # Numbers of NumPy and decimals are numbers, too.
    return isinstance(value, timedelta) or hasattr(type(value), "__float__")


def _is_seconds_or_none(value: object) -> bool:
    return value is None or _is_seconds(value)


def _is_count(value: object) -> bool:
    return hasattr(type(value), "__index__")


def _is_count_or_none(value: object) -> bool:
    return value is None or _is_count(value)


def _is_moment(value: object) -> bool:
    return value is None or isinstance(value, datetime) or _is_seconds(value)


def _is_command(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and all(isinstance(part, str) for part in value)


def _is_service(value: object) -> bool:
    # One of a wrong kind is reported where it is used.
    return _is_text(value) or hasattr(value, "get_job")


def _is_texts(value: object) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(isinstance(key, str) and isinstance(text, str) for key, text in value.items())


def _is_path(value: object) -> bool:
    return value is None or isinstance(value, str | os.PathLike)


def _is_file(value: object) -> bool:
    return value is None or hasattr(value, "write")


# By name: a parameter means the same in every verb. What names a job is checked where it is used.
_EXPECTED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "since_ms": (_is_moment, "milliseconds since the epoch, a datetime or a timedelta"),
    "refresh_seconds": (_is_seconds, "seconds or a timedelta"),
    "poll_interval_seconds": (_is_seconds, "seconds or a timedelta"),
    "settle_seconds": (_is_seconds, "seconds or a timedelta"),
    "timeout": (_is_seconds_or_none, "seconds, a timedelta or None"),
    "get_logs_retries": (_is_count, "a whole number"),
    "limit": (_is_count_or_none, "a whole number or None"),
    "task": (_is_text, "a task's name or id, or None"),
    "name": (_is_text, "a string or None"),
    "state": (_is_text, "a JobState, its name or None"),
    "command": (_is_command, "a string, which a shell runs, or a list of strings"),
    "attributes": (_is_texts, "a dict of strings or None"),
    "env": (_is_texts, "a dict of strings or None"),
    "cwd": (_is_path, "a path or None"),
    "file": (_is_file, "a text file or None"),
    "service": (_is_service, "a service's name, a JobService or None"),
}
