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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cjepa_kernels import backends
from cjepa_kernels.bench import candidates, sizes
from cjepa_kernels.bench.candidates import (
    BOTH,
    CHUNKED,
    COMPILED,
    DIRECTIONS,
    EAGER,
    FORWARD,
    MM,
    NATIVE,
    PRODUCTS,
    TITLES,
)
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.machine import instruction_set
from cjepa_kernels.bench.records import Record, write_results
from cjepa_kernels.bench.sizes import Size, views
from cjepa_kernels.bench.timing import Run, first_line, interleaved
from cjepa_kernels.tables import print_table

BF16, NO_GRAD = "native-bf16", "native-no-grad"  # NATIVE in bf16 and under torch.no_grad
HEADINGS = {
    "targets": "Targets: native over the bare matrix product",
    "speedups": "Speed-ups: other formulas over native",
    "small": "Small batches: native over eager",
    "bf16": "bf16: native in fp32 over native in bf16",
    "sweep": "Time against the number of rows",
}
PARTS = tuple(HEADINGS)
RATIO_HEADER = ["M", "D", "pass", "ratio of", "ms / ms", "ratio", "target", ""]

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


def callables(cell: Cell) -> tuple[dict[str, Run], dict[str, str]]:
    """The calls to time, by name, and why other names are left out."""
    runs: dict[str, Run] = {}
    missing = {}
    for name in cell.names:
        inputs = views(cell.size, dtype=torch.bfloat16 if name == BF16 else torch.float32)
        if name == MM:
            runs[name] = candidates.products(inputs, cell.direction)
            continue
        try:
            candidate = candidates.find(NATIVE if name in (BF16, NO_GRAD) else name)
            formula = candidate.make(TEMPERATURE)
            candidates.one_pass(formula, inputs, BOTH)()
        except (ImportError, RuntimeError) as error:
            missing[name] = first_line(error)
            continue
        if name == NO_GRAD:
            formula = torch.no_grad()(formula)
        runs[name] = candidates.one_pass(formula, inputs, cell.direction)
    return runs, missing


def measure(cell: Cell, seconds: float) -> list[Record]:
    """Time a cell: one row of the results file for each candidate."""
    runs, missing = callables(cell)
    for name, reason in missing.items():
        print(f"{TITLES[name]} is left out: {reason}", flush=True)
    times = interleaved(runs, seconds=seconds * cell.share, least=cell.least)
    return [
        {
            "part": cell.part,
            "M": cell.size.rows,
            "D": cell.size.features,
            "pass": cell.direction,
            "name": name,
            "dtype": "bf16" if name == BF16 else "fp32",
            **summary,
            **{
                f"over_{other}": summary["median"] / times[other]["median"]
                if other in times
                else None
                for other in (MM, EAGER)
            },
        }
        for name, summary in times.items()
    ]


