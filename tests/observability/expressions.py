"""The PromQL of the committed dashboards and rules, as the tests of this folder read it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
RULES_TEST = ROOT / "deploy" / "prometheus" / "rules_test.yaml"
RUNBOOKS = ROOT / "deploy" / "prometheus" / "runbooks.md"

_METRIC = re.compile(r"(?<![\w$\"])((?:finery[_:]|vllm:|DCGM_)[\w:]+|up(?=\{))(\{[^}]*\})?")
_VARIABLE = re.compile(r"\$(?!__)\w+")


@dataclass(frozen=True)
class Expression:
    """One query. `where` is for people; `legend` is the panel's, with its labels in double braces."""

    where: str
    expr: str
    legend: str = ""
    unit: str = ""

    def selectors(self) -> list[tuple[str, list[str]]]:
        """(metric, labels that are matched), for each place where a metric is named."""
        found = _METRIC.findall(self.expr)
        return [(name, re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\"", matchers)) for name, matchers in found]

    def legend_labels(self) -> list[str]:
        return re.findall(r"\{\{(\w+)\}\}", self.legend)


def panels() -> list[Expression]:
    """Of every panel, with whatever a reader could choose chosen."""
    found: list[Expression] = []
    for file in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expr = _VARIABLE.sub(".+", target["expr"]).replace("$__rate_interval", "10s")
                found.append(
                    Expression(f"{file.stem}: {panel['title']}", expr, target["legendFormat"], panel["fieldConfig"]["defaults"]["unit"])
                )
    return found


def rules() -> list[dict[str, object]]:
    """Of every group, in order."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_expressions() -> list[Expression]:
    return [Expression(str(rule.get("alert") or rule["record"]), str(rule["expr"])) for rule in rules()]


def choices() -> list[tuple[str, str]]:
    """(metric, label) of every variable that a reader chooses by."""
    found: list[tuple[str, str]] = []
    for file in sorted(DASHBOARDS.glob("*.json")):
        for variable in json.loads(file.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"])
                assert match is not None, variable["query"]
                found.append((match[1], match[2]))
    return found
