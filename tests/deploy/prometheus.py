"""The query API of a running Prometheus."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

__all__ = ["Prometheus", "eventually"]


class Prometheus:
    """Reads what a server has."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the data of a reply of its API."""
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Return the series of an expression now, each with its labels and value; of a native histogram its count."""
        return [
            (one["metric"], float(one["value"][1] if "value" in one else one["histogram"][1]["count"]))
            for one in self.get("query", query=expr)["result"]
        ]

    def labels(self, expr: str, *names: str) -> list[tuple[str, ...]]:
        """Return these labels of its series, in order."""
        return sorted(tuple(labels.get(name, "") for name in names) for labels, _ in self.query(expr))

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=30).close()
        except OSError:
            return False
        return True


def eventually(found: Callable[[], object], expected: object, timeout_s: float = 60) -> None:
    """Wait until a value is as expected; fail with the last value if it does not come."""
    deadline_s = time.monotonic() + timeout_s
    while (last := found()) != expected and time.monotonic() < deadline_s:
        time.sleep(0.25)
    assert last == expected
