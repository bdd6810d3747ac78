"""A long pipeline: it would take an hour, and the demo cancels it."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType


def _stop(number: int, frame: FrameType | None) -> None:
    sys.stdout.write("asked to stop: rolling back the open day\n")
    sys.exit(1)


def main() -> None:
    """Process a year, ten seconds for each day."""
    signal.signal(signal.SIGTERM, _stop)
    for day in range(1, 366):
        sys.stdout.write(f"day {day} of 365: loading partition\n")
        sys.stdout.flush()
        time.sleep(10)


if __name__ == "__main__":
    main()
