"""Line charts as inline SVG: drawn here, coloured and made interactive by the page's own style and script."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
SMOOTH_FROM = 25  # points from which on a moving mean is drawn over the raw values
TICKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named line: points (x, y) in order of x, NaN is a gap; ``band`` holds (x, low, high) around it.

    Example: ``Series(name="reward", points=((1.0, 0.5), (2.0, 0.75)))``
    """

    name: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()
    markers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over the iterations. ``percent`` shows shares as percentages; ``zero`` includes 0 in the range."""

    title: str
    series: tuple[Series, ...]
    subtitle: str = ""
    percent: bool = False
    zero: bool = False


@dataclass(frozen=True, slots=True)
class _Scale:
    """A linear map of [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def nice_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About ``count`` round numbers that enclose [low, high]."""
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if low == high == 0 else (low - abs(low) * 0.1, low + abs(low) * 0.1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last ``width`` values, fewer at the start; NaN is left out."""
    means = []
    for end in range(1, len(values) + 1):
        window = [v for v in values[max(0, end - width) : end] if not math.isnan(v)]
        means.append(math.fsum(window) / len(window) if window else math.nan)
    return means


def draw(chart: Chart) -> str:
    """The chart as an HTML figure; an empty string where it has no finite point."""
    series = [line for line in chart.series if any(math.isfinite(y) for _, y in line.points)]
    ys = [y for line in series for _, y in line.points if math.isfinite(y)]
    ys += [bound for line in series for _, low, high in line.band for bound in (low, high)]
    if not ys:
        return ""
    ticks = nice_ticks(min([0.0, *ys] if chart.zero else ys), max(ys))
    xs = [x for line in series for x, _ in line.points]
    x = _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    y = _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    body = "".join([*_grid(ticks, y, chart.percent), *_x_axis(x, min(xs), max(xs))])
    body += "".join(_line(line, number, x, y) for number, line in enumerate(series, start=1))
    data = [{"name": line.name, "points": [(px, _finite(py)) for px, py in line.points]} for line in series]
    frame = {"low": x.low, "high": x.high, "left": LEFT, "right": WIDTH - RIGHT, "percent": chart.percent}
    legend = "".join(
        f'<li><i class="k s{number}"></i>{escape(line.name)} <b>{_shown(_last(line), chart.percent)}</b></li>'
        for number, line in enumerate(series, start=1)
    )
    label = f"{chart.title}: " + ", ".join(f"{s.name} ends at {_shown(_last(s), chart.percent)}" for s in series)
    subtitle = f"<small>{escape(chart.subtitle)}</small>" if chart.subtitle else ""
    return (
        f'<figure class="chart" data-lines="{escape(json.dumps(data))}" data-frame="{escape(json.dumps(frame))}">'
        f"<figcaption><h3>{escape(chart.title)}</h3>{subtitle}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<ul class="legend">{legend}</ul><output></output></figure>'
    )


def _grid(ticks: Sequence[float], y: _Scale, percent: bool) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 3.5}" text-anchor="end">{_tick(tick, percent)}</text>'
        for tick in ticks
    ]


def _x_axis(x: _Scale, first: float, last: float) -> list[str]:
    step = max(1, round(nice_ticks(first, last)[1] - nice_ticks(first, last)[0])) if last > first else 1
    ticks = range(math.ceil(first / step) * step, int(last) + 1, step)
    return [f'<text x="{x(tick)}" y="{HEIGHT - 7}" text-anchor="middle">{tick}</text>' for tick in ticks]


def _line(line: Series, number: int, x: _Scale, y: _Scale) -> str:
    parts = []
    if line.band:
        edge = [(px, high) for px, _, high in line.band] + [(px, low) for px, low, _ in reversed(line.band)]
        parts.append(f'<polygon class="band s{number}" points="{" ".join(f"{x(a)},{y(b)}" for a, b in edge)}"/>')
    values = [py for _, py in line.points]
    if len(values) >= SMOOTH_FROM and not line.markers:
        means = moving_mean(values, max(3, len(values) // 12))
        smooth = [(px, mean) for (px, _), mean in zip(line.points, means, strict=True)]
        parts.append(f'<path class="raw s{number}" d="{_path(line.points, x, y)}"/>')
        parts.append(f'<path class="line s{number}" d="{_path(smooth, x, y)}"/>')
    else:
        parts.append(f'<path class="line s{number}" d="{_path(line.points, x, y)}"/>')
    if line.markers or len(values) == 1:
        parts += [
            f'<circle class="s{number}" cx="{x(px)}" cy="{y(py)}" r="3"/>'
            for px, py in line.points
            if math.isfinite(py)
        ]
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    pieces, pen = [], "M"
    for px, py in points:
        if not math.isfinite(py):
            pen = "M"
            continue
        pieces.append(f"{pen}{x(px)} {y(py)}")
        pen = "L"
    return "".join(pieces)


def _last(line: Series) -> float:
    return next(py for _, py in reversed(line.points) if math.isfinite(py))


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _tick(value: float, percent: bool) -> str:
    return f"{100 * value:g} %" if percent else f"{value:g}"


def _shown(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
