"""What a rank sends and multiplies, by formula, and a simulation of the overlap.

    python bench/distributed_cost.py [--no-save]

R ranks of m = M_r rows each, M = R m, D features of ``itemsize`` bytes. Writes the tables of
docs/distributed.md to bench/results/distributed_cost.json and draws docs/images/distributed.svg.
The formulas of this package's two strategies are held against the code's counters by
bench/distributed.py and by the tests; those of the others follow their sources:

    lightly    1.6.0: features gathered, logits (M_r, M) kept; the gradients of all rows, stacked,
               are all-reduced
    open_clip  3.3.0, local_loss and gather_with_grad, with both views as the rows of NT-Xent: the
               same with a reduce-scatter
    inf_cl     1.2.1, its ring, likewise: R - 1 exchanges of features in each direction and R of
               fp32 gradients; logits computed again in the backward

A simulation is not a measurement: it shows what the rates that are put in lead to. Its rates are
those of data sheets for the links and an assumption for the products, which have not run on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cjepa_kernels.bench.records import write_results
from cjepa_kernels.bench.tables import print_table
from cjepa_kernels.plot_style import NATIVE as OURS
from cjepa_kernels.plot_style import OTHER, svg

RANKS = (2, 4, 8, 16, 64, 256, 1024)
SCHEMES = ("ring", "all_gather", "lightly", "open_clip", "inf_cl")
AGREED = 8 * 12  # bytes in which ranks tell each other what they hold
STATISTICS = 3  # numbers of a row that travel: fp64 in the forward, fp32 in the backward


@dataclass(frozen=True)
class Problem:
    """Equal shards: ranks, rows of each, features, bytes of a feature."""

    ranks: int
    rows: int
    features: int
    itemsize: int

    @property
    def shard(self) -> int:
        """Bytes of a shard's features."""
        return self.rows * self.features * self.itemsize

    @property
    def gradient(self) -> int:
        """Bytes of a shard's gradients, fp32."""
        return self.rows * self.features * 4


@dataclass(frozen=True)
class Cost:
    """Of one rank, the mean over all: bytes sent, and FLOPs of the products."""

    forward_bytes: float
    backward_bytes: float
    flops: float


def cost(scheme: str, p: Problem, *, kept: bool = False) -> Cost:
    """What a scheme takes.

    Args:
        scheme: One of ``SCHEMES``.
        p: The problem.
        kept: Whether the own block's exponentials were kept for the backward.
    """
    product = 2 * p.rows * p.features  # FLOPs of a row of S with one other shard
    own = p.rows * p.rows * p.features
    every = p.ranks * p.rows * product  # (M_r, M)
    if scheme == "lightly":
        return Cost((p.ranks - 1) * p.shard, 2 * (p.ranks - 1) * p.shard, 3 * every)
    if scheme == "open_clip":
        return Cost((p.ranks - 1) * p.shard, (p.ranks - 1) * p.shard, 3 * every)
    if scheme == "inf_cl":
        exchanged = (p.ranks - 1) * p.shard
        return Cost(exchanged, exchanged + p.ranks * p.gradient, 4 * every)
    agreed = (p.ranks - 1) * AGREED + 2 * (p.ranks - 1) * 8 * (p.features + 3) // p.ranks
    own_flops = (1 + 2 + (not kept)) * own
    others = (p.ranks - 1) * p.rows
    if scheme == "all_gather":
        forward = (p.ranks - 1) * p.shard
        backward = (p.ranks - 1) * p.rows * STATISTICS * 4
        return Cost(agreed + forward, backward, own_flops + 3 * others * product)
    # The ring: a visitor a step. With R even the last step of one rank in two needs half of it.
    steps = p.ranks // 2
    visits = steps - 0.25 if p.ranks % 2 == 0 else steps
    returns = 0.75 if p.ranks == 2 else steps
    first = min(visits, 1)  # its features were kept for the backward
    forward = visits * p.shard + returns * p.rows * STATISTICS * 8
    backward = (
        (visits - first if steps else 0) * p.shard
        + visits * p.rows * STATISTICS * 4
        + returns * p.gradient
    )
    return Cost(agreed + forward, backward, own_flops + 4 * others / 2 * product)


