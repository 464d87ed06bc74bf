"""The schema must fit a Kubernetes resource: structural, one type per field, also across the variants of a union."""

from collections.abc import Iterator

from steadyhelm.config.load import schema

SCHEMA = schema()


def resolve(node: dict) -> dict:
    return SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def kind(node: dict) -> str:
    """The one type of a field, nullable or not; fails on a mixture."""
    node = resolve(node)
    options = node.get("anyOf", []) + node.get("oneOf", [])
    kinds = {kind(option) for option in options} - {"null"} if options else {node["type"]}
    assert len(kinds) == 1, f"mixed types {kinds} in {node}"
    only = kinds.pop()
    return f"array of {kind(node['items'])}" if only == "array" else only


def unions(node: dict, path: str = "") -> Iterator[tuple[str, list[dict]]]:
    node = resolve(node)
    if "oneOf" in node:
        yield path, [resolve(option) for option in node["oneOf"]]
    for option in [*node.get("oneOf", []), *node.get("anyOf", [])]:
        yield from unions(option, path)
    if "items" in node:
        yield from unions(node["items"], path + "[]")
    for name, child in node.get("properties", {}).items():
        yield from unions(child, f"{path}.{name}")


def test_no_field_mixes_types():
    fields = [child for part in [SCHEMA, *SCHEMA["$defs"].values()] for child in part.get("properties", {}).values()]
    assert len(fields) > 100
    for field in fields:
        kind(field)


def test_a_field_name_has_one_type_in_all_variants_of_a_union():
    found = dict(unions(SCHEMA))
    assert {".algorithm", ".reward.terms[]"} <= set(found)
    for path, variants in found.items():
        for name in {name for variant in variants for name in variant["properties"]}:
            kinds = {kind(variant["properties"][name]) for variant in variants if name in variant["properties"]}
            assert len(kinds) == 1, f"{path}.{name} is {kinds}"


def test_every_field_is_described_and_no_part_takes_unknown_keys():
    for part in [SCHEMA, *SCHEMA["$defs"].values()]:
        if part["type"] != "object":
            continue
        assert part["additionalProperties"] is False
        for name, field in part["properties"].items():
            assert field.get("description"), f"{part['title']}.{name} has no docstring"


def test_a_tuple_is_an_array_of_one_type_with_its_length():
    betas = SCHEMA["$defs"]["Learner"]["properties"]["betas"]
    assert (betas["items"], betas["minItems"], betas["maxItems"]) == (
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        2,
        2,
    )
    assert "prefixItems" not in str(SCHEMA)
