"""Draw the pictures of docs/concepts.md: docs/images/concepts_*.svg.

    python docs/draw_concepts.py

The SVGs follow the reader's light or dark colours. Needs Matplotlib, from the extra ``bench``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from cjepa_kernels.plot_style import GRID, INK, NATIVE, OTHER, svg

OUT = Path(__file__).parent / "images"
POSITIVE = "#d97706"
COLUMN = "#1f9d78"
RANKS = (NATIVE, POSITIVE, COLUMN, "#b45bb0")


def canvas(axes: Axes, width: float, height: float) -> None:
    """A drawing surface with y downwards, as rows of a matrix are counted."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.axis("off")


def cell(axes: Axes, x: float, y: float, width: float = 1, height: float = 1, **style: Any) -> None:
    """A rectangle with its upper left corner at (x, y)."""
    style = {"facecolor": "none", "edgecolor": GRID, "linewidth": 0.8, **style}
    axes.add_patch(Rectangle((x, y), width, height, **style))


def box(axes: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """The same with round corners."""
    style = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.0, **style}
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.25", **style
    )
    axes.add_patch(shape)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """An arrow in the data's coordinates."""
    style = {"color": INK, "linewidth": 1.2, "arrowstyle": "-|>", "mutation_scale": 9, **style}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def text(axes: Axes, x: float, y: float, words: str, **style: Any) -> None:
    """Centred words."""
    style = {"ha": "center", "va": "center", "fontsize": 9, **style}
    axes.text(x, y, words, **style)


def draw_matrix(figure: Figure) -> None:
    """S of four pairs, and what becomes of one of its rows."""
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.35])
    canvas(left, 10.2, 10.6)
    pairs, anchor = 4, 1
    for a in range(2 * pairs):
        for b in range(2 * pairs):
            style: dict[str, Any] = {"facecolor": NATIVE, "alpha": 0.5 if a == anchor else 0.16}
            if a == b:
                style = {}
                text(left, 2.5 + b, 1.5 + a, "×", color=OTHER)
            elif (a - b) % pairs == 0:
                style = {"facecolor": POSITIVE, "alpha": 0.9}
            cell(left, 2 + b, 1 + a, **style)
    for view, name in enumerate(("view i", "view j")):
        middle = 2 + pairs / 2 + view * pairs
        text(left, middle, 0.45, name)
        text(left, 0.75, middle - 1, name)
    cell(left, 2, 1 + anchor, 2 * pairs, edgecolor=INK, linewidth=1.6)
    text(left, 1.65, 1.5 + anchor, "a", fontweight="bold")
    left.plot([2 + pairs] * 2, [1, 1 + 2 * pairs], color=INK, linewidth=0.8)
    left.plot([2, 2 + 2 * pairs], [1 + pairs] * 2, color=INK, linewidth=0.8)
    text(left, 6, 9.75, "S = Ẑ Ẑᵀ, 4 pairs: 8 rows, all cosines")
    left.set_title("One matrix holds every comparison")

    canvas(right, 14, 10.6)
    right.set_title("The positive is kept out of the sum")
    text(right, 0.2, 1.2, "row a, divided by the temperature τ", ha="left")
    for b in range(2 * pairs):
        style = {"facecolor": NATIVE, "alpha": 0.5}
        if b == anchor:
            style = {}
            text(right, 0.7 + b, 2.5, "×", color=OTHER)
        elif b == anchor + pairs:
            style = {"facecolor": POSITIVE, "alpha": 0.9}
        cell(right, 0.2 + b, 2, **style)
    box(right, 0.2, 5, 6.2, 1.7, edgecolor=NATIVE)
    text(right, 3.3, 5.55, "LSE⁻ = log Σ exp ℓ")
    text(right, 3.3, 6.2, "over the negatives alone", fontsize=8)
    box(right, 7.4, 5, 3.4, 1.7, edgecolor=POSITIVE)
    text(right, 9.1, 5.55, "ℓ_pos")
    text(right, 9.1, 6.2, "the positive's logit", fontsize=8)
    for b in range(2 * pairs):
        if b == anchor + pairs:
            arrow(right, (0.7 + b, 3.1), (8.6, 4.95), color=POSITIVE)
        elif b != anchor:
            arrow(right, (0.7 + b, 3.1), (1.6 + 0.5 * b, 4.95), color=NATIVE, linewidth=0.8)
    arrow(right, (3.3, 6.75), (4.6, 7.75))
    arrow(right, (9.1, 6.75), (7.0, 7.75))
    text(right, 5.8, 8.15, "x = LSE⁻ − ℓ_pos", fontweight="bold")
    text(right, 3.0, 9.05, "loss = softplus(x)")
    text(right, 8.6, 9.05, "gradient ∝ sigmoid(x) = 1 − p_pos")
    text(
        right, 5.8, 9.85, "no difference of two nearly equal numbers, however small the loss",
        fontsize=8, color=OTHER,
    )  # fmt: skip


