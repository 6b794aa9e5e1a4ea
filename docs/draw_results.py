"""Draw the pictures of the documents from the recorded results: ``python docs/draw_results.py``.

It writes headline.svg, nt_xent_cpu.svg, losses_cpu.svg, temperature_error.svg and distributed.svg
to docs/images. The SVGs follow the reader's light or dark colours. It needs Matplotlib, from the
extra ``bench``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cjepa_kernels.bench import plots
from cjepa_kernels.bench.candidates import (
    BOTH,
    COMPILED,
    EAGER,
    FORWARD,
    MM,
    NATIVE,
    OURS,
    TITLES,
)
from cjepa_kernels.bench.losses import COMPARED, LOSSES
from cjepa_kernels.bench.records import RESULTS
from cjepa_kernels.plot_style import INK, OTHER, svg
from cjepa_kernels.plot_style import NATIVE as BAR

sys.path.insert(0, str(RESULTS.parent))  # The scripts of bench/ are no package.

from distributed_cost import HIDDEN, NETWORK, NVLINK, SHOWN, Problem, simulate
from gpu_targets import AUTOCAST, MM3
from gpu_targets import COMPILED as COMPILED_GPU
from gpu_targets import OURS as TRITON

Content = dict[str, Any]

DOCS = RESULTS.parents[1] / "docs"
CPU_OF_HEADLINE = DOCS / "results" / "amd-epyc-avx2.json"
CPU_ROWS, GPU_ROWS, FEATURES = 8192, 65536, 256  # of the README's picture
MANY_RANKS = 64  # Of the picture of what ranks send.
MOST_BARS = 5  # in a panel of the README's picture


def draw_nt_xent(results: Content) -> Figure:
    """What bench/nt_xent.py recorded: time against M, and native beside what it is compared with.

    Args:
        results: The content of its results file.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    times, products, speedups = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    (features,) = {row["D"] for row in results["rows"] if row["part"] == "sweep"}
    plots.draw_times(
        times,
        [
            {**row, "name": OURS if row["name"] == NATIVE else row["name"]}
            for row in results["rows"]
            if row["part"] in ("sweep", "targets") and row["pass"] == BOTH
        ],
        features,
    )
    times.tick_params(axis="x", labelrotation=45)
    times.set_title(f"Forward + backward, ms (D = {features})")
    targets = results["targets"]
    over_mm = [e for e in targets if (e["part"], e["numerator"]) == ("targets", NATIVE)]
    passes = {FORWARD: "fwd", BOTH: "fwd + bwd"}
    labels = [f"{entry['M']} × {entry['D']}, {passes[entry['pass']]}" for entry in over_mm]
    _draw_ratios(products, over_mm, labels)
    products.set_title("Time / bare matrix products")
    products.set_xlabel("line: target; lower is better")
    others = [entry for entry in targets if entry["part"] == "speedups" and entry["target"]]
    labels = [f"{TITLES[entry['numerator']]}\n{entry['M']} × {entry['D']}" for entry in others]
    _draw_ratios(speedups, others, labels)
    speedups.set_xscale("log")
    speedups.set_xlim(left=1)
    speedups.minorticks_off()
    speedups.set_title("Times faster than")
    speedups.set_xlabel("line: target; higher is better")
    return figure


