"""The configurations in deploy/stores have what the measured faults of real stores need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

STORES = Path(__file__).parents[2] / "deploy" / "stores"


def value(file: str, path: str) -> Any:
    """Return the value at a path of keys with dots between them; None without it."""
    found = yaml.safe_load((STORES / file).read_text())
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


@pytest.mark.parametrize(
    ("file", "path", "expected"),
    [
        ("loki.yaml", "limits_config.shard_streams.time_sharding_enabled", True),
        ("loki.yaml", "querier.query_ingesters_within", "168h"),
        ("loki.yaml", "ingester.query_store_max_look_back_period", "168h"),
        ("loki.yaml", "pattern_ingester.enabled", True),
        ("loki.yaml", "compactor.retention_enabled", True),
        ("loki.yaml", "server.grpc_server_max_recv_msg_size", 32 << 20),
        ("tempo.yaml", "distributor.max_attribute_bytes", 65_536),
        ("tempo.yaml", "query_frontend.search.max_duration", "336h"),
        ("tempo.yaml", "storage.trace.wal.ingestion_time_range_slack", "168h"),
        (
            "tempo.yaml",
            "overrides.defaults.metrics_generator.processors",
            ["local-blocks", "span-metrics", "service-graphs"],
        ),
        ("tempo-3.yaml", "compactor", None),
        ("tempo-3.yaml", "distributor.max_attribute_bytes", 65_536),
        ("tempo-3.yaml", "query_frontend.search.max_duration", "336h"),
        ("tempo-3.yaml", "live_store.wal.ingestion_time_range_slack", "168h"),
        ("tempo-3.yaml", "block_builder.wal.ingestion_time_range_slack", "168h"),
    ],
)
def test_a_setting_is_there(file: str, path: str, expected: object) -> None:
    """Each fault of stores that only their configuration can prevent is prevented; see docs/proof.md."""
    assert value(file, path) == expected
