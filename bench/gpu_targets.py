"""What bench/gpu.py measures, the targets on an H200, and how results stand to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cjepa_kernels.bench.sizes import Size

Record = dict[str, Any]
Results = dict[str, list[Record]]  # the lists of the results file

FORWARD, BOTH = "forward", "forward+backward"
# Candidates. The loss under test takes bf16 features, the product unit rows in bf16.
OURS, MM, MM3, INF_CL, BYTES = "triton", "mm", "3 mm", "inf_cl", "its bytes copied"
EAGER = "eager bf16"  # nothing but bf16, the fewest launches
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
    prediction: Size  # rows of predictions
    product: int


FULL = Sizes(
    # The common width first: the time may run out.
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


def judge(results: Results, sizes: Sizes) -> list[Record]:
    """Every target with its value and verdict, whatever was measured of it."""
    medians = {
        (row["part"], row["M"], row["D"], row["pass"], row["name"]): row["median"]
        for row in results["rows"]
    }
    missing = {record["part"] for record in results["missing"]}
    failed, too_large = (
        {(record["part"], record["M"], record["D"]) for record in results.get(section, [])}
        for section in ("failed", "out_of_memory")
    )
    records: list[Record] = []

    def add(
        target: str, part: str, size: Size, relation: str, bound: float, value: float | None
    ) -> None:
        if value is not None:
            met = value <= bound if relation == "<=" else value >= bound
            verdict = "met" if met else "missed"
        elif part in missing:
            verdict = "not installed"
        elif (part, *size) in failed:
            verdict = "failed"
        else:
            verdict = "out of memory" if (part, *size) in too_large else "not run"
        records.append(
            {
                "target": target,
                "part": part,
                "M": size.rows,
                "D": size.features,
                "relation": relation,
                "bound": bound,
                "value": value,
                "verdict": verdict,
            }
        )

    def ratio(part: str, size: Size, direction: str, over: str, under: str) -> float | None:
        above, below = (medians.get((part, *size, direction, name)) for name in (over, under))
        return above / below if above and below else None

    for direction, products, count, bound in (
        (FORWARD, MM, "one product", 0.6),
        (BOTH, MM3, "three products", 0.9),
    ):
        for size in sizes.targets:
            value = ratio("targets", size, direction, OURS, products)
            add(f"{direction} / {count}", "targets", size, "<=", bound, value)
    for part, over, bound, of_part in (
        ("targets", AUTOCAST, 8, sizes.targets),
        ("compiled", COMPILED, 4, sizes.compiled),
        ("inf_cl", INF_CL, 10, (sizes.inf_cl,)),
    ):
        for size in of_part:
            add(f"{over} / {BOTH}", part, size, ">=", bound, ratio(part, size, BOTH, over, OURS))
    seconds = medians.get(("targets", *UTILISATION, FORWARD, OURS))
    rates = [record["flops"] for record in results["matmul"] if record["size"] == sizes.product]
    flops = 2 * UTILISATION.rows**2 * UTILISATION.features
    value = flops / seconds / rates[0] if seconds and rates else None
    name = f"FLOP/s of the forward, all M² counted / those of a product of {sizes.product}³"
    add(name, "targets", UTILISATION, ">=", 1.1, value)
    for part, how, bound in (
        ("latency", "as called", 0.5),
        ("latency_graphed", "CUDA graphs", 0.8),
    ):
        for size in sizes.latency:
            value = ratio(part, size, BOTH, OURS, EAGER)
            add(f"latency of {BOTH} / {EAGER}, {how}", part, size, "<=", bound, value)
    value = ratio("prediction", sizes.prediction, BOTH, OURS, BYTES)
    add("prediction loss / its bytes", "prediction", sizes.prediction, "<=", 1.3, value)
    over_input = {record["M"]: record["over_input"] for record in results["memory"]}
    largest = max(over_input, default=None) if LARGEST in sizes.memory else None
    add(f"largest M of {BOTH}", "memory", LARGEST, ">=", LARGEST.rows, largest)
    extra = over_input.get(LARGEST.rows)
    add("memory beyond the gradients / input", "memory", LARGEST, "<=", 4, extra)
    first = next((record["seconds"] for record in results["first_use"]), None)
    add("seconds of the first use, compiling", "first_use", sizes.first_use, "<=", 20, first)
    return records


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


def markdown(content: dict[str, Any]) -> str:
    """The results file as a page."""
    environment, (gpu,) = content["environment"], content["gpu"]
    versions = {
        "PyTorch": environment["torch"],
        "CUDA": gpu["cuda"],
        "Triton": gpu["triton"],
        "inf-cl": gpu["inf_cl"],
        "cjepa_kernels": environment["cjepa_kernels"],
        "Python": environment["python"],
        "commit": environment["commit"],
    }
    lines = [
        f"# {gpu['device']}, {environment['date']}",
        "",
        ", ".join(f"{name} {version or 'unknown'}" for name, version in versions.items())
        + f"; `{environment['command']}`",
        "",
        summary(content["targets"]) + ".",
        "",
        *_markdown_table(HEADER, table(content["targets"])),
        "",
        "## Times in ms",
        "",
        "Of the device alone, its L2 cache emptied before, but for latencies, which begin when the "
        "host begins to launch. `device and host`: the host was slower or waited for the device.",
        "",
        *_markdown_table(
            ["part", "M", "D", "pass", "candidate", "of", "p20", "median", "p80", "rounds"],
            [
                [
                    *(str(row[key]) for key in ("part", "M", "D", "pass", "name", "of")),
                    *(f"{1e3 * row[key]:.4f}" for key in ("p20", "median", "p80")),
                    str(row["rounds"]),
                ]
                for row in content["rows"]
            ],
        ),
    ]
    for title, section in (
        ("Large product", "matmul"),
        ("Errors against float64", "accuracy"),
        ("Memory beyond the gradients", "memory"),
        ("First use", "first_use"),
        ("Not installed", "missing"),
        ("Out of memory", "out_of_memory"),
        ("Failed", "failed"),
    ):
        if content[section]:
            header = list(content[section][0])
            rows = [[_cell(record[key]) for key in header] for record in content[section]]
            lines += ["", f"## {title}", "", *_markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (header, ["---"] * len(header), *rows)
    ]
