"""The targets of ``make gpu-check``, and whether a record meets them.

They hold for an H100 or H200 with bf16 features, temperature 0.1 and metrics, and all but the last
two are ratios within one run. This is the only place that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_targets import BYTES, MM, MM3

from cjepa_kernels.bench.candidates import BOTH, COMPILED, EAGER, FORWARD, OURS
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.targets import AT_LEAST, AT_MOST, Target

REDUCE_OVERHEAD, GRAPH = "reduce-overhead", "CUDA graph"
USUAL = "cjepa_kernels, usual kernels and launches"  # Without Gluon kernels and launch plans.
NOT_MEASURED = "not measured"
AS_CALLED, IN_A_ROW = "as_called", "in_a_row"
LARGEST = Size(2**21, 256)
PREDICTION = Size(128 * 196, 768)


@dataclass(frozen=True)
class Ratio:
    """The time of one candidate divided by that of another.

    Attributes:
        title: What the page calls it.
        section: The section of the record: ``latency`` or ``device``.
        above: The candidate whose time is divided.
        below: The candidate by whose time it is divided.
        limits: The largest ratio that meets the target, by size.
        time: Which time of the latency is compared.
        cell: The part and the pass of a time of the device.
    """

    title: str
    section: str
    above: str
    below: str
    limits: Mapping[Size, float]
    time: str = ""
    cell: tuple[str, str] = ("", "")


def _widths(rows: int, limits: tuple[float, float, float, float]) -> dict[Size, float]:
    """Limits at D = 128, 256, 512, 768."""
    return {Size(rows, d): limit for d, limit in zip((128, 256, 512, 768), limits, strict=True)}


def _rows(limit: float, *rows: int) -> dict[Size, float]:
    """One limit for several M at D = 256."""
    return {Size(count, 256): limit for count in rows}


RATIOS = (
    Ratio(
        "as called / plain formula",
        "latency",
        above=OURS,
        below=EAGER,
        limits=_rows(0.30, 256, 1024, 4096),
        time=AS_CALLED,
    ),
    Ratio(
        "as called / `torch.compile` of the plain formula",
        "latency",
        above=OURS,
        below=COMPILED,
        limits=_rows(0.45, 1024, 4096, 16384),
        time=AS_CALLED,
    ),
    Ratio(
        "in a row / `torch.compile` of the plain formula",
        "latency",
        above=OURS,
        below=COMPILED,
        limits=_rows(0.45, 1024, 4096, 16384),
        time=IN_A_ROW,
    ),
    Ratio(
        '`torch.compile(mode="reduce-overhead")` as called / plain formula',
        "latency",
        above=REDUCE_OVERHEAD,
        below=EAGER,
        limits=_rows(0.25, 1024),
        time=AS_CALLED,
    ),
    Ratio(
        "forward / one product",
        "device",
        above=OURS,
        below=MM,
        limits=_widths(65536, (0.33, 0.42, 0.45, 0.58)) | _widths(16384, (0.48, 0.58, 0.70, 0.68)),
        cell=("loss", FORWARD),
    ),
    Ratio(
        "forward + backward / three products",
        "device",
        above=OURS,
        below=MM3,
        limits=_widths(65536, (0.38, 0.64, 0.70, 0.74)),
        cell=("loss", BOTH),
    ),
    Ratio(
        "prediction loss / its bytes",
        "device",
        above=OURS,
        below=BYTES,
        limits={PREDICTION: 1.2},
        cell=("prediction", BOTH),
    ),
)
LARGEST_TITLE, EXTRA_TITLE, MOST_EXTRA = "largest M", "extra memory / input", 3.1


def seconds(content: Record, ratio: Ratio, size: Size, name: str) -> float | None:
    """The median of a candidate, if the record has it."""
    part, direction = ratio.cell
    wanted = {"M": size.rows, "D": size.features, "name": name}
    if ratio.section == "device":
        wanted |= {"part": part, "pass": direction}
    for row in content.get(ratio.section, []):
        if all(row[key] == value for key, value in wanted.items()):
            time: dict[str, Any] = row[ratio.time] if ratio.time else row
            return float(time["median"])
    return None


def judge(content: Record) -> list[Target]:
    """Every target with its value; without a value its verdict is ``NOT_MEASURED``."""
    targets = []
    for ratio in RATIOS:
        for size, limit in ratio.limits.items():
            above, below = (
                seconds(content, ratio, size, name) for name in (ratio.above, ratio.below)
            )
            cell = {"target": ratio.title, "M": size.rows, "D": size.features}
            value = above / below if above and below else None
            targets.append(Target(cell, value, limit, unmeasured=NOT_MEASURED))
    extra = {
        row["M"]: row["over_input"]
        for row in content.get("memory", [])
        if row["D"] == LARGEST.features
    }
    at = {"M": LARGEST.rows, "D": LARGEST.features}
    for title, value, limit, bound in (
        (LARGEST_TITLE, max(extra, default=None), LARGEST.rows, AT_LEAST),
        (EXTRA_TITLE, extra.get(LARGEST.rows), MOST_EXTRA, AT_MOST),
    ):
        targets.append(Target({"target": title, **at}, value, limit, bound, NOT_MEASURED))
    return targets
