"""A container's log is cut into the same lines however its reply arrives, and resumed at any line."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from tailspan.services.kubernetes.log import START, LineCutter, TimedLine, since_time

_NANOS = 1_000_000_000
_BEGIN_NS = 1_795_910_400 * _NANOS

lines = st.lists(
    st.tuples(
        # Many of one time; stdout and stderr may be out of order by a little.
        st.integers(0, 5),
        st.sampled_from([0, 0, 0, 1, 999_999_999, 1_000_000_001]),
        st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")),
    ),
    max_size=30,
)


def reply_of(found: list[tuple[int, bytes]], since_ns: int = 0) -> bytes:
    """Return the text of a log as the API sends it."""
    shown = []
    for time_ns, text in found:
        second, nanos = divmod(time_ns, _NANOS)
        stamp = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        if time_ns >= since_ns // _NANOS * _NANOS:
            shown.append(f"{stamp}.{nanos:09d}Z ".encode() + text + b"\n")
    return b"".join(shown)


def cut(text: bytes, cutter: LineCutter, size: int) -> list[TimedLine]:
    """Return the lines of a reply that arrives in pieces of a size."""
    found = [line for start in range(0, len(text), size) for line in cutter.feed(text[start : start + size])]
    return found + cutter.close()


@given(lines, st.integers(1, 50), st.integers(0, 30))
def test_a_log_is_resumed_at_any_line(steps: list[tuple[int, int, bytes]], size: int, taken: int) -> None:
    """What was taken and what comes after the position are the whole log; in a log in order no line comes twice."""
    time_ns, found = _BEGIN_NS, []
    for small, large, text in steps:
        time_ns += large + (small if large == 0 else 0) // 3
        found.append((time_ns, text))
    whole = cut(reply_of(found), LineCutter(), size)
    assert [(line.time_ns, line.text) for line in whole] == found
    position = whole[min(taken, len(whole)) - 1].position if whole and taken else START
    since = since_time(position)
    since_ns = 0 if since is None else int(datetime.fromisoformat(since).timestamp()) * _NANOS
    rest = cut(reply_of(found, since_ns), LineCutter(position), size)
    assert whole[: min(taken, len(whole))] + rest == whole


@given(lines, st.integers(0, 29))
def test_lines_out_of_order_are_not_lost(steps: list[tuple[int, int, bytes]], taken: int) -> None:
    """Times that go back, by microseconds or by a clock that is set: the rest has at least all further lines."""
    found = [(_BEGIN_NS + small * 1_000 + large, text) for small, large, text in steps]
    whole = cut(reply_of(found), LineCutter(), 1 << 20)
    if taken >= len(whole):
        return
    position = whole[taken].position
    since = since_time(position)
    since_ns = int(datetime.fromisoformat(since or "").timestamp()) * _NANOS
    rest = cut(reply_of(found, since_ns), LineCutter(position), 1 << 20)
    further = [line for line in whole[taken + 1 :] if line.time_ns >= since_ns]
    assert [(line.time_ns, line.text) for line in further] == [(line.time_ns, line.text) for line in rest][
        len(rest) - len(further) :
    ]


def test_sentences_of_the_kubelet_are_no_lines() -> None:
    """They have no time; a zone other than UTC is understood."""
    cutter = LineCutter()
    text = b"unable to retrieve container logs for containerd://1\n2026-11-29T02:00:00.5+01:00 a\n"
    assert cut(text, cutter, 7) == [TimedLine(_BEGIN_NS + 3600 * _NANOS + _NANOS // 2, 0, b"a")]
    assert cutter.notes == ["unable to retrieve container logs for containerd://1"]