def draw_bars(
    axes: Axes,
    values: Mapping[str, float],
    texts: Sequence[str],
    *,
    colours: str | Sequence[str] = BAR,
    ends: Sequence[float] | None = None,
) -> None:
    """Horizontal bars from the top down, each with a text beside it.

    Args:
        axes: Where they are drawn.
        values: Lengths of the bars by their labels.
        texts: Of the bars.
        colours: Of all bars, or of each.
        ends: Where the texts begin. Default: at the ends of the bars.
    """
    axes.barh(range(len(values)), list(values.values()), color=colours, height=0.62)
    axes.set_yticks(range(len(values)), list(values))
    for position, (end, text) in enumerate(zip(ends or values.values(), texts, strict=True)):
        axes.annotate(f" {text}", (end, position), verticalalignment="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def _draw_ratios(axes: Axes, entries: list[Content], labels: list[str]) -> None:
    """A bar for each ratio, and a tick across it where its target is."""
    values = {label: entry["ratio"] for label, entry in zip(labels, entries, strict=True)}
    ends = [max(entry["ratio"], entry["target"] or 0) for entry in entries]
    texts = [f"{v:.2g}" if v < 10 else f"{v:.0f}" for v in values.values()]
    draw_bars(axes, values, texts, ends=ends)
    for position, entry in enumerate(entries):
        if entry["target"] is not None:
            axes.plot([entry["target"]] * 2, [position - 0.4, position + 0.4], color=INK)


def draw_temperature_errors(rows: list[Content]) -> Figure:
    """Error of loss and gradient against the temperature, as bench/temperature_error.py found."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "gradient"), strict=True):
        curves = {
            name: sorted((row["temperature"], row[f"{formula}_{quantity}"]) for row in rows)
            for formula, name in (("here", OURS), ("textbook", EAGER))
        }
        plots.draw_errors(axes, curves)
        axes.set_title(f"Relative error of the {quantity}, fp32")
    return figure


def draw_distributed(rows: list[Content]) -> Figure:
    """What each scheme costs a rank, and the simulated time that waiting adds to the ring.

    Args:
        rows: What bench/distributed_cost.py recorded.
    """
    names = {
        "ring": "ring (here)",
        "all_gather": "all-gather (here)",
        "lightly": "lightly",
        "open_clip": "open_clip",
        "inf_cl": "Inf-CL's ring",
    }
    colours = [plots.STYLES[OURS].colour] * 2 + [OTHER] * 3
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    sent, multiplied, waiting = figure.subplots(1, 3)
    for axes, key, unit, title in (
        (sent, "bytes", 2**20, "Sent by a rank, MiB"),
        (multiplied, "flops", 1e12, "Multiplied by a rank, TFLOP"),
    ):
        of_scheme = {row["scheme"]: row[key] / unit for row in rows if row["ranks"] == MANY_RANKS}
        values = {label: of_scheme[scheme] for scheme, label in names.items()}
        texts = [f"{value:.3g}" for value in values.values()]
        draw_bars(axes, values, texts, colours=colours)
        axes.set_title(title)
        axes.set_xlabel(f"{MANY_RANKS} ranks of {SHOWN.rows // 2} pairs, {SHOWN.features} features")
    pairs = [2**k for k in range(8, 15)]
    for link, ranks, name in ((NVLINK, 8, OURS), (NETWORK, MANY_RANKS, EAGER)):
        problems = [Problem(ranks, 2 * count, SHOWN.features, SHOWN.itemsize) for count in pairs]
        waiting.plot(
            pairs,
            [100 * simulate(problem, link)["exposed"] for problem in problems],
            label=f"{ranks} ranks, {link.name}",
            color=plots.STYLES[name].colour,
            linestyle=plots.STYLES[name].dash,
        )
    waiting.axhline(100 * HIDDEN, color=OTHER, linewidth=1)
    waiting.annotate(
        f"{100 * HIDDEN:.0f} %", (pairs[0], 100 * HIDDEN), (2, 3), textcoords="offset points"
    )
    waiting.set_xscale("log", base=2)
    waiting.set_yscale("log")
    waiting.set_xticks(pairs, [str(count) for count in pairs])
    waiting.set_ylim(0.5, 1e4)
    waiting.set_xlabel("pairs a rank")
    waiting.set_title("Simulated: time that waiting adds, %")
    waiting.legend()
    return figure


def draw_headline(cpu: Content, gpu: Content) -> Figure:
    """The README's picture: time and memory of one step of each loss.

    Args:
        cpu: The results file of ``cjepa bench``.
        gpu: That of bench/gpu.py.
    """
    on_cpu = {
        OURS: "cjepa_kernels",
        COMPILED: "torch.compile",
        EAGER: "plain formula",
        "lightly": "lightly's",
        "hjepa": "H-JEPA's",
    }
    size = (CPU_ROWS, FEATURES)
    seconds = {
        row["name"]: row["median"]
        for row in cpu["rows"]
        if (row["M"], row["D"], row["pass"]) == (*size, BOTH)
    }
    extra = {r["name"]: r["extra_bytes"] for r in cpu["memory"] if (r["M"], r["D"]) == size}
    parts = {TRITON: "targets", COMPILED_GPU: "compiled", AUTOCAST: "targets", MM3: "targets"}
    gpu_seconds = {
        row["name"]: row["median"]
        for row in gpu["rows"]
        if (row["M"], row["D"], row["pass"]) == (GPU_ROWS, FEATURES, BOTH)
        and parts.get(row["name"]) == row["part"]
    }
    on_gpu = {TRITON: "cjepa_kernels", COMPILED_GPU: "torch.compile", AUTOCAST: "plain formula"}
    where = f"{cpu['environment']['threads']} CPU threads, batch {CPU_ROWS // 2:,}"
    device = gpu["gpu"][0]["device"].split()[1]
    figure = Figure(figsize=(10.4, 2.5), layout="constrained")
    times, memory, gpu_times = figure.subplots(1, 3)
    of_cpu = {label: 1e3 * seconds[name] for name, label in on_cpu.items() if name in seconds}
    _draw_headline_panel(times, f"Time, {where}", of_cpu, unit="ms", products=1e3 * seconds[MM])
    mebibytes = {label: extra[name] / 2**20 for name, label in on_cpu.items() if name in extra}
    _draw_headline_panel(memory, f"Memory, {where}", mebibytes, unit="MiB")
    of_gpu = {label: 1e3 * gpu_seconds[name] for name, label in on_gpu.items()}
    title = f"Time, {device}, batch {GPU_ROWS // 2:,}"
    _draw_headline_panel(gpu_times, title, of_gpu, unit="ms", products=1e3 * gpu_seconds[MM3])
    return figure


def _draw_headline_panel(
    axes: Axes,
    title: str,
    values: dict[str, float],
    *,
    unit: str,
    products: float | None = None,
    places: int = MOST_BARS,
) -> None:
    """Bars with their values, this package's first, and a line for the bare products.

    Panels of a picture have room for as many ``places`` each, so that their bars are equally wide.
    """
    texts = [f"{v:,.0f} {unit}" if v >= 20 else f"{v:.1f} {unit}" for v in values.values()]
    colours = [plots.STYLES[OURS].colour, *[OTHER] * (len(values) - 1)]
    draw_bars(axes, values, texts, colours=colours)
    axes.texts[0].set_fontweight("bold")
    axes.set_ylim(places - 0.4, -0.6)
    axes.set_xlim(0, 1.28 * max(values.values()))
    axes.set_title(title)
    if products is not None:
        bounds = (0.45, len(values) - 0.55)  # The first bar's value may stand in its way.
        axes.plot([products] * 2, bounds, color=INK, linestyle=":", linewidth=1.2)
        axes.annotate(
            "its three matrix products",
            (products, len(values) - 0.52),
            xytext=(4, -9),
            textcoords="offset points",
            annotation_clip=False,
            fontsize=8,
            color=INK,
        )
    axes.grid(False)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines["bottom"].set_visible(False)


def draw_losses(results: Content) -> Figure:
    """Forward + backward of the losses beside NT-Xent, as bench/losses.py recorded them."""
    figure = Figure(figsize=(10.4, 3.0), layout="constrained")
    seconds = {
        (row["loss"], row["name"]): row["median"]
        for row in results["rows"]
        if (row["M"], row["D"]) == COMPARED
    }
    names = list(dict.fromkeys(loss for loss, _ in seconds))
    panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        milliseconds = {
            one.title: 1e3 * seconds[name, one.name]
            for one in LOSSES[name].candidates().values()
            if (name, one.name) in seconds
        }
        title = f"{LOSSES[name].title}, {COMPARED.rows:,} rows"
        _draw_headline_panel(axes, title, milliseconds, unit="ms", places=3)
    return figure


def _read(path: Path) -> Content:
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    return content


def pictures() -> dict[Path, Callable[[], Figure]]:
    """What draws each picture, from the records."""
    records = list(RESULTS.glob("NVIDIA-*.json"))
    if len(records) != 1:
        raise SystemExit(f"{RESULTS}: {len(records)} files NVIDIA-*.json instead of one")
    errors = _read(RESULTS / "temperature_error_cpu.json")["rows"]
    costs = _read(RESULTS / "distributed_cost.json")["rows"]
    images = DOCS / "images"
    return {
        images / "headline.svg": partial(draw_headline, _read(CPU_OF_HEADLINE), _read(records[0])),
        images / "nt_xent_cpu.svg": partial(draw_nt_xent, _read(RESULTS / "nt_xent_cpu.json")),
        images / "losses_cpu.svg": partial(draw_losses, _read(RESULTS / "losses_cpu.json")),
        images / "temperature_error.svg": partial(draw_temperature_errors, errors),
        images / "distributed.svg": partial(draw_distributed, costs),
    }


def main() -> None:
    for path, draw in pictures().items():
        path.write_text(svg(draw), encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
