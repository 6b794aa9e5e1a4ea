"""The bytes that a rank sends and the FLOPs of its products, by formula, and a simulation.

    python bench/distributed_cost.py [--no-save]

There are R ranks of m = M_r rows each, M = R m, with D features of ``itemsize`` bytes. The script
writes the tables of docs/distributed.md to bench/results/distributed_cost.json, and
docs/draw_results.py draws them. A test compares the formulas of this package's two strategies with
the code's own counters. The formulas of the others follow their sources:

    lightly    1.6.0: gathers the features, keeps logits (M_r, M), and all-reduces the gradients of
               all rows, stacked
    open_clip  3.3.0, local_loss and gather_with_grad, with both views as the rows of NT-Xent: the
               same with a reduce-scatter
    inf_cl     1.2.1, its ring, likewise: R - 1 exchanges of features in each direction and R of
               fp32 gradients; computes the logits again in the backward

A simulation is not a measurement: it shows what follows from the rates that are put in. The rates
of the links are those of data sheets. The rate of the products is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.distributed.nt_xent import SETTINGS
from cjepa_kernels.tables import print_table

RANKS = (2, 4, 8, 16, 64, 256, 1024)
SCHEMES = ("ring", "all_gather", "lightly", "open_clip", "inf_cl")
AGREED = 8 * (2 + SETTINGS)  # Bytes in which ranks tell each other what they hold.
STATISTICS = 3  # Numbers of a row that travel, fp64 in the forward and fp32 in the backward.


@dataclass(frozen=True)
class Problem:
    """Equal shards.

    Attributes:
        ranks: R.
        rows: M_r, of each rank.
        features: D.
        itemsize: Bytes of a feature.
    """

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
    """The bytes that a rank sends and the FLOPs of its products, the mean over the ranks."""

    forward_bytes: float
    backward_bytes: float
    flops: float


def cost(scheme: str, problem: Problem, *, saved: bool = False) -> Cost:
    """The cost of a scheme.

    Args:
        scheme: One of ``SCHEMES``.
        problem: Ranks, rows and features.
        saved: Whether the own block's exponentials were saved for the backward.
    """
    product = 2 * problem.rows * problem.features  # FLOPs of a row of S with one other shard
    own = problem.rows * problem.rows * problem.features
    every = problem.ranks * problem.rows * product  # (M_r, M)
    exchanged = (problem.ranks - 1) * problem.shard
    if scheme == "lightly":
        return Cost(exchanged, 2 * exchanged, 3 * every)
    if scheme == "open_clip":
        return Cost(exchanged, exchanged, 3 * every)
    if scheme == "inf_cl":
        return Cost(exchanged, exchanged + problem.ranks * problem.gradient, 4 * every)
    agreed = (problem.ranks - 1) * AGREED + 2 * (problem.ranks - 1) * 8 * (
        problem.features + 3
    ) // problem.ranks
    own_flops = (1 + 2 + (not saved)) * own
    others = (problem.ranks - 1) * problem.rows
    if scheme == "all_gather":
        backward = others * STATISTICS * 4
        return Cost(agreed + exchanged, backward, own_flops + 3 * others * product)
    # The ring has one visitor in each step. With R even, one rank in two needs only half of the
    # visitor of the last step.
    steps = problem.ranks // 2
    visits = steps - 0.25 if problem.ranks % 2 == 0 else steps
    returns = 0.75 if problem.ranks == 2 else steps
    first = min(visits, 1)  # Its features are saved for the backward.
    forward = visits * problem.shard + returns * problem.rows * STATISTICS * 8
    backward = (
        (visits - first if steps else 0) * problem.shard
        + visits * problem.rows * STATISTICS * 4
        + returns * problem.gradient
    )
    return Cost(agreed + forward, backward, own_flops + 4 * others / 2 * product)


@dataclass(frozen=True)
class Link:
    """A network: bytes a second in each direction, and seconds before the first byte arrives."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink", 450e9, 10e-6)  # 900 GB/s in both directions together.
NETWORK = Link("400 Gb/s", 50e9, 20e-6)
FLOP_RATE = 400e12  # Assumed for the products in bf16.
# An exchange is hidden if it adds no more than this share to the time of the products.
HIDDEN = 0.05


def simulate(problem: Problem, link: Link, rate: float = FLOP_RATE) -> dict[str, float]:
    """Seconds of one forward and backward of the ring on a rank, step by step as in ``ring.py``.

    In every step an exchange runs beside the products, and both must end. The rank is one that
    needs all of its last visitor.

    Returns:
        ``products``, the seconds of the products alone; ``total``, the seconds of everything; and
        ``exposed``, the share of ``products`` that waiting adds.
    """
    # Seconds of the forward of the own block.
    square = problem.rows * problem.rows * problem.features / rate
    statistics, weights = 8 * STATISTICS * problem.rows, 4 * STATISTICS * problem.rows
    steps, total, products = problem.ranks // 2, 0.0, 0.0

    def step(flops: float, sent: float) -> None:
        nonlocal total, products
        products += flops
        total += max(flops, link.latency + sent / link.bandwidth if sent else 0.0)

    def visit(number: int, passes: float) -> float:
        halved = problem.ranks % 2 == 0 and number == steps
        return passes * 2 * square * (0.5 if halved else 1.0)

    step(square, problem.shard)
    for number in range(1, steps + 1):
        step(visit(number, 1), problem.shard * (number < steps) + statistics * (number > 1))
    step(0.0, statistics)
    step(0.0, weights)
    for number in range(1, steps + 1):
        coming = (problem.shard + weights) * (number < steps)
        step(visit(number, 3), coming + problem.gradient * (number > 1))
    step(3 * square, problem.gradient)
    return {"products": products, "total": total, "exposed": total / products - 1}


def hidden_from(ranks: int, features: int, link: Link) -> int:
    """The smallest number of pairs a rank that hides the exchange, to an eighth."""
    pairs = 8
    while simulate(Problem(ranks, 2 * pairs, features, 2), link)["exposed"] > HIDDEN:
        pairs += max(1, 2 ** (pairs.bit_length() - 1) // 8)
    return pairs


SHOWN = Problem(ranks=0, rows=4096, features=256, itemsize=2)  # 2048 pairs a rank in bf16.
FEATURES = (128, 256, 768)


def cost_rows() -> list[Record]:
    """The cost of each scheme for each number of ranks."""
    rows = []
    for ranks in RANKS:
        for scheme in SCHEMES:
            of_scheme = cost(scheme, replace(SHOWN, ranks=ranks))
            sent = of_scheme.forward_bytes + of_scheme.backward_bytes
            rows.append({"ranks": ranks, "scheme": scheme, "bytes": sent, "flops": of_scheme.flops})
    return rows


def hidden_rows() -> list[Record]:
    """The pairs a rank at which the ring's products hide its exchange, by link, ranks and D."""
    rows = []
    for link, ranks in ((NVLINK, 8), (NETWORK, 16), (NETWORK, 64), (NETWORK, 1024)):
        for features in FEATURES:
            pairs = hidden_from(ranks, features, link)
            record = {"link": link.name, "ranks": ranks, "D": features, "pairs": pairs}
            rows.append({**record, "whole_batch": pairs * ranks})
    return rows


def main() -> None:
    options = read_options(__doc__)
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
    save(options, "distributed_cost", rows, hidden=hidden)


if __name__ == "__main__":
    main()
