"""What an API server says to a TrainingRun: the CRD's schema by jsonschema, its rules by a CEL library."""

from collections.abc import Iterator
from typing import Any

import cel
from jsonschema import Draft4Validator
from steadyhelm_operator.crd import crd

from tests.charts.schemas import closed

CRD = crd()
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
VALIDATOR = Draft4Validator(closed(SCHEMA))


def faults(found: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with an object, or with the update that makes it of ``before``."""
    by_schema = [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(found)]
    return by_schema or list(broken(SCHEMA, found, before))


def broken(schema: dict[str, Any], value: Any, before: Any = None, place: str = "$") -> Iterator[str]:
    """The messages of rules that do not hold, all the way down; those of a transition only where there was a value."""
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = "oldSelf" in rule["rule"]
        if transition and before is None:
            continue
        given = {"self": value, **({"oldSelf": before} if transition else {})}
        if cel.evaluate(rule["rule"], given) is not True:
            yield f"{place}: {rule['message']}"
    if isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            if name in value:
                old = before.get(name) if isinstance(before, dict) else None
                yield from broken(field, value[name], old, f"{place}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from broken(schema["items"], item, None, f"{place}[{index}]")
