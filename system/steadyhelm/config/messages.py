"""The messages about a wrong run file: each names file and line, dotted path, value and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from steadyhelm.config.base import Part
from steadyhelm.config.fields import all_places, field_at, parts_at, parts_in
from steadyhelm.config.source import Place, Source, dotted

_LONGEST_VALUE = 60  # characters of a value that a message shows


def messages(root: type[Part], source: Source, error: ValidationError) -> list[str]:
    """One line per error, in the order of the file."""
    placed = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # pydantic counts only elements without errors, and those have messages of their own
        place = _place(source.value, detail["loc"])
        if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
            place = (*place, "type")
        text = _text(root, source, detail, place)
        if detail["type"] == "value_error" and (found := re.match(r"[a-z_]+(?:\.\w+)+", text)):
            place = tuple(int(step) if step.isdigit() else step for step in found[0].split("."))
        placed.append((source.lines.get(place, 0), f"{source.locate(place)}: {text}"))
    placed.sort(key=lambda item: item[0])
    return [text for _, text in placed]


def _place(value: Any, loc: tuple[int | str, ...]) -> Place:
    """Pydantic's location without the ``type`` values that it puts behind the place of a union."""
    place: list[int | str] = []
    for step in loc:
        if isinstance(value, dict) and value.get("type") == step and step not in value:
            continue
        place.append(step)
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            value = None
    return tuple(place)


def _text(root: type[Part], source: Source, detail: ErrorDetails, place: Place) -> str:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    path = dotted(place) or "the run file"
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown_key(root, source, place)
    if kind == "missing":
        return _missing(root, source, place)
    if kind == "union_tag_not_found":
        return f"{path} is missing: add it; its values are {_type_values(root, source, place)}"
    if kind == "union_tag_invalid":
        values = context["expected_tags"]
        hint = _did_you_mean(str(context["tag"]), re.findall(r"'([^']+)'", values))
        return f"{path} is {context['tag']!r}: its values are {values}{hint}"
    expected = _EXPECTED[kind](context) if kind in _EXPECTED else detail["msg"]
    meaning = _meaning(root, source, place) if kind == "string_pattern_mismatch" else ""
    hint = _did_you_mean(str(value), re.findall(r"'([^']+)'", expected)) if kind == "literal_error" else ""
    return f"{path} is {_shown(value)}: {expected}{hint}{meaning}"


_EXPECTED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "int_type": lambda _: "give a whole number",
    "int_from_float": lambda _: "give a whole number",
    "float_type": lambda _: "give a number",
    "finite_number": lambda _: "give a finite number",
    "string_type": lambda _: "give text, in quotes where it looks like something else",
    "bool_type": lambda _: "give true or false",
    "tuple_type": lambda _: "give a list, as [a, b]",
    "dict_type": lambda _: "give a mapping, as {key: value}",
    "model_type": lambda _: "give a mapping, as {key: value}",
    "model_attributes_type": lambda _: "give a mapping, as {key: value}",
    "literal_error": lambda c: f"give {c['expected']}",
    "greater_than": lambda c: f"give a number above {c['gt']}",
    "greater_than_equal": lambda c: f"give a number of at least {c['ge']}",
    "less_than": lambda c: f"give a number below {c['lt']}",
    "less_than_equal": lambda c: f"give a number of at most {c['le']}",
    "too_short": lambda c: f"give at least {c['min_length']} element(s), not {c['actual_length']}",
    "too_long": lambda c: f"give at most {c['max_length']} element(s), not {c['actual_length']}",
    "string_pattern_mismatch": lambda c: f"give text of the form {c['pattern']}",
}


def _unknown_key(root: type[Part], source: Source, place: Place) -> str:
    key = str(place[-1])
    known = sorted({name for part in parts_at(root, source.value, place[:-1]) for name in part.model_fields})
    near = difflib.get_close_matches(key, known, n=1)
    here = tuple(step for step in place if isinstance(step, str))
    elsewhere = [dotted(other) for other in all_places(root) if other[-1] == key and other != here]
    variants = [repr(kind) for kind in _variants_with(root, source, place)]
    if variants:
        remedy = f"remove it, or set {_parent(place)}.type to {_one_of(variants)}, which has it"
    elif near:
        remedy = f"did you mean {near[0]!r}?"
    elif elsewhere:
        remedy = f"did you mean {elsewhere[0]!r}?"
    else:
        remedy = f"remove it; {_parent(place)} has {', '.join(known)}"
    return f"{dotted(place)} is not a known key: {remedy}"


def _variants_with(root: type[Part], source: Source, place: Place) -> list[str]:
    """The types by which the union around ``place`` would have its key."""
    union = field_at(root, source.value, place[:-1])
    parts = [] if union is None else parts_in(union.annotation)
    return [part.model_fields["type"].default for part in parts if {"type", place[-1]} <= part.model_fields.keys()]


def _one_of(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _missing(root: type[Part], source: Source, place: Place) -> str:
    if isinstance(place[-1], int):
        return f"{dotted(place)} is missing: the list {_parent(place)} needs at least {place[-1] + 1} elements"
    return f"{dotted(place)} is missing: add '{place[-1]}:' to {_parent(place)}{_meaning(root, source, place)}"


def _type_values(root: type[Part], source: Source, place: Place) -> str:
    parts = parts_at(root, source.value, place[:-1])
    return ", ".join(repr(part.model_fields["type"].default) for part in parts)


def _meaning(root: type[Part], source: Source, place: Place) -> str:
    info = field_at(root, source.value, place)
    if info is None or not info.description:
        return ""
    return " (" + " ".join(info.description.replace("``", "").split()).rstrip(".") + ")"


def _did_you_mean(value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parent(place: Place) -> str:
    return dotted(place[:-1]) or "the run file"


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
