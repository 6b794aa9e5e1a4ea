"""The sizes that bench/gpu.py measures, the targets on an H200, and whether results meet them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from cjepa_kernels.bench.candidates import BOTH, FORWARD
from cjepa_kernels.bench.sizes import Size

Record = dict[str, Any]
Results = dict[str, list[Record]]  # The lists of the results file.

# The candidates. The loss under test takes bf16 features, and the products take unit rows in bf16.
OURS, MM, MM3, INF_CL, BYTES = "triton", "mm", "3 mm", "inf_cl", "its bytes copied"
EAGER = "eager bf16"  # All in bf16, which takes the fewest launches.
AUTOCAST = "eager, bf16 under autocast"
COMPILED = "compiled eager, bf16 under autocast"
HEADER = ["target", "M", "D", "bound", "value", "verdict"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of every part; ``product`` is the edge of the large product."""

    targets: tuple[Size, ...]
    compiled: tuple[Size, ...]
    latency: tuple[Size, ...]
    memory: tuple[Size, ...]
    accuracy: Size
    fp32: Size
    inf_cl: Size
    first_use: Size
    prediction: Size  # Rows of predictions.
    product: int


FULL = Sizes(
    # The most common width comes first, because the time may run out.
    targets=tuple(Size(m, d) for d in (256, 128, 512, 768) for m in (16384, 65536)),
    compiled=(Size(16384, 256), Size(65536, 256)),
    latency=tuple(Size(2 * batch, 256) for batch in (128, 256, 512, 1024)),
    memory=(Size(2**20, 256), Size(2**21, 256)),
    accuracy=Size(8192, 256),
    fp32=Size(16384, 256),
    inf_cl=Size(16384, 256),
    first_use=Size(16384, 256),
    prediction=Size(128 * 196, 768),
    product=8192,
)
QUICK = Sizes(
    targets=(Size(2048, 128),),
    compiled=(Size(1024, 256),),
    latency=(Size(256, 256),),
    memory=(Size(2**14, 256),),
    accuracy=Size(1024, 256),
    fp32=Size(2048, 256),
    inf_cl=Size(1024, 256),
    first_use=Size(1024, 256),
    prediction=Size(512, 768),
    product=2048,
)
UTILISATION = Size(65536, 256)
LARGEST = Size(2**21, 256)


class Target(NamedTuple):
    """A measured value and its bound, an upper or a lower one.

    Attributes:
        target: What is compared with what.
        part: The part of the benchmark that measures it.
        size: At which rows and features.
        value: The measured value, None if there is none.
        at_most: The upper bound.
        at_least: The lower bound.
    """

    target: str
    part: str
    size: Size
    value: float | None
    at_most: float = math.inf
    at_least: float = -math.inf


def judge(results: Results, sizes: Sizes) -> list[Record]:
    """Every target with its value and its verdict, also those that were not measured."""
    return [
        {
            "target": found.target,
            "part": found.part,
            "M": found.size.rows,
            "D": found.size.features,
            "relation": "<=" if found.at_most < math.inf else ">=",
            "bound": found.at_most if found.at_most < math.inf else found.at_least,
            "value": found.value,
            "verdict": _verdict(found, results),
        }
        for found in _targets(results, sizes)
    ]


def _verdict(target: Target, results: Results) -> str:
    if target.value is not None:
        return "met" if target.at_least <= target.value <= target.at_most else "missed"
    if any(record["part"] == target.part for record in results["missing"]):
        return "not installed"
    for section, verdict in (("failed", "failed"), ("out_of_memory", "out of memory")):
        cells = {(record["part"], record["M"], record["D"]) for record in results.get(section, [])}
        if (target.part, *target.size) in cells:
            return verdict
    return "not run"


def _targets(results: Results, sizes: Sizes) -> Iterator[Target]:
    medians = {
        (row["part"], row["M"], row["D"], row["pass"], row["name"]): row["median"]
        for row in results["rows"]
    }

    def ratio(part: str, size: Size, direction: str, names: tuple[str, str]) -> float | None:
        above, below = (medians.get((part, *size, direction, name)) for name in names)
        return above / below if above and below else None

    for direction, products, count, bound in (
        (FORWARD, MM, "one product", 0.6),
        (BOTH, MM3, "three products", 0.9),
    ):
        for size in sizes.targets:
            value = ratio("targets", size, direction, (OURS, products))
            yield Target(f"{direction} / {count}", "targets", size, value, at_most=bound)
    for part, other, bound, measured_at in (
        ("targets", AUTOCAST, 8, sizes.targets),
        ("compiled", COMPILED, 4, sizes.compiled),
        ("inf_cl", INF_CL, 10, (sizes.inf_cl,)),
    ):
        for size in measured_at:
            value = ratio(part, size, BOTH, (other, OURS))
            yield Target(f"{other} / {BOTH}", part, size, value, at_least=bound)
    seconds = medians.get(("targets", *UTILISATION, FORWARD, OURS))
    rates = [record["flops"] for record in results["matmul"] if record["size"] == sizes.product]
    flops = 2 * UTILISATION.rows**2 * UTILISATION.features
    value = flops / seconds / rates[0] if seconds and rates else None
    name = f"FLOP/s of the forward, all M² counted / those of a product of {sizes.product}³"
    yield Target(name, "targets", UTILISATION, value, at_least=1.1)
    for part, how, bound in (
        ("latency", "as called", 0.5),
        ("latency_graphed", "CUDA graphs", 0.8),
    ):
        for size in sizes.latency:
            value = ratio(part, size, BOTH, (OURS, EAGER))
            yield Target(f"latency of {BOTH} / {EAGER}, {how}", part, size, value, at_most=bound)
    size = sizes.prediction
    value = ratio("prediction", size, BOTH, (OURS, BYTES))
    yield Target("prediction loss / its bytes", "prediction", size, value, at_most=1.3)
    over_input = {record["M"]: record["over_input"] for record in results["memory"]}
    largest = max(over_input, default=None) if LARGEST in sizes.memory else None
    yield Target(f"largest M of {BOTH}", "memory", LARGEST, largest, at_least=LARGEST.rows)
    extra = over_input.get(LARGEST.rows)
    yield Target("memory beyond the gradients / input", "memory", LARGEST, extra, at_most=4)
    name, size = "seconds of the first use, compiling", sizes.first_use
    first = next((record["seconds"] for record in results["first_use"]), None)
    yield Target(name, "first_use", size, first, at_most=20)


def table(records: list[Record]) -> list[list[str]]:
    """Rows under ``HEADER``."""
    return [
        [
            record["target"],
            str(record["M"]),
            str(record["D"]),
            f"{record['relation']} {record['bound']}",
            "-" if record["value"] is None else f"{record['value']:.3f}".removesuffix(".000"),
            record["verdict"],
        ]
        for record in records
    ]


def summary(records: list[Record]) -> str:
    """How many targets have which verdict."""
    verdicts = [record["verdict"] for record in records]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    return f"{len(records)} targets: {', '.join(counts)}"