def compare(part: str, rows: list[Record], *, bf16_instructions: bool) -> list[Record]:
    """Every ratio that a part reports beside its target, for the results file.

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
    records = []
    for (size, direction), medians in cells.items():
        for numerator, denominator in _pairs(part, medians):
            target, at_most = _target(
                part, size, direction, numerator, bf16_instructions=bf16_instructions
            )
            ratio = medians[numerator] / medians[denominator]
            verdict = "no target"
            if target is not None:
                met = ratio <= target if at_most else ratio >= target
                verdict = "met" if met else "not met"
            records.append(
                {
                    "part": part,
                    "M": size.rows,
                    "D": size.features,
                    "pass": direction,
                    "numerator": numerator,
                    "denominator": denominator,
                    "seconds": [medians[numerator], medians[denominator]],
                    "ratio": ratio,
                    "target": target,
                    "bound": "at most" if at_most else "at least",
                    "verdict": verdict,
                }
            )
    return records


def _pairs(part: str, medians: dict[str, float]) -> list[tuple[str, str]]:
    if part == "bf16":
        return [(NATIVE, BF16)]
    if part == "speedups":
        return [(name, NATIVE) for name in medians if name not in (MM, NATIVE)]
    others = {"small": [EAGER], "targets": [MM], "sweep": [MM, EAGER]}[part]
    own = [NATIVE, NO_GRAD] if part == "targets" else [NATIVE]
    return [(name, other) for name in own for other in others if {name, other} <= medians.keys()]


def _target(
    part: str, size: Size, direction: str, numerator: str, *, bf16_instructions: bool
) -> tuple[float | None, bool]:
    """The bound, if there is one, and whether it is an upper one."""
    if part == "targets":
        return OVER_MM.get((size, direction)) if numerator == NATIVE else None, True
    if part == "small":
        return OVER_EAGER_AT.get(size, OVER_EAGER), True
    if part == "bf16":
        return BF16_SPEEDUP if bf16_instructions else None, False
    if part == "speedups":
        return SPEEDUPS.get((size, numerator)), False
    return None, True


def cells_of(record: Record) -> list[str]:
    """The row of the printed table, in the order of ``RATIO_HEADER``."""
    products = PRODUCTS[record["pass"]]
    titles = TITLES | {BF16: "native bf16", NO_GRAD: "native under no_grad", MM: f"{products} mm"}
    names = [titles[record[key]] for key in ("numerator", "denominator")]
    target = "" if record["target"] is None else f"{record['bound']} {record['target']:g}"
    return [
        str(record["M"]),
        str(record["D"]),
        record["pass"],
        " / ".join(names),
        " / ".join(f"{1e3 * seconds:.3f}" for seconds in record["seconds"]),
        f"{record['ratio']:.3f}",
        target,
        record["verdict"],
    ]


def run(
    all_sizes: Sizes, parts: Sequence[str], seconds: float, *, compiled: bool
) -> dict[str, list[Record]]:
    """Measure the parts and print each one's table.

    Returns:
        Sections of the results file: ``rows`` and ``targets``.
    """
    cells = plan(all_sizes, parts, compiled=compiled)
    sections: dict[str, list[Record]] = {"rows": [], "targets": []}
    start, done = time.perf_counter(), 0
    has_bf16 = "bf16" in instruction_set()
    for part in (part for part in PARTS if part in parts):
        for cell in (cell for cell in cells if cell.part == part):
            done += 1
            print(f"[{done}/{len(cells)}, {time.perf_counter() - start:.0f} s] {cell}", flush=True)
            sections["rows"] += measure(cell, seconds)
        judged = compare(part, sections["rows"], bf16_instructions=has_bf16)
        sections["targets"] += judged
        print(f"\n{HEADINGS[part]}")
        print_table(RATIO_HEADER, [cells_of(record) for record in judged])
        if part == "bf16" and not has_bf16:
            print(f"There is no target here: {instruction_set()} has no bf16 instructions.")
        print(flush=True)
    return sections


def summary(judged: list[Record]) -> str:
    """How many targets are met, and which are not."""
    with_target = [entry for entry in judged if entry["target"] is not None]
    missed = [entry for entry in with_target if entry["verdict"] != "met"]
    lines = [f"{len(with_target) - len(missed)} of {len(with_target)} targets met"]
    lines += [
        f"  not met: {entry['numerator']} / {entry['denominator']} at M={entry['M']} "
        f"D={entry['D']} {entry['pass']}: {entry['ratio']:.3f}, {entry['bound']} "
        f"{entry['target']:g}"
        for entry in missed
    ]
    return "\n".join(lines)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """``2048x256,8192x128`` as sizes."""
    try:
        return sizes.parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_parts(text: str) -> list[str]:
    """``targets,small`` as names of parts."""
    parts = text.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"expected parts of {', '.join(PARTS)}; got {unknown}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=parse_sizes, help="MxD of the targets, separated by commas")
    parser.add_argument("--only", type=parse_parts, help="parts, separated by commas")
    parser.add_argument("--seconds", type=float, help="time for each cell (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, without torch.compile")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    options = parser.parse_args()
    native = backends()[NATIVE]
    if not native.available:
        raise SystemExit(f"This benchmark times the native back end: {native.reason}")
    all_sizes = QUICK if options.quick else FULL
    if options.sizes:
        all_sizes = replace(all_sizes, targets=options.sizes)
    default_seconds = 0.01 if options.quick else 3.0
    if options.quick:
        print(f"{TITLES[COMPILED]} is left out of --quick: compiling takes long")
    sections = run(
        all_sizes,
        options.only or PARTS,
        default_seconds if options.seconds is None else options.seconds,
        compiled=not options.quick,
    )
    print(summary(sections["targets"]))
    if options.no_save:
        return
    if options.quick or options.sizes or options.only:
        print("not written: bench/results holds whole runs, without --quick, --sizes or --only")
        return
    print(f"written: {write_results('nt_xent_cpu', **sections)}")


if __name__ == "__main__":
    main()
