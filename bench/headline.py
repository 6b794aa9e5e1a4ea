"""Draw the README's picture from recorded results: time and memory of one step of each loss.

Prints what the README says of them, too.

python bench/headline.py --cpu docs/results/DEVICE.json --gpu bench/results/DEVICE.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_tables import milliseconds
from gpu_targets import AUTOCAST, COMPILED, MM3
from gpu_targets import OURS as TRITON
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cjepa_kernels.bench.candidates import BOTH, EAGER, FORWARD, MM, OURS
from cjepa_kernels.bench.candidates import COMPILED as COMPILED_CPU
from cjepa_kernels.plot_style import INK, NATIVE, OTHER, svg

OUT = Path(__file__).parent.parent / "docs" / "images" / "headline.svg"
ROWS_OF_BARS = 5
CPU_ROWS, GPU_ROWS, FEATURES = 8192, 65536, 256
Content = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Bars of one quantity.

    Attributes:
        title: Above the bars.
        bars: Label and value, in the unit of ``unit``, the loss of this package first.
        line: What the bare products take, or None.
    """

    title: str
    bars: dict[str, float]
    unit: str
    line: float | None = None


def cpu_panels(content: Content) -> tuple[Panel, Panel]:
    """Time and peak memory on the CPU."""
    size = (CPU_ROWS, FEATURES)
    seconds = {
        row["name"]: row["median"]
        for row in content["rows"]
        if (row["M"], row["D"], row["pass"]) == (*size, BOTH)
    }
    extra = {
        row["name"]: row["extra_bytes"] / 2**20
        for row in content["memory"]
        if (row["M"], row["D"]) == size
    }
    names = {
        OURS: "cjepa_kernels",
        COMPILED_CPU: "torch.compile",
        EAGER: "plain formula",
        "lightly": "lightly's",
        "hjepa": "H-JEPA's",
    }
    time = {label: 1e3 * seconds[name] for name, label in names.items() if name in seconds}
    memory = {label: extra[name] for name, label in names.items() if name in extra}
    where = f"{content['environment']['threads']} CPU threads, batch {CPU_ROWS // 2:,}"
    return (
        Panel(f"Time, {where}", time, "ms", 1e3 * seconds[MM]),
        Panel(f"Memory, {where}", memory, "MiB"),
    )


def gpu_panel(content: Content) -> Panel:
    """Time on the GPU."""
    parts = {TRITON: "targets", COMPILED: "compiled", AUTOCAST: "targets", MM3: "targets"}
    of = {
        row["name"]: 1e3 * row["median"]
        for row in content["rows"]
        if (row["M"], row["D"], row["pass"]) == (GPU_ROWS, FEATURES, BOTH)
        and parts.get(row["name"]) == row["part"]
    }
    names = {TRITON: "cjepa_kernels", COMPILED: "torch.compile", AUTOCAST: "plain formula"}
    (gpu,) = content["gpu"]
    where = " ".join(gpu["device"].split()[1:2])
    bars = {label: of[name] for name, label in names.items()}
    return Panel(f"Time, {where}, batch {GPU_ROWS // 2:,}", bars, "ms", of[MM3])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds > 0.1 else f"{1e3 * seconds:.3g}"


def sentence(cpu: Content, gpu: Content) -> str:
    """What the README says below the picture: where it was measured, and its figures."""
    seconds = {
        row["name"]: row["median"]
        for row in cpu["rows"]
        if (row["M"], row["D"], row["pass"]) == (CPU_ROWS, FEATURES, BOTH)
    }
    of = milliseconds(gpu)

    def on_gpu(part: str, name: str) -> float:
        return of(part, GPU_ROWS, FEATURES, BOTH, name)

    eager, compiled, lightly, hjepa = (
        f"{seconds[name] / seconds[OURS]:.1f}" for name in (EAGER, COMPILED_CPU, "lightly", "hjepa")
    )
    settings, (device,) = cpu["settings"], gpu["gpu"]
    return (
        f"Forward + backward of NT-Xent, D = {FEATURES}. CPU: {settings['dtype']}, "
        f"{processor(cpu['environment'])}, batch {CPU_ROWS // 2:,} pairs: "
        f"{eager} times as fast as the plain formula, {compiled} as `torch.compile` of it, "
        f"{lightly} as lightly's, {hjepa} as H-JEPA's. "
        f"GPU: bf16, {' '.join(device['device'].split()[:2])}, batch {GPU_ROWS // 2:,} pairs: "
        f"{on_gpu('targets', AUTOCAST) / on_gpu('targets', TRITON):.1f} times as fast as the plain "
        f"formula, {on_gpu('compiled', COMPILED) / on_gpu('compiled', TRITON):.1f} as "
        f"`torch.compile` of it, {on_gpu('targets', TRITON) / on_gpu('targets', MM3):.2f} of the "
        "time of its three bare products."
    )


