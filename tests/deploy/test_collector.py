"""The gateway's configuration; the collector itself is in no package registry, so its structure is what can be held."""

from __future__ import annotations

from typing import Any

import yaml

from tests.deploy.configured import DEPLOY

GATEWAY: dict[str, Any] = yaml.safe_load((DEPLOY / "collector" / "gateway.yaml").read_text())


def test_every_component_is_defined_and_used() -> None:
    """A pipeline names nothing that is not there, and nothing is there in vain."""
    pipelines = GATEWAY["service"]["pipelines"]
    assert set(pipelines) == {"logs", "traces", "metrics"}
    for kind in ("receivers", "processors", "exporters"):
        assert {name for pipeline in pipelines.values() for name in pipeline[kind]} == set(GATEWAY[kind])
    assert GATEWAY["service"]["extensions"] == list(GATEWAY["extensions"])


def test_only_what_is_on_disk_is_acked() -> None:
    """Each exporter's queue is persistent and refuses what does not fit, and nothing before it holds what it acked."""
    assert all(pipeline["processors"] == ["memory_limiter"] for pipeline in GATEWAY["service"]["pipelines"].values())
    for exporter in GATEWAY["exporters"].values():
        queue = exporter["sending_queue"]
        assert queue["storage"] in GATEWAY["extensions"]
        assert not queue.get("block_on_overflow", False)
        assert queue["batch"]["min_size"] <= queue["batch"]["max_size"] <= queue["queue_size"]
        assert exporter["retry_on_failure"] == {"enabled": True, "max_elapsed_time": "0s"}
