"""What of the cluster's chart needs no helm: its schema, its examples, what it says of other parts of the system."""

import json
import re
import runpy
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from steadyhelm.config import RunFile
from steadyhelm.config.s3 import S3Address
from steadyhelm.driver import METRICS_ADDRESS
from steadyhelm.errors import ConfigError
from steadyhelm.telemetry.metrics import FAMILIES, METRICS
from steadyhelm.telemetry.prometheus import LatestMetrics, exposition

from tests.charts.objects import CLUSTER, EXAMPLES, ROOT
from tests.charts.values import closed_parts
from tests.unit.docs.markdown import anchors, files

SCHEMA = json.loads((CLUSTER / "values.schema.json").read_text())
VALUES = yaml.safe_load((CLUSTER / "values.yaml").read_text())
GENERATE = runpy.run_path(str(ROOT / "charts" / "generate.py"))


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values as helm puts them together."""
    both = {
        name: merged(under[name], over[name]) for name in under.keys() & over.keys() if isinstance(over[name], dict)
    }
    return {**under, **over, **both}


def test_the_schema_is_one_and_leaves_nothing_open():
    assert closed_parts(SCHEMA) > 100


def test_every_pool_takes_every_default():
    fixed = SCHEMA["definitions"]["fixedPool"]["properties"].keys()
    pools = {
        name: part.get("properties", {}).keys() or fixed
        for name, part in SCHEMA["properties"]["pools"]["properties"].items()
    }
    defaults = SCHEMA["properties"]["defaults"]["properties"].keys()
    assert {name: defaults - known for name, known in pools.items()} == {
        "head": {"gpus", "rayCpus"},  # the head computes nothing
        **{name: set() for name in ("rollout", "reference", "reward", "learner")},
    }


@pytest.mark.parametrize("file", [CLUSTER / "values.yaml", *EXAMPLES], ids=lambda file: file.stem)
def test_the_schema_takes_the_defaults_and_the_examples(file: Path):
    values = merged(VALUES, yaml.safe_load(file.read_text()))
    assert [error.message for error in Draft7Validator(SCHEMA).iter_errors(values)] == []


def test_the_schema_takes_the_values_on_the_page_for_users():
    values = yaml.safe_load(files(ROOT / "docs" / "kubernetes.md")["my-values.yaml"])
    assert [error.message for error in Draft7Validator(SCHEMA).iter_errors(merged(VALUES, values))] == []


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"pools": {"rolout": {"min": 1}}}, "$.pools"),
        ({"pools": {"rollout": {"mim": 1}}}, "$.pools.rollout"),
        ({"name": "n" * 46}, "$.name"),
        ({"pools": {"head": {"gpus": 1}}}, "$.pools.head"),
        ({"pools": {"rollout": {"gracePeriodSeconds": 300}}}, "$.pools.rollout.gracePeriodSeconds"),
        ({"defaults": {"cpu": "4 cores"}}, "$.defaults.cpu"),
        ({"defaults": {"env": {"AWS_SECRET_ACCESS_KEY": "x"}}}, "$.defaults.env"),
        ({"defaults": {"env": {"REDIS_USERNAME": "x"}}}, "$.defaults.env"),
        ({"pools": {"head": {"env": {"RAY_REDIS_ADDRESS": "redis:6379"}}}}, "$.pools.head.env"),
        ({"pools": {"head": {"env": {"RAY_enable_autoscaler_v2": "1"}}}}, "$.pools.head.env"),
        ({"networkPolicy": {"egress": [{"cidr": ":/0", "ports": [443]}]}}, "$.networkPolicy.egress[0].cidr"),
        ({"defaults": {"memory": "16GB"}}, "$.defaults.memory"),
        ({"defaults": {"mounts": {"/tmp": {"claim": "a"}}}}, "$.defaults.mounts"),
        ({"defaults": {"mounts": {"/data": {"claim": "a", "secret": "b"}}}}, "$.defaults.mounts['/data']"),
        ({"podLabels": {"ray.io/cluster": "other"}}, "$.podLabels"),
        ({"s3": {"uri": "s3://key:secret@bucket/runs"}}, "$.s3.uri"),
        ({"s3": {"accessKey": "AKIA"}}, "$.s3"),
        ({"defaults": {"shm": "64Mi"}}, "$.defaults.shm"),
        ({"uid": 0}, "$.uid"),
        ({"auth": {"mode": "open"}}, "$.auth.mode"),
        ({"autoscaling": None}, "$.autoscaling"),
    ],
    ids=lambda found: found if isinstance(found, str) else "",
)
def test_the_schema_refuses(values: dict[str, Any], place: str):
    errors = list(Draft7Validator(SCHEMA).iter_errors(merged(VALUES, values)))
    assert [error.json_path for error in errors] == [place]


@pytest.mark.parametrize(
    "values",
    [
        {"defaults": {"cpu": 2, "memory": "1500M", "runtimeClassName": "nvidia"}},
        {"defaults": {"cpu": "1.5", "image": f"registry.example.org:5000/team/learner:v1@sha256:{'a' * 64}"}},
        {"defaults": {"cpu": 0.5, "memory": "1.5Gi", "shm": "1.5Gi"}, "autoscaling": {"cpu": "0.05"}},
        {"pools": {"reward": {"env": {"REDIS_USERNAME": "judge"}}}},
        {"image": {"tag": "t" * 128}, "defaults": {"image": f"learner:{'t' * 128}"}},
        {"global": {"imageRegistry": "registry.example.org"}},
        {"defaults": {"image": f"learner@sha256:{'0' * 64}"}},
        {"defaults": {"tolerations": [{"key": "gpu", "value": "true", "effect": "NoExecute"}, {"key": "spot"}]}},
        {"networkPolicy": {"apiFrom": ["n" * 63], "egress": [{"cidr": "::/0", "ports": [443]}]}},
        {"networkPolicy": {"egress": [{"cidr": "2001:db8:1:2:3:4:5:6/128", "ports": [443]}]}},
        {"s3": {"credentialsSecret": "team.s3", "uri": "s3://bucket/runs?endpoint=http://[fd00::1]:9000"}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_schema_takes_what_kubernetes_takes(values: dict[str, Any]):
    assert [error.message for error in Draft7Validator(SCHEMA).iter_errors(merged(VALUES, values))] == []


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/.runs/..a/...",
        "s3://bucket/runs?endpoint=http://[fd00::1]:9000/&region=eu-central-1",
        "s3://bucket/runs?endpoint=https://minio.minio.svc/below&path_style=0",
        "s3://bucket/runs?endpoint=http://host:65535",
        "s3://bucket/runs?timeout_s=5&deadline_s=0.05",
    ],
)
def test_the_store_is_an_address_by_the_schema_and_by_the_system(uri: str):
    assert S3Address.parse(uri).bucket == "bucket"
    assert not store_faults(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/runs?secret_access_key=CANARY",
        "s3://bucket/runs?regoin=eu",
        "s3://bucket/runs?endpoint=foo",
        "s3://bucket/runs?endpoint=minio:9000",
        "s3://bucket/runs?endpoint=ftp://host",
        "s3://bucket/runs?endpoint=http://",
        "s3://bucket/runs?endpoint=http://host:0",
        "s3://bucket/runs?endpoint=http://host:65536",
        "s3://bucket/runs?endpoint=http://key:secret@host",
        "s3://bucket/runs?path_style=true",
        "s3://bucket/runs?timeout_s=abc",
        "s3://bucket/runs?deadline_s=0",
        "s3://bucket/../x",
        "s3://bucket/./x",
        "s3://bucket/..",
    ],
)
def test_what_is_no_address_to_the_system_is_none_to_the_schema(uri: str):
    with pytest.raises(ConfigError):
        S3Address.parse(uri)
    assert store_faults(uri)


def store_faults(uri: str) -> list[str]:
    """What the schema says against a store."""
    return [error.message for error in Draft7Validator(SCHEMA).iter_errors(merged(VALUES, {"s3": {"uri": uri}}))]


def paths(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The dotted path of every value that the schema has a name for."""
    for name, value in values.items():
        known = schema.get("properties", {}).get(name, {})
        known = SCHEMA["definitions"][known["$ref"].rpartition("/")[2]] if "$ref" in known else known
        if value and isinstance(value, dict) and known.get("properties"):
            yield from paths(value, known, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_every_value_is_explained_where_it_stands():
    explained = {path for path, _ in GENERATE["documented"]((CLUSTER / "values.yaml").read_text())}
    inherited = {path.removeprefix("defaults.") for path in explained if path.startswith("defaults.")}
    bare = set(paths(VALUES, SCHEMA)) - explained
    assert {
        path for path in bare if not re.fullmatch(r"pools\.\w+\.(\w+)", path) or path.split(".")[2] not in inherited
    } == set()
    assert {path for path in explained if path not in set(paths(VALUES, SCHEMA))} == set()


@pytest.mark.parametrize("file", GENERATE["FILES"], ids=lambda file: file.name)
def test_what_is_made_is_up_to_date(file: Path):
    assert file.read_text() == GENERATE["FILES"][file](), f"{file} is out of date: run python charts/generate.py"


def exported() -> set[str]:
    """The names of all metrics that a driver can export, as Prometheus reads them."""
    latest = LatestMetrics("r")
    latest.update(dict.fromkeys((*METRICS, *(f"{prefix}/x" for prefix in FAMILIES)), 1.0))
    return set(re.findall(r"^(steadyhelm_\w+)\{", exposition(latest), re.MULTILINE))


def named(text: str) -> set[str]:
    return set(re.findall(r"steadyhelm_\w+", text))


def test_the_dashboard_names_metrics_that_exist():
    panels = json.loads((CLUSTER / "files" / "dashboard.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(panels) > 10
    assert all(named(expression) for expression in expressions)
    assert named(" ".join(expressions)) <= exported()


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CLUSTER / "files" / "alerts.yaml").read_text())["groups"]
    return group["rules"]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_names_metrics_that_exist_its_cluster_and_a_page_that_helps(rule: dict[str, Any]):
    assert named(rule["expr"])
    assert named(rule["expr"]) <= exported()
    assert rule["expr"].count("{CLUSTER") == len(re.findall(r"steadyhelm_", rule["expr"]))
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (page, anchor) == ("RUNBOOK", rule["alert"].lower())
    assert anchor in anchors(ROOT / VALUES["monitoring"]["alerts"]["runbook"])


def test_the_smoke_run_is_a_run_file_with_a_task_of_its_own():
    folder = CLUSTER / "files" / "smoke"
    run = RunFile.model_validate(yaml.safe_load((folder / "smoke.yaml").read_text()))
    assert (run.schedule.iterations, run.store.uri) == (1, "STORE")
    task = runpy.run_path(str(folder / "smoke.py"))
    pairs = task["pairs"]()
    assert [(pair.responses[0], pair.label) for pair in pairs] == [
        (name, 1) for name in ("red", "green", "blue", "black")
    ]
    assert (
        {run.model.factory, run.data.train} == {"smoke.py:model", "smoke.py:pairs"} <= {f"smoke.py:{n}" for n in task}
    )


def test_the_smoke_runs_model_is_a_model_folder(tmp_path: Path):
    from steadyhelm.models.folder import require_model_folder

    runpy.run_path(str(CLUSTER / "files" / "smoke" / "smoke.py"))["model"](tmp_path / "model", 0)
    require_model_folder(tmp_path / "model")


def test_versions_and_names_are_those_of_the_system():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = (need for need in project["optional-dependencies"]["train"] if need.startswith("ray["))
    assert ray.endswith(f"=={VALUES['rayVersion']}")
    assert yaml.safe_load((CLUSTER / "Chart.yaml").read_text())["appVersion"] == project["version"]
    assert METRICS_ADDRESS in (CLUSTER / "templates" / "_pod.tpl").read_text()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_stores_of_the_examples_are_addresses(file: Path):
    uri = yaml.safe_load(file.read_text())["s3"].get("uri")
    assert uri is None or str(S3Address.parse(uri)) == uri


def test_the_head_ends_after_its_drivers(tmp_path: Path):
    """What finds drivers, finds them by the name of the command, and not itself or a shell that speaks of them."""
    script = (CLUSTER / "files" / "stop-drivers.sh").read_text()
    (find,) = re.findall(r"grep .*?(?= 2>)", script)
    processes = {
        "10": ["/opt/python3.11", "/opt/bin/steadyhelm", "run", "digits.yaml"],
        "11": ["steadyhelm", "sft", "a.yaml"],
        "20": ["/bin/bash", "-c", script],
        "21": ["/bin/sh", "-c", "steadyhelm run digits.yaml"],
        "22": ["ray::steadyhelm-rollout"],
        "23": [*find.split()[:2], find.split("'")[1], "/proc/10/cmdline"],
    }
    for pid, words in processes.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    found = subprocess.run(
        ["bash", "-c", find.replace("/proc/", f"{tmp_path}/")], capture_output=True, text=True, check=True
    )
    assert sorted(Path(line).parent.name for line in found.stdout.split()) == ["10", "11"]