def draw_triangle(figure: Figure) -> None:
    """The tiles that are computed, whom each serves, and a tile of the diagonal."""
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    canvas(left, 13.4, 8.8)
    blocks, i, j = 6, 1, 4
    for a in range(blocks):
        for b in range(blocks):
            style: dict[str, Any] = {"facecolor": NATIVE, "alpha": 0.3}
            if a > b:
                style = {"linestyle": ":"}
            elif a == b:
                style["alpha"] = 0.6
            if (a, b) == (i, j):
                style = {"facecolor": COLUMN, "alpha": 0.9}
            cell(left, 1 + b, 1 + a, **style)
    cell(left, 1 + i, 1 + j, edgecolor=COLUMN, linestyle="--", linewidth=1.2)
    text(left, 1.5 + i, 1.5 + j, "tᵀ", color=COLUMN, fontsize=10)
    text(left, 1.5 + j, 1.5 + i, "t", fontsize=11, fontweight="bold")
    for block, name in ((i, "I"), (j, "J")):
        text(left, 0.6, 1.5 + block, name, fontweight="bold")
        text(left, 1.5 + block, 0.6, name, fontweight="bold")
        box(left, 8.5, 1.1 + block, 4.6, 0.8, edgecolor=COLUMN)
        text(left, 10.8, 1.5 + block, f"sums of the rows in block {name}", fontsize=8)
    arrow(left, (2 + j, 1.5 + i), (8.45, 1.5 + i), color=COLUMN)
    left.plot([1.5 + j, 1.5 + j], [2 + i, 1.5 + j], color=COLUMN, linewidth=1.2)
    arrow(left, (1.5 + j, 1.5 + j), (8.45, 1.5 + j), color=COLUMN)
    text(left, 7.65, 2.2, "row sums", fontsize=8)
    text(left, 7.55, 5.15, "column sums", fontsize=8)
    text(left, 4, 7.5, "filled: computed; dotted: never computed", fontsize=8)
    text(left, 4, 8.2, "S is symmetric: tᵀ would hold the same numbers", fontsize=8, color=OTHER)
    left.set_title("A tile above the diagonal serves both of its sides")

    canvas(right, 8.2, 8.8)
    for a in range(6):
        for b in range(6):
            style = {"facecolor": NATIVE, "alpha": 0.3}
            if a == b:
                style = {}
                text(right, 1.6 + b, 1.5 + a, "×", color=OTHER)
            elif a // 2 == b // 2:
                style = {"facecolor": POSITIVE, "alpha": 0.9}
            cell(right, 1.1 + b, 1 + a, **style)
        text(right, 0.55, 1.5 + a, f"{'ij'[a % 2]}{'₀₁₂'[a // 2]}", fontsize=9)
        text(right, 1.6 + a, 0.55, f"{'ij'[a % 2]}{'₀₁₂'[a // 2]}", fontsize=9)
    text(right, 4.1, 7.5, "views interleaved: i₀ j₀ i₁ j₁ …", fontsize=8)
    text(
        right, 4.1, 8.2, "self × and positive: only these tiles need a mask",
        fontsize=8, color=OTHER,
    )  # fmt: skip
    right.set_title("A tile on the diagonal")


