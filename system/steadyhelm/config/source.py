"""YAML with line numbers: what the messages about a run file point at.

Scalars follow YAML 1.2's core schema: ``1e-4`` is a number; ``yes``, ``12:30`` and ``2026-01-01`` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from steadyhelm.errors import ConfigError

Place = tuple[str | int, ...]
"""A place in the run file: keys and list indices. Example: ``("reward", "terms", 0, "weight")``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A parsed YAML document with the line of every node.

    ``lines`` maps a place to its line, from 1; for an entry of a mapping, the line of its key. ``overrides`` names
    what replaced a node from outside the file, such as ``--set a.b=c``.
    """

    name: str
    value: Any
    lines: dict[Place, int]
    overrides: dict[Place, str] = field(default_factory=dict)

    def locate(self, place: Place) -> str:
        """Where ``place`` is written, or else the nearest node around it: ``file.yaml:12`` or ``--set a.b=c``."""
        for length in range(len(place), -1, -1):
            if place[:length] in self.overrides:
                return self.overrides[place[:length]]
            if place[:length] in self.lines:
                return f"{self.name}:{self.lines[place[:length]]}"
        return self.name


def dotted(place: Place) -> str:
    """``("reward", "terms", 0, "weight")`` as ``"reward.terms.0.weight"``."""
    return ".".join(str(part) for part in place)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's scalars and without aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node. Raises ComposerError at an alias, whose expansion a message could not point at."""
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]  # the stubs leave the parser's methods bare
            mark = event.start_mark
            raise yaml.composer.ComposerError(None, None, "a run file has no aliases: write the value out", mark)
        return super().compose_node(parent, index)


_PLAIN_TAGS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(name: str, text: str, one_line: bool = False) -> Source:
    """The document ``text`` of the file ``name``; an empty one is an empty mapping.

    Args:
        name: what messages call the text.
        text: YAML.
        one_line: whether ``text`` is no file but a value of the command line, where a line number says nothing.

    Raises ConfigError for text that is not YAML, several documents, aliases, tags, and keys that are doubled or not
    text.
    """
    loader: _Loader | None = None
    lines: dict[Place, int] = {}
    problems: list[str] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = {} if node is None else _construct(loader, node, (), name, lines, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}: column {mark.column + 1}" if mark and not one_line else name
        raise ConfigError(f"{where}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if problems:
        raise ConfigError("\n".join(problems))
    return Source(name=name, value=value, lines=lines)


def _construct(
    loader: _Loader, node: yaml.Node, place: Place, name: str, lines: dict[Place, int], problems: list[str]
) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_TAGS:
        problems.append(f"{name}:{node.start_mark.line + 1}: the tag {node.tag!r} is not read: remove it")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*place, i), name, lines, problems) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            problems.append(f"{name}:{line}: the key {key!r} is not text: put it in quotes")
            continue
        here = (*place, key)
        if key in result:
            problems.append(
                f"{name}:{line}: {dotted(here)} is given twice, first in line {lines[here]}: keep one of the two"
            )
            continue
        lines[here] = line
        result[key] = _construct(loader, value_node, here, name, lines, problems)
    return result
