"""A double of Tempo with its default limits: attributes are cut at 2,048 bytes, a trace has at most 5 MB.

tempo = Tempo()
collector.always("traces", tempo)
"""

from __future__ import annotations

from collections import Counter

from tests.fakes.collector import Reply, Request
from tests.fakes.otlp_rows import SpanRow, span_rows

ATTRIBUTE_BYTES = 2_048
TRACE_BYTES = 5_000_000


class Tempo:
    """Answers ``POST /v1/traces``; see the module's docstring.

    Attributes:
        trace_bytes: Stored bytes by trace id.
    """

    def __init__(self) -> None:
        self.trace_bytes: Counter[str] = Counter()
        self._spans: list[SpanRow] = []

    def __call__(self, request: Request) -> Reply:
        """Store the spans of a request, with long attributes cut."""
        spans = list(span_rows(request.message))
        size = len(request.payload) // max(1, len(spans))
        rejected = 0
        for span in spans:
            if self.trace_bytes[span.trace_id] + size > TRACE_BYTES:
                rejected += 1
                continue
            self.trace_bytes[span.trace_id] += size
            for attributes in (span.attributes, *(event.attributes for event in span.events)):
                attributes.update({key: _cut(value) for key, value in attributes.items()})
            self._spans.append(span)
        return Reply(rejected=rejected, message="TRACE_TOO_LARGE" if rejected else "")

    def spans(self, trace_id: str = "") -> list[SpanRow]:
        """Return the stored spans, of one trace or of all."""
        return [span for span in self._spans if trace_id in ("", span.trace_id)]


def _cut(value: object) -> object:
    return value.encode()[:ATTRIBUTE_BYTES].decode(errors="ignore") if isinstance(value, str) else value
