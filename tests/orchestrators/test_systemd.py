"""Units of a real systemd, relayed by a real agent: equal to what the journal itself has at the end."""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tailspan import Client, load_settings
from tests.fakes.collector import Collector
from tests.fakes.otlp_rows import SpanRow
from tests.orchestrators.harness import Relay
from tests.orchestrators.machine import Machine

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

WORK = """#!/bin/bash
echo start "$1"
echo err >&2
for ((i = 0; i < $2; i++)); do echo "line $i"; sleep 0.05; done
printf 'bytes \\xff\\xfe and \\033[31mred\\033[0m\\n\\nafter an empty line\\n'
head -c 120000 /dev/zero | tr '\\0' y
echo
printf 'no newline'
exit "$1"
"""
UNITS = {
    "ts-etl": ("Type=oneshot", "/usr/local/bin/work 0 200", ""),
    "ts-bad": ("Type=oneshot\nRestart=on-failure\nRestartSec=1", "/usr/local/bin/work 3 20", "StartLimitBurst=3"),
    "ts-limit": ("RuntimeMaxSec=3", "/bin/sleep 1000", ""),
    "ts-late": ("Type=oneshot\nTimeoutStartSec=3", "/bin/sleep 1000", ""),
    "ts-long": ("", "/bin/bash -c 'while echo tick; do sleep 0.5; done'", ""),
    "ts-stubborn": ("TimeoutStopSec=2", "/bin/bash -c 'trap \"\" TERM; while sleep 1; do echo on; done'", ""),
    "ts-killed": ("Type=oneshot", "/bin/sh -c 'echo dying; kill -9 $$$$'", ""),
    "ts-absent": ("Type=oneshot", "/nonexistent", ""),
    "ts-stays": ("Type=oneshot\nRemainAfterExit=yes", "/bin/echo done", ""),
    "ts-skipped": ("Type=oneshot\nExecCondition=/bin/false", "/bin/echo never", ""),
    "ts-many": ("Type=oneshot\nLogRateLimitBurst=0", "/bin/bash -c 'for i in {1..20000}; do echo n$$i; done'", ""),
}
RESULTS = {
    "ts-etl.service": "success",
    "ts-bad.service": "failure",
    "ts-limit.service": "timeout",
    "ts-late.service": "timeout",
    "ts-long.service": "cancellation",
    "ts-stubborn.service": "cancellation",
    "ts-killed.service": "failure",
    "ts-absent.service": "failure",
    "ts-stays.service": "success",
    "ts-skipped.service": "success",
    "ts-many.service": "success",
    "ts-named.service": "failure",
    "echo": "success",
}
FAILED = "d9b373ed55a64feb8242e02dbe79a49c"
RUNS = len(RESULTS) + 2  # ts-bad runs three times


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with the units."""
    with Machine(tmp_path) as machine:
        work = machine.root / "usr/local/bin/work"
        work.write_text(WORK)
        work.chmod(0o755)
        for name, (service, command, unit) in UNITS.items():
            text = f"[Unit]\n{unit}\nStartLimitIntervalSec=100\n[Service]\n{service}\nExecStart={command}\n"
            machine.write_unit(f"{name}.service", text)
        machine.write_unit("ts-etl.timer", "[Timer]\nOnActiveSec=1s\nAccuracySec=100ms\n")
        machine.run("systemctl", "daemon-reload")
        yield machine


def entries_of(machine: Machine) -> list[dict[str, Any]]:
    """Return all entries of the machine's journal."""
    printed = machine.run("journalctl", "--quiet", "--no-pager", "--output=json", "--all")
    return [json.loads(line) for line in printed.splitlines()]


def expected_lines(entries: list[dict[str, Any]]) -> Counter[tuple[int, str]]:
    """Return time in us and text of each line of the units, parts of one line joined."""
    found: Counter[tuple[int, str]] = Counter()
    parts: dict[str, bytes] = {}
    times: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        unit = entry.get("_SYSTEMD_UNIT", "")
        if not unit.startswith(("ts-", "run-")) or entry["_TRANSPORT"] not in ("stdout", "journal"):
            continue
        message = entry["MESSAGE"]
        text = bytes(message) if isinstance(message, list) else message.encode()
        whole = parts.pop(entry.get("_STREAM_ID", ""), b"") + text
        if entry.get("_LINE_BREAK") == "line-max":
            parts[entry["_STREAM_ID"]] = whole
            continue
        # Without an invocation if the unit had ended before the journal looked for it.
        instant = unit, entry["__REALTIME_TIMESTAMP"]
        assert times[instant] < 1000
        times[instant] += 1
        found[int(entry["__REALTIME_TIMESTAMP"]), whole.decode("utf-8", "replace")] += 1
    return found


