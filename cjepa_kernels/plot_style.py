"""How plots look: light and dark colours, SVG that follows the reader's, labels at curves."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cjepa_kernels.files import atomic_path

# Matplotlib needs real colours. In the text of an SVG these two are replaced by the reader's.
INK, GRID = "#010203", "#040506"
PAPER = "#ffffff", "#14171c"  # In light and in dark mode, as in the next line.
LIGHT_AND_DARK = {INK: ("#1c2128", "#e4e8ed"), GRID: ("#d5d9df", "#3a414b")}
COLOURS = """<style>
svg { --ink: #1c2128; --grid: #d5d9df; }
@media (prefers-color-scheme: dark) { svg { --ink: #e4e8ed; --grid: #3a414b; } }
</style>"""
OTHER = "#8b8f98"
NATIVE = "#2b83ba"
LABEL_SPACE = 0.062  # Between two labels, as a share of the height of the axes.


def settings(ink: str = INK, grid: str = GRID) -> dict[Any, Any]:
    """Matplotlib's settings with these two colours."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "cjepa",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "grid.linewidth": 0.6,
        "grid.color": grid,
        "axes.edgecolor": grid,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "legend.frameon": False,
        "savefig.transparent": True,
    }


Draw = Callable[[], Figure]


def svg(draw: Draw) -> str:
    """A figure as SVG that follows the reader's light or dark colours."""
    with matplotlib.rc_context(settings()):
        text = svg_with_colours(draw(), ink="var(--ink)", grid="var(--grid)")
    return re.sub(r"(<svg[^>]*>)", rf"\1\n{COLOURS}", text, count=1)


def svg_with_colours(figure: Figure, *, ink: str, grid: str, **options: Any) -> str:
    """A figure as SVG without metadata, its two placeholder colours replaced by these.

    Args:
        figure: Drawn with :func:`settings`, within a context that has them still.
        ink: What stands for ``INK``.
        grid: What stands for ``GRID``.
        **options: Further options of ``savefig``.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **options)
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text.replace(INK, ink).replace(GRID, grid)


def write_pngs(draw: Draw, path: Path) -> list[Path]:
    """Write ``path`` in light colours and ``<stem>-dark.png`` beside it in dark ones."""
    written = []
    for dark, name in enumerate((path.name, f"{path.stem}-dark.png")):
        ink, grid = (LIGHT_AND_DARK[colour][dark] for colour in (INK, GRID))
        with matplotlib.rc_context(settings(ink, grid)), atomic_path(path.with_name(name)) as file:
            draw().savefig(file, format="png", dpi=160, facecolor=PAPER[dark], transparent=False)
        written.append(path.with_name(name))
    return written


class Label(NamedTuple):
    """Text for the curve that ends at (x, y)."""

    x: float
    y: float
    text: str
    colour: str


def label_curves(
    axes: Axes, labels: Sequence[Label], *, column: float = 0.66, always_right: bool = False
) -> None:
    """Put each label right of its curve's end, or left of it if another end is in the way.

    Args:
        axes: Axes with their final limits.
        labels: Labels of the curves.
        column: Share of the width. Curves that end beyond it share a column of labels outside.
        always_right: Put labels right of the ends even if another end is in the way.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    inside: list[tuple[float, float, Label]] = []
    outside: list[tuple[float, float, Label]] = []
    for label in labels:
        x, y = map(float, to_axes.transform((label.x, label.y)))
        (outside if x > column else inside).append((x, y, label))
    for group, is_outside in ((inside, False), (outside, True)):
        group.sort(key=lambda end: end[1])
        heights = spread([y for _, y, _ in group], LABEL_SPACE)
        for height, (x, y, label) in zip(heights, group, strict=True):
            crowded = not (is_outside or always_right) and any(
                0 < other - x < 0.3 and abs(level - y) < LABEL_SPACE for other, level, _ in group
            )
            beside = x - 0.03 if crowded else x + 0.03
            axes.annotate(
                label.text,
                xy=(x, y),
                xytext=(1.03 if is_outside else beside, height),
                horizontalalignment="right" if crowded else "left",
                xycoords="axes fraction",
                textcoords="axes fraction",
                color=label.colour,
                verticalalignment="center",
                arrowprops={
                    "arrowstyle": "-",
                    "color": label.colour,
                    "linewidth": 0.6,
                    "alpha": 0.6,
                    "shrinkA": 1,
                    "shrinkB": 4,
                },
            )


def spread(heights: Sequence[float], space: float) -> list[float]:
    """Move rising heights within 0 to 1 until neighbours are ``space`` apart."""
    moved = list(heights)
    for _ in range(200):
        for i in range(len(moved) - 1):
            lack = space - (moved[i + 1] - moved[i])
            if lack > 0:
                moved[i] -= lack / 2
                moved[i + 1] += lack / 2
        if moved and moved[-1] > 1:
            moved[-1] = 1.0
        if moved and moved[0] < 0:
            moved[0] = 0.0
    return moved
