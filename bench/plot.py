"""Draw bench/results/nt_xent_cpu.json: time against M, and native beside what it is compared with.

    python bench/plot.py [--results RESULTS.json] [--out docs/images/nt_xent_cpu.svg]

The SVG follows the reader's light or dark colours. Needs Matplotlib, from the extra ``bench``.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measurement import RESULTS
from plan import TITLES

Record = dict[str, Any]

OUT = Path(__file__).parent.parent / "docs" / "images" / "nt_xent_cpu.svg"
# Matplotlib wants real colours; these are replaced by CSS variables in the SVG text.
INK, GRID = "#010203", "#040506"
COLOURS = """<style>
svg { --ink: #1c2128; --grid: #d5d9df; }
@media (prefers-color-scheme: dark) { svg { --ink: #e4e8ed; --grid: #3a414b; } }
</style>"""
NATIVE = "#2b83ba"
OTHER = "#8b8f98"
# Hues that read on white and on near-black; dashes tell the curves apart too.
CURVES = {
    "eager": ("eager", "#d97706", "--"),
    "chunked": ("chunked", "#1f9d78", "-."),
    "mm": ("three bare mm", OTHER, ":"),
    "native": ("native", NATIVE, "-"),
}
SETTINGS: dict[Any, Any] = {
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
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "axes.edgecolor": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def swept_features(rows: list[Record]) -> int:
    """D of the sweep over M."""
    (features,) = {int(row["D"]) for row in rows if row["part"] == "sweep"}
    return features


def curve(rows: list[Record], name: str) -> list[tuple[int, float]]:
    """(M, seconds) of forward + backward at the sweep's D, by rising M."""
    features = swept_features(rows)
    points = {
        row["M"]: row["median"]
        for row in rows
        if row["part"] in ("sweep", "targets")
        and (row["D"], row["pass"], row["name"]) == (features, "forward+backward", name)
    }
    return sorted(points.items())


def draw_time(axes: Axes, rows: list[Record]) -> None:
    """Time of forward + backward against M, one curve an implementation."""
    for name, (label, colour, dash) in CURVES.items():
        points = curve(rows, name)
        if points:
            sizes, seconds = zip(*points, strict=True)
            axes.plot(sizes, [1e3 * value for value in seconds], dash, color=colour, label=label)
            axes.plot(sizes, [1e3 * value for value in seconds], "o", color=colour, markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({size for name in CURVES for size, _ in curve(rows, name)}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.tick_params(axis="x", labelrotation=45)
    axes.minorticks_off()
    axes.set_xlabel("M = 2B rows")
    axes.set_title(f"Forward + backward, ms (D = {swept_features(rows)})")
    axes.legend()


def draw_bars(axes: Axes, entries: list[Record], labels: list[str]) -> None:
    """A bar for each ratio, and a tick across it where its target is."""
    positions = range(len(entries))
    axes.barh(positions, [entry["ratio"] for entry in entries], color=NATIVE, height=0.6)
    for position, entry in zip(positions, entries, strict=True):
        if entry["target"] is not None:
            axes.plot([entry["target"]] * 2, [position - 0.4, position + 0.4], color=INK)
        axes.annotate(
            f" {entry['ratio']:.2g}" if entry["ratio"] < 10 else f" {entry['ratio']:.0f}",
            (max(entry["ratio"], entry["target"] or 0), position),
            verticalalignment="center",
        )
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def draw_over_mm(axes: Axes, targets: list[Record]) -> None:
    """Native over the bare matrix product."""
    entries = [
        entry for entry in targets if (entry["part"], entry["numerator"]) == ("targets", "native")
    ]
    passes = {"forward": "fwd", "forward+backward": "fwd + bwd"}
    labels = [f"{entry['M']} × {entry['D']}, {passes[entry['pass']]}" for entry in entries]
    draw_bars(axes, entries, labels)
    axes.set_title("Time / bare matrix products")
    axes.set_xlabel("bar: measured, line: target (lower is better)")


def draw_speedups(axes: Axes, targets: list[Record]) -> None:
    """Other formulas over native."""
    entries = [entry for entry in targets if entry["part"] == "speedups" and entry["target"]]
    labels = [f"{TITLES[entry['numerator']]}\n{entry['M']} × {entry['D']}" for entry in entries]
    draw_bars(axes, entries, labels)
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.minorticks_off()
    axes.set_title("Times faster than")
    axes.set_xlabel("bar: measured, line: target (higher is better)")


def draw(results: dict[str, list[Record]]) -> str:
    """The whole figure as SVG."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        panels = figure.subplots(1, 3)
        draw_time(panels[0], results["rows"])
        draw_over_mm(panels[1], results["targets"])
        draw_speedups(panels[2], results["targets"])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return follow_colour_scheme(buffer.getvalue())


def follow_colour_scheme(svg: str) -> str:
    """Replace the two placeholder colours by the reader's, and leave out what no reader needs."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(<svg[^>]*>)", rf"\1\n{COLOURS}", svg, count=1)
    return svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "nt_xent_cpu.json")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    if "targets" not in results:
        raise SystemExit(f"{options.results} has no targets: run bench/nt_xent.py first")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(draw(results), encoding="utf-8")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
