"""The sizes that bench/gpu.py measures, the targets on an H200, and whether results meet them."""

from __future__ import annotations

from dataclasses import dataclass

from cjepa_kernels.bench.candidates import BOTH, FORWARD
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.targets import AT_LEAST, AT_MOST, NOT_RUN, Target

Results = dict[str, list[Record]]  # The lists of the results file.

# The candidates. The loss under test takes bf16 features, and the products take unit rows in bf16.
OURS, MM, MM3, INF_CL, BYTES = "triton", "mm", "3 mm", "inf_cl", "its bytes copied"
EAGER = "eager bf16"  # All in bf16, which takes the fewest launches.
AUTOCAST = "eager, bf16 under autocast"
COMPILED = "compiled eager, bf16 under autocast"
COLUMNS = ("target", "M", "D")
RELATIONS = {AT_MOST: "<=", AT_LEAST: ">="}  # As the results file writes them.


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


def judge(results: Results, sizes: Sizes) -> list[Target]:
    """Every target with its value, also those that were not measured."""
    medians = {
        (row["part"], row["M"], row["D"], row["pass"], row["name"]): row["median"]
        for row in results["rows"]
    }
    targets: list[Target] = []

    def add(
        name: str, *, part: str, size: Size, value: float | None, bound: str, limit: float
    ) -> None:
        cell = {"target": name, "part": part, "M": size.rows, "D": size.features}
        targets.append(Target(cell, value, limit, bound, unmeasured=_why(cell, results)))

    def ratio(part: str, size: Size, direction: str, names: tuple[str, str]) -> float | None:
        above, below = (medians.get((part, *size, direction, name)) for name in names)
        return above / below if above and below else None

    for direction, products, count, limit in (
        (FORWARD, MM, "one product", 0.6),
        (BOTH, MM3, "three products", 0.9),
    ):
        for size in sizes.targets:
            value = ratio("targets", size, direction, (OURS, products))
            add(
                f"{direction} / {count}",
                part="targets",
                size=size,
                value=value,
                bound=AT_MOST,
                limit=limit,
            )
    for part, other, limit, measured_at in (
        ("targets", AUTOCAST, 8, sizes.targets),
        ("compiled", COMPILED, 4, sizes.compiled),
        ("inf_cl", INF_CL, 10, (sizes.inf_cl,)),
    ):
        for size in measured_at:
            value = ratio(part, size, BOTH, (other, OURS))
            add(f"{other} / {BOTH}", part=part, size=size, value=value, bound=AT_LEAST, limit=limit)
    seconds = medians.get(("targets", *UTILISATION, FORWARD, OURS))
    rates = [record["flops"] for record in results["matmul"] if record["size"] == sizes.product]
    flops = 2 * UTILISATION.rows**2 * UTILISATION.features
    value = flops / seconds / rates[0] if seconds and rates else None
    name = f"FLOP/s of the forward, all M² counted / those of a product of {sizes.product}³"
    add(name, part="targets", size=UTILISATION, value=value, bound=AT_LEAST, limit=1.1)
    for part, how, limit in (
        ("latency", "as called", 0.5),
        ("latency_graphed", "CUDA graphs", 0.8),
    ):
        for size in sizes.latency:
            value = ratio(part, size, BOTH, (OURS, EAGER))
            add(
                f"latency of {BOTH} / {EAGER}, {how}",
                part=part,
                size=size,
                value=value,
                bound=AT_MOST,
                limit=limit,
            )
    size = sizes.prediction
    value = ratio("prediction", size, BOTH, (OURS, BYTES))
    add(
        "prediction loss / its bytes",
        part="prediction",
        size=size,
        value=value,
        bound=AT_MOST,
        limit=1.3,
    )
    over_input = {record["M"]: record["over_input"] for record in results["memory"]}
    largest = max(over_input, default=None) if LARGEST in sizes.memory else None
    add(
        f"largest M of {BOTH}",
        part="memory",
        size=LARGEST,
        value=largest,
        bound=AT_LEAST,
        limit=LARGEST.rows,
    )
    extra = over_input.get(LARGEST.rows)
    add(
        "memory beyond the gradients / input",
        part="memory",
        size=LARGEST,
        value=extra,
        bound=AT_MOST,
        limit=4,
    )
    first = next((record["seconds"] for record in results["first_use"]), None)
    name = "seconds of the first use, compiling"
    add(name, part="first_use", size=sizes.first_use, value=first, bound=AT_MOST, limit=20)
    return targets


def _why(cell: Record, results: Results) -> str:
    """Why a target may have no value."""
    if any(record["part"] == cell["part"] for record in results["missing"]):
        return "not installed"
    for section, verdict in (("failed", "failed"), ("out_of_memory", "out of memory")):
        for record in results.get(section, []):
            if all(record[key] == cell[key] for key in ("part", "M", "D")):
                return verdict
    return NOT_RUN


def as_records(targets: list[Target]) -> list[Record]:
    """The targets as the results file holds them."""
    return [
        {
            **target.cell,
            "relation": RELATIONS[target.bound],
            "bound": target.limit,
            "value": target.value,
            "verdict": target.verdict,
        }
        for target in targets
    ]
