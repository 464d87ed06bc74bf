"""Writes the reference pages beside this file from the code: ``python docs/reference/generate.py``."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from steadyhelm.config.load import schema
from steadyhelm.telemetry.metrics import FAMILIES, METRICS, Metric, prometheus_name

HERE = Path(__file__).parent
NOTICE = "<!-- made by docs/reference/generate.py: change the code's docstrings, then run it -->"


def metrics_page() -> str:
    """The page of all metrics."""
    lines = [
        "# Metrics",
        "",
        NOTICE,
        "",
        "Each iteration's metrics are a line of `<store>/<run>/metrics/*.jsonl`. The second name is Prometheus's.",
        "*Repeats*: a resumed run on a CPU has the same value, bit for bit.",
        "",
        "| metric | Prometheus | meaning | unit | kind | repeats |",
        "|---|---|---|---|---|---|",
        *(_metric_row(name, prometheus_name(name)[0], metric) for name, metric in METRICS.items()),
        "",
        "## Open groups",
        "",
        "Names that a run file or a service brings.",
        "",
        "| metric | Prometheus | meaning | unit | kind | repeats |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        name = f"{family.prefix}/<{family.label}>"
        exposed = prometheus_name(f"{family.prefix}/x")[0] + f'{{{family.label}="…"}}'
        lines.append(_metric_row(name, exposed, family.metric))
    return "\n".join(lines) + "\n"


def run_file_page() -> str:
    """The page of all fields of a run file."""
    tree = schema()
    lines = [
        "# Run file",
        "",
        NOTICE,
        "",
        "A YAML file, or JSON. Unknown keys are errors; types are exact. `--set part.field=value` replaces a value.",
        "`steadyhelm validate FILE` checks one, `steadyhelm schema` prints this tree as JSON Schema.",
        "",
        *_part("The whole", tree),
    ]
    for name, part in tree["$defs"].items():
        lines += ["", *_part(name, part)]
    return "\n".join(lines) + "\n"


def _metric_row(name: str, exposed: str, metric: Metric) -> str:
    repeats = "yes" if metric.exact else "no"
    exposed += "_total" if metric.kind == "counter" else ""  # as the text format has it
    return f"| `{name}` | `{exposed}` | {_cell(metric.help)} | {metric.unit or '–'} | {metric.kind} | {repeats} |"


def _part(title: str, part: dict[str, Any]) -> list[str]:
    """A heading, the part's sentence, and a row for each of its fields."""
    required = part.get("required", ())
    rows = [
        f"| `{name}` | {_kind(field)} | {'**required**' if name in required else _default(field)} | "
        f"{_cell(field.get('description', ''))} |"
        for name, field in part.get("properties", {}).items()
    ]
    table = ["", "| field | type | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return [f"## {title}", "", _text(part.get("description", "")), *table]


def _kind(field: dict[str, Any]) -> str:
    """The field's type: a link to its part, its choices, or its JSON type with bounds."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in field:
            return " or ".join(_kind(option) for option in field[union])
    if "enum" in field:
        return " ∣ ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = ", ".join(f"{sign} {field[key]}" for key, sign in bounds if key in field)
    return str(field.get("type", "any")) + (f" {limits}" if limits else "")


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if isinstance(default, dict):
        return "its defaults"
    if isinstance(default, list) and default and isinstance(default[0], dict):
        return ", ".join(f"`{item['type']}`" for item in default)
    return "none" if default is None else f"`{default!r}`" if not isinstance(default, bool) else f"`{default}`".lower()


def _text(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return _text(text).replace("|", "∣")


SIZING = runpy.run_path(str(HERE / "sizing.py"))
SIZES = ("<!-- sizes: made by docs/reference/generate.py -->\n", "<!-- /sizes -->")
"""Between these stands the table of sizes in ``docs/kubernetes.md``."""


def sizing_page() -> str:
    """The page of what models take."""
    return str(SIZING["page"](NOTICE))


def kubernetes_page() -> str:
    """The page of Kubernetes, all but the table of sizes as it stands."""
    before, begin, rest = (HERE.parent / "kubernetes.md").read_text(encoding="utf-8").partition(SIZES[0])
    _, end, after = rest.partition(SIZES[1])
    return f"{before}{begin}{SIZING['summary']()}\n{end}{after}"


PAGES = {
    "metrics.md": metrics_page,
    "run-file.md": run_file_page,
    "sizing.md": sizing_page,
    "../kubernetes.md": kubernetes_page,
}
"""Each page's file and what makes it."""

if __name__ == "__main__":
    for file, page in PAGES.items():
        (HERE / file).write_text(page(), encoding="utf-8")
