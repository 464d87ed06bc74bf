"""The CRD: what Kubernetes asks of a schema, and that it says the same as the run file's own checks."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from steadyhelm.config.load import load_run_file, validate
from steadyhelm.config.source import Source
from steadyhelm.errors import ConfigError
from steadyhelm_operator.api import RunFile, Spec

from tests.operator.judge import CRD, SCHEMA, faults
from tests.operator.objects import run_file, training_run

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "charts" / "steadyhelm-operator" / "files" / "trainingruns.yaml"
RUN_FILES = sorted((ROOT / "workloads").glob("*/*.yaml"))


def places(schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in the schema, with the fields that lead to it."""
    yield place, schema
    for name, field in schema.get("properties", {}).items():
        yield from places(field, f"{place}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from places(schema[key], f"{place}[]")


ALL = dict(places(SCHEMA))


def test_it_is_small_enough_to_be_applied_as_it_lies_in_the_chart():
    assert len(FILE.read_bytes()) < 60_000


@pytest.mark.parametrize(
    "word", ["$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "const", "default", "title", "prefixItems"]
)
def test_a_structural_schema_has_no(word: str):
    assert [place for place, schema in ALL.items() if word in schema] == []


def test_every_place_has_one_type_and_says_what_may_be_below():
    assert len(ALL) > 150
    for place, schema in ALL.items():
        assert schema["type"] in {"object", "array", "string", "integer", "number", "boolean"}, place
        if schema["type"] == "object" and place != ".metadata":
            below = {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
            assert len(below) == 1, place
        if schema["type"] == "array":
            assert "items" in schema, place
        for bound in ("minimum", "maximum"):
            assert schema.get(f"exclusive{bound.capitalize()}", True) is True, place


def test_only_the_clusters_spec_is_open():
    opened = [place for place, schema in ALL.items() if "x-kubernetes-preserve-unknown-fields" in schema]
    assert opened == [".spec.cluster.template.spec"]


def test_every_field_is_explained():
    bare = {place for place, schema in ALL.items() if "description" not in schema and not place.endswith("[]")}
    assert bare - {"", ".metadata"} == set()


def test_it_has_every_field_of_the_run_file():
    def fields(part: type[Any]) -> set[str]:
        return set(part.model_fields)

    properties = ALL[".spec.run"]["properties"]
    assert set(properties) == fields(RunFile)
    for name in ("model", "data", "rollout", "reference", "reward", "learner", "schedule", "store", "runtime"):
        assert set(properties[name]["properties"]) == fields(RunFile.model_fields[name].annotation)
    assert set(ALL[".spec"]["properties"]) == {"run", "files", "id", "cluster", "suspend", "failurePolicy", "cleanup"}
    assert ALL[".spec.run.algorithm.type"]["enum"] == [
        "dr_grpo",
        "grpo",
        "reinforce_pp",
        "rloo",
        "sft",
        "stable_reinforce",
    ]


def test_descriptions_tell_defaults_that_are_not_stamped():
    assert ALL[".spec.run.learner.lr"]["description"] == "Peak learning rate. Default: 1e-06."
    assert ALL[".spec.run.algorithm.aggregation"]["description"].endswith(
        "Default: constant for dr_grpo, sequence for grpo, reinforce_pp, rloo or stable_reinforce, token for sft."
    )
    assert ALL[".spec.failurePolicy.maxAttempts"]["description"].endswith("Default: 4.")


def test_columns_show_fields_of_the_status():
    for column in CRD["spec"]["versions"][0]["additionalPrinterColumns"]:
        path = column["jsonPath"]
        if path.startswith(".status"):
            kind = ALL[path]["type"]
            assert column["type"] == kind, path


def as_the_operator_does(document: Any) -> str:
    """What the whole check says to a run file; nothing where it is right."""
    try:
        validate(Source(name="spec.run", value=document, lines={}))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_run_files_of_the_workloads_are_taken(file: Path):
    assert faults(training_run(yaml.safe_load(load_run_file(file).model_dump_json(exclude_unset=True)))) == []


GOOD = {
    "least": run_file(),
    "sft": run_file(algorithm={"type": "sft", "aggregation": "token"}, data={"train": "a.py:b", "swap": "none"}),
    "grpo": run_file(algorithm={"type": "grpo", "beta": 0.1}, rollout={"samples_per_prompt": 8}),
    "release": run_file(algorithm={"type": "stable_reinforce", "normalization": "release"}),
    "vllm": run_file(rollout={"engine": {"type": "vllm", "args": ["--enforce-eager"]}}),
    "external": run_file(
        rollout={"engine": {"type": "external", "server": "vllm", "urls": ["http://a:1"], "weights_folder": "/w"}}
    ),
    "terms": run_file(reward={"terms": [{"type": "custom", "name": "mine", "code": "a.py:b"}], "combine": "sum"}),
    "scaling": run_file(rollout={"scaling": {"min": 1, "max": 4}}),
    "stale": run_file(schedule={"iterations": 9, "max_staleness": 2, "drop_staler_than": 1}),
    "pixels": run_file(data={"train": "a.py:b", "min_pixels": 1, "max_pixels": 2}),
    "eval": run_file(data={"train": "a.py:b", "eval": "a.py:c"}, schedule={"iterations": 9, "eval_every": 3}),
    "path": run_file(model={"path": "/models/qwen"}),
}


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD)
def test_the_api_server_takes_what_the_operator_takes(document: dict[str, Any]):
    assert as_the_operator_does(document) == ""
    assert faults(training_run(document)) == []


BAD = {
    "a field of another objective": (run_file(algorithm={"type": "grpo", "gamma": 0.5}), "gamma needs type"),
    "no objective": (run_file(algorithm={"beta": 0.5}), "'type' is a required property"),
    "an unknown objective": (run_file(algorithm={"type": "ppo"}), "is not one of"),
    "a choice of another objective": (
        run_file(algorithm={"type": "sft", "aggregation": "constant"}, data={"train": "a.py:b", "swap": "none"}),
        "aggregation is sequence or token where type is sft",
    ),
    "beta in fine-tuning": (
        run_file(algorithm={"type": "sft", "beta": 0.1}, data={"train": "a.py:b", "swap": "none"}),
        "beta needs type",
    ),
    "an engine that lacks its servers": (
        run_file(rollout={"engine": {"type": "external", "server": "vllm", "weights_folder": "/w"}}),
        "type external needs urls",
    ),
    "arguments for no server": (run_file(rollout={"engine": {"type": "transformers", "args": []}}), "args needs type"),
    "a term without code": (
        run_file(reward={"terms": [{"type": "custom", "name": "a"}], "combine": "sum"}), "type custom needs code",
    ),
    "a mode that the term has not": (
        run_file(reward={"terms": [{"type": "format", "mode": "strict"}], "combine": "sum"}), "mode needs type",
    ),
    "an anchor in shared memory": (run_file(weights={"type": "local", "anchor_every": 2}), "anchor_every needs type"),
    "two models": (run_file(model={"path": "/m", "factory": "a.py:b"}), "exactly one of path and factory"),
    "no model": (run_file(model={}), "exactly one of path and factory"),
    "bounds the wrong way": (run_file(rollout={"scaling": {"min": 4, "max": 2}}), "min must not be above max"),
    "pixels the wrong way": (run_file(data={"train": "a.py:b", "min_pixels": 3, "max_pixels": 2}), "min_pixels must"),
    "a drop that drops nothing": (run_file(schedule={"iterations": 9, "drop_staler_than": 1}), "drop_staler_than must"),
    "evaluation of nothing": (run_file(schedule={"iterations": 9, "eval_every": 1}), "needs held-out pairs"),
    "a typo": (run_file(learner={"learning_rate": 1.0}), "'learning_rate' was unexpected"),
    "text for a number": (run_file(seed="1"), "is not of type 'integer'"),
    "a rate of zero": (run_file(learner={"lr": 0}), "less than or equal to the minimum"),
    "a name in capitals": (run_file(name="Digits"), "does not match"),
    "no iterations": (run_file(schedule={}), "'iterations' is a required property"),
}  # fmt: skip


@pytest.mark.parametrize(("document", "words"), BAD.values(), ids=BAD)
def test_the_api_server_refuses_what_the_operator_refuses(document: dict[str, Any], words: str):
    assert as_the_operator_does(document) != ""
    found = faults(training_run(document))
    assert found
    assert any(words in fault for fault in found), found


SPECS = {
    "both clusters": ({"cluster": {"name": "rl", "template": {"spec": {}}}}, "exactly one of name and template"),
    "no cluster": ({"cluster": {}}, "exactly one of name and template"),
    "a misspelt field": ({"suspended": True}, "'suspended' was unexpected"),
    "no attempts": ({"failurePolicy": {"maxAttempts": 0}}, "less than the minimum"),
    "an unknown cleanup": ({"cleanup": {"cluster": "Remove"}}, "is not one of"),
}


@pytest.mark.parametrize(("spec", "words"), SPECS.values(), ids=SPECS)
def test_the_api_server_refuses_a_spec(spec: dict[str, Any], words: str):
    assert any(words in fault for fault in faults(training_run(**spec)))
    with pytest.raises(ValueError, match=r"spec|validation"):
        Spec.model_validate_json(json.dumps({"run": run_file(), "cluster": {"name": "rl"}, **spec}))


@pytest.mark.parametrize(
    ("name", "right"), [("a-1", True), ("1a", False), ("a" * 53, True), ("a" * 54, False), ("a.b", False)]
)
def test_the_name_is_one_that_a_raycluster_can_have(name: str, right: bool):
    assert (faults(training_run(name=name)) == []) is right


def test_what_identifies_a_run_cannot_change():
    before = training_run(id="a")
    for change, words in (
        ({"id": "b"}, "id cannot change"),
        ({"cluster": {"name": "other"}}, "name cannot change"),
        ({"cluster": {"template": {"spec": {}}}}, "name cannot change"),
    ):
        after = copy.deepcopy(before)
        after["spec"] |= change
        assert any(words in fault for fault in faults(after, before))
    without = copy.deepcopy(before)
    del without["spec"]["id"]
    assert any("id cannot change" in fault for fault in faults(without, before))
    after = copy.deepcopy(before)
    after["spec"] |= {"suspend": True, "run": run_file(seed=3)}
    assert faults(after, before) == []


def test_the_schema_changes_nothing_about_a_run_file():
    """No defaults are stamped, so an object reads back as it was written, and a run's checksum stays."""
    assert all("default" not in schema for schema in ALL.values())
