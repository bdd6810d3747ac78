"""Jobs of all kinds for the stores, and what each store must show of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.fakes.agents import Bench

START = timedelta(minutes=5)
TRACEBACK = ("Traceback (most recent call last):", '  File "etl.py", line 3, in load', "ValueError: no such tile")
LINES: dict[str, list[str]] = {
    "plain": [f"line {number}" for number in range(250)],
    "levels": ["INFO: up", "WARNING: slow", "plain", "ERROR: no", "DEBUG: x", "CRITICAL: gone"],
    "equal": ["same"] * 40,
    "texts": ["ünïcödé 😀", '{"level": "error", "message": "json"}', "  spaces  ", "a\ttab", "x" * 3000],
    "silent": [],
    "failed": ["INFO: up", *TRACEBACK],
    "canceled": ["INFO: up"],
}
STATES = {"failed": "FAILED", "canceled": "CANCELED"}


def add_jobs(bench: Bench, lines: dict[str, list[str]] | None = None) -> None:
    """Add ended jobs of these lines, each named like its key; None: of all kinds."""
    for name, texts in (LINES if lines is None else lines).items():
        start = datetime.now(UTC) - START
        bench.fake.add_job(name, job_name=name, submitted_at=start, started_at=start)
        if texts:
            bench.fake.add_lines(name, *texts, timestamp_ms=int(start.timestamp() * 1000), step_ms=1)
        end = start + timedelta(seconds=1 + len(texts) / 1000)
        bench.fake.set_state(name, STATES.get(name, "SUCCEEDED"), finished_at=end, job_status_date=end)
