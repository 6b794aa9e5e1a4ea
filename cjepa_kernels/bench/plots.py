"""The plots of a comparison, and the elements that other pictures share with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cjepa_kernels.bench.candidates import BOTH, CANDIDATES, COMPILED, EAGER, OURS, TITLES
from cjepa_kernels.bench.comparison import Results
from cjepa_kernels.bench.records import Record
from cjepa_kernels.files import atomic_write
from cjepa_kernels.plot_style import NATIVE, OTHER, Label, label_curves, svg, write_pngs

Point = tuple[float, float]
TALLEST_ERROR, SMALLEST_ERROR = 3.0, 1e-8


class Style(NamedTuple):
    """The looks of a candidate's curve. Its colour is legible on white and on near-black."""

    colour: str
    dash: Any
    marker: str
    width: float = 1.6


STYLES = {
    "cjepa_kernels": Style(NATIVE, "-", "o", 2.6),
    "chunked": Style("#1f9d78", (0, (5, 1, 1, 1)), "D"),
    "eager": Style("#d97706", (0, (5, 2)), "s"),
    "compiled": Style("#c0504d", (0, (2, 1)), "^"),
    "lightly": Style("#b05fa5", (0, (6, 1, 1, 1, 1, 1)), "v"),
    "hjepa": Style("#8e6d46", (0, (8, 2)), "P"),
    "metric_learning": Style("#7f8c3b", (0, (3, 1, 1, 1)), "X"),
    "inf_cl": Style("#3d9fb3", (0, (4, 1, 2, 1)), "<"),
    "siglip_kernel": Style("#7a70c8", (0, (1, 1, 3, 1)), ">"),
    "mm": Style(OTHER, (0, (1, 1.5)), "."),
}


def widest_sweep(results: Results) -> int:
    """The D for which the most M were measured."""
    features: list[int] = [row["D"] for row in results["rows"] if row["pass"] == BOTH]
    return max(sorted(set(features)), key=features.count, default=0)


def curve(records: Sequence[Record], name: str, key: str, features: int) -> list[Point]:
    """The points (M, value) of a candidate, by rising M."""
    return sorted(
        (row["M"], row[key]) for row in records if (row["D"], row["name"]) == (features, name)
    )


def draw_curve(axes: Axes, points: Sequence[Point], name: str) -> Label:
    """Draw the curve of one candidate and return its label."""
    colour, dash, marker, width = STYLES[name]
    xs, ys = zip(*points, strict=True)
    order = {OURS: 4.0, EAGER: 3.5}.get(name, 3.0)  # Of curves that coincide these are on top.
    axes.plot(xs, ys, linestyle=dash, color=colour, linewidth=width, zorder=order)
    axes.plot(xs, ys, marker, color=colour, markersize=4, zorder=order)
    return Label(xs[-1], ys[-1], TITLES[name], colour)


def draw_spread(axes: Axes, x: float, *, low: float, high: float, colour: str) -> None:
    """An error bar from ``low`` to ``high``."""
    axes.errorbar(
        [x],
        [low],
        yerr=[[0.0], [high - low]],
        fmt="none",
        ecolor=colour,
        elinewidth=1.0,
        capsize=3.0,
        zorder=4.5,
    )


