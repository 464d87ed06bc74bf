"""The operator's chart as helm renders it, judged by the schemas of who reads it and by what has to hold anyway."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from tests.charts.invariants import overcommitted, unmounted, unrestricted
from tests.charts.objects import Manifest, Pod, one
from tests.charts.schemas import Judge
from tests.charts.test_operator_values import CHART, EXAMPLES, SCHEMA, VALUES
from tests.charts.values import values

pytestmark = pytest.mark.charts
Render = Callable[..., list[Manifest]]
EVERYTHING = {
    "namespaces": ["research", "production"],
    "rbac": {"tokenSecrets": ["rl"]},
    "image": {"registry": "registry.example.org/team", "pullSecrets": ["registry"]},
    "networkPolicy": {"metricsFrom": ["monitoring"]},
    "monitoring": {"podMonitor": {"enabled": True}, "alerts": {"enabled": True}},
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"operator": "Exists"}],
    "podLabels": {"team": "x"},
    "podAnnotations": {"a": "b"},
    "priorityClassName": "system-cluster-critical",
}
WRITING = {"create", "update", "patch", "delete", "deletecollection", "*"}


@pytest.fixture(scope="session")
def render(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Renders the operator's chart: ``render(values)``. Raises ValueError with what helm says."""
    folder = tmp_path_factory.mktemp("helm-operator")
    environment = {**os.environ, **{f"HELM_{name}_HOME": str(folder) for name in ("CACHE", "CONFIG", "DATA")}}

    def rendered(chosen: Mapping[str, object], release: str = "steadyhelm-operator") -> list[Manifest]:
        file = folder / "values.yaml"
        file.write_text(json.dumps(chosen))
        command = [helm, "template", release, CHART, "--namespace", "ns", "--values", file]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ValueError(done.stderr)
        return [found for found in yaml.load_all(done.stdout, yaml.CSafeLoader) if found]

    return rendered


def pod(manifests: list[Manifest]) -> Pod:
    deployment = one(manifests, "Deployment")
    template = deployment["spec"]["template"]
    return Pod(name=deployment["metadata"]["name"], labels=template["metadata"]["labels"], spec=template["spec"])


def wrong(judge: Judge, manifests: list[Manifest]) -> list[str]:
    """Everything that schemas and invariants say against what was rendered."""
    found = pod(manifests)
    judged = [m for m in manifests if m["kind"] != "CustomResourceDefinition"]  # Kubernetes judges that one itself
    labels = found.labels.items()
    selectors = [one(manifests, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in manifests if m["kind"] == "NetworkPolicy"]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in manifests if m["kind"] == "PodMonitor"]
    return [
        *(fault for manifest in judged for fault in judge.faults(manifest)),
        *(fault for check in (unrestricted, unmounted, overcommitted) for fault in check(found)),
        *(f"{selector} selects nothing" for selector in selectors if not selector.items() <= labels),
        *greedy(manifests),
    ]


def rules(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """The operator's own rights, not those of people."""
    own = [
        m
        for m in manifests
        if m["kind"] in ("Role", "ClusterRole") and not m["metadata"]["name"].endswith(("-edit", "-view"))
    ]
    return [rule for role in own for rule in role["rules"]]


def greedy(manifests: list[Manifest]) -> list[str]:
    """Rights that the operator must not have."""
    found = []
    for rule in rules(manifests):
        if "*" in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]:
            found.append(f"a right on everything: {rule}")
        if "secrets" in rule["resources"] and rule["verbs"] != ["get"]:
            found.append(f"more than reading a Secret by its name: {rule}")
        if "pods" in rule["resources"] and WRITING & set(rule["verbs"]):
            found.append(f"writes pods: {rule}")
        if "rbac.authorization.k8s.io" in rule["apiGroups"]:
            found.append(f"gives rights: {rule}")
    return found


@pytest.mark.parametrize(
    "chosen", [{}, EVERYTHING, *(yaml.safe_load(file.read_text()) for file in EXAMPLES)],
    ids=["defaults", "everything", *(file.stem for file in EXAMPLES)],
)  # fmt: skip
def test_defaults_and_examples_render_to_objects_that_hold(judge: Judge, render: Render, chosen: dict[str, Any]):
    assert wrong(judge, render(chosen)) == []


