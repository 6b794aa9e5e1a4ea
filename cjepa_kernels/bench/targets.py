"""Targets: measured values, their bounds, and whether they are met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cjepa_kernels.bench.records import Record
from cjepa_kernels.tables import print_table

AT_MOST, AT_LEAST = "at most", "at least"
MET, MISSED, NO_TARGET, NOT_RUN = "met", "missed", "no target", "not run"


class Target(NamedTuple):
    """A measured value and its bound.

    Attributes:
        cell: The fields of a results file that say what was measured.
        value: The value, mostly a ratio; None if it was not measured.
        limit: The bound; None if the value is only reported.
        bound: ``AT_MOST`` or ``AT_LEAST``.
        unmeasured: The verdict if there is no value.
    """

    cell: Record
    value: float | None
    limit: float | None = None
    bound: str = AT_MOST
    unmeasured: str = NOT_RUN

    @property
    def verdict(self) -> str:
        """Whether the target is met."""
        if self.limit is None:
            return NO_TARGET
        if self.value is None:
            return self.unmeasured
        met = self.value <= self.limit if self.bound == AT_MOST else self.value >= self.limit
        return MET if met else MISSED

    def record(self) -> Record:
        """The target as an entry of a results file."""
        judged = {"ratio": self.value, "target": self.limit, "bound": self.bound}
        return {**self.cell, **judged, "verdict": self.verdict}

    def texts(self) -> tuple[str, str]:
        """The value and its bound."""
        value = "-" if self.value is None else f"{self.value:.3f}".removesuffix(".000")
        return value, "" if self.limit is None else f"{self.bound} {self.limit:g}"


def print_targets(targets: Sequence[Target], columns: Sequence[str]) -> None:
    """Print a table of targets; ``columns`` are fields of their cells."""
    rows = [[*(str(t.cell[c]) for c in columns), *t.texts(), t.verdict] for t in targets]
    print_table([*columns, "value", "target", "verdict"], rows)


def summary(targets: Sequence[Target], columns: Sequence[str]) -> str:
    """How many targets have which verdict, and a line for each that is not met."""
    judged = [target for target in targets if target.limit is not None]
    counts = Counter(target.verdict for target in judged)
    lines = [
        f"{len(judged)} targets: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}"
    ]
    for target in judged:
        if target.verdict != MET:
            where = ", ".join(f"{column} {target.cell[column]}" for column in columns)
            lines.append(f"  {target.verdict}: {where}: {', '.join(target.texts())}")
    return "\n".join(lines)
