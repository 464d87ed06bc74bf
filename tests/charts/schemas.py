"""Strict schemas: of Kubernetes (as kubernetes-validate ships them) and of custom resources (their CRDs)."""

import json
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.charts.objects import Manifest

KUBERNETES = "1.36"


class Loader(yaml.CSafeLoader):
    """Reads a lone ``=``, which CRDs have among their choices, as the text that it is."""


Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


def custom_resources(paths: Iterable[Path]) -> dict[tuple[str, str], Draft202012Validator]:
    """What judges the objects of every CustomResourceDefinition in the files, by apiVersion and kind."""
    found = {}
    for file in paths:
        for crd in yaml.load_all(file.read_text(), Loader):
            if crd["kind"] != "CustomResourceDefinition":
                continue
            for version in crd["spec"]["versions"]:
                key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
                found[key] = Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))
    return found


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema as JSON Schema that refuses unknown fields, which an API server prunes without a word."""
    schema = deepcopy(schema)
    schema["properties"] |= {"metadata": {"type": "object"}}

    def close(part: Any) -> None:
        if isinstance(part, list):
            for each in part:
                close(each)
        elif isinstance(part, dict):
            open_ended = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & part.keys()
            if isinstance(part.get("properties"), dict) and part.get("type") == "object" and not open_ended:
                part["additionalProperties"] = False
            if part.pop("x-kubernetes-int-or-string", False):
                part.pop("anyOf", None)
                part["type"] = ["integer", "string"]
            for each in part.values():
                close(each)

    close(schema)
    return schema


@cache
def kubernetes(kind: str, version: str) -> Draft202012Validator | None:
    """What judges built-in objects of a kind; None where Kubernetes has no such kind. ``version``: ``apps-v1``."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    file = folder / f"{kind.lower()}-{version}.json"
    if not file.is_file():
        return None
    definitions: Any = Resource.from_contents(
        json.loads((folder / "_definitions.json").read_text()), default_specification=DRAFT202012
    )
    registry: Any = Registry().with_resource("_definitions.json", definitions).crawl()
    return Draft202012Validator(json.loads(file.read_text()), registry=registry)


class Judge:
    """Says what is wrong with objects."""

    def __init__(self, custom: dict[tuple[str, str], Draft202012Validator]) -> None:
        self.custom = custom

    def knows(self, kind: str) -> bool:
        """Whether there is a schema of the custom resource ``kind``."""
        return any(kind == known for _, known in self.custom)

    def faults(self, manifest: Manifest) -> list[str]:
        """What no API server would take, or would drop; empty for a custom resource of an unknown kind."""
        group, _, version = manifest["apiVersion"].rpartition("/")
        validator = self.custom.get((manifest["apiVersion"], manifest["kind"]))
        if validator is None:
            validator = kubernetes(manifest["kind"], f"{group.partition('.')[0]}-{version}".lstrip("-"))
        if validator is None:
            assert (group, manifest["kind"]) == ("ray.io", "RayCluster"), f"no schema of {manifest['kind']}"
            return []
        name = f"{manifest['kind']} {manifest['metadata']['name']}"
        return [f"{name}: {error.json_path}: {error.message[:300]}" for error in validator.iter_errors(manifest)]

    def template_faults(self, template: dict[str, Any]) -> list[str]:
        """What is wrong with a pod template."""
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "of-a-group"}, "template": template}
        return self.faults(pod)