@pytest.mark.parametrize("file", [CHART / "values.yaml", *EXAMPLES], ids=lambda file: file.stem)
def test_helm_finds_no_fault(helm: Path, file: Path):
    done = subprocess.run(
        [helm, "lint", "--strict", CHART, "--values", file], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@given(values(SCHEMA, VALUES))
@settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_values_render_to_objects_that_hold(judge: Judge, render: Render, chosen: dict[str, Any]):
    assert wrong(judge, render(chosen)) == []


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda rule: rule.update(verbs=["get", "list"], resources=["secrets"]), "more than reading a Secret"),
        (lambda rule: rule.update(resources=["*"]), "a right on everything"),
        (lambda rule: rule.update(verbs=["delete"], resources=["pods"]), "writes pods"),
        (lambda rule: rule.update(apiGroups=["rbac.authorization.k8s.io"]), "gives rights"),
    ],
)
def test_the_invariants_see_what_they_are_for(render: Render, spoil: Callable[[dict[str, Any]], object], fault: str):
    manifests = render({})
    spoil(rules(manifests)[0])
    assert any(fault in found for found in greedy(manifests))


def test_the_definition_comes_as_it_is_and_stays():
    rendered = yaml.safe_load((CHART / "files" / "trainingruns.yaml").read_text())
    assert rendered["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_definition_is_left_out_where_it_comes_from_elsewhere(render: Render):
    assert [m["metadata"]["name"] for m in render({}) if m["kind"] == "CustomResourceDefinition"] == [
        "trainingruns.steadyhelm.dev"
    ]
    assert not [m for m in render({"crd": {"install": False}}) if m["kind"] == "CustomResourceDefinition"]


def test_with_namespaces_named_it_has_no_rights_elsewhere(render: Render):
    manifests = render({"namespaces": ["a", "b"]})
    assert sorted(m["metadata"]["namespace"] for m in manifests if m["kind"] == "Role") == ["a", "b"]
    assert not [m for m in manifests if m["kind"] == "ClusterRoleBinding"]
    assert {"--namespace=a", "--namespace=b"} <= set(pod(manifests).spec["containers"][0]["args"])


def test_it_reads_the_secrets_that_are_named_and_no_others(render: Render):
    (rule,) = (r for r in rules(render({"rbac": {"tokenSecrets": ["rl"]}})) if "secrets" in r["resources"])
    assert (rule["verbs"], rule["resourceNames"]) == (["get"], ["rl"])


def test_there_is_one_operator_at_a_time(render: Render):
    spec = one(render({}), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_it_reaches_heads_the_api_server_and_names_only(render: Render):
    (policy,) = (m for m in render({}) if m["kind"] == "NetworkPolicy")
    assert "ingress" not in policy["spec"]
    ports = [sorted(port["port"] for port in rule["ports"]) for rule in policy["spec"]["egress"]]
    assert ports == [[53, 53], [443, 6443], [8265, 8266]]
    assert policy["spec"]["egress"][2]["to"] == [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"ray.io/node-type": "head"}}}
    ]


def test_it_asks_for_names_at_the_ports_that_the_values_name(render: Render):
    (policy,) = (m for m in render({"networkPolicy": {"dnsPorts": [53, 5353]}}) if m["kind"] == "NetworkPolicy")
    ports = [(port["port"], port["protocol"]) for port in policy["spec"]["egress"][0]["ports"]]
    assert ports == [(53, "UDP"), (53, "TCP"), (5353, "UDP"), (5353, "TCP")]


@pytest.mark.parametrize(
    ("install", "says"), [("true", "takes it over with --take-ownership"), ("false", "has to come from elsewhere")]
)
def test_the_notes_say_whose_the_definition_is(helm: Path, install: str, says: str):
    command = [helm, "install", "o", CHART, "--dry-run=client", "--set", f"crd.install={install}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert says in notes
    assert notes.count("NOTE  ") == 1


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "steadyhelm-operator:0.1.0"),
        ({"registry": "r.example.org/t/", "tag": "x"}, None),
        ({"registry": "r.example.org/t", "tag": "x"}, "r.example.org/t/steadyhelm-operator:x"),
        ({"registry": "r.example.org/t", "name": "a.example.org/b:1"}, "a.example.org/b:1"),
    ],
)
def test_the_image_is_completed_unless_it_is_whole(render: Render, image: dict[str, str], reference: str | None):
    if reference is None:
        with pytest.raises(ValueError, match="registry"):
            render({"image": image})
        return
    assert pod(render({"image": image})).spec["containers"][0]["image"] == reference
