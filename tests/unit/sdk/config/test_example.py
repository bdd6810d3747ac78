"""config.example.toml: it loads, has every key, states true defaults, and a copy of it changes nothing."""

from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tailspan.config import Expect, OtlpKeys, RedactPattern, Settings, Watch, load_settings
from tailspan.errors import ConfigError

EXAMPLE = Path(__file__).parents[4] / "config.example.toml"
KEY_LINE = re.compile(r'^#((?:[a-z_]+|"[^"]+") = .+?) +# (default|example)([;:,]|$)', re.MULTILINE)


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TAILSPAN_", "OTEL_")):
            monkeypatch.delenv(name)


def uncommented() -> str:
    """The example with every commented key and table switched on."""
    return re.sub(r'^#(?=\[|[a-z_]+ = |"[^"]+" = )', "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def service_types() -> dict[str, Any]:
    """The classes of the built-in service types."""
    return {entry.name: entry.load() for entry in entry_points(group="tailspan.services")}


def service_keys(kind: str, loaded: Settings) -> set[str]:
    """The keys that a service type knows, from what it says about one that it does not."""
    with pytest.raises(ConfigError) as caught:
        service_types()[kind].from_options(kind, {"type": kind, "qqq": 1}, loaded)
    return set(str(caught.value).split("known here: ")[1].split(", "))


def test_a_copy_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as it is sets no key, so it equals no file at all, and the environment is still heard."""
    assert load_settings(EXAMPLE).model_dump() == load_settings().model_dump()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://loki/otlp/v1/logs")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "a=b")
    assert load_settings(EXAMPLE).model_dump() == load_settings().model_dump()
    assert load_settings(EXAMPLE).otlp.endpoint == "http://collector:4318"


def test_everything_switched_on_loads(tmp_path: Path) -> None:
    """Each commented key can be switched on as it stands, the tables of the services too."""
    path = tmp_path / "config.toml"
    path.write_text(uncommented(), encoding="utf-8")
    loaded = load_settings(path)
    assert loaded.agent.watch[0].name == "etl-*"
    for kind, service in service_types().items():
        options = loaded.services[kind]
        options.pop("group", None)  # a group of that name need not exist here
        assert service.from_options(kind, options, loaded).name == kind


def test_every_key_is_shown() -> None:
    """Each key of each model is in the example's section for it, as a key or as the other way to say one."""
    table = tomllib.loads(uncommented())
    text = EXAMPLE.read_text(encoding="utf-8")

    models: list[tuple[type[BaseModel], dict[str, Any], str]] = [
        (Settings, table, ""),
        (OtlpKeys, table["otlp"]["logs"], "otlp.logs"),
        (Watch, table["agent"]["watch"][0], "agent.watch"),
        (Expect, table["agent"]["expect"][0], "agent.expect"),
        (RedactPattern, table["redact"]["patterns"][0], "redact.patterns"),
    ]
    models += [
        (type(getattr(Settings(), name)), table[name], name) for name in ("agent", "otlp", "files", "redact", "links")
    ]
    sections = [(set(model.model_fields), shown, path) for model, shown, path in models]
    sections += [
        (service_keys(kind, load_settings()), table["services"][kind], f"services.{kind}") for kind in service_types()
    ]
    missing = [
        f"{path}.{name}"
        for names, shown, path in sections
        for name in names
        if name not in shown and not re.search(rf"or(?: write it here)?: {name} = ", text)
    ]
    assert missing == []
    assert set(service_types()) >= {"local", "fused"}


def test_every_key_says_its_default_or_that_it_is_an_example() -> None:
    """No key line is without a word on its default."""
    lines = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if re.match(r'#[a-z_"][^ ]* = ', line)]
    assert [line for line in lines if not KEY_LINE.match(line)] == []
    assert len(lines) > 50


def test_stated_defaults_are_the_defaults(tmp_path: Path) -> None:
    """Switching on all keys that are marked as plain default gives the same settings as no file."""
    kept = []
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        found = KEY_LINE.match(line)
        if found and (found[2], found[3]) == ("default", ";"):
            kept.append(found[1])
        elif line.startswith(("[", "#[")):
            kept.append(line.removeprefix("#"))
    path = tmp_path / "config.toml"
    path.write_text(
        "\n".join(kept)
        .replace("jobs = []", "jobs = []\ndiscover = true")
        .replace("[[agent.expect]]", '[[agent.expect]]\nname = "x"\nevery = 1'),
        encoding="utf-8",
    )
    shown, defaults = load_settings(path), load_settings()
    assert shown.agent.watch == [Watch(service="local", discover=True)]
    assert shown.agent.expect[0].grace == 3600
    assert shown.agent.model_copy(update={"expect": []}) == defaults.agent
    assert [shown.otlp.for_signal(name) for name in ("logs", "traces", "metrics")] == [
        defaults.otlp.for_signal(name) for name in ("logs", "traces", "metrics")
    ]
    assert shown.otlp.dead_letter_max == defaults.otlp.dead_letter_max
    assert (shown.files, shown.redact, shown.links) == (defaults.files, defaults.redact, defaults.links)
    assert shown.default_service == defaults.default_service
    for kind, service in service_types().items():
        assert service.from_options(kind, shown.services[kind], shown).name == kind
