"""Charts as SVG and tables: bars, lines, heat maps. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "heat_table", "legend", "line_chart", "stacked_bars", "ticks"]

_MAX_NAME = 48
"""Letters of a row's name; it is there whole for pointing at."""
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 940, 80, 14, 12, 26


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart, or one layer of its bars."""

    name: str
    color: str
    """Of CSS."""
    values: Sequence[float]
    is_stepped: bool = False
    """Whether a value holds until the next one."""
    is_filled: bool = False


def ticks(highest: float, lowest: float = 0.0, count: int = 4, unit: float = 1.0) -> list[float]:
    """Round numbers of units from ``lowest`` to ``highest``, about ``count`` of them.

    >>> ticks(9.3)
    [0.0, 2.5, 5.0, 7.5]
    """
    highest, lowest = highest / unit, lowest / unit
    span = highest - lowest
    if not span > 0 or not math.isfinite(span):
        return [lowest * unit]
    power = 10.0 ** math.floor(math.log10(span / count))
    width = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * (count + 0.5) >= span)
    first = math.ceil(lowest / width)
    last = math.floor(highest / width + 1e-9)
    return [round(n * width, 12) * unit for n in range(first, last + 1)]


def legend(series: Sequence[Series]) -> str:
    """Names beside their colours."""
    items = (f'<span><i style="background:{s.color}"></i>{escape(s.name)}</span>' for s in series)
    return f'<div class="legend">{"".join(items)}</div>'


def stacked_bars(
    labels: Sequence[str],
    layers: Sequence[Series],
    titles: Sequence[str],
    text: Callable[[float], str],
    marks: Sequence[int] = (),
    height: int = 220,
) -> str:
    """One bar for each label; a layer's values are heights of their own.

    Args:
        labels: Below the bars; as many are written as fit.
        layers: From below.
        titles: What pointing at each bar says.
        text: Of a value on the axis.
        marks: Bars with a dotted line before them.
        height: Pixels.
    """
    sums = [sum(values) for values in zip(*(layer.values for layer in layers), strict=True)]
    top = max(sums, default=0.0) or 1.0
    plot = _Plot(height, 0.0, top)
    pitch = (_WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    width = min(pitch * 0.72, 46)
    parts = [plot.grid(text)]
    every = math.ceil(len(labels) / 14)
    for number, (label, title) in enumerate(zip(labels, titles, strict=True)):
        middle, base = _LEFT + pitch * (number + 0.5), 0.0
        bar = [f"<title>{escape(title)}</title>"]
        for layer in layers:
            value = layer.values[number]
            if value > 0:
                y, below = plot.y(base + value), plot.y(base)
                bar.append(
                    f'<rect x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
                    f'height="{below - y:.1f}" style="fill:{layer.color}"/>'
                )
            base += value
        parts.append(f"<g>{''.join(bar)}</g>")
        if number in marks:
            x = middle - pitch / 2
            parts.append(plot.line(x, plot.top, x, plot.floor, "restart"))
        if number % every == 0:
            parts.append(plot.label(middle, label))
    return plot.svg(parts)


def line_chart(
    xs: Sequence[float],
    series: Sequence[Series],
    text: Callable[[float], str],
    x_text: Callable[[float], str],
    marks: Sequence[float] = (),
    height: int = 220,
    unit: float = 0.0,
) -> str:
    """Lines over a common x; values that are not finite are left out.

    Args:
        xs: Ascending.
        series: A value for each x.
        text: Of a value on the axis.
        x_text: Likewise of an x.
        marks: Where a dotted line stands.
        height: Pixels.
        unit: Of the grid, which then begins at 0; 0 for a grid about the values.
    """
    finite = [v for s in series for v in s.values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    plot = _Plot(height, 0.0 if unit else low - margin, high + margin, unit or 1.0)
    first, last = min(xs, default=0.0), max(xs, default=1.0)

    def x_of(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5
        return _LEFT + 8 + share * (_WIDTH - _LEFT - _RIGHT - 16)

    parts = [plot.grid(text)]
    parts += [plot.line(x_of(x), plot.top, x_of(x), plot.floor, "restart") for x in marks]
    for one in series:
        pairs = zip(xs, one.values, strict=True)
        points = [(x_of(x), plot.y(value)) for x, value in pairs if math.isfinite(value)]
        parts.append(_path(one, points, plot.floor))
    for x in dict.fromkeys([first, *ticks(last, first, 6), last] if len(xs) > 1 else [first]):
        is_crowded = x not in (first, last) and min(x - first, last - x) < (last - first) * 0.07
        if not is_crowded:
            parts.append(plot.label(x_of(x), x_text(x)))
    return plot.svg(parts)


def heat_table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, str, Sequence[float], Sequence[str], int | None]],
    note: str,
) -> str:
    """A table whose cells are the darker, the larger their value is in its row.

    Args:
        columns: Headings.
        rows: Name, note behind the row, values, texts of the cells (for pointing at, and shown
            where there are few columns), and the column to frame.
        note: Heading of the notes.
    """
    is_wide = len(columns) <= 12
    every = math.ceil(len(columns) / 16)
    head = "".join(f"<th>{escape(c) if n % every == 0 else ''}</th>" for n, c in enumerate(columns))
    lines = [f"<tr><th></th>{head}<th class='text'>{escape(note)}</th></tr>"]
    for name, behind, values, texts, framed in rows:
        most = max(values, default=0.0) or 1.0
        cells = []
        for number, (value, cell) in enumerate(zip(values, texts, strict=True)):
            shade = 0.06 + 0.62 * value / most if value > 0 else 0.0
            kind = "cell" + (" wide" if is_wide else "") + (" worst" if number == framed else "")
            shown = escape(cell) if is_wide else ""
            title = escape(f"{columns[number]}: {cell}")
            cells.append(
                f'<td class="{kind}" title="{title}" '
                f'style="background:rgba(var(--heat),{shade:.2f})">{shown}</td>'
            )
        named = f'<td class="name" title="{escape(name)}">{escape(_shortened(name))}</td>'
        noted = f'<td class="note">{escape(behind)}</td>'
        lines.append(f"<tr>{named}{''.join(cells)}{noted}</tr>")
    return f'<div class="scroll"><table class="heat">{"".join(lines)}</table></div>'


def _shortened(name: str) -> str:
    """Without its middle, if it is long: names of one layer differ at their ends."""
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[: _MAX_NAME // 3]}…{name[-(_MAX_NAME - _MAX_NAME // 3 - 1) :]}"


def _path(one: Series, points: Sequence[tuple[float, float]], floor: float) -> str:
    if not points:
        return ""
    steps = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        steps.append(f"H{x:.1f}V{y:.1f}" if one.is_stepped else f"L{x:.1f} {y:.1f}")
    line = "".join(steps)
    drawn = f'<path d="{line}" style="fill:none;stroke:{one.color};stroke-width:2"/>'
    if one.is_filled:
        area = f"{line}V{floor:.1f}H{points[0][0]:.1f}Z"
        drawn = f'<path d="{area}" style="fill:{one.color};opacity:.18"/>' + drawn
    if len(points) <= 60 and not one.is_stepped:
        dots = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{one.color}"/>' for x, y in points
        )
        drawn += "".join(dots)
    return drawn


class _Plot:
    """The frame of one chart: its vertical scale, grid and labels."""

    def __init__(self, height: int, low: float, high: float, unit: float = 1.0) -> None:
        self._height, self._low, self._high, self._unit = height, low, high, unit
        self.top, self.floor = float(_TOP), float(height - _BOTTOM)

    def y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self.floor - share * (self.floor - self.top)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'

    def label(self, x: float, text: str) -> str:
        y = self._height - 8
        return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'

    def grid(self, text: Callable[[float], str]) -> str:
        parts = []
        for value in ticks(self._high, self._low, unit=self._unit):
            y = self.y(value)
            parts.append(self.line(_LEFT, y, _WIDTH - _RIGHT, y, "grid"))
            shown = escape(text(value))
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
        return "".join(parts)

    def svg(self, parts: Sequence[str]) -> str:
        box = f"0 0 {_WIDTH} {self._height}"
        return f'<div class="scroll"><svg viewBox="{box}" role="img">{"".join(parts)}</svg></div>'
