"""The benchmark's job: prints lines of 110 bytes on average, as a program started by path (it imports nothing else).

    printer.py COUNT [whole|each] [--warm FILE] [--supervisor FILE]

``whole`` writes 64 KiB at once, as a program does whose output is no terminal; ``each`` writes line by line. With
``--warm`` a process that writes these lines into a file finds memory that was just used, as on a machine without a
host: a page that a virtual machine has left alone for seconds costs it more than everything that is measured here. With
``--supervisor`` it notes what its parent, the job's supervisor, used up for these lines. It prints the wall time that
printing took to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time

LEVELS = ("INFO", "INFO", "INFO", "DEBUG", "INFO", "WARNING", "INFO", "INFO", "INFO", "ERROR")
TEXTS = (
    "read a tile of the archive",
    "wrote rows to the table of measurements, partition by day",
    "skipped a row without a date",
    "asked the catalogue for the next page of scenes of this region and season, with clouds below a tenth",
    "done with one file",
    "retrying after the store was busy for a moment",
)
CHUNK = 1 << 16


def lines(count: int) -> list[bytes]:
    """Return lines with time, level and numbers that differ, as pipelines write them."""
    return [
        f"2026-01-{1 + n // 100_000 % 28:02d} 12:{n // 60_000 % 60:02d}:{n // 1000 % 60:02d},{n % 1000:03d} "
        f"{LEVELS[n % 10]} etl.step{n % 7} rec={n} {TEXTS[n % 6]} in {n * 7919 % 100_000 / 100:.2f} ms\n".encode()
        for n in range(count)
    ]


def supervisor() -> dict[str, int]:
    """Return what the parent has used up: CPU in ns, and its peak of memory in KiB. Source: proc(5)."""
    pid = os.getppid()
    cpu = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat") as file:
            cpu += int(file.read().split()[0])
    with open(f"/proc/{pid}/status") as file:
        rss = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    return {"cpu_ns": cpu, "rss_kib": rss}


def warm(path: str, pieces: list[bytes]) -> None:
    """Use twice the memory that a file of these pieces takes, and give it back; nothing is left to be written."""
    os.sync()
    with open(path, "wb") as file:
        file.writelines(pieces)
        file.writelines(pieces)
    os.unlink(path)


def main() -> None:
    """Print."""
    written = lines(int(sys.argv[1]))
    note = sys.argv[-1] if "--supervisor" in sys.argv else None
    pieces = written
    if "each" not in sys.argv:
        text = b"".join(written)
        pieces = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    if "--warm" in sys.argv:
        warm(sys.argv[sys.argv.index("--warm") + 1], pieces)
    before = supervisor() if note else {}
    begun = time.perf_counter()
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(1, view) :]
    wall_s = time.perf_counter() - begun
    print(wall_s, file=sys.stderr, flush=True)
    if note:
        time.sleep(0.3)  # until the supervisor has read and written what is still in the pipe
        after = supervisor()
        with open(note, "w") as file:
            json.dump({**after, "cpu_ns": after["cpu_ns"] - before["cpu_ns"], "wall_s": wall_s}, file)


if __name__ == "__main__":
    main()
