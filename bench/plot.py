"""Draw bench/results/nt_xent_cpu.json: time against M, and native beside what it is compared with.

    python bench/plot.py [--results RESULTS.json] [--out docs/images/nt_xent_cpu.svg]

The SVG follows the reader's light or dark colours. Needs Matplotlib, from the extra ``bench``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plan import TITLES

from cjepa_kernels.bench.records import RESULTS
from cjepa_kernels.plot_style import INK, NATIVE, OTHER, svg

Record = dict[str, Any]

OUT = Path(__file__).parent.parent / "docs" / "images" / "nt_xent_cpu.svg"
# Hues that read on white and on near-black; dashes tell the curves apart too.
CURVES = {
    "eager": ("eager", "#d97706", "--"),
    "chunked": ("chunked", "#1f9d78", "-."),
    "mm": ("three bare mm", OTHER, ":"),
    "native": ("native", NATIVE, "-"),
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

    def figure() -> Figure:
        whole = Figure(figsize=(12, 3.8), layout="constrained")
        panels = whole.subplots(1, 3)
        draw_time(panels[0], results["rows"])
        draw_over_mm(panels[1], results["targets"])
        draw_speedups(panels[2], results["targets"])
        return whole

    return svg(figure)


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
