"""The Prometheus rules: their form, their meaning (with promtool), their runbooks in deploy/README.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.queries import dashboard_queries

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
}
UNIT_TESTS = yaml.safe_load((PROMETHEUS / "rules.test.yaml").read_text())["tests"]


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_runbook(name: str) -> None:
    """An alert has a summary, a description, and a runbook section that exists."""
    annotations = ALERTS[name]["annotations"]
    assert annotations["summary"]
    assert annotations["description"]
    assert annotations["runbook_url"].endswith(f"deploy/README.md#{name.lower()}")
    assert re.search(rf"^#+ {name}$", (DEPLOY / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ALERTS)
def test_no_alert_uses_the_job_label(name: str) -> None:
    """OTLP and a scrape fill `job` differently, and only a scrape has `up`."""
    assert not re.search(r"\bjob\s*(=|,|\))|\bup\b", ALERTS[name]["expr"])


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_seen_to_fire_and_not_to_fire(name: str) -> None:
    """Each rule has a case in which it fires and one in which it does not."""
    cases = [case for test in UNIT_TESTS for case in test.get("alert_rule_test", ()) if case["alertname"] == name]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


def test_the_unit_tests_of_counts_are_about_the_queries_of_the_dashboards() -> None:
    """Each expression that promtool evaluates is a panel's query for all pipelines and the last three hours."""
    tested = {case["expr"] for test in UNIT_TESTS for case in test.get("promql_expr_test", ())}
    panels = {query.text: query.panel for query in dashboard_queries({}, window="3h")}
    assert {panels.get(expr) for expr in tested} == {
        "jobs: Succeeded",
        "pipelines: 95th percentile of the last hour's runs",
    }


@pytest.mark.services
def test_the_rules_do_what_their_unit_tests_say() -> None:
    """promtool accepts the rules, and their unit tests pass."""
    for arguments in (["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]):
        done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.services
@pytest.mark.parametrize("name", ALERTS)
def test_the_unit_tests_notice_a_rule_that_never_fires(name: str, tmp_path: Path) -> None:
    """The unit tests fail for a rule that never fires."""
    rules = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == name:
                rule["expr"] = f"({rule['expr']}) and on () vector(1) > 1"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "rules.test.yaml").write_text((PROMETHEUS / "rules.test.yaml").read_text())
    done = subprocess.run(
        ["promtool", "test", "rules", "rules.test.yaml"], cwd=tmp_path, capture_output=True, timeout=60
    )
    assert done.returncode != 0