@dataclass(frozen=True)
class Link:
    """What a rank's exchange runs over: bytes a second each way, seconds before the first one."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink", 450e9, 10e-6)  # 900 GB/s, both ways together
NETWORK = Link("400 Gb/s", 50e9, 20e-6)
FLOP_RATE = 400e12  # of the products in bf16, assumed
# "Hidden" is an exchange that adds no more than this share to the time of the products.
HIDDEN = 0.05


def simulate(p: Problem, link: Link, rate: float = FLOP_RATE) -> dict[str, float]:
    """Seconds of one forward and backward of the ring on a rank, step by step as in ``ring.py``.

    In every step an exchange runs beside the products, and both have to end. The rank is one whose
    last visitor comes whole.

    Returns:
        ``products`` alone, ``total``, and ``exposed``, the share that waiting adds.
    """
    square = p.rows * p.rows * p.features / rate  # seconds of the own block's forward
    statistics, weights = 8 * STATISTICS * p.rows, 4 * STATISTICS * p.rows
    steps, total, products = p.ranks // 2, 0.0, 0.0

    def step(flops: float, sent: float) -> None:
        nonlocal total, products
        products += flops
        total += max(flops, link.latency + sent / link.bandwidth if sent else 0.0)

    def visit(number: int, passes: float) -> float:
        halved = p.ranks % 2 == 0 and number == steps
        return passes * 2 * square * (0.5 if halved else 1.0)

    step(square, p.shard)
    for number in range(1, steps + 1):
        step(visit(number, 1), p.shard * (number < steps) + statistics * (number > 1))
    step(0.0, statistics)
    step(0.0, weights)
    for number in range(1, steps + 1):
        coming = (p.shard + weights) * (number < steps)
        step(visit(number, 3), coming + p.gradient * (number > 1))
    step(3 * square, p.gradient)
    return {"products": products, "total": total, "exposed": total / products - 1}


def hidden_from(ranks: int, features: int, link: Link) -> int:
    """The fewest pairs a rank from which on the exchange is hidden, to an eighth."""
    pairs = 8
    while simulate(Problem(ranks, 2 * pairs, features, 2), link)["exposed"] > HIDDEN:
        pairs += max(1, 2 ** (pairs.bit_length() - 1) // 8)
    return pairs


SHOWN = Problem(ranks=0, rows=4096, features=256, itemsize=2)  # 2048 pairs a rank, bf16
FEATURES = (128, 256, 768)


def cost_rows() -> list[dict[str, Any]]:
    """Each scheme's cost at each number of ranks."""
    rows = []
    for ranks in RANKS:
        for scheme in SCHEMES:
            found = cost(scheme, replace(SHOWN, ranks=ranks))
            sent = found.forward_bytes + found.backward_bytes
            rows.append({"ranks": ranks, "scheme": scheme, "bytes": sent, "flops": found.flops})
    return rows


def hidden_rows() -> list[dict[str, Any]]:
    """From how many pairs a rank on the ring's exchange hides behind its products."""
    rows = []
    for link, ranks in ((NVLINK, 8), (NETWORK, 16), (NETWORK, 64), (NETWORK, 1024)):
        for features in FEATURES:
            pairs = hidden_from(ranks, features, link)
            record = {"link": link.name, "ranks": ranks, "D": features, "pairs": pairs}
            rows.append({**record, "whole_batch": pairs * ranks})
    return rows


NAMES = {
    "ring": "ring (here)",
    "all_gather": "all-gather (here)",
    "lightly": "lightly",
    "open_clip": "open_clip",
    "inf_cl": "Inf-CL's ring",
}
DRAWN_RANKS = 64


def draw_costs(axes: Axes, rows: list[dict[str, Any]], key: str, unit: float, title: str) -> None:
    """A bar for each scheme."""
    values = {row["scheme"]: row[key] / unit for row in rows if row["ranks"] == DRAWN_RANKS}
    colours = [OURS if "(here)" in name else OTHER for name in NAMES.values()]
    axes.barh(range(len(NAMES)), [values[scheme] for scheme in NAMES], color=colours, height=0.6)
    for position, scheme in enumerate(NAMES):
        axes.annotate(
            f" {values[scheme]:.3g}", (values[scheme], position), verticalalignment="center"
        )
    axes.set_yticks(range(len(NAMES)), NAMES.values())
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    axes.set_xlabel(f"{DRAWN_RANKS} ranks of {SHOWN.rows // 2} pairs, {SHOWN.features} features")


def draw_exposed(axes: Axes) -> None:
    """The share of time that waiting adds, against the pairs of a rank."""
    pairs = [2**k for k in range(8, 15)]
    for link, ranks, colour, dashes in (
        (NVLINK, 8, "#2b83ba", "-"),
        (NETWORK, 64, "#d97706", "--"),
    ):
        problems = [Problem(ranks, 2 * count, SHOWN.features, 2) for count in pairs]
        values = [100 * simulate(p, link)["exposed"] for p in problems]
        label = f"{ranks} ranks, {link.name}"
        axes.plot(pairs, values, label=label, color=colour, linestyle=dashes, linewidth=2)
    axes.axhline(100 * HIDDEN, color=OTHER, linewidth=1)
    axes.annotate(
        f"{100 * HIDDEN:.0f} %", (pairs[0], 100 * HIDDEN), (2, 3), textcoords="offset points"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(pairs, [str(count) for count in pairs])
    axes.set_ylim(0.5, 1e4)
    axes.set_xlabel("pairs a rank")
    axes.set_title("Simulated: time that waiting adds, %")
    axes.legend()


def draw(rows: list[dict[str, Any]]) -> str:
    """The whole figure as SVG."""

    def figure() -> Figure:
        whole = Figure(figsize=(12, 3.2), layout="constrained")
        panels = whole.subplots(1, 3)
        draw_costs(panels[0], rows, "bytes", 2**20, "Sent by a rank, MiB")
        draw_costs(panels[1], rows, "flops", 1e12, "Multiplied by a rank, TFLOP")
        draw_exposed(panels[2])
        return whole

    return svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-save", action="store_true", help="write nothing")
    options = parser.parse_args()
    rows, hidden = cost_rows(), hidden_rows()
    print_table(
        ["R", "scheme", "sent, MiB", "TFLOP"],
        [
            [str(r["ranks"]), r["scheme"], f"{r['bytes'] / 2**20:.4g}", f"{r['flops'] / 1e12:.3g}"]
            for r in rows
        ],
    )
    print_table(
        ["link", "R", "D", "pairs a rank", "whole batch"],
        [[str(r[key]) for key in ("link", "ranks", "D", "pairs", "whole_batch")] for r in hidden],
    )
    if options.no_save:
        return
    print(f"written: {write_results('distributed_cost', rows, hidden=hidden)}")
    out = Path(__file__).parent.parent / "docs" / "images" / "distributed.svg"
    out.write_text(draw(rows), encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
