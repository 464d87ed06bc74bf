import ast
import re
import runpy
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml
from steadyhelm.cli import app
from steadyhelm.config.load import load_run_file

from tests.unit.docs.markdown import DOCS, PAGES, ROOT, anchors, blocks, commands, page_name, prose, shell_lines

pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


def cli_options() -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    return {name: {o for p in command.params for o in p.opts} for name, command in group.commands.items()}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pages
def test_every_relative_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} leads nowhere"
        assert found.is_relative_to(ROOT), f"{target} leaves the repository"
        assert not anchor or anchor in anchors(found), f"{target}: {page_name(found)} has no such heading"


@pages
def test_every_command_in_the_docs_exists_with_its_options(page: Path):
    known, targets = cli_options(), make_targets()
    for command in commands(page):
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[1] != "--help":
            names = [name.rstrip(",") for name in re.split(r" \| ", command.removeprefix("steadyhelm "))]
            for name in names if len(names) > 1 else [words[1]]:
                assert name in known, command
            for option in (word.partition("=")[0] for word in words[2:] if word.startswith("-")):
                assert option in known[words[1]], command


@pages
def test_every_file_of_the_repository_that_a_command_names_is_there(page: Path):
    for line in shell_lines(page):
        for word in line.split():
            if re.match(r"(charts|workloads|docker|engines|benchmarks)/", word):
                assert (ROOT / word).exists(), line


@pages
def test_every_run_file_that_a_command_names_is_valid_with_what_the_command_sets(page: Path):
    for command in commands(page):
        _, name, *words = shlex.split(command)
        if name in ("run", "sft", "submit", "validate") and words and words[0].startswith("workloads/"):
            settings = [value for option, value in pairwise(words) if option == "--set"]
            load_run_file(ROOT / words[0], settings)


@pages
def test_every_value_that_a_helm_command_sets_is_one_of_its_chart(page: Path):
    for line in shell_lines(page):
        chart = re.search(r"charts/[\w-]+", line)
        if not line.startswith("helm ") or chart is None:
            continue
        values = yaml.safe_load((ROOT / chart[0] / "values.yaml").read_text())
        for path in re.findall(r"--set '?([\w.]+)=", line):
            place = values
            for name in path.split("."):
                assert name in place, f"{line}: {path}"
                place = place[name]


@pages
def test_every_option_that_stands_alone_in_the_docs_is_one_of_some_command(page: Path):
    known = set().union(*cli_options().values()) | {"--help", "--quick", "--json"}
    for text in re.findall(r"`(--[a-z-]+)[^`]*`", prose(page)):
        assert text in known, text


def test_the_readme_names_the_two_commands():
    assert {"make train", "make test"} <= set(commands(ROOT / "README.md"))


def test_the_reference_pages_are_those_that_the_code_makes():
    made = runpy.run_path(str(DOCS / "reference" / "generate.py"))["PAGES"]
    for file, page in made.items():
        stored = (DOCS / "reference" / file).read_text()
        assert stored == page(), f"{file} is out of date: run python docs/reference/generate.py"


def test_the_layers_in_the_architecture_are_those_of_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in contracts if c["type"] == "layers" and c.get("containers") == ["steadyhelm"])
    (drawn,) = (text for lang, _, text in blocks(DOCS / "architecture.md") if lang == "layers")
    assert drawn.splitlines() == layers


def glossary() -> list[list[str]]:
    rows = [line for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


def test_glossary_terms_are_in_order_and_told_once():
    terms = [row[0] for row in glossary()]
    assert len(terms) > 40
    assert terms == sorted(set(terms))


@pytest.mark.parametrize("row", glossary(), ids=lambda row: row[0])
def test_what_the_glossary_names_is_defined_there(row: list[str]):
    _, meaning, name = row
    assert meaning
    file, names = locate(name.strip("`").split("."))
    assert names, f"{name} names a module, not what is in it"
    body = ast.parse(file.read_text()).body
    for part in names:
        found = [node for node in body if part in defined(node)]
        assert found, f"{page_name(file)} does not define {part}"
        body = getattr(found[0], "body", [])


def locate(parts: list[str]) -> tuple[Path, list[str]]:
    """The file of the module that a dotted name begins with, and the rest of the name. Nothing is imported."""
    folder = ROOT / "system"
    for number, part in enumerate(parts):
        if (folder / f"{part}.py").is_file():
            return folder / f"{part}.py", parts[number + 1 :]
        if not (folder / part).is_dir():
            return folder / "__init__.py", parts[number:]
        folder /= part
    return folder / "__init__.py", []


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines or imports."""
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {node.name}
        case ast.ImportFrom():
            return {alias.asname or alias.name for alias in node.names}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


RECORDS = sorted((DOCS / "design").glob("[0-9]*.md"))


def test_decision_records_are_numbered_without_gaps_and_all_listed():
    assert [int(record.name[:4]) for record in RECORDS] == list(range(1, len(RECORDS) + 1))
    listed = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", (DOCS / "design" / "README.md").read_text())
    assert listed == [record.name for record in RECORDS]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name[:4])
def test_a_decision_record_has_context_decision_and_consequences(record: Path):
    text = record.read_text()
    assert text.startswith(f"# {record.name[:4]} ")
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
