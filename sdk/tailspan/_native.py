"""The choice between a function in C (`_native.c`) and the same function in Python. Standard library only.

The C part is absent where Tailspan was installed without a C compiler, or with ``TAILSPAN_PURE=1``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["COMPILED", "compiled"]


def _load() -> Any:
    try:
        return __import__("tailspan._compiled", fromlist=["_compiled"])
    except ImportError:
        return None


_extension = _load()

COMPILED = _extension is not None
"""Whether the C part is installed."""


def compiled(name: str, python: F) -> F:
    """Return the function of this name in C, or the one in Python where the C part is absent.

    Args:
        name: Its name in `_native.c`.
        python: The same function in Python, with the same results.
    """
    return getattr(_extension, name, python)
