"""Rules and dashboard: what they ask for is what the server tells, and Prometheus can read them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from tests.deploy.manifests import CHART, of_kind, only, rendered, tool

RULES = CHART / "files" / "rules.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
NAME = re.compile(r"\b(?:vllm|nibble):[a-z0-9_]+")
SELECTOR = re.compile(r"((?:vllm|nibble):[a-z0-9_]+)\{([^}]*)\}")
TARGET = {"namespace", "service", "instance", "pod", "job"}  # labels that Prometheus adds


def told() -> dict[str, set[str]]:
    """Every series of /metrics by name, with its labels."""
    metrics = Metrics("m")
    metrics.describe({"block_size": "16"}, {"version": "1"}, max_lora=1, tally=dict)
    metrics.watch_jobs(lambda: {"queued": 1})
    metrics.watch_audit(lambda: (0, 0))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> list[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    asked = [rule["expr"] for group in groups for rule in group["rules"]]
    dashboard = json.loads(DASHBOARD.read_text())
    asked += [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    asked += [
        one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"
    ]
    return asked


@pytest.mark.parametrize("expression", expressions())
def test_every_name_and_label_is_in_the_metrics(expression: str) -> None:
    series = told()
    names = NAME.findall(expression)
    assert names
    assert set(names) <= set(series)
    for name, selectors in SELECTOR.findall(expression):
        labels = set(re.findall(r"([a-z_]+)\s*(?:=~|!=|!~|=)", selectors))
        assert labels <= series[name] | TARGET
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        known = set().union(*(series[name] for name in names), TARGET)
        assert {label.strip() for label in grouped.split(",")} <= known


def test_every_kind_of_refusal_has_a_panel() -> None:
    refusals = {name for name in told() if name.endswith("_refused_total")}
    assert len(refusals) == 2
    assert refusals <= set(NAME.findall(DASHBOARD.read_text()))


def test_the_autoscaler_s_query_too() -> None:
    fleet = ("--values", str(CHART / "examples" / "fleet.yaml"))
    made = rendered(*fleet)
    (trigger,) = only(made, "ScaledObject")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert set(NAME.findall(query)) <= set(told())
    # ServiceMonitor's series carry the name of the Service.
    assert f'service="{only(made, "Service")["metadata"]["name"]}"' in query


def test_panels_do_not_overlap_and_refer_to_variables_that_are_there() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))
    variables = {one["name"] for one in dashboard["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) <= variables | {"__all"}


def test_rules_say_what_to_do() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["action"]
            assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_chart_carries_both_unchanged() -> None:
    made: list[dict[str, Any]] = rendered(
        "--set=prometheusRules.enabled=true,dashboard.enabled=true"
    )
    assert only(made, "PrometheusRule")["spec"] == yaml.safe_load(RULES.read_text())
    (config,) = of_kind(made, "ConfigMap")
    assert json.loads(config["data"]["nibble.json"]) == json.loads(DASHBOARD.read_text())


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        [tool("promtool"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_takes_the_rules() -> None:
    assert "11 rules found" in promtool("check", "rules", str(RULES))


def test_each_alert_fires_where_it_should_and_only_there() -> None:
    cases = Path(__file__).with_name("rules_test.yaml")
    assert "SUCCESS" in promtool("test", "rules", str(cases))
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert alerts <= set(re.findall(r'alertname="(\w+)"', cases.read_text()))


def test_promtool_takes_what_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [one for one in expressions() if not one.startswith("label_values")]
    plain = [one.replace("$__rate_interval", "5m") for one in asked]
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(plain)]
    path = tmp_path / "dashboard.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(path))
