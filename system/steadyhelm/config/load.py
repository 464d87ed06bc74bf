"""A run file from YAML: read, overridden, checked; every error at once, each with its place and remedy."""

from __future__ import annotations

import ast
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from steadyhelm.config.fields import default_at, parts_at, plain
from steadyhelm.config.messages import messages
from steadyhelm.config.run import RunFile
from steadyhelm.config.source import Place, Source, dotted, parse
from steadyhelm.errors import ConfigError


def load_run_file(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> RunFile:
    """The run file at ``path`` with ``overrides`` (each ``"a.b=c"``) put in, checked with the code files it names.

    Raises ConfigError with one line per error.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file: give the path of a run file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8: save the run file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give the path of a run file") from None
    source = parse(str(path), text)
    if not isinstance(source.value, dict):
        kind = type(source.value).__name__
        raise ConfigError(f"{path}:1: the document is a {kind}, not a mapping: begin with 'name: my-run'")
    for override in overrides:
        override_value(source, override)
    run_file = validate(source)
    problems = list(_wrong_code(source, run_file, path.parent))
    if problems:
        raise ConfigError("\n".join(problems))
    return run_file


def validate(source: Source) -> RunFile:
    """The run file that ``source`` describes; types are exact: ``"2"`` is no number and ``true`` no 1.

    Raises ConfigError with one line per error.
    """
    try:
        # Strict validation of JSON is exact in its types and still takes a list where the tree has a tuple.
        return RunFile.model_validate_json(json.dumps(source.value), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(messages(RunFile, source, error))) from None


def override_value(source: Source, override: str) -> None:
    """Puts ``"a.b=c"`` into ``source``: ``c`` is YAML, list elements go by index, parts left out are made.

    Raises ConfigError for an override without ``=``, an unknown path, or an index that the list does not have.
    """
    label = f"--set {override}"
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{label}: not an override: write --set path.to.key=value")
    place: Place = tuple(int(step) if step.isdigit() else step for step in path.split("."))
    container = source.value
    for depth, step in enumerate(place):
        here = place[: depth + 1]
        _check_step(source, container, here, label)
        if depth == len(place) - 1:
            container[step] = parse(label, text, one_line=True).value if text.strip() else ""
        elif isinstance(container, dict) and container.get(step) is None:
            container[step] = default_at(RunFile, source.value, here)
            source.overrides[here] = label
        container = container[step]
    source.overrides[place] = label
    for inner in [known for known in source.lines if known[: len(place)] == place]:
        del source.lines[inner]


def _check_step(source: Source, container: Any, here: Place, label: str) -> None:
    parent, step = here[:-1], here[-1]
    name = dotted(parent) or "the run file"
    if isinstance(container, list):
        if not isinstance(step, int) or step >= len(container):
            raise ConfigError(f"{label}: {name} is a list of {len(container)}: give an index below {len(container)}")
    elif not isinstance(container, dict):
        raise ConfigError(f"{label}: {name} is {container!r} and has no {step!r}: set {name} itself")
    elif isinstance(step, int):
        raise ConfigError(f"{label}: {name} is not a list: give one of its keys in place of {step}")
    elif not any(step in part.model_fields for part in parts_at(RunFile, source.value, parent)):
        # The same words as for an unknown key of the file, which the whole tree's validation finds.
        probe = Source(name=source.name, value=source.value, lines=source.lines, overrides={here: label})
        container[step] = None
        try:
            validate(probe)
        except ConfigError as error:
            del container[step]
            lines = [line for line in str(error).splitlines() if line.startswith(label + ":")]
            raise ConfigError("\n".join(lines)) from None


def _wrong_code(source: Source, run_file: RunFile, base: pathlib.Path) -> Iterator[str]:
    """Messages about references to code whose file or name is not there; reads the files and runs none."""
    for place, reference in code_references(run_file):
        file, _, name = reference.partition(":")
        where = f"{source.locate(place)}: {dotted(place)} is {reference!r}"
        try:
            tree = ast.parse((base / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            yield f"{where}: there is no file {base / file}: paths start at the run file's folder"
        except (OSError, UnicodeDecodeError) as error:
            yield f"{where}: {base / file} cannot be read ({error}): name a Python file"
        except SyntaxError as error:
            yield f"{where}: {base / file}:{error.lineno} is not Python ({error.msg}): correct that line"
        else:
            if name not in _top_level_names(tree):
                yield f"{where}: {base / file} defines no {name!r} at its top level: define it, or name another"


def code_references(run_file: RunFile) -> list[tuple[Place, str]]:
    """Each ``file.py:name`` that the run file mentions, with its place."""
    model, data = run_file.model, run_file.data
    found: list[tuple[Place, str | None]] = [
        (("model", "factory"), model.factory),
        (("data", "train"), data.train),
        (("data", "eval"), data.eval),
        (("data", "template"), data.template),
    ]
    found += [
        (("reward", "terms", i, "code"), term.code)
        for i, term in enumerate(run_file.reward.terms)
        if term.type == "custom"
    ]
    return [(place, reference) for place, reference in found if reference is not None]


def _top_level_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)  # and not into its body, whose names are its own
            continue
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending += ast.iter_child_nodes(node)
    return names


class RunFileSchema(GenerateJsonSchema):
    """JSON Schema as a Kubernetes resource can hold it: a tuple of one type is an array of that type."""

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        """Called by pydantic for each tuple: ``items`` where all of its fields are of one type."""
        made = super().tuple_schema(schema)
        kinds = made.get("prefixItems", [])
        if kinds and all(kind == kinds[0] for kind in kinds):
            made = {k: v for k, v in made.items() if k != "prefixItems"} | {"items": kinds[0]}
        return made


def schema() -> dict[str, Any]:
    """The run file's JSON Schema with the fields' descriptions. An optional field is ``anyOf`` its type and null."""
    return RunFile.model_json_schema(schema_generator=RunFileSchema)


def diff_run_files(old: RunFile, new: RunFile) -> list[str]:
    """One line ``path: old → new`` per value that differs, by path; nothing where they agree.

    ``auto`` is compared as what it stands for in its run.

    Example: ``["learner.lr: 0.0001 → 0.0002", "reward.terms.1.weight: 1.0 → (absent)"]``
    """
    before, after = dict(_leaves(_in_force(old))), dict(_leaves(_in_force(new)))
    lines = []
    for place in sorted({*before, *after}, key=lambda p: [(isinstance(s, str), str(s)) for s in p]):
        a, b = (
            json.dumps(side[place], ensure_ascii=False) if place in side else "(absent)" for side in (before, after)
        )
        if a != b:
            lines.append(f"{dotted(place)}: {a} → {b}")
    return lines


def _in_force(run: RunFile) -> Any:
    return plain(run if run.is_sft else run.model_copy(update={"algorithm": run.objective}))


def _leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    if not items:
        yield place, value
    for key, item in items:
        yield from _leaves(item, (*place, key))
