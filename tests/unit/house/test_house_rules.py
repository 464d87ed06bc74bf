"""Rules of the house that no tool of ``make check`` knows.

That public names are documented and annotated is ruff's and mypy's; who imports whom is import-linter's.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.docs.markdown import ROOT, page_name

PACKAGE = sorted(file for folder in ("system", "operators") for file in (ROOT / folder).rglob("*.py"))
ALL = sorted(
    file
    for folder in ("system", "operators", "workloads", "benchmarks", "tests")
    for file in (ROOT / folder).rglob("*.py")
)
LONGEST = 99
NAMELESS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
BROAD = {"Exception", "BaseException"}


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def test_no_function_is_longer_than_a_screen_or_two():
    assert len(ALL) > 100
    for file in ALL:
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < LONGEST, f"{page_name(file)}: {node.name}"


def test_modules_are_named_by_what_they_hold():
    assert not [page_name(file) for file in ALL if NAMELESS & {file.stem, file.parent.name}]


def test_no_file_of_the_package_imports_a_workload():
    workloads = {"workloads", *(path.stem for path in (ROOT / "workloads").rglob("*") if path.suffix in {"", ".py"})}
    assert {"digits", "r1_reward"} <= workloads
    for file in PACKAGE:
        imported = {alias.name for node in nodes(file) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes(file) if isinstance(node, ast.ImportFrom) and node.module}
        assert not workloads & {name.partition(".")[0] for name in imported}, page_name(file)


@pytest.mark.parametrize("file", [file for file in PACKAGE if "except" in file.read_text()], ids=page_name)
def test_a_broad_except_raises_again_or_says_why(file: Path):
    lines = file.read_text().splitlines()
    for node in nodes(file):
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and not raises_again(node):
            assert any("#" in line for line in lines[node.lineno - 1 : node.lineno + 1]), f"line {node.lineno}"


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id in BROAD) for kind in caught)


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_every_tier_of_tests_that_needs_no_gpu_runs_in_ci():
    tiers = set(re.findall(r"^(test[a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"test-gpu"}
    steps = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    run = set(re.findall(r"\btest(?:-[a-z]+)?\b", "\n".join(steps)))
    assert tiers <= run
