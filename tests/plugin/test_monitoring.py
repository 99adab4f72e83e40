"""The alert rules and the dashboard name metrics that exist, and load into a real Prometheus."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from metasoft_patches.metrics import METRICS, PREFIX

from tests.tools import need

FOLDER = Path(__file__).parents[2] / "examples" / "monitoring"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
KNOWN = {f"{PREFIX}{metric.name}{suffix}" for metric in METRICS for suffix in SUFFIXES[metric.kind]}


def run(*command, **kwargs) -> str:
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["alerts.yml", "alerts_test.yml", "dashboard.json"])
def test_only_metrics_that_exist_are_named(name):
    named = set(re.findall(rf"{PREFIX}\w+", (FOLDER / name).read_text()))
    assert named and named <= KNOWN


def test_the_dashboard_is_the_scripts_own_and_shows_every_metric():
    text = (FOLDER / "dashboard.json").read_text()
    assert run(sys.executable, "make_dashboard.py") == text
    assert all(f"{PREFIX}{metric.name}" in text for metric in METRICS if metric.name not in ("spans", "saved_slots"))


@pytest.fixture
def promtool() -> str:
    return need("promtool", "prometheus")


def test_alerts_are_rules_that_fire_when_they_should(promtool):
    assert "SUCCESS: 5 rules" in run(promtool, "check", "rules", "alerts.yml")
    assert "SUCCESS" in run(promtool, "test", "rules", "alerts_test.yml")


def test_each_expression_of_the_dashboard_is_promql(promtool, tmp_path):
    expressions = [
        target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
        for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"]
        for target in panel["targets"]
    ]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"SUCCESS: {len(rules)} rules" in run(promtool, "check", "rules", str(tmp_path / "rules.yml"))
