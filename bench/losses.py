"""Time, memory and errors of the contrastive losses beside other projects' formulas, on the CPU.

    python bench/losses.py [--loss info_nce,clip,sup_con,labels] [--rows 256,2048,8192,32768]
                           [--seconds 8] [--quick] [--no-save]

Forward + backward at temperature 0.1 and D = 256, in fp32. The candidates of a loss take turns, and
each round gives the ratio of our time to another's; the ratio of a record is their median, with
its 99 % interval (cjepa_kernels/bench/verdict.py). Errors are those against the plain formula in
float64. A candidate that needs too much memory or too long is not run, and the record says why.
Beside the times for which there are targets, the record has the time that our matrix products
alone would take at the rate of a large one (torch.mm). The script reports a target that is missed
and goes on. Only a run of the default losses and rows writes bench/results/losses_cpu.json, at its
end.
"""

from __future__ import annotations

import argparse

from cjepa_kernels.bench.loss_comparison import FEATURES, Measurement, print_rows, targets_of
from cjepa_kernels.bench.losses import parse_losses
from cjepa_kernels.bench.script_options import Progress, read_options, require_native, save
from cjepa_kernels.bench.targets import print_targets, summary

ROWS, QUICK_ROWS = (256, 2048, 8192, 32768), (200,)
TIMED = ("info_nce", "clip", "sup_con", "labels")
COLUMNS = ("loss", "M", "D", "ours", "other")


def parse_rows(text: str) -> tuple[int, ...]:
    """``2048,8192`` as rising numbers of rows."""
    rows = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if any(count < 4 or count % 2 for count in rows):
        raise argparse.ArgumentTypeError(f"expected even numbers of 4 rows or more, got {text!r}")
    return tuple(sorted(rows))


def main() -> None:
    options = read_options(
        __doc__,
        {
            "--loss": {"type": parse_losses, "help": "losses, separated by commas"},
            "--rows": {"type": parse_rows, "help": "even numbers of rows, separated by commas"},
        },
        seconds=8.0,
        quick_seconds=0.0,
    )
    require_native()
    names = options.loss or list(TIMED)
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    measurement = Measurement(options.seconds)
    progress = Progress(len(names) * len(rows))
    for name in names:
        for count in rows:
            progress(f"{name} M={count} D={FEATURES}")
            measurement.measure(name, count)
    targets = targets_of(measurement.sections)
    print()
    print_rows(measurement.sections)
    print("\nTargets: our time over the other's")
    print_targets(targets, COLUMNS)
    print(summary(targets, COLUMNS))
    if options.loss or options.rows:
        print("not written: bench/results holds whole runs, without --loss and --rows")
    else:
        records = [target.record() for target in targets]
        save(options, "losses_cpu", targets=records, **measurement.sections)


if __name__ == "__main__":
    main()
