"""A pipeline that succeeds: read measurements, clean them, and write the mean per station."""

from __future__ import annotations

import csv
import io
import logging
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing

_log = logging.getLogger("weather_etl")


def _measurements(days: int, stations: int) -> Iterator[str]:
    rng = random.Random(7)
    yield "station,day,celsius"
    for day in range(days):
        for station in range(stations):
            value = "n/a" if rng.random() < 0.02 else f"{rng.gauss(9 + station, 6):.1f}"
            yield f"S{station:02},{day},{value}"


def main() -> None:
    """Extract, transform, load."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    text = "\n".join(_measurements(days=60, stations=12))
    _log.info("extract: read %d B of measurements", len(text))
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE measurements (station TEXT, day INTEGER, celsius REAL)")
        skipped = 0
        for row in csv.DictReader(io.StringIO(text)):
            try:
                values = (row["station"], int(row["day"]), float(row["celsius"]))
            except ValueError:
                skipped += 1
                _log.warning("transform: station %s day %s has no value, skipped", row["station"], row["day"])
                continue
            database.execute("INSERT INTO measurements VALUES (?, ?, ?)", values)
        _log.info("transform: rows without a value, skipped: %d", skipped)
        for station, mean in database.execute("SELECT station, avg(celsius) FROM measurements GROUP BY station"):
            _log.info("load: station %s mean %.2f C", station, mean)
            time.sleep(0.05)
    _log.info("done")


if __name__ == "__main__":
    main()
