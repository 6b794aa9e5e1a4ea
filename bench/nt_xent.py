"""Time of NT-Xent's CPU kernel beside other formulas, and its targets.

    python bench/nt_xent.py [--only targets,speedups] [--sizes 2048x256] [--seconds 3] [--quick]

The times are medians of interleaved runs at temperature 0.1, in fp32 unless a line says bf16.
``mm`` is one matrix product, ``torch.mm(z, z.T, out=...)``; forward + backward is compared with
three of them. The forward pass has gradients enabled, as in training, unless a line says
``no_grad``. The parts are these ratios:

    targets   forward and forward + backward / mm
    speedups  other formulas / native, forward + backward
    small     native / eager for small batches
    bf16      native in fp32 / native in bf16
    sweep     native / mm and eager at further M with D = 256, for docs/draw_results.py

The script reports a target that is missed and goes on. Only a run of all parts at their own sizes
writes bench/results/nt_xent_cpu.json, at its end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cjepa_kernels.bench import candidates
from cjepa_kernels.bench.candidates import (
    BOTH,
    CHUNKED,
    COMPILED,
    DIRECTIONS,
    EAGER,
    FORWARD,
    MM,
    NATIVE,
    TITLES,
)
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.machine import instruction_set
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import Progress, read_options, require_native, save
from cjepa_kernels.bench.sizes import Size, parse_sizes, views
from cjepa_kernels.bench.targets import AT_LEAST, AT_MOST, Target, print_targets, summary
from cjepa_kernels.bench.timing import Run, interleaved
from cjepa_kernels.error_lines import kind_and_first_line

BF16, NO_GRAD = "native-bf16", "native-no-grad"  # NATIVE in bf16 and under torch.no_grad
VARIANTS = {BF16: f"{TITLES[NATIVE]} in bf16", NO_GRAD: f"{TITLES[NATIVE]} without gradients"}
HEADINGS = {
    "targets": "Targets: native over the bare matrix product",
    "speedups": "Speed-ups: other formulas over native",
    "small": "Small batches: native over eager",
    "bf16": "bf16: native in fp32 over native in bf16",
    "sweep": "Time against the number of rows",
}
PARTS = tuple(HEADINGS)
COLUMNS = ("M", "D", "pass", "numerator", "denominator")

# Upper bounds on native / bare mm: forward against one product, forward + backward against three.
OVER_MM: dict[tuple[Size, str], float] = {
    (Size(2048, 256), FORWARD): 0.42,
    (Size(2048, 256), BOTH): 0.42,
    (Size(8192, 128), FORWARD): 0.36,
    (Size(8192, 128), BOTH): 0.45,
    (Size(8192, 256), FORWARD): 0.37,
    (Size(8192, 256), BOTH): 0.42,
    (Size(8192, 768), FORWARD): 0.40,
    (Size(8192, 768), BOTH): 0.45,
    (Size(32768, 256), FORWARD): 0.38,
    (Size(32768, 256), BOTH): 0.50,
}
# Lower bounds on another formula / native, forward + backward.
SPEEDUPS: dict[tuple[Size, str], float] = {
    (Size(8192, 256), EAGER): 4.5,
    (Size(8192, 256), COMPILED): 2.7,
    (Size(8192, 256), "lightly"): 7.0,
    (Size(8192, 256), "hjepa"): 10.0,
    (Size(256, 256), "metric_learning"): 50.0,
}
# Upper bounds on native / eager, either pass: never slower, and faster for a batch of 128.
OVER_EAGER = 1.0
OVER_EAGER_AT = {Size(256, 768): 0.7}
# Lower bound on native in fp32 / native in bf16, on a CPU that has bf16 instructions.
BF16_SPEEDUP = 1.6


@dataclass(frozen=True)
class Sizes:
    """The sizes of every part. Above ``comparable`` rows only mm and native run."""

    targets: tuple[Size, ...]
    speedups: Size
    metric_learning: Size
    small: tuple[Size, ...]
    bf16: tuple[Size, ...]
    sweep: tuple[Size, ...]
    comparable: int


FULL = Sizes(
    targets=(Size(2048, 256), *(Size(8192, d) for d in (128, 256, 768)), Size(32768, 256)),
    speedups=Size(8192, 256),
    metric_learning=Size(256, 256),
    small=tuple(
        Size(rows, features) for rows in (16, 64, 256, 1024) for features in (64, 128, 768)
    ),
    bf16=(Size(2048, 256), Size(8192, 256)),
    # Together with 2048, 8192 and 32768 of the targets these are the M at D = 256.
    sweep=tuple(Size(rows, 256) for rows in (256, 512, 1024, 4096, 16384)),
    comparable=16384,
)
QUICK = Sizes(
    targets=(Size(32, 8), Size(96, 8)),
    speedups=Size(32, 8),
    metric_learning=Size(16, 8),
    small=(Size(16, 8),),
    bf16=(Size(32, 8),),
    sweep=(Size(16, 8),),
    comparable=64,
)


@dataclass(frozen=True)
class Cell:
    """Candidates that are timed in turn on the same inputs.

    Attributes:
        part: One of ``PARTS``.
        size: Rows and features.
        direction: ``FORWARD`` or ``BOTH``.
        names: Candidates. ``mm`` is one product in the forward pass and three in both passes.
        share: Share of the time of a cell that this one gets.
        least: Least number of rounds.
    """

    part: str
    size: Size
    direction: str
    names: tuple[str, ...]
    share: float = 1.0
    least: int = 5

    def __str__(self) -> str:
        where = f"M={self.size.rows} D={self.size.features} {self.direction}"
        return f"{self.part} {where}: {', '.join(self.names)}"


def plan(all_sizes: Sizes, parts: Sequence[str], *, compiled: bool = True) -> list[Cell]:
    """The cells of the parts that were asked for, in the order of ``PARTS``."""
    formulas = (MM, NATIVE, EAGER, COMPILED, "lightly", "hjepa", "four_blocks")
    if not compiled:
        formulas = tuple(name for name in formulas if name != COMPILED)
    library = (MM, NATIVE, EAGER, "metric_learning")

    def with_eager(part: str, size: Size, direction: str) -> Cell:
        """A cell of mm and native, with chunked and eager beside them where the size allows it."""
        names = (MM, NATIVE, NO_GRAD) if direction == FORWARD else (MM, NATIVE)
        if size.rows > all_sizes.comparable:
            return Cell(part, size, direction, names, least=3)
        least = 3 if size.rows == all_sizes.comparable else 5
        return Cell(part, size, direction, (*names, CHUNKED, EAGER), least=least)

    cells = [
        *(with_eager("targets", s, d) for s in all_sizes.targets for d in DIRECTIONS),
        Cell("speedups", all_sizes.speedups, BOTH, formulas, least=4),
        Cell("speedups", all_sizes.metric_learning, BOTH, library),
        *(
            Cell("small", size, direction, (MM, NATIVE, EAGER), share=0.5)
            for size in all_sizes.small
            for direction in DIRECTIONS
        ),
        *(Cell("bf16", s, d, (NATIVE, BF16)) for s in all_sizes.bf16 for d in DIRECTIONS),
        *(with_eager("sweep", size, BOTH) for size in all_sizes.sweep),
    ]
    return [cell for cell in cells if cell.part in parts]


def make_call(cell: Cell, name: str) -> Run:
    """The call of a candidate, which has run once.

    Raises:
        ImportError: If a library is missing; the message says how to get it.
        RuntimeError: If it does not work here.
    """
    inputs = views(cell.size, dtype=torch.bfloat16 if name == BF16 else torch.float32)
    if name == MM:
        return candidates.products(inputs, cell.direction)
    candidate = candidates.find(NATIVE if name in (BF16, NO_GRAD) else name)
    formula = candidate.make(TEMPERATURE)
    candidates.one_pass(formula, inputs, BOTH)()
    if name == NO_GRAD:
        formula = torch.no_grad()(formula)
    return candidates.one_pass(formula, inputs, cell.direction)


def measure(cell: Cell, seconds: float) -> list[Record]:
    """Time a cell: one row of the results file for each candidate."""
    calls: dict[str, Run] = {}
    for name in cell.names:
        try:
            calls[name] = make_call(cell, name)
        except (ImportError, RuntimeError) as error:
            title = VARIANTS.get(name) or TITLES[name]
            print(f"{title} is left out: {kind_and_first_line(error)}", flush=True)
    times = interleaved(calls, seconds=seconds * cell.share, least=cell.least)
    rows = []
    for name, row in times.items():
        over = {
            f"over_{other}": row["median"] / times[other]["median"] if other in times else None
            for other in (MM, EAGER)
        }
        where = {"part": cell.part, "M": cell.size.rows, "D": cell.size.features}
        what = {"pass": cell.direction, "name": name, "dtype": "bf16" if name == BF16 else "fp32"}
        rows.append({**where, **what, **row, **over})
    return rows


def compare(part: str, rows: list[Record], *, bf16_instructions: bool) -> list[Target]:
    """Every ratio that a part reports, with its target.

    Args:
        part: One of ``PARTS``.
        rows: Rows of the results file.
        bf16_instructions: Whether the kernel uses bf16 instructions here.
    """
    cells: dict[tuple[Size, str], dict[str, float]] = {}
    for row in rows:
        if row["part"] == part:
            cell = cells.setdefault((Size(row["M"], row["D"]), row["pass"]), {})
            cell[row["name"]] = row["median"]
    comparisons = []
    for (size, direction), medians in cells.items():
        others = [name for name in medians if name not in (MM, NATIVE)]
        for names, limit, bound in {
            "targets": [
                ((NATIVE, MM), OVER_MM.get((size, direction)), AT_MOST),
                ((NO_GRAD, MM), None, AT_MOST),
            ],
            "speedups": [((name, NATIVE), SPEEDUPS.get((size, name)), AT_LEAST) for name in others],
            "small": [((NATIVE, EAGER), OVER_EAGER_AT.get(size, OVER_EAGER), AT_MOST)],
            "bf16": [((NATIVE, BF16), BF16_SPEEDUP if bf16_instructions else None, AT_LEAST)],
            "sweep": [((NATIVE, other), None, AT_MOST) for other in (MM, EAGER)],
        }[part]:
            if medians.keys() >= set(names):
                above, below = (medians[name] for name in names)
                cell = {"part": part, "M": size.rows, "D": size.features, "pass": direction}
                cell |= {"numerator": names[0], "denominator": names[1], "seconds": [above, below]}
                comparisons.append(Target(cell, above / below, limit, bound))
    return comparisons


def run(
    all_sizes: Sizes, parts: Sequence[str], seconds: float, *, compiled: bool
) -> dict[str, list[Record]]:
    """Measure the parts and print each one's table, and how many targets are met.

    Returns:
        Sections of the results file: ``rows`` and ``targets``.
    """
    cells = plan(all_sizes, parts, compiled=compiled)
    rows: list[Record] = []
    targets: list[Target] = []
    progress = Progress(len(cells))
    has_bf16 = "bf16" in instruction_set()
    for part in (part for part in PARTS if part in parts):
        for cell in (cell for cell in cells if cell.part == part):
            progress(cell)
            rows += measure(cell, seconds)
        judged = compare(part, rows, bf16_instructions=has_bf16)
        targets += judged
        print(f"\n{HEADINGS[part]}")
        print_targets(judged, COLUMNS)
        if part == "bf16" and not has_bf16:
            print(f"There is no target here: {instruction_set()} has no bf16 instructions.")
        print(flush=True)
    print(summary(targets, COLUMNS))
    return {"rows": rows, "targets": [target.record() for target in targets]}


def parse_parts(text: str) -> list[str]:
    """``targets,small`` as names of parts."""
    parts = text.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"expected parts of {', '.join(PARTS)}; got {unknown}")
    return parts


def main() -> None:
    options = read_options(
        __doc__,
        {
            "--sizes": {"type": parse_sizes, "help": "MxD of the targets, separated by commas"},
            "--only": {"type": parse_parts, "help": "parts, separated by commas"},
        },
        seconds=3.0,
        quick_seconds=0.01,
    )
    require_native()
    all_sizes = QUICK if options.quick else FULL
    if options.sizes:
        all_sizes = replace(all_sizes, targets=options.sizes)
    if options.quick:
        print(f"{TITLES[COMPILED]} is left out of --quick: compiling takes long")
    sections = run(all_sizes, options.only or PARTS, options.seconds, compiled=not options.quick)
    if options.sizes or options.only:
        print("not written: bench/results holds whole runs, without --sizes or --only")
    else:
        save(options, "nt_xent_cpu", **sections)


if __name__ == "__main__":
    main()
