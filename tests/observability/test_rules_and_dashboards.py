"""Rules and dashboards in themselves: promtool reads them, alerts have tests and runbooks, the JSON is what the code makes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from observability.expressions import DASHBOARDS, ROOT, RULES, RULES_TEST, RUNBOOKS, Expression, panels, rules

ALERTS = [rule for rule in rules() if "alert" in rule]


def promtool(*arguments) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool is missing; install it: apt-get install prometheus", pytrace=False)
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_reads_the_rules_and_their_tests_pass():
    promtool("check", "rules", RULES)
    promtool("test", "rules", RULES_TEST)


def test_an_alert_that_fires_at_another_value_fails_its_test(tmp_path):
    shutil.copy(RULES_TEST, tmp_path)
    (tmp_path / RULES.name).write_text(RULES.read_text().replace("usage_perc > 0.9", "usage_perc > 0.96"))
    with pytest.raises(AssertionError, match="FineryKvCacheFull"):
        promtool("test", "rules", tmp_path / RULES_TEST.name)


def test_promtool_reads_the_configuration_of_a_local_prometheus():
    promtool("check", "config", ROOT / "deploy" / "prometheus" / "prometheus.yml")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_tested_as_it_fires_and_as_it_does_not(alert):
    cases = [case for test in yaml.safe_load(RULES_TEST.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert["alert"]}
    assert fires == {True, False}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_has_a_runbook(alert):
    assert alert["labels"]["severity"] in {"warning", "critical"}
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (.+)$", (ROOT / file).read_text(), flags=re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    assert f"`{alert['alert']}`" in RUNBOOKS.read_text()


def test_the_committed_dashboards_are_what_the_code_makes(tmp_path):
    subprocess.run([sys.executable, ROOT / "deploy" / "grafana" / "dashboards.py", "--out", tmp_path], check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in DASHBOARDS.iterdir()}
    assert made == committed, "run python deploy/grafana/dashboards.py"
    assert set(made) == {"fleet.json", "training.json", "serving.json", "adapters.json"}


def test_every_expression_of_the_dashboards_is_promql(tmp_path):
    recorded = [{"record": f"panel:{number}", "expr": panel.expr} for number, panel in enumerate(panels())]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    assert f"{len(recorded)} rules found" in promtool("check", "rules", file)


def test_temperatures_and_tokens_have_units_of_their_own():
    units = {panel.unit for panel in panels() if "_celsius" in panel.expr}
    assert units == {"celsius"}
    rates = {panel.unit for panel in panels() if re.search(r"tokens(_per_second|_total)\b", panel.expr)}
    assert rates == {"suffix: tokens/s"}


def test_the_reader_of_expressions_finds_metrics_and_their_labels():
    expression = Expression("", 'sum by (replica) (rate(vllm:x_bucket{replica=~".*",le!="1"}[5m])) / finery:y:rate5m + up{job="z"}')
    assert expression.selectors() == [("vllm:x_bucket", ["replica", "le"]), ("finery:y:rate5m", []), ("up", ["job"])]