def draw_tournament(figure: Figure) -> None:
    """Which rank multiplies which shards, and how the shards get there."""
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    canvas(left, 10.4, 10.6)
    size, names = 2, "ABCD"
    for r in range(4):
        text(left, 1.3, 1 + size * (r + 0.5), names[r], fontweight="bold")
        text(left, 1.8 + size * (r + 0.5), 0.5, names[r], fontweight="bold")
        for s in range(4):
            x, y = 1.8 + size * s, 1 + size * r
            step = (r - s) % 4
            if step == 0:
                cell(left, x, y, size, size, facecolor=RANKS[r], alpha=0.85)
                text(left, x + 1, y + 1, "own", fontsize=8)
            elif step == 1:
                cell(left, x, y, size, size, facecolor=RANKS[r], alpha=0.5)
                text(left, x + 1, y + 1, "step 1", fontsize=8)
            elif step == 3:
                cell(left, x, y, size, size, linestyle=":")
            elif r < s:
                cell(left, x, y, size / 2, size, facecolor=RANKS[r], alpha=0.3)
                cell(left, x + size / 2, y, size / 2, size, facecolor=RANKS[s], alpha=0.3)
                text(left, x + 1, y + 1, "step 2", fontsize=8)
            else:
                cell(left, x, y, size, size, linestyle=":")
    for r in range(4):
        cell(left, 1.8 + 2 * r, 9.45, 0.45, 0.45, facecolor=RANKS[r], alpha=0.85)
        text(left, 2.4 + 2 * r, 9.68, f"rank {r}", ha="left", fontsize=8)
    left.set_title("S of four shards: every pair meets once")

    canvas(right, 15, 10.6)
    centres = [(3.6, 4.4), (11.2, 4.4)]
    for step, (x, y) in enumerate(centres, start=1):
        spots = [(x, y - 2.6), (x + 2.6, y), (x, y + 2.6), (x - 2.6, y)]
        for r, (a, b) in enumerate(spots):
            visitor = names[(r - step) % 4]
            box(
                right, a - 0.95, b - 0.62, 1.9, 1.24, edgecolor=RANKS[r], facecolor=RANKS[r],
                alpha=0.3,
            )  # fmt: skip
            text(right, a, b, f"{names[r]} × {visitor}", fontweight="bold")
        bends = [((0.95, -2.0), (2.3, -0.7)), ((2.3, 0.7), (0.95, 2.0)),
                 ((-0.95, 2.0), (-2.3, 0.7)), ((-2.3, -0.7), (-0.95, -2.0))]  # fmt: skip
        for (ax, ay), (bx, by) in bends:
            arrow(
                right, (x + ax, y + ay), (x + bx, y + by), color=OTHER,
                connectionstyle="arc3,rad=0.2",
            )  # fmt: skip
        what = (
            "each rank is visited by its left neighbour" if step == 1 else "and by the one opposite"
        )
        text(right, x, 0.45, f"step {step}: {what}", fontsize=8)
    text(
        right,
        7.4,
        8.55,
        "row sums stay; column sums follow the visitor, one step behind,",
        fontsize=8,
    )
    text(
        right,
        7.4,
        9.2,
        "and go home at the end. While a rectangle is multiplied, the next",
        fontsize=8,
    )
    text(right, 7.4, 9.85, "visitor arrives. Similarities never travel.", fontsize=8)
    right.set_title("Shards travel round the ring")


