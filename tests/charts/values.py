"""A chart's schema of values: whether it is closed, and any values by it, as a Hypothesis strategy."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st
from jsonschema import Draft7Validator

Schema = dict[str, Any]
NOTHING: Mapping[str, Any] = {}
FEW = 2


def values(schema: Schema, chart: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Values that a user may give: any part of what ``schema`` knows, but all that ``chart``'s own values lack."""
    return _strategy(schema, schema, chart)


def _strategy(schema: Schema | bool, root: Schema, chart: Any = NOTHING) -> st.SearchStrategy[Any]:
    if schema is True:
        return st.dictionaries(st.sampled_from(("registry", "team")), st.booleans())
    assert not isinstance(schema, bool)
    if "$ref" in schema:
        found = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return _strategy(found, root, chart)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "oneOf" in schema:
        return st.one_of([_strategy(option, root) for option in schema["oneOf"]])
    if "allOf" in schema:
        first, second = schema["allOf"]
        refused = re.compile(second["not"]["pattern"])
        return _strategy(first, root).filter(lambda text: refused.search(text) is None)
    match schema.get("type", "string"):
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema["minimum"], schema["maximum"])
        case "number":
            thousandths = st.integers(round(schema["minimum"] * 1000), round(schema["maximum"] * 1000))
            return thousandths.map(lambda number: number / 1000)
        case "string":
            return st.from_regex(schema["pattern"], fullmatch=True, alphabet=st.characters(max_codepoint=126))
        case "array":
            least = schema.get("minItems", 0)
            unique = repr if schema.get("uniqueItems") else None
            items = _strategy(schema["items"], root)
            return st.lists(items, min_size=least, max_size=max(least, FEW), unique_by=unique)
        case "object":
            return _object(schema, root, chart)
    raise AssertionError(f"the strategy does not know {schema}")


def _object(schema: Schema, root: Schema, chart: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    if schema.get("additionalProperties"):
        names = _strategy(schema["propertyNames"], root)
        return st.dictionaries(names, _strategy(schema["additionalProperties"], root), max_size=FEW)
    assert schema["additionalProperties"] is False, "a strict schema says what is allowed"
    parts = {
        name: _strategy(part, root, chart.get(name, NOTHING)) for name, part in schema.get("properties", {}).items()
    }
    needed = set(schema.get("required", ())) - chart.keys()
    return st.fixed_dictionaries(
        {name: part for name, part in parts.items() if name in needed},
        optional={name: part for name, part in parts.items() if name not in needed},
    )


def closed_parts(schema: dict[str, Any]) -> int:
    """How many parts a chart's schema of values has, each of which leaves nothing open."""
    Draft7Validator.check_schema(schema)
    found = list(schemas(schema))
    for part in found:
        match part["type"]:
            case "object":
                assert part.get("additionalProperties") is False or "propertyNames" in part, part
            case "string":
                assert re.fullmatch(r"\^.*\$", part["pattern"]), part
            case "integer" | "number":
                assert {"minimum", "maximum"} <= part.keys(), part
    return len(found)


def schemas(part: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema."""
    if isinstance(part, dict):
        if "type" in part and isinstance(part["type"], str):
            yield part
        for each in part.values():
            yield from schemas(each)
    elif isinstance(part, list):
        for each in part:
            yield from schemas(each)
