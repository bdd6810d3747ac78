"""`Outbox`: unsent spans in memory, exactly as long as these are all that the store has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailspan_agent.analysis.run_totals import RunTotals
from tailspan_agent.checkpoint import outbox
from tailspan_agent.checkpoint.rows import OutboxSpan
from tailspan_agent.checkpoint.store import SqliteStore
from tailspan_agent.errors import ValueRefusedError


def span(key: int, span_id: str, text: bytes = b"span") -> OutboxSpan:
    return OutboxSpan(key, span_id, b"resource", text)


def key_of(store: SqliteStore, job_id: str = "j1") -> int:
    return store.add_job("id", job_id, "etl", stream=0, ledger="{}").key


@pytest.mark.parametrize("most_bytes", [0, 1 << 20])
def test_memory_and_file_have_the_same_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    """Those of the oldest job first, whatever the order of the writes; what is acknowledged is not sent again."""
    monkeypatch.setattr(outbox, "_MAX_BYTES", most_bytes)
    store = SqliteStore(tmp_path)
    older, newer = key_of(store, "j1"), key_of(store, "j2")
    assert store.unsent_spans(10) == []
    assert store.add_spans(newer, [span(newer, "a")]) == {"a"}
    assert store.end_job(older, [span(older, "b"), span(older, "c")], RunTotals("etl", "success"))
    assert store.unsent_spans(10) == [span(older, "b"), span(older, "c"), span(newer, "a")]
    assert store.unsent_spans(2) == [span(older, "b"), span(older, "c")]
    store.ack_spans([span(older, "b")])
    assert store.unsent_spans(10) == [span(older, "c"), span(newer, "a")]
    store.close()
    reopened = SqliteStore(tmp_path)
    assert reopened.unsent_spans(10) == [span(older, "c"), span(newer, "a")]
    reopened.close()


def test_a_span_that_was_sent_is_not_sent_again(tmp_path: Path) -> None:
    """The end of a job may bring a span again that an earlier process wrote and sent; the first one stays."""
    store = SqliteStore(tmp_path)
    key = key_of(store)
    store.add_spans(key, [span(key, "a")])
    store.ack_spans([span(key, "a")])
    assert store.unsent_spans(10) == []
    assert store.add_spans(key, [span(key, "a", b"other")]) == set()
    assert store.end_job(key, [span(key, "a", b"other"), span(key, "b")], RunTotals("etl", "success"))
    assert store.unsent_spans(10) == [span(key, "b")]
    store.close()


def test_spans_of_a_unit_that_is_undone_are_not_sent(tmp_path: Path) -> None:
    """What the store refuses is rolled back with the spans before it."""
    store = SqliteStore(tmp_path)
    key = key_of(store)
    assert store.unsent_spans(10) == []

    def write() -> None:
        with store.together():
            store.add_spans(key, [span(key, "a")])
            store.add_job("id", "\ud800", "etl", stream=0, ledger="{}")

    with pytest.raises(ValueRefusedError):
        write()
    assert store.unsent_spans(10) == []
    store.close()
