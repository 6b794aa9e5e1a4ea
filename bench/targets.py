"""The targets of the CPU kernel and how a measured ratio stands to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plan import BF16, NO_GRAD, TITLES, Direction

from cjepa_kernels.bench.sizes import Size

Record = dict[str, Any]

# native / bare mm: forward against one product, forward + backward against three.
OVER_MM: dict[tuple[Size, Direction], float] = {
    (Size(2048, 256), "forward"): 0.42,
    (Size(2048, 256), "forward+backward"): 0.42,
    (Size(8192, 128), "forward"): 0.36,
    (Size(8192, 128), "forward+backward"): 0.45,
    (Size(8192, 256), "forward"): 0.37,
    (Size(8192, 256), "forward+backward"): 0.42,
    (Size(8192, 768), "forward"): 0.40,
    (Size(8192, 768), "forward+backward"): 0.45,
    (Size(32768, 256), "forward"): 0.38,
    (Size(32768, 256), "forward+backward"): 0.50,
}
# Another formula / native, forward + backward.
SPEEDUPS: dict[tuple[Size, str], float] = {
    (Size(8192, 256), "eager"): 4.5,
    (Size(8192, 256), "compiled"): 2.7,
    (Size(8192, 256), "lightly"): 7.0,
    (Size(8192, 256), "hjepa"): 10.0,
    (Size(256, 256), "metric_learning"): 50.0,
}
# native / eager, either pass: never slower, and faster for the common batch of 128.
OVER_EAGER = 1.0
OVER_EAGER_AT = {Size(256, 768): 0.7}
# native fp32 / native bf16, on a CPU that has bf16 instructions.
BF16_SPEEDUP = 1.6


@dataclass(frozen=True)
class Comparison:
    """The ratio of two medians beside its target.

    Attributes:
        part: Part of the benchmark.
        size: Rows and features.
        direction: Forward, or forward + backward.
        numerator: Name of the candidate that is divided.
        denominator: Name of the candidate that it is divided by.
        seconds: Their medians.
        target: Bound on the ratio, or None where there is none.
        at_most: Whether the target is an upper bound, else a lower one.
    """

    part: str
    size: Size
    direction: Direction
    numerator: str
    denominator: str
    seconds: tuple[float, float]
    target: float | None
    at_most: bool

    @property
    def ratio(self) -> float:
        return self.seconds[0] / self.seconds[1]

    @property
    def verdict(self) -> str:
        if self.target is None:
            return "no target"
        met = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        return "met" if met else "not met"

    def cells(self) -> list[str]:
        """The row of the printed table, in the order of ``HEADER``."""
        bound = "" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target:g}"
        names = [TITLES.get(name, name) for name in (self.numerator, self.denominator)]
        if self.direction == "forward+backward":
            names = ["3 bare mm" if name == TITLES["mm"] else name for name in names]
        return [
            str(self.size.rows),
            str(self.size.features),
            self.direction,
            " / ".join(names),
            " / ".join(f"{1e3 * seconds:.3f}" for seconds in self.seconds),
            f"{self.ratio:.3f}",
            bound,
            self.verdict,
        ]

    def record(self) -> Record:
        """The entry in the results file."""
        return {
            "part": self.part,
            "M": self.size.rows,
            "D": self.size.features,
            "pass": self.direction,
            "numerator": self.numerator,
            "denominator": self.denominator,
            "ratio": self.ratio,
            "target": self.target,
            "bound": "at most" if self.at_most else "at least",
            "verdict": self.verdict,
        }


HEADER = ["M", "D", "pass", "ratio of", "ms / ms", "ratio", "target", ""]


def compare(part: str, rows: list[Record], *, bf16_instructions: bool) -> list[Comparison]:
    """Every ratio that a part reports, from its measured rows.

    Args:
        part: One of ``plan.PARTS``.
        rows: Rows of the results file.
        bf16_instructions: Whether the kernel uses bf16 instructions here.
    """
    groups: dict[tuple[Size, Direction], dict[str, float]] = {}
    for row in rows:
        if row["part"] == part:
            group = groups.setdefault((Size(row["M"], row["D"]), row["pass"]), {})
            group[row["name"]] = row["median"]
    comparisons = []
    for (size, direction), medians in groups.items():
        for numerator, denominator in _pairs(part, medians):
            target, at_most = _target(part, size, direction, numerator, bf16_instructions)
            comparisons.append(
                Comparison(
                    part,
                    size,
                    direction,
                    numerator,
                    denominator,
                    (medians[numerator], medians[denominator]),
                    target,
                    at_most,
                )
            )
    return comparisons


def _pairs(part: str, medians: dict[str, float]) -> list[tuple[str, str]]:
    if part == "bf16":
        return [("native", BF16)]
    if part == "speedups":
        return [(name, "native") for name in medians if name not in ("mm", "native")]
    others = {"small": ["eager"], "targets": ["mm"], "sweep": ["mm", "eager"]}[part]
    own = ["native", NO_GRAD] if part == "targets" else ["native"]
    return [(name, other) for name in own for other in others if {name, other} <= medians.keys()]


def _target(
    part: str, size: Size, direction: Direction, numerator: str, bf16_instructions: bool
) -> tuple[float | None, bool]:
    """The bound and whether it is an upper one."""
    if part == "targets":
        return OVER_MM.get((size, direction)) if numerator == "native" else None, True
    if part == "small":
        return OVER_EAGER_AT.get(size, OVER_EAGER), True
    if part == "bf16":
        return BF16_SPEEDUP if bf16_instructions else None, False
    if part == "speedups":
        return SPEEDUPS.get((size, numerator)), False
    return None, True
