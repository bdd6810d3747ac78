"""`Outbox`: the spans that the store has and that are not acknowledged, in memory.

A span is sent moments after it was written: reading it from the file again costs more than writing it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tailspan_agent.checkpoint.rows import OutboxSpan

__all__ = ["Outbox"]

_MAX_BYTES = 4 << 20


class Outbox:
    """The unsent spans of a store, as long as memory has all of them; else they are read from the file.

    Attributes:
        is_whole: Whether all unsent spans of the store are here.
    """

    __slots__ = ("_bytes", "_spans", "is_whole")

    def __init__(self) -> None:
        self.is_whole = False
        self._spans: dict[tuple[int, str], OutboxSpan] = {}
        self._bytes = 0

    def start(self) -> None:
        """Note that the store has no unsent span now."""
        self.is_whole = True

    def lose(self) -> None:
        """Forget all: what the store has is not known any more, or too large for memory."""
        self.is_whole = False
        self._spans.clear()
        self._bytes = 0

    def add(self, spans: Iterable[OutboxSpan]) -> None:
        """Add spans that were written."""
        if self.is_whole:
            for span in spans:
                self._spans[span.job, span.span_id] = span
                self._bytes += span.size
            if self._bytes > _MAX_BYTES:
                self.lose()

    def remove(self, spans: Iterable[OutboxSpan]) -> None:
        """Remove spans that are acknowledged."""
        for span in spans:
            if self._spans.pop((span.job, span.span_id), None) is not None:
                self._bytes -= span.size

    def in_order(self) -> Sequence[OutboxSpan]:
        """Return all spans, those of the oldest jobs first."""
        return [span for _, span in sorted(self._spans.items(), key=_key)]


def _key(item: tuple[tuple[int, str], OutboxSpan]) -> tuple[int, str]:
    return item[0]
