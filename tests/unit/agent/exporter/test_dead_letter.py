"""The dead letter stores rejected batches until it is full."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest

from tailspan.testing import FakeClock
from tailspan_agent.errors import AgentError
from tailspan_agent.exporter.dead_letter import DeadLetter, DeadLetterGroup, read_entries, summarize
from tailspan_agent.otlp.json_lines import decode_line
from tests.fakes.otlp_samples import logs_payload, payload_of

NOON = 1_785_067_200.0  # 2026-07-26T12:00:00Z


def add(
    letter: DeadLetter,
    payload: bytes,
    *,
    signal: str = "logs",
    kind: str = "invalid",
    reason: str = "HTTP 400: bad",
    rejected: int = 3,
    count: int = 3,
) -> None:
    asyncio.run(letter.add(signal, payload, kind=kind, reason=reason, rejected=rejected, count=count))
    letter.close()


def test_a_batch_is_kept_with_its_reason(tmp_path: Path) -> None:
    """One line, readable for OTLP readers and for people."""
    letter = DeadLetter(tmp_path / "dead", max_bytes=1 << 20, clock=FakeClock(NOON))
    add(letter, logs_payload(3), kind="partial", reason="too old", rejected=2)
    path = tmp_path / "dead" / "logs.jsonl"
    (line,) = path.read_bytes().splitlines()
    assert decode_line(line) == ("logs", logs_payload(3))
    assert json.loads(line)["tailspan"] == {
        "time": "2026-07-26T12:00:00+00:00",
        "kind": "partial",
        "reason": "too old",
        "rejected": 2,
        "count": 3,
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nothing_is_deleted_by_rotation(tmp_path: Path) -> None:
    """Only an operator deletes a rejected batch."""
    letter = DeadLetter(tmp_path, max_bytes=1 << 20, max_size=1000)
    for number in range(30):
        add(letter, logs_payload(2, job=f"job-{number}"))
    assert len(list(tmp_path.iterdir())) > 5
    payloads = [
        decode_line(entry.path.read_bytes().splitlines()[entry.line - 1])[1] for entry in read_entries(tmp_path)
    ]
    assert payloads == [logs_payload(2, job=f"job-{number}") for number in range(30)]


def test_full_dead_letter_fails_and_keeps_its_batches(tmp_path: Path) -> None:
    """The limit is for all signals together; a batch that does not fit must not be acknowledged."""
    letter = DeadLetter(tmp_path, max_bytes=2000)
    add(letter, payload_of("traces"), signal="traces")
    before = letter.total_bytes()
    assert 0 < before < 2000
    with pytest.raises(AgentError, match="dead_letter_max"):
        add(letter, logs_payload(20))
    assert letter.total_bytes() == before
    add(letter, logs_payload(1))
    assert before < letter.total_bytes() <= 2000


def test_room_again_is_noticed(tmp_path: Path) -> None:
    """An operator removes files while the agent runs."""
    letter = DeadLetter(tmp_path, max_bytes=1000)
    add(letter, logs_payload(3))
    with pytest.raises(AgentError):
        add(letter, logs_payload(3))
    (tmp_path / "logs.jsonl").unlink()
    add(letter, logs_payload(3))
    assert len(list(read_entries(tmp_path))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_fails(tmp_path: Path) -> None:
    """It fails like the size limit."""
    (tmp_path / "logs.jsonl").symlink_to("/dev/full")
    with pytest.raises(AgentError, match="cannot be written"):
        add(DeadLetter(tmp_path, max_bytes=1 << 20), logs_payload(3))


def test_parallel_batches_do_not_share_the_last_room(tmp_path: Path) -> None:
    """Several requests may be rejected at once."""
    letter = DeadLetter(tmp_path, max_bytes=2000)

    async def run() -> list[BaseException | None]:
        adds = (
            letter.add("logs", logs_payload(2), kind="invalid", reason="bad", rejected=2, count=2) for _ in range(20)
        )
        return await asyncio.gather(*adds, return_exceptions=True)

    results = asyncio.run(run())
    letter.close()
    assert letter.total_bytes() <= 2000
    assert sum(result is None for result in results) == len(list(read_entries(tmp_path))) > 0
    assert {type(result) for result in results} == {type(None), AgentError}


def test_summary_groups_by_signal_and_reason(tmp_path: Path) -> None:
    """The output of `tailspan agent dead-letter`."""
    clock = FakeClock(NOON)
    letter = DeadLetter(tmp_path, max_bytes=1 << 20, clock=clock)
    add(letter, logs_payload(3))
    asyncio.run(clock.sleep(60))
    add(letter, logs_payload(3), rejected=2)
    add(letter, payload_of("traces"), signal="traces", reason="HTTP 422", rejected=1, count=1)
    logs, traces = summarize(tmp_path)
    size = (tmp_path / "logs.jsonl").stat().st_size
    first, last = "2026-07-26T12:00:00+00:00", "2026-07-26T12:01:00+00:00"
    assert logs == DeadLetterGroup("logs", "invalid", "HTTP 400: bad", 2, 5, 6, size, first, last)
    assert (traces.signal, traces.reason, traces.batches) == ("traces", "HTTP 422", 1)


def test_summary_of_nothing(tmp_path: Path) -> None:
    """An agent without rejections has no directory."""
    assert summarize(tmp_path / "missing") == []


def test_summary_reports_unreadable_lines(tmp_path: Path) -> None:
    """An edited file that cannot be read is reported."""
    add(DeadLetter(tmp_path, max_bytes=1 << 20), logs_payload(3))
    with (tmp_path / "logs.jsonl").open("ab") as file:
        file.write(b"\xff garbage\n")
    kinds = {group.kind: group.batches for group in summarize(tmp_path)}
    assert kinds == {"invalid": 1, "unreadable": 1}
