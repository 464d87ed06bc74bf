"""Panels of lines over one axis of time, as an SVG file that stands alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 820, 60, 16
PANEL, GAP, HEAD, FOOT = 110, 34, 26, 36
COLOURS = ("#1f5fbf", "#d9622b", "#3a8f4d")
APART = -2.5
"""How far lines of one panel are drawn from each other, so that equal ones are seen."""
INK, FAINT = "#333333", "#dddddd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points (seconds, value) in order; each value holds until the next point.

    Example: ``Line(name="serving", points=((0.0, 1.0), (41.5, 3.0)))``
    """

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Lines in one frame; ``goal`` is drawn as a dashed line, ``top`` is the least upper end of the axis."""

    title: str
    lines: tuple[Line, ...]
    goal: float | None = None
    top: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A time with a name, shaded behind all panels."""

    name: str
    begin_s: float
    end_s: float


def draw(title: str, panels: Sequence[Panel], spans: Sequence[Span], end_s: float) -> str:
    """The picture from 0 to ``end_s``."""
    height = HEAD + len(panels) * (PANEL + GAP) + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    bottom = HEAD + len(panels) * (PANEL + GAP)
    for span in spans:
        left, right = _x(span.begin_s, end_s), _x(min(span.end_s, end_s), end_s)
        parts.append(
            f'<rect x="{left}" y="{HEAD}" width="{right - left:.1f}" height="{bottom - HEAD}" fill="#f3efe6"/>'
            f'<text x="{(left + right) / 2:.1f}" y="{HEAD - 10}" text-anchor="middle">{escape(span.name)}</text>'
        )
    for number, panel in enumerate(panels):
        parts += _panel(panel, HEAD + GAP + number * (PANEL + GAP), end_s)
    step = next(s for s in (10, 30, 60, 120, 300, 600, 1800, 3600, 7200) if end_s / s <= 12 or s == 7200)
    for tick in range(0, int(end_s) + 1, step):
        parts.append(f'<text x="{_x(tick, end_s)}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 32}" text-anchor="middle">seconds</text></svg>')
    return "\n".join(parts) + "\n"


def _x(second: float, end_s: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * second / end_s, 1)


def _panel(panel: Panel, y: int, end_s: float) -> Iterator[str]:
    """The frame ``PANEL`` high below ``y``, its title and names of lines above."""
    most = max([panel.top, *(value for line in panel.lines for _, value in line.points)])
    top = math.ceil(most)

    def height(value: float) -> float:
        return round(y + PANEL * (1 - value / top), 1)

    yield f'<text x="{LEFT}" y="{y - 8}" font-weight="bold">{escape(panel.title)}</text>'
    for value in sorted({0, top, *range(0, top + 1, max(1, top // 3))}):
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height(value)}" y2="{height(value)}" stroke="{FAINT}"/>'
        yield f'<text x="{LEFT - 8}" y="{height(value) + 4}" text-anchor="end">{value}</text>'
    if panel.goal is not None:
        yield (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height(panel.goal)}" y2="{height(panel.goal)}" '
            f'stroke="{INK}" stroke-dasharray="4 4"/>'
        )
    for number, line in enumerate(panel.lines):
        colour = COLOURS[number % len(COLOURS)]
        yield (
            f'<text x="{WIDTH - RIGHT - 90 * (len(panel.lines) - 1 - number)}" y="{y - 8}" text-anchor="end" '
            f'fill="{colour}">{escape(line.name)}</text>'
        )
        yield (
            f'<path d="{_steps(line, height, end_s)}" fill="none" stroke="{colour}" stroke-width="2" '
            f'transform="translate(0 {APART * number})"/>'
        )


def _steps(line: Line, height: Callable[[float], float], end_s: float) -> str:
    path, last = "", 0.0
    for second, value in line.points:
        move = f"H{_x(second, end_s)} V{height(value)}" if path else f"M{_x(second, end_s)} {height(value)}"
        path, last = f"{path} {move}", second
    return f"{path} H{_x(max(last, end_s), end_s)}".strip()
