"""The one table that each benchmark prints, and the JSON form of it.

A benchmark is a function from ``quick`` to rows; ``main`` is its command line. Run it from anywhere:
``python benchmarks/<name>.py [--quick] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure; ``goal`` is None for a figure that is only shown beside the others.

    Example: ``Row(name="put, plane / raw files", value=0.83, unit="ratio", goal=0.70, better="higher")``
    """

    name: str
    value: float
    unit: str
    goal: float | None
    better: Literal["higher", "lower"]

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``, or nothing where there is no goal."""
        if self.goal is None:
            return ""
        met = self.value >= self.goal if self.better == "higher" else self.value <= self.goal
        return "met" if met else "missed"


def machine() -> str:
    """The processor, the cores that this process may use and the Python version, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, Python {platform.python_version()}"


def render(rows: Sequence[Row]) -> str:
    """The rows as aligned text, a header line first."""
    cells = [("name", "value", "unit", "goal", "")]
    for row in rows:
        goal = "" if row.goal is None else f"{'≥' if row.better == 'higher' else '≤'} {row.goal:.4g}"
        cells.append((row.name, f"{row.value:.4g}", row.unit, goal, row.verdict))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    lines = []
    for name, value, unit, goal, verdict in cells:
        left, right = name.ljust(widths[0]), value.rjust(widths[1])
        lines.append(f"{left}  {right}  {unit.ljust(widths[2])}  {goal.ljust(widths[3])}  {verdict}".rstrip())
    return "\n".join(lines)


def main(
    description: str,
    measure: Callable[[bool], Sequence[Row]],
    arguments: Sequence[str] | None = None,
    *,
    own: argparse.ArgumentParser | None = None,
) -> Sequence[Row]:
    """Parses ``--quick`` and ``--json FILE``, measures, prints the table and writes the list of rows.

    Args:
        description: one sentence for ``--help`` and above the table: what is measured against what.
        measure: called once with True for ``--quick`` (under a minute); returns the rows in the order to print.
        arguments: the command line without the program's name; None means the process's own.
        own: options besides, which the benchmark has read; for ``--help``, and so that no others are taken.
    """
    parser = argparse.ArgumentParser(description=description, parents=[own] if own else [])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as a JSON list")
    options = parser.parse_args(arguments)
    rows = measure(options.quick)
    print(f"{description}\n{machine()}\n\n{render(rows)}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n")
    return rows