def draw_strip(figure: Figure) -> None:
    """One block of columns stays on the chip, blocks of rows stream by."""
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    canvas(left, 9.4, 10)
    blocks, j = 8, 5
    for a in range(blocks):
        for b in range(a, blocks):
            style: dict[str, Any] = {"facecolor": NATIVE, "alpha": 0.2}
            if b == j and a < j:
                style["alpha"] = 0.75
            if a == b:
                style = {"facecolor": OTHER, "alpha": 0.3}
            cell(left, 0.8 + b, 1 + a, **style)
    cell(left, 0.8 + j, 1, 1, j, edgecolor=INK, linewidth=1.8)
    arrow(left, (1.3 + j, 1.15), (1.3 + j, 0.85 + j), linewidth=1.8)
    text(left, 1.3 + j, 0.55, "J", fontweight="bold")
    text(left, 0.4, 1.5, "0", fontsize=8)
    text(left, 0.4, 0.5 + j, f"{j - 1}", fontsize=8)
    text(left, 0.6, 7.3, "grey: the diagonal,\nin a launch of its own", fontsize=8, ha="left")
    left.set_title("A strip is a run down one column of tiles")

    canvas(right, 15, 10)
    right.set_title("What one program does")
    box(right, 4.4, 0.9, 6.4, 7.4, linestyle="--", edgecolor=OTHER)
    text(right, 7.6, 1.35, "on the chip", fontsize=8, color=OTHER)
    box(right, 5, 1.9, 5.2, 1.5, facecolor=COLUMN, edgecolor=COLUMN, alpha=0.35)
    text(right, 7.6, 2.4, "block J: 128 rows of Ẑ")
    text(right, 7.6, 3.0, "stays in shared memory", fontsize=8)
    box(right, 5, 4.1, 5.2, 1.5, facecolor=NATIVE, edgecolor=NATIVE, alpha=0.35)
    text(right, 7.6, 4.6, "tile of S, its exponentials")
    text(right, 7.6, 5.2, "in registers, gone after use", fontsize=8)
    box(right, 5, 6.3, 5.2, 1.5, facecolor=POSITIVE, edgecolor=POSITIVE, alpha=0.3)
    text(right, 7.6, 6.8, "sums of the columns")
    text(right, 7.6, 7.4, "stay until the run ends", fontsize=8)
    arrow(right, (7.6, 3.45), (7.6, 4.05))
    arrow(right, (7.6, 5.65), (7.6, 6.25))
    for k in range(4):
        cell(right, 0.4, 2.2 + 1.3 * k, 1.7, 0.9, facecolor=NATIVE, alpha=0.2 + 0.15 * k)
        text(right, 1.25, 2.65 + 1.3 * k, f"rows {3 - k}", fontsize=8)
    text(right, 1.25, 7.9, "row blocks\nstream by", fontsize=8)
    arrow(right, (2.3, 4.85), (4.9, 4.85), linewidth=1.8)
    arrow(right, (10.3, 4.85), (12.4, 4.85))
    text(right, 13.6, 4.85, "row sums,\none store\na tile", fontsize=8)
    arrow(right, (10.3, 7.05), (12.4, 7.05))
    text(right, 13.6, 7.05, "column sums,\none store\na run", fontsize=8)
    text(right, 7.6, 9.1, "S itself is never written to memory", fontweight="bold")


PICTURES: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
    "matrix": (draw_matrix, (9.6, 4.2)),
    "triangle": (draw_triangle, (9.6, 4.0)),
    "tournament": (draw_tournament, (9.6, 4.1)),
    "strip": (draw_strip, (9.6, 4.0)),
}


def draw(name: str) -> str:
    """One picture as SVG."""
    function, size = PICTURES[name]

    def figure() -> Figure:
        empty = Figure(figsize=size, layout="constrained")
        function(empty)
        return empty

    return svg(figure)


def main() -> None:
    for name in PICTURES:
        path = OUT / f"concepts_{name}.svg"
        path.write_text(draw(name), encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
