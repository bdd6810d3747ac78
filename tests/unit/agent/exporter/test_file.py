"""Files mode: the content of the disk after rotation, after a crash and on a full disk."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tailspan_agent.exporter.file import FileExporter
from tailspan_agent.exporter.outcome import Delivered, Outcome, Retry
from tailspan_agent.exporter.rotating_file import RotatingFile, existing_files
from tailspan_agent.otlp.json_lines import decode_line
from tests.fakes.otlp_samples import exporter_to, logs_payload, payload_of


def export(exporter: FileExporter, payload: bytes, count: int = 3) -> Outcome:
    async def run() -> Outcome:
        try:
            return await exporter.export(payload, count)
        finally:
            await exporter.aclose()

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["logs", "traces", "metrics"])
def test_one_line_a_request_in_one_file_a_signal(tmp_path: Path, kind: str) -> None:
    """Without an endpoint, the configured signals become files for a replay."""
    exporter = exporter_to(None, signal=kind, state_dir=tmp_path)
    assert isinstance(exporter, FileExporter)
    assert exporter.endpoint == str(tmp_path / "otlp" / f"{kind}.jsonl")
    assert export(exporter, payload_of(kind)) == Delivered()
    (line,) = Path(exporter.endpoint).read_bytes().splitlines()
    assert decode_line(line) == (kind, payload_of(kind))


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    """Logs may have content that other users must not read."""
    before = os.umask(0)
    try:
        export(FileExporter("logs", tmp_path / "otlp", max_size=1 << 20, keep=3), logs_payload(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "otlp").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "otlp" / "logs.jsonl").stat().st_mode) == 0o600


def test_rotation_keeps_the_newest_files(tmp_path: Path) -> None:
    """No file exceeds its size, and names sort by age."""
    files = RotatingFile(tmp_path, "logs", max_size=30, keep=3)
    for number in range(10):
        files.append(b"line %05d\n" % number)
    files.close()
    paths = existing_files(tmp_path, "logs")
    assert [path.name for path in paths] == ["logs-000003.jsonl", "logs-000004.jsonl", "logs.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    assert b"".join(path.read_bytes() for path in paths) == b"".join(b"line %05d\n" % number for number in range(4, 10))


def test_keep_one_keeps_the_newest_file_only(tmp_path: Path) -> None:
    """It is the smallest valid setting."""
    files = RotatingFile(tmp_path, "logs", max_size=30, keep=1)
    for number in range(10):
        files.append(b"line %05d\n" % number)
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["logs.jsonl"]
    assert (tmp_path / "logs.jsonl").read_bytes() == b"line 00008\nline 00009\n"


def test_a_line_over_the_size_has_a_file_of_its_own(tmp_path: Path) -> None:
    """A line is never cut."""
    files = RotatingFile(tmp_path, "logs", max_size=10, keep=None)
    for line in (b"a\n", b"b" * 50 + b"\n", b"c\n"):
        files.append(line)
    files.close()
    assert [path.read_bytes() for path in existing_files(tmp_path, "logs")] == [b"a\n", b"b" * 50 + b"\n", b"c\n"]


@pytest.mark.parametrize("torn", [b"to", b"t" * 200_000, b""])
@pytest.mark.parametrize("whole", [b"", b"whole\n", b"one\ntwo\n"])
def test_a_partial_line_is_removed_before_the_next(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    """A line that a crash left incomplete was never acknowledged, and must not merge with the next one."""
    (tmp_path / "logs.jsonl").write_bytes(whole + torn)
    files = RotatingFile(tmp_path, "logs", max_size=1 << 20, keep=None)
    files.append(b"next\n")
    files.close()
    assert (tmp_path / "logs.jsonl").read_bytes() == whole + b"next\n"


def test_a_deleted_file_is_created_again(tmp_path: Path) -> None:
    """Lines written to a deleted file would be lost."""
    files = RotatingFile(tmp_path, "logs", max_size=1 << 20, keep=None)
    files.append(b"one\n")
    (tmp_path / "logs.jsonl").rename(tmp_path / "moved")
    files.append(b"two\n")
    files.close()
    assert (tmp_path / "logs.jsonl").read_bytes() == b"two\n"
    assert (tmp_path / "moved").read_bytes() == b"one\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_retried(tmp_path: Path) -> None:
    """Nothing is lost while the service keeps the lines."""
    (tmp_path / "logs.jsonl").symlink_to("/dev/full")
    outcome = export(FileExporter("logs", tmp_path, max_size=1 << 20, keep=3), logs_payload(1))
    assert isinstance(outcome, Retry)
    assert not outcome.server_error
    assert str(tmp_path) in outcome.reason


def test_disk_that_takes_half_a_line_takes_none(tmp_path: Path) -> None:
    """A short write is undone; the same line fits later."""
    files = RotatingFile(tmp_path, "logs", max_size=1 << 20, keep=None)
    files.append(b"first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="large") as caught:
            files.append(b"x" * 500 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "logs.jsonl").read_bytes() == b"first\n"
    files.append(b"x" * 500 + b"\n")
    files.close()
    assert (tmp_path / "logs.jsonl").read_bytes() == b"first\n" + b"x" * 500 + b"\n"


def test_directory_that_cannot_be_created_is_retried(tmp_path: Path) -> None:
    """A file in place of the directory, a read-only file system."""
    (tmp_path / "otlp").write_text("in the way")
    outcome = export(FileExporter("logs", tmp_path / "otlp", max_size=1 << 20, keep=3), logs_payload(1))
    assert isinstance(outcome, Retry)


_WRITER = """
import sys
from pathlib import Path
from tailspan_agent.exporter.rotating_file import RotatingFile
files = RotatingFile(Path(sys.argv[1]), "logs", max_size=2_000_000, keep=None)
for number in range(100_000):
    files.append(b"%08d" % number + b"x" * 300_000 + b"\\n")
    print(number, flush=True)
"""


def test_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    """Every acknowledged line is there, complete and in order, after SIGKILL; the next writer appends after it."""
    process = subprocess.Popen([sys.executable, "-c", _WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(12):
        process.stdout.readline()
    process.kill()
    acked = 12 + len(process.stdout.read().splitlines())
    process.stdout.close()
    process.wait()
    files = RotatingFile(tmp_path, "logs", max_size=2_000_000, keep=None)
    files.append(b"last\n")
    files.close()
    lines = b"".join(path.read_bytes() for path in existing_files(tmp_path, "logs")).split(b"\n")
    assert lines[-2:] == [b"last", b""]
    assert len(lines) - 2 >= acked
    assert [line[:8] for line in lines[:-2]] == [b"%08d" % number for number in range(len(lines) - 2)]
    assert {len(line) for line in lines[:-2]} == {300_008}
