"""Dashboard, alert rules and docs name the metrics and the fields of cost records that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from observe_cost import front_end

from cierzo.engine.frontend.observe.collector import Collector
from cierzo.engine.frontend.observe.usage_record import UsageRecord

DOCS = Path(__file__).resolve().parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
NAME = re.compile(r"\b(?:cierzo_|vllm:)[a-z_]+")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, set[str]]]:
    """Each metric as it is told, by name: its kind and its labels."""
    frontend = front_end(usage_file=str(tmp_path_factory.mktemp("observing") / "usage.jsonl"))
    frontend.observer.certificate_expires_s = lambda: 1.0
    found = {}
    for family in Collector(frontend).collect():
        name = family.name + "_total" * (family.type == "counter")
        found[name] = (family.type, set(family._labelnames))
    frontend.observer.close()
    return found


def _samples(names: dict[str, tuple[str, set[str]]]) -> set[str]:
    """Names that an expression may use."""
    suffixes = {"histogram": ("_bucket", "_count", "_sum")}
    return {name + suffix for name, (kind, _) in names.items() for suffix in suffixes.get(kind, ("",))}


def _expressions() -> dict[str, list[str]]:
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DOCS / "alerts.yaml").read_text(encoding="utf-8"))
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return {"dashboard": panels + variables, "alerts": alerts}


@pytest.mark.parametrize("where", ["dashboard", "alerts"])
def test_expressions_name_metrics_that_there_are(names: dict[str, tuple[str, set[str]]], where: str) -> None:
    expressions = _expressions()[where]
    assert len(expressions) > 8
    for expression in expressions:
        used = NAME.findall(expression)
        assert used, expression
        assert not set(used) - _samples(names), expression
        assert expression.count("(") == expression.count(")"), expression


@pytest.mark.parametrize("where", ["dashboard", "alerts"])
def test_expressions_choose_by_labels_that_the_metrics_have(
    names: dict[str, tuple[str, set[str]]], where: str
) -> None:
    kept = {name + suffix: labels for name, (_, labels) in names.items() for suffix in ("", "_bucket")}
    for expression in _expressions()[where]:
        for name, inside in re.findall(r"((?:cierzo_|vllm:)[a-z_]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", inside)) <= {"instance", *kept[name]}, expression
        for inside in re.findall(r"by \(([^)]*)\)", expression):
            some = set().union(*(kept.get(name, set()) for name in NAME.findall(expression)))
            assert {label.strip() for label in inside.split(",")} <= {"le", "instance", *some}, expression


def test_a_tenant_at_its_own_limits_does_not_call_the_operator() -> None:
    (overloaded,) = [each for each in _expressions()["alerts"] if "overloaded" in each]
    assert 'whose="server"' in overloaded


def test_every_rule_says_what_it_is_about() -> None:
    rules = yaml.safe_load((DOCS / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all(
        rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"] for rule in rules
    )


def test_every_metric_is_documented_with_its_labels(names: dict[str, tuple[str, set[str]]]) -> None:
    told = set(re.findall(r"`((?:cierzo_|vllm:)[a-z_]+)`", OPERATIONS))
    assert told == set(names), "documented, and there"
    for row in re.findall(r"^\| (`cierzo_[^|]+) \| ([^|]*) \|", OPERATIONS, re.MULTILINE):
        labels = {label.strip() for label in row[1].split(",")} - {""}
        assert all(names[name][1] == labels for name in NAME.findall(row[0])), row


def test_every_field_of_a_cost_record_has_its_row() -> None:
    table = OPERATIONS.partition("### Cost records")[2].partition("| field |")[2].partition("\n\n")[0]
    told = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert told == [*UsageRecord.__struct_fields__]
