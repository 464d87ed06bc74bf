"""What the tree of the run file has at a place: its parts, fields and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from steadyhelm.config.base import Part
from steadyhelm.config.source import Place


def parts_in(annotation: Any) -> list[type[Part]]:
    """The part classes that an annotation mentions, in order: through Annotated, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts_in(argument)]


def parts_at(root: type[Part], value: Any, place: Place) -> list[type[Part]]:
    """The classes that the mapping at ``place`` of the document ``value`` may be; one where its ``type`` tells."""
    parts = [root]
    for step in place:
        value = _child(value, step)
        if isinstance(step, str):
            parts = [
                p for part in parts if step in part.model_fields for p in parts_in(part.model_fields[step].annotation)
            ]
        kind = value.get("type") if isinstance(value, dict) else None
        told = [part for part in parts if "type" in part.model_fields and part.model_fields["type"].default == kind]
        parts = told or parts
    return parts


def field_at(root: type[Part], value: Any, place: Place) -> FieldInfo | None:
    """The field that ``place`` names, or whose list element it is; None where there is none."""
    names = [(i, step) for i, step in enumerate(place) if isinstance(step, str)]
    if not names:
        return None
    index, name = names[-1]
    for part in parts_at(root, value, place[:index]):
        if name in part.model_fields:
            return part.model_fields[name]
    return None


def default_at(root: type[Part], value: Any, place: Place) -> Any:
    """The default of the field at ``place`` as a run file would write it: types, and what they do not imply.

    An empty mapping where it has none. Example: ``{"type": "stable_reinforce"}`` for ``algorithm``; its own defaults
    are left out, so that setting another ``type`` gives that variant's.
    """
    found = field_at(root, value, place)
    default = None if found is None or found.is_required() else found.get_default(call_default_factory=True)
    return {} if default is None else _written(default)


def _written(value: Any) -> Any:
    if isinstance(value, BaseModel):
        whole = value.model_dump(mode="json")
        kind = {"type": whole["type"]} if "type" in whole else {}
        return kind | value.model_dump(mode="json", exclude_defaults=True)
    return [_written(item) for item in value] if isinstance(value, tuple | list) else value


def plain(value: Any) -> Any:
    """Parts as mappings and tuples as lists, all the way down."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def all_places(root: type[Part], prefix: Place = ()) -> Iterator[Place]:
    """Every field of the tree once, without list indices, unions opened."""
    seen: set[Place] = set()
    for name, info in root.model_fields.items():
        for place in (
            (*prefix, name),
            *(p for part in parts_in(info.annotation) for p in all_places(part, (*prefix, name))),
        ):
            if place not in seen:
                seen.add(place)
                yield place


def _child(value: Any, step: str | int) -> Any:
    if isinstance(step, str):
        return value.get(step) if isinstance(value, dict) else None
    return value[step] if isinstance(value, list) and 0 <= step < len(value) else None
