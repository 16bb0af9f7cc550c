"""The ratios as bars, in an SVG written here: one group an operation, one line at the limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.samples import Figure

__all__ = ["plot"]

_COLOURS = (
    "#1b6ca8",
    "#d1495b",
    "#edae49",
    "#66a182",
    "#8d96a3",
    "#5d4e8c",
    "#a05c2c",
    "#2e4057",
    "#b56576",
)
_LEFT, _UNIT, _BAR, _GAP = 330, 60, 12, 14
"""Pixels: of the names, of a ratio of 1, of a bar, between groups."""
_LONGEST = 10
"""Ratio at which bars are cut; their number stands beside them."""
_WIDTH = _LEFT + _UNIT * _LONGEST + 80


def plot(path: Path, figures: Sequence[Figure]) -> None:
    """Draw the ratios of wall times to the raw limits; the least is best.

    Args:
        path: Of the SVG.
        figures: Of a run; those that are no such ratio are left out.
    """
    ratios = [figure for figure in figures if figure.measure == "time"]
    libraries = list(dict.fromkeys(figure.library for figure in ratios))
    colours = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(libraries)}
    shapes: list[str] = []
    y = 40
    for size, operation in dict.fromkeys((f.size, f.operation) for f in ratios):
        group = [f for f in ratios if (f.size, f.operation) == (size, operation)]
        middle = y + _BAR * len(group) / 2 + 4
        shapes.append(_text(10, middle, f"{size}: {operation}"))
        for figure in group:
            length = _UNIT * min(figure.value, _LONGEST)
            shapes.append(
                f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR - 1}" '
                f'fill="{colours[figure.library]}"/>'
            )
            label = f"{figure.value:.2f} {figure.library}"
            shapes.append(_text(_LEFT + length + 4, y + _BAR - 3, label, 9))
            y += _BAR
        y += _GAP
    limit = _LEFT + _UNIT
    shapes += [
        f'<line x1="{limit}" y1="30" x2="{limit}" y2="{y}" stroke="black"/>',
        _text(10, 18, "Wall time over the raw limit of the same run; 1 is the machine"),
    ]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 10}" '
        f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(words)}</text>'
