"""The CustomResourceDefinition of ``TrainingRun``, made from the pydantic tree.

Kubernetes takes *structural* schemas only: no references, one type at each place, no choice between types. So
references are put in, an optional field is a field, and a union by ``type`` becomes one object with the fields of all
variants, whose rules in CEL (the Common Expression Language) say which fields belong to which ``type``. Defaults are
told in descriptions but not stamped into objects: a later version may choose others for runs that left them open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from steadyhelm.config.load import RunFileSchema

from steadyhelm_operator.api import GROUP, KIND, PLURAL, VERSION, TrainingRun

Schema = dict[str, Any]
Rule = tuple[str, str]

RULES: Mapping[str, tuple[Rule, ...]] = {
    "TrainingRun": (
        (
            "self.metadata.name.size() <= 53 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "the name must begin with a letter and have at most 53 lower-case letters, digits and dashes",
        ),
    ),
    "Spec": (
        (
            "has(self.id) == has(oldSelf.id) && (!has(self.id) || self.id == oldSelf.id)",
            "id cannot change: make another TrainingRun",
        ),
    ),
    "Cluster": (
        ("has(self.name) != has(self.template)", "give exactly one of name and template"),
        (
            "has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)",
            "the cluster's name cannot change: make another TrainingRun",
        ),
    ),
    "Model": (
        (
            "(has(self.path) && self.path != '') != has(self.factory)",
            "give exactly one of path and factory",
        ),
    ),
    "Data": (
        (
            "!has(self.min_pixels) || !has(self.max_pixels) || self.min_pixels <= self.max_pixels",
            "min_pixels must not be above max_pixels",
        ),
    ),
    "Scaling": (("!has(self.min) || self.min <= self.max", "min must not be above max"),),
    "Schedule": (
        (
            "!has(self.drop_staler_than) || (has(self.max_staleness) && self.drop_staler_than < self.max_staleness)",
            "drop_staler_than must be below max_staleness",
        ),
    ),
    "RunFile": (
        (
            "!has(self.schedule.eval_every) || self.schedule.eval_every == 0 || has(self.data.eval)",
            "schedule.eval_every needs held-out pairs: name them in data.eval, or set it to 0",
        ),
    ),
}
"""Rules between fields, by class: what can be said at once. The operator checks a run file whole, and says it then."""

LIMITS: Mapping[tuple[str, str], Schema] = {("Reward", "terms"): {"maxItems": 64}}
"""Bounds by class and field, without which the API server could not bound what a rule below costs."""

COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress", 0),
    ("Reward", "number", ".status.reward", 0),
    ("Engines", "string", ".status.engines", 0),
    ("Attempt", "integer", ".status.attempt", 0),
    ("Reason", "string", ".status.reason", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Policy", "string", ".status.policyVersion", 1),
    ("Accuracy", "number", ".status.accuracy", 1),
    ("Staleness", "number", ".status.staleness", 1),
    ("Checkpoint", "integer", ".status.checkpoint.iteration", 1),
    ("Cluster", "string", ".status.cluster", 1),
    ("Message", "string", ".status.message", 1),
)
"""What ``kubectl get trainingruns`` shows: title, type, place, and 1 where it takes ``-o wide``."""

_KEPT = ("type", "format", "pattern", "enum", "minLength", "maxLength", "minItems", "maxItems", "maxProperties")


def crd() -> Schema:
    """The CustomResourceDefinition. Helm keeps it when the chart goes, since its removal would delete all runs."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}", "annotations": {"helm.sh/resource-policy": "keep"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "trainingrun",
                "shortNames": ["trun"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": place, **({"priority": wide} if wide else {})}
                        for name, kind, place, wide in COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": schema()},
                }
            ],
        },
    }


def schema() -> Schema:
    """The structural schema of a ``TrainingRun``."""
    tree = TrainingRun.model_json_schema(by_alias=True, schema_generator=RunFileSchema)
    made = _structural(tree | {"title": "TrainingRun"}, tree["$defs"])
    given = {
        "apiVersion": {"type": "string", "description": "Version of the resource's form."},
        "kind": {"type": "string", "description": KIND},
        "metadata": {"type": "object"},
    }
    made["properties"] = given | made["properties"]
    return made


