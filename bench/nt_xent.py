"""Time and accuracy of nt_xent beside its matrix product, other formulas, and its targets.

    python bench/nt_xent.py [--only targets,speedups] [--sizes 2048x256] [--seconds 3] [--quick]

Medians of interleaved runs, temperature 0.1, metrics on, fp32 unless a line says bf16. ``mm`` is
the bare ``torch.mm(z, z.T, out=…)``; forward + backward is compared with three of them. Forward
is a training step's, with gradients enabled, unless a line says ``no_grad``. Parts:

    targets   forward and forward + backward / bare mm
    speedups  other formulas / native, forward + backward
    small     native / eager for small batches
    bf16      native in fp32 / native in bf16
    accuracy  errors of loss and gradients against float64 at the sizes timed
    sweep     further M at D = 256, for bench/plot.py

A target that is missed is reported, never an error. Only a run of all parts at their own sizes
writes bench/results/nt_xent_cpu.json, at its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import accuracy
import targets
from plan import BF16, FULL, PARTS, QUICK, TITLES, Cell, Sizes, callables, plan

from cjepa_kernels import backends
from cjepa_kernels.bench import sizes as bench_sizes
from cjepa_kernels.bench.machine import instruction_set
from cjepa_kernels.bench.records import write_results
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.tables import print_table
from cjepa_kernels.bench.timing import interleaved

HEADINGS = {
    "targets": "Targets: native over the bare matrix product",
    "speedups": "Speed-ups: other formulas over native",
    "small": "Small batches: native over eager",
    "bf16": "bf16: native in fp32 over native in bf16",
    "accuracy": "Accuracy: largest difference from float64 / largest magnitude",
    "sweep": "Time against the number of rows",
}
COMPILE = "compiled"


class Progress:
    """Says what is being measured, how far the run is and how long it has taken."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.start = steps, 0, time.perf_counter()

    def step(self, what: str) -> None:
        self.done += 1
        elapsed = time.perf_counter() - self.start
        print(f"[{self.done}/{self.steps}, {elapsed:.0f} s] {what}", flush=True)


def measure(cell: Cell, seconds: float) -> list[dict[str, Any]]:
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
                for other in ("mm", "eager")
            },
        }
        for name, summary in times.items()
    ]


def accuracy_cases(sizes: Sizes, parts: list[str]) -> list[tuple[Size, str, tuple[str, ...]]]:
    """Size, dtype and names of every check against float64."""
    if "accuracy" not in parts:
        return []
    fp32 = [
        (size, "fp32", ("native", "eager") if size.rows <= sizes.comparable else ("native",))
        for size in dict.fromkeys(
            (*sizes.small, sizes.metric_learning, *sizes.sweep, *sizes.targets)
        )
    ]
    return [*fp32, *((size, "bf16", ("native", "eager")) for size in sizes.bf16)]


def run(sizes: Sizes, parts: list[str], seconds: float, *, compiled: bool) -> dict[str, Any]:
    """Measure the parts and print each one's table.

    Returns:
        Sections of the results file: ``rows``, ``targets`` and ``accuracy``.
    """
    cells = plan(sizes, parts)
    cases = accuracy_cases(sizes, parts)
    progress = Progress(len(cells) + len(cases))
    sections: dict[str, list[dict[str, Any]]] = {"rows": [], "targets": [], "accuracy": []}
    for part in (part for part in PARTS if part in parts):
        for cell in (cell for cell in cells if cell.part == part):
            if not compiled:
                names = tuple(name for name in cell.names if name != COMPILE)
                cell = dataclasses.replace(cell, names=names)
            progress.step(
                f"{part} M={cell.size.rows} D={cell.size.features} {cell.direction}: "
                f"{', '.join(cell.names)}"
            )
            sections["rows"] += measure(cell, seconds)
        for size, dtype, names in cases if part == "accuracy" else ():
            progress.step(f"{part} M={size.rows} D={size.features} {dtype}: {', '.join(names)}")
            sections["accuracy"] += accuracy.measure_errors(size, dtype, names)
        sections["targets"] += report(part, sections)
    return sections


def report(part: str, sections: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Print a part's table and return its ratios for the results file."""
    print(f"\n{HEADINGS[part]}")
    if part == "accuracy":
        print_table(accuracy.HEADER, accuracy.table(sections["accuracy"]))
        print(flush=True)
        return []
    has_bf16 = "bf16" in instruction_set()
    comparisons = targets.compare(part, sections["rows"], bf16_instructions=has_bf16)
    print_table(targets.HEADER, [comparison.cells() for comparison in comparisons])
    if part == "bf16" and not has_bf16:
        print(f"No target here: {instruction_set()} has no bf16 instructions.")
    print(flush=True)
    return [comparison.record() for comparison in comparisons]


def summary(judged: list[dict[str, Any]]) -> str:
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
        return bench_sizes.parse_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_parts(text: str) -> list[str]:
    """``targets,small`` as names of parts."""
    parts = text.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"expected parts of {', '.join(PARTS)}; got {unknown}")
    return parts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=parse_sizes, help="MxD, separated by commas, of targets and accuracy"
    )
    parser.add_argument("--only", type=parse_parts, help="parts, separated by commas")
    parser.add_argument("--seconds", type=float, help="time for each cell (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, without torch.compile")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    native = backends()["native"]
    if not native.available:
        raise SystemExit(f"This benchmark times the native back end: {native.reason}")
    sizes = QUICK if options.quick else FULL
    if options.sizes:
        sizes = dataclasses.replace(sizes, targets=options.sizes)
    default_seconds = 0.01 if options.quick else 3.0
    if options.quick:
        print(f"{TITLES[COMPILE]} is left out: it takes long to compile, --quick goes without")
    sections = run(
        sizes,
        options.only or list(PARTS),
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