def processor(environment: Content) -> str:
    """A CPU and what of it was used: ``2 threads of an AMD EPYC (AVX2)``."""
    instructions = environment["instruction_set"].split("_")[0].upper().replace("AVX5", "AVX-5")
    article = "an" if environment["device"][0] in "AEIO" else "a"
    return f"{environment['threads']} threads of {article} {environment['device']} ({instructions})"


# Heads of the README's table: what is measured of it, and of which candidate.
LOSSES = {
    OURS: "ours",
    EAGER: "plain",
    COMPILED_CPU: "`torch.compile`",
    "lightly": "lightly's",
    "hjepa": "H-JEPA's",
}
RATIOS = {FORWARD: "forward / mm", BOTH: "f + b / 3 mm"}
REMEMBERED = (OURS, EAGER)


def cpu_table(content: Content) -> str:
    """The README's: M, then of each loss forward + backward in ms and its memory."""
    memory = [f"{LOSSES[name]}, MiB" for name in REMEMBERED]
    heads = ["M = 2B", *RATIOS.values(), *LOSSES.values(), *memory]
    rows = []
    for count in sorted({row["M"] for row in content["rows"] if row["D"] == FEATURES}):
        at = (count, FEATURES)
        seconds = {
            (r["pass"], r["name"]): r["median"] for r in content["rows"] if (r["M"], r["D"]) == at
        }
        extra = {r["name"]: r["extra_bytes"] for r in content["memory"] if (r["M"], r["D"]) == at}
        ratios = [
            f"{seconds[key, OURS] / seconds[key, MM]:.2f}" if (key, MM) in seconds else "-"
            for key in RATIOS
        ]
        cells = [
            *ratios,
            *(_ms(seconds[BOTH, n]) if (BOTH, n) in seconds else "-" for n in LOSSES),
            *(f"{extra[n] / 2**20:.0f}" if n in extra else "-" for n in REMEMBERED),
        ]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    head = f"| {' | '.join(heads)} |"
    return "\n".join([head, "|" + "---:|" * len(heads), *rows])


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Horizontal bars with their values, and a line for the bare products."""
    labels = list(panel.bars)
    colours = [NATIVE, *[OTHER] * (len(labels) - 1)]
    axes.barh(labels, list(panel.bars.values()), color=colours, height=0.62)
    axes.set_ylim(ROWS_OF_BARS - 0.4, -0.6)
    axes.set_title(panel.title)
    axes.set_xlim(0, 1.28 * max(panel.bars.values()))
    for index, value in enumerate(panel.bars.values()):
        text = f" {value:,.0f} {panel.unit}" if value >= 20 else f" {value:.1f} {panel.unit}"
        weight = "bold" if index == 0 else "normal"
        axes.text(value, index, text, va="center", color=INK, fontweight=weight)
    if panel.line is not None:
        bounds = (0.45, len(labels) - 0.55)  # the first bar's value may stand in its way
        axes.plot([panel.line] * 2, bounds, color=INK, linestyle=":", linewidth=1.2)
        axes.annotate(
            "its three matrix products",
            (panel.line, len(labels) - 0.52),
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


def draw(cpu: Content, gpu: Content) -> Figure:
    """The three panels beside each other."""
    figure = Figure(figsize=(10.4, 2.5), layout="constrained")
    panels = (*cpu_panels(cpu), gpu_panel(gpu))
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw_panel(axes, panel)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", type=Path, required=True, help="what cjepa bench recorded")
    parser.add_argument("--gpu", type=Path, required=True, help="what bench/gpu.py recorded")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    cpu, gpu = (json.loads(path.read_text("utf-8")) for path in (options.cpu, options.gpu))
    options.out.write_text(svg(lambda: draw(cpu, gpu)), encoding="utf-8")
    print(f"written: {options.out}\nFor the README:\n\n{sentence(cpu, gpu)}\n\n{cpu_table(cpu)}")


if __name__ == "__main__":
    main()