def _structural(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """``node`` without references, choices and defaults."""
    node = _resolved(node, definitions)
    if "oneOf" in node:
        return _union(node, definitions)
    made: Schema = {key: node[key] for key in _KEPT if key in node}
    if "const" in node:
        made["enum"] = [node["const"]]
    for bound in ("minimum", "maximum"):
        strict = f"exclusive{bound.capitalize()}"
        if strict in node:
            made |= {bound: node[strict], strict: True}
        elif bound in node:
            made[bound] = node[bound]
    title = node.get("title", "")
    if "items" in node:
        made["items"] = _structural(node["items"], definitions)
    if "properties" in node:
        made["properties"] = {
            name: _structural(field, definitions) | LIMITS.get((title, name), {})
            for name, field in node["properties"].items()
        }
        if node.get("required"):
            made["required"] = node["required"]
        _ruled(made, RULES.get(title, ()))
    elif isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _structural(node["additionalProperties"], definitions)
    elif made.get("type") == "object":
        made["x-kubernetes-preserve-unknown-fields"] = True
    return _told(node) | made


def _resolved(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """``node`` with what it refers to; its own words come before those of the class."""
    if "$ref" in node:
        found = definitions[node["$ref"].rpartition("/")[2]]
        return _resolved({**found, **{key: value for key, value in node.items() if key != "$ref"}}, definitions)
    if "anyOf" in node:
        options = [option for option in node["anyOf"] if option != {"type": "null"}]
        rest = {key: value for key, value in node.items() if key != "anyOf"}
        if len(options) == 1:
            return _resolved({**options[0], **rest}, definitions)
        choices = [choice for option in options for choice in option.get("enum", [option.get("const")])]
        if not all(isinstance(choice, str) for choice in choices):
            raise TypeError(f"a field has more than one type, which Kubernetes cannot hold: {node}")
        return {**rest, "type": "string", "enum": choices}
    return node


def _union(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """One object for all variants, with rules that say which fields belong to which ``type``."""
    variants = {
        tag: _resolved({"$ref": reference}, definitions) for tag, reference in node["discriminator"]["mapping"].items()
    }
    tags = list(variants)
    words = (f"`{tag}`: {_summary(variant.get('description', ''))}" for tag, variant in variants.items())
    properties: Schema = {"type": {"description": " ".join(words), "type": "string", "enum": tags}}
    rules: list[Rule] = []
    names = dict.fromkeys(name for variant in variants.values() for name in variant["properties"] if name != "type")
    needed_by_all = ["type"]
    for name in names:
        owners = {
            tag: variant["properties"][name] for tag, variant in variants.items() if name in variant["properties"]
        }
        properties[name], narrower = _merged(name, {tag: _structural(f, definitions) for tag, f in owners.items()})
        rules += narrower
        if len(owners) < len(tags):
            rules.append((f"!has(self.{name}) || {_is(owners)}", f"{name} needs type {_or(owners)}"))
        needing = [tag for tag in owners if name in variants[tag].get("required", ())]
        if len(needing) == len(tags):
            needed_by_all.append(name)
        elif needing:
            rules.append((f"!({_is(needing)}) || has(self.{name})", f"type {_or(needing)} needs {name}"))
    made: Schema = {"type": "object", "properties": properties, "required": needed_by_all}
    _ruled(made, rules)
    return _told(node) | made


def _merged(name: str, found: Mapping[str, Schema]) -> tuple[Schema, list[Rule]]:
    """One schema for a field that several variants have; choices are joined, and rules keep each to its own."""
    widest = max(found.values(), key=lambda field: len(field.get("enum", ())))
    texts = {tag: field.get("description", "") for tag, field in found.items()}
    ends = {tag: re.search(r" Default: (.*)\.$", text) for tag, text in texts.items()}
    defaults = {tag: end[1] for tag, end in ends.items() if end}
    made = dict(widest)
    if len(set(defaults.values())) > 1:
        told = ", ".join(
            f"{value} for {_or([t for t in defaults if defaults[t] == value])}" for value in _once(defaults)
        )
        made["description"] = re.sub(r" Default: .*\.$", "", widest.get("description", "")) + f" Default: {told}."
    rules = []
    for tag, field in found.items():
        if _bare(field) == _bare(widest):
            continue
        if not set(field.get("enum", ())) < set(widest.get("enum", ())) or _bare(field, "enum") != _bare(
            widest, "enum"
        ):
            raise TypeError(f"the field {name!r} differs between the variants of a union: give it one type in all")
        rule = f"self.type != '{tag}' || !has(self.{name}) || self.{name} in {_list(field['enum'])}"
        rules.append((rule, f"{name} is {_or(field['enum'])} where type is {tag}"))
    return made, rules


def _bare(field: Any, *without: str) -> Any:
    """``field`` without its words."""
    if isinstance(field, dict):
        left = {"description", *without}
        return {
            key: _bare(value) for key, value in field.items() if key not in left or not isinstance(value, str | list)
        }
    return field


def _ruled(made: Schema, rules: Iterable[Rule]) -> None:
    if rules:
        made["x-kubernetes-validations"] = [{"rule": rule, "message": message} for rule, message in rules]


def _default(node: Schema) -> str:
    """The default in words; empty where there is none, or nothing that one could write."""
    value = node.get("default")
    if value in (None, "", {}, []):
        return ""
    if isinstance(value, dict):
        return str(value.get("type", ""))
    if isinstance(value, list) and isinstance(value[0], dict):
        return ", ".join(str(item["type"]) for item in value)
    return value if isinstance(value, str) else json.dumps(value)


def _told(node: Schema) -> Schema:
    """The description of ``node``, with its default; nothing where there is neither."""
    default = _default(node)
    text = _words(node.get("description", "")) + (f" Default: {default}." if default else "")
    return {"description": text} if text else {}


def _words(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _summary(text: str) -> str:
    """The first paragraph."""
    return _words(text.partition("\n\n")[0])


def _is(tags: Iterable[str]) -> str:
    first, *more = tags
    return f"self.type in {_list([first, *more])}" if more else f"self.type == '{first}'"


def _once(values: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(values.values()))


def _list(values: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"


def _or(values: Iterable[str]) -> str:
    *first, last = values
    return f"{', '.join(first)} or {last}" if first else last