def _rows_axis(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)), [f"{size:.0f}" for size in sorted(set(sizes))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("M = 2B rows")


def draw_time(results: Results) -> Figure:
    """Forward + backward against M."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    rows = [row for row in results["rows"] if row["pass"] == BOTH]
    draw_times(figure.subplots(), rows, widest_sweep(results))
    return figure


def draw_times(axes: Axes, rows: Sequence[Record], features: int) -> None:
    """Time of forward + backward against M, a curve for each candidate.

    Args:
        axes: Where they are drawn.
        rows: With ``name``, ``M``, ``D``, ``median``, ``p20`` and ``p80`` in seconds.
        features: The D that is drawn.
    """
    curves = {name: curve(rows, name, "median", features) for name in STYLES}
    labels = [
        draw_curve(axes, [(m, 1e3 * seconds) for m, seconds in points], name)
        for name, points in curves.items()
        if points
    ]
    for row in rows:
        if row["D"] == features and row["name"] in STYLES:
            colour = STYLES[row["name"]].colour
            low, high = 1e3 * row["p20"], 1e3 * row["p80"]
            draw_spread(axes, row["M"], low=low, high=high, colour=colour)
    _rows_axis(axes, [m for points in curves.values() for m, _ in points])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Time of forward + backward, ms (D = {features}; bars: p20 to p80)")
    label_curves(axes, labels)


def draw_memory(results: Results) -> Figure:
    """Peak extra memory against M. A hollow mark is what a candidate that was left out needs."""
    features = widest_sweep(results)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    labels, sizes, highest = [], [], 1.0
    limit = results["environment"]["memory_bytes"]
    for name in STYLES:
        points = [
            (m, size / 2**20)
            for m, size in curve(results["memory"], name, "extra_bytes", features)
            if size > 0
        ]
        if not points:
            continue
        labels.append(draw_curve(axes, points, name))
        needed = [
            (row["M"], row["needed_bytes"] / 2**20)
            for row in results["left_out"]
            if (row["D"], row["name"]) == (features, name)
            and row["M"] > points[-1][0]
            and CANDIDATES[name].degree > 1
            and name != COMPILED  # Its memory is not known.
            and row["needed_bytes"] < 8 * (limit or 0)
        ]
        if needed:
            style = STYLES[name]
            path = [points[-1], *sorted(needed)]
            axes.plot(*zip(*path, strict=True), ":", color=style.colour, linewidth=1)
            axes.plot(
                *zip(*needed, strict=True),
                style.marker,
                color=style.colour,
                markerfacecolor="none",
                markersize=5,
            )
            labels[-1] = labels[-1]._replace(x=path[-1][0], y=path[-1][1])
        sizes += [m for m, _ in (*points, *needed)]
        highest = max(highest, *(size for _, size in (*points, *needed)))
    _rows_axis(axes, sizes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    if limit is not None and highest * 2**20 > limit / 30:
        axes.axhline(limit / 2**20, color=rcParams["text.color"], linewidth=1.2)
        axes.annotate(
            f"memory of this machine: {limit / 2**30:.0f} GiB",
            (0.01, limit / 2**20),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
        )
        axes.set_ylim(top=max(2.5 * limit / 2**20, 1.5 * highest))
    axes.set_title(f"Peak extra memory of forward + backward, MiB (D = {features})")
    label_curves(axes, labels)
    return figure


class RooflinePoint(NamedTuple):
    """A candidate at one size: FLOPs per byte, and FLOP/s at the median, p80 and p20 times."""

    rows: int
    intensity: float
    rate: float
    low: float
    high: float


def _on_the_roofline(results: Results) -> dict[str, RooflinePoint]:
    """The point of each candidate whose bytes are known, at its largest M."""
    features = widest_sweep(results)
    points: dict[str, RooflinePoint] = {}
    for row in results["rows"]:
        cubic = row["name"] in CANDIDATES and CANDIDATES[row["name"]].degree > 2
        if (row["pass"], row["D"]) == (BOTH, features) and row["bytes_moved"] and not cubic:
            flops = 6 * row["M"] ** 2 * features
            rates = (flops / row[key] for key in ("median", "p80", "p20"))
            point = RooflinePoint(row["M"], flops / row["bytes_moved"], *rates)
            points[row["name"]] = max(point, points.get(row["name"], point))
    return points


def draw_roofline(results: Results) -> Figure:
    """FLOP/s of each candidate at its largest M against the FLOPs per byte that it moves."""
    features = widest_sweep(results)
    peak, bandwidth = results["roofs"]["flops"], results["roofs"]["bandwidth"]
    points = _on_the_roofline(results)
    ridge = peak / bandwidth
    low = min(ridge, *(point.intensity for point in points.values())) / 30  # The labels need room.
    high = 3 * max(ridge, *(point.intensity for point in points.values()))
    bottom = min(low * bandwidth, *(point.low for point in points.values())) / 2
    top = 3 * max(peak, *(point.high for point in points.values()))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    ink = rcParams["text.color"]
    unit, name_of_unit = (1e12, "TFLOP/s") if peak >= 1e13 else (1e9, "GFLOP/s")
    roof = ([low, ridge, high], [low * bandwidth / unit, peak / unit, peak / unit])
    axes.plot(*roof, color=ink, linewidth=1.2, zorder=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom / unit, top / unit)
    labels = []
    largest = max(point.rows for point in points.values())
    for name in (name for name in STYLES if name in points):
        point = points[name]
        style = STYLES[name]
        size = 9 if name == OURS else 6
        axes.plot(
            [point.intensity],
            [point.rate / unit],
            style.marker,
            color=style.colour,
            markersize=size,
        )
        draw_spread(
            axes, point.intensity, low=point.low / unit, high=point.high / unit, colour=style.colour
        )
        text = TITLES[name] if point.rows == largest else f"{TITLES[name]}, M = {point.rows}"
        labels.append(Label(point.intensity, point.rate / unit, text, style.colour))
    labels.append(Label(ridge, peak / unit, "", "none"))  # It keeps the others off the roof.
    label_curves(axes, labels, column=1.0, always_right=True)
    ours = points.get(OURS)
    if ours is not None and ours.rate > min(peak, ours.intensity * bandwidth):
        axes.annotate(
            "above the roof: half of the products is left out, S being symmetric",
            (ours.intensity, ours.rate / unit),
            xytext=(0, 9),
            textcoords="offset points",
            horizontalalignment="right",
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("FLOPs for each byte that operators read or write")
    axes.set_title(
        f"Roofline: 6 M² D FLOPs / time, {name_of_unit} (M = {largest}, D = {features}; "
        "bars: p20 to p80)"
    )
    axes.annotate(
        f"a large product: {peak / unit:.3g} {name_of_unit}",
        (ridge, peak / unit),
        xytext=(0, 4),
        textcoords="offset points",
    )
    axes.annotate(
        f"a copy: {bandwidth / 1e9:.0f} GB/s",
        (ridge / 1.5, peak / 1.5 / unit),
        xytext=(-6, 4),
        textcoords="offset points",
        horizontalalignment="right",
    )
    return figure


def draw_temperatures(results: Results) -> Figure:
    """Error of the gradient against the temperature, a panel for each dtype of the inputs."""
    records = results["temperatures"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in records))
    figure = Figure(figsize=(3.1 * len(dtypes) + 1.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        curves = {
            name: sorted(
                (row["temperature"], row["gradient"])
                for row in records
                if (row["dtype"], row["name"]) == (dtype, name)
            )
            for name in STYLES
        }
        draw_errors(axes, curves, labelled=axes is panels[-1])
        axes.set_title(f"{dtype} inputs")
    panels[0].set_ylabel("largest error of the gradient\n/ its largest magnitude")
    panels[0].annotate(
        "nothing right", (0.02, 1.0), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points",
    )  # fmt: skip
    return figure


def draw_errors(
    axes: Axes, curves: Mapping[str, Sequence[Point]], *, labelled: bool = True
) -> None:
    """Errors against the temperature.

    Args:
        axes: Where they are drawn.
        curves: (temperature, error) of each candidate; without points it is left out.
        labelled: Whether the curves have labels.
    """
    drawn = {name: points for name, points in curves.items() if points}
    labels = [
        draw_curve(axes, [(x, _within_errors(error)) for x, error in points], name)
        for name, points in drawn.items()
    ]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(SMALLEST_ERROR * 3, TALLEST_ERROR)
    temperatures = sorted({x for points in drawn.values() for x, _ in points}, reverse=True)
    axes.set_xticks(temperatures, [f"{value:g}" for value in temperatures], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("temperature")
    axes.axhline(1.0, color=rcParams["text.color"], linewidth=0.8)
    if labelled:
        label_curves(axes, labels)


def _within_errors(error: float) -> float:
    """The error within the axis. NaN counts as the tallest."""
    return TALLEST_ERROR if math.isnan(error) else min(max(error, SMALLEST_ERROR), TALLEST_ERROR)


PLOTS: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "time": ("Time against the number of rows", draw_time),
    "memory": ("Peak memory against the number of rows", draw_memory),
    "roofline": ("Roofline", draw_roofline),
    "temperature": ("Error of the gradient against the temperature", draw_temperatures),
}


def drawable(results: Results) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """Title and drawing of each plot that the results have data for."""
    data = {
        "time": results["rows"],
        "memory": results["memory"],
        "roofline": results["roofs"] and _on_the_roofline(results),
        "temperature": results["temperatures"],
    }
    return {
        name: (title, partial(draw, results)) for name, (title, draw) in PLOTS.items() if data[name]
    }


def write_all_pngs(results: Results, directory: Path) -> list[Path]:
    """Write every plot in light and dark colours."""
    return [
        path
        for name, (_, draw) in drawable(results).items()
        for path in write_pngs(draw, directory / f"{name}.png")
    ]


def write_all_svgs(results: Results, directory: Path, prefix: str) -> list[Path]:
    """Write every plot as SVG that follows the reader's colours."""
    written = []
    for name, (_, draw) in drawable(results).items():
        written.append(directory / f"{prefix}_{name}.svg")
        atomic_write(written[-1], svg(draw))
    return written