def relayed_lines(collector: Collector) -> Counter[tuple[int, str]]:
    """Return time in us and text of the lines that arrived, each uid once."""
    rows = {row.attributes["log.record.uid"]: row for row in collector.log_records() if not row.event_name}
    return Counter((row.time_unix_nano // 1000, row.body) for row in rows.values())


def run_spans(collector: Collector) -> dict[str, SpanRow]:
    """Return the newest run span of each job."""
    spans = [span for span in collector.spans() if span.name.startswith("RUN ")]
    return {span.attributes["cicd.pipeline.run.id"]: span for span in spans}


def shown(text: str) -> str:
    """Return a line without its colours, as it is relayed."""
    return text.replace("\x1b[31m", "").replace("\x1b[0m", "")


def test_all_lines_states_and_attempts(machine, tmp_path):
    """Agents that are stopped and killed in between: each line once, each end with its result, restarts linked."""
    section = f'command_prefix = ["{machine.enter}"]\nunits = ["ts-*", "run-*"]'
    with Collector() as collector, Relay("systemd", section, collector, tmp_path) as relay:
        machine.run("systemctl", "start", "--no-block", "ts-etl.timer", "ts-bad.service")
        relay.interrupt(signal.SIGTERM)
        others = [f"{name}.service" for name in UNITS if name not in ("ts-etl", "ts-bad")]
        machine.run("systemctl", "start", "--no-block", *others)
        machine.run("systemd-run", "--unit=ts-named", "sh", "-c", "echo named; exit 4")
        machine.run("systemd-run", "echo", "transient")
        relay.interrupt(signal.SIGKILL, after_lines=500)
        agent = relay.start()
        collector.wait_until(lambda: any(row.body == "tick" for row in collector.log_records()), 60)
        machine.run("systemctl", "stop", "ts-long.service", "ts-stubborn.service")
        collector.wait_until(lambda: len(run_spans(collector)) == RUNS, 120)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait() == 0
        relay.finish()
        entries = entries_of(machine)
        expected = Counter({(at, shown(text)): count for (at, text), count in expected_lines(entries).items()})
        with contextlib.suppress(TimeoutError):
            collector.wait_until(lambda: relayed_lines(collector) == expected, 60)
        found = relayed_lines(collector)
        assert (list((expected - found).items())[:10], list((found - expected).items())[:10]) == ([], [])
        spans = run_spans(collector)
    results = {span.name.removeprefix("RUN "): span.attributes["cicd.pipeline.result"] for span in spans.values()}
    assert results == RESULTS
    codes = {span.name.removeprefix("RUN "): span.attributes.get("process.exit.code") for span in spans.values()}
    assert (codes["ts-etl.service"], codes["ts-bad.service"], codes["ts-killed.service"]) == (0, 3, 137)
    tries = [span for span in spans.values() if span.name == "RUN ts-bad.service"]
    tries.sort(key=lambda span: span.start_unix_nano)
    assert [[link for _, link in span.links] for span in tries] == [[], [tries[0].span_id], [tries[1].span_id]]
    failures = {entry["INVOCATION_ID"]: entry for entry in reversed(entries) if entry.get("MESSAGE_ID") == FAILED}
    for job_id, span in spans.items():
        if job_id in failures:
            late_us = span.end_unix_nano / 1000 - int(failures[job_id]["_SOURCE_REALTIME_TIMESTAMP"])
            # The last line may be stored after the end, which then is the end of the span.
            assert -1 < late_us < 1_000_000


def test_a_unit_is_stopped_by_cancel(machine, tmp_path):
    """The verb stops the unit; an invocation that ended before stays as it is."""
    config = tmp_path / "config.toml"
    config.write_text(f'[services.systemd]\ncommand_prefix = ["{machine.enter}"]\nunits = ["ts-*"]\n')
    machine.run("systemctl", "start", "ts-long.service")
    with Client(load_settings(config)) as client:
        job = next(iter(client.list_jobs(service="systemd")))
        assert client.cancel(job).state == "CANCELED"
        assert client.cancel(job).error == "the unit was stopped"


UNUSUAL = {
    r"ts-a\x2db": ("Type=oneshot", "ExecStart=/bin/echo an escaped name", "success", 0),
    "ts-t@": ("Type=oneshot", "ExecStart=/bin/echo instance %i", "success", 0),
    "ts-pre": ("", "ExecStartPre=/bin/sh -c 'echo pre; exit 7'\nExecStart=/bin/echo never", "failure", 7),
    "ts-two": ("Type=oneshot", "ExecStart=/bin/echo one\nExecStart=-/bin/false\nExecStart=/bin/echo two", "success", 0),
    "ts-allowed": ("SuccessExitStatus=3", "ExecStart=/bin/sh -c 'echo allowed; exit 3'", "success", 0),
    "ts-255": ("Type=oneshot", "ExecStart=/bin/sh -c 'echo last; exit 255'", "failure", 255),
    "ts-post": ("", "ExecStart=/bin/echo main\nExecStopPost=/bin/sh -c 'sleep 1; echo after the end'", "success", 0),
    "ts-forks": ("Type=forking", "ExecStart=/bin/sh -c '(sleep 2; echo child) &'", "success", 0),
    "ts-term": ("", "ExecStart=/bin/sh -c 'echo terminates; kill -TERM $$$$; sleep 9'", "success", 0),
    "ts-named": ("Type=oneshot\nSyslogIdentifier=other\nSyslogLevel=err", "ExecStart=/bin/echo an error", "success", 0),
    "ts-mute": ("Type=oneshot\nStandardOutput=null", "ExecStart=/bin/echo nothing", "success", 0),
    "ts-burst": (
        "Type=oneshot\nLogRateLimitIntervalSec=5s\nLogRateLimitBurst=100",
        "ExecStart=/bin/bash -c 'for i in {1..3000}; do echo n$$i; done; sleep 6; echo end of the burst'",
        "success",
        0,
    ),
    "ts-rotated": (
        "Type=oneshot\nLogRateLimitBurst=0",
        "ExecStart=/bin/bash -c 'for i in {1..400}; do echo r$$i; sleep 0.02; done'",
        "success",
        0,
    ),
}
"""Keys of the unit, its commands, and what becomes of it: result and exit code."""


def test_unusual_units(tmp_path):
    """Escaped names, instances, commands before and after, codes that are allowed, lines that are dropped, rotation."""
    section = f'command_prefix = ["{tmp_path}/enter.sh"]\nunits = ["ts-*"]'
    with (
        Machine(tmp_path) as machine,
        Collector() as collector,
        Relay("systemd", section, collector, tmp_path) as relay,
    ):
        for name, (keys, commands, _, _) in UNUSUAL.items():
            machine.write_unit(f"{name}.service", f"[Service]\n{keys}\n{commands}\n")
        machine.run("systemctl", "daemon-reload")
        agent = relay.start()
        started = [f"{name}{'one' if name.endswith('@') else ''}.service" for name in UNUSUAL]
        machine.run("systemctl", "start", "--no-block", *started)
        for _ in range(5):
            machine.run("sleep", "1")
            machine.run("journalctl", "--rotate")
        collector.wait_until(lambda: len(run_spans(collector)) == len(UNUSUAL), 120)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait() == 0
        relay.finish()
        expected = expected_lines(entries_of(machine))
        with contextlib.suppress(TimeoutError):
            collector.wait_until(lambda: relayed_lines(collector) == expected, 60)
        found, spans = relayed_lines(collector), run_spans(collector).values()
    assert (list((expected - found).items())[:10], list((found - expected).items())[:10]) == ([], [])
    results = {
        span.name.removeprefix("RUN ").replace("@one", "@").removesuffix(".service"): (
            span.attributes["cicd.pipeline.result"],
            span.attributes.get("process.exit.code"),
        )
        for span in spans
    }
    assert results == {name: (result, code) for name, (_, _, result, code) in UNUSUAL.items()}
    dropped = {span.name: span.attributes.get("systemd.suppressed_lines") for span in spans}
    assert int(dropped.pop("RUN ts-burst.service")) > 2_000
    assert set(dropped.values()) == {None}
