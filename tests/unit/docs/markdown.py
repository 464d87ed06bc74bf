"""Reading of the repository's Markdown pages."""

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])

_FENCE = re.compile(r"^( *)```(\S*)[ ]?(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The fenced blocks of a page: language, the file that the block is, and its text."""
    return [(m[2], m[3], dedent(m[4])) for m in _FENCE.finditer(page.read_text())]


def files(page: Path) -> dict[str, str]:
    """The files that the page has its reader write."""
    return {file: text for _, file, text in blocks(page) if file}


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def shell_lines(page: Path) -> list[str]:
    """Lines of its shell blocks, without comments."""
    texts = [text for language, _, text in blocks(page) if language == "sh"]
    return [line.partition(" #")[0].strip() for text in texts for line in text.replace("\\\n", "").splitlines()]


def commands(page: Path) -> list[str]:
    """Lines of shell blocks and inline code that are commands of ours."""
    inline = re.findall(r"`([^`\n]+)`", prose(page))
    return [text for text in (*shell_lines(page), *inline) if re.match(r"(steadyhelm|make) ", text)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
