"""What of the operator's chart needs no helm: its schema, its examples, what it says of the operator."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from steadyhelm_operator.crd import crd
from steadyhelm_operator.metrics import Metrics

from tests.charts.objects import ROOT
from tests.charts.test_cluster_values import GENERATE, merged
from tests.charts.values import closed_parts
from tests.unit.docs.markdown import anchors

CHART = ROOT / "charts" / "steadyhelm-operator"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_schema_is_one_and_leaves_nothing_open():
    assert closed_parts(SCHEMA) >= 40


@pytest.mark.parametrize("file", [CHART / "values.yaml", *EXAMPLES], ids=lambda file: file.stem)
def test_the_schema_takes_the_defaults_and_the_examples(file: Path):
    values = merged(VALUES, yaml.safe_load(file.read_text()))
    assert [error.message for error in Draft7Validator(SCHEMA).iter_errors(values)] == []


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"replicas": 2}, "$"),
        ({"image": {"repository": "a"}}, "$.image"),
        ({"namespaces": "research"}, "$.namespaces"),
        ({"workers": 0}, "$.workers"),
        ({"memory": "256M"}, "$.memory"),
        ({"uid": 0}, "$.uid"),
        ({"logFormat": "text"}, "$.logFormat"),
        ({"podLabels": {"app.kubernetes.io/name": "other"}}, "$.podLabels"),
        ({"rbac": {"tokenSecrets": ["A"]}}, "$.rbac.tokenSecrets[0]"),
        ({"monitoring": {"podMonitor": {"labels": {"app.kubernetes.io/name": "x"}}}}, "$.monitoring.podMonitor.labels"),
        ({"monitoring": {"alerts": {"labels": {"helm.sh/chart": "x"}}}}, "$.monitoring.alerts.labels"),
    ],
    ids=lambda found: found if isinstance(found, str) else "",
)
def test_the_schema_refuses(values: dict[str, Any], place: str):
    errors = list(Draft7Validator(SCHEMA).iter_errors(merged(VALUES, values)))
    assert [error.json_path for error in errors] == [place]


@pytest.mark.parametrize(
    "values",
    [
        {"cpu": 0.5, "memory": "1.5Gi"},
        {"cpu": "0.05"},
        {"image": {"tag": "t" * 128}},
        {"podAnnotations": {"k8s.v1.cni.cncf.io/networks": "a"}},
        {"priorityClassName": "team.high"},
        {"monitoring": {"alerts": {"runbook": "https://example.org/~team/runbook"}}},
        {"global": {"imageRegistry": "registry.example.org"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_schema_takes_what_kubernetes_takes(values: dict[str, Any]):
    assert [error.message for error in Draft7Validator(SCHEMA).iter_errors(merged(VALUES, values))] == []


def paths(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> set[str]:
    """The dotted path of every value."""
    found: set[str] = set()
    for name, value in values.items():
        known = schema.get("properties", {}).get(name, {})
        found |= paths(value, known, f"{path}{name}.") if known.get("properties") else {f"{path}{name}"}
    return found


def test_every_value_is_explained_where_it_stands():
    explained = {path for path, _ in GENERATE["documented"]((CHART / "values.yaml").read_text())}
    assert explained == paths(VALUES, SCHEMA)


def test_the_definition_in_the_chart_is_the_operators():
    assert yaml.safe_load((CHART / "files" / "trainingruns.yaml").read_text()) == crd()


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    return group["rules"]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_names_metrics_that_exist_and_a_page_that_helps(rule: dict[str, Any]):
    exported = {sample for family in Metrics().registry.collect() for sample in (family.name, f"{family.name}_total")}
    named = set(re.findall(r"steadyhelm_\w+", rule["expr"]))
    assert named
    assert named <= exported
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (page, anchor) == ("RUNBOOK", rule["alert"].lower())
    assert anchor in anchors(ROOT / VALUES["monitoring"]["alerts"]["runbook"])


def test_versions_are_those_of_the_system():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]
