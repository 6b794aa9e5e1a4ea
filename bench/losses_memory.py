"""Peak extra memory of the contrastive losses' forward + backward on the CPU at a large batch.

    python bench/losses_memory.py [--rows 65536] [--no-save]

Each loss runs in a process of its own (cjepa_kernels/bench/memory.py). The gradients are counted,
the inputs are not. InfoNCE and CLIP contrast so many rows with as many others, so their input is
twice as large. The target is four times the input. The script reports a miss and goes on. Only a
run of the default rows writes bench/results/losses_memory_cpu.json.
"""

from __future__ import annotations

from cjepa_kernels.bench import memory
from cjepa_kernels.bench.candidates import NATIVE
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.losses import LOSSES
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, require_native, save
from cjepa_kernels.bench.sizes import DTYPES, Size
from cjepa_kernels.bench.targets import Target, print_targets
from cjepa_kernels.tables import mebibytes

FEATURES, DTYPE = 256, "fp32"
ROWS = 65536
MOST = 4.0  # Times the input.


def measure(name: str, title: str, rows: int, size: Size) -> Record:
    """One row of the results file.

    Args:
        name: Of the candidate.
        title: Of the loss.
        rows: That are contrasted with each other or with as many others.
        size: Of both views together.
    """
    extra = memory.peak_bytes(name, size, device="cpu", dtype=DTYPE, temperature=TEMPERATURE)
    of_input = DTYPES[DTYPE].itemsize * size.rows * size.features
    return {
        "name": name,
        "title": title,
        "M": rows,
        "D": size.features,
        "input_bytes": of_input,
        "extra_bytes": extra,
        "over_input": extra / of_input,
    }


def target_of(record: Record) -> Target:
    """The extra memory divided by the input's, and its target."""
    sizes = {f"{key} MiB": mebibytes(record[f"{key}_bytes"]) for key in ("input", "extra")}
    return Target({**record, **sizes}, record["over_input"], MOST if record["M"] >= ROWS else None)


def main() -> None:
    options = read_options(
        __doc__, {"--rows": {"type": int, "default": ROWS, "help": "number of rows"}}
    )
    require_native()
    rows = options.rows
    cases = [(NATIVE, "NT-Xent", Size(rows, FEATURES))]
    cases += [(loss.ours.name, loss.title, loss.size(rows, FEATURES)) for loss in LOSSES.values()]
    records = []
    for name, title, size in cases:
        print(f"measuring {title} M={rows}", flush=True)
        records.append(measure(name, title, rows, size))
    targets = list(map(target_of, records))
    print_targets(targets, ["title", "M", "input MiB", "extra MiB"])
    if rows == ROWS:
        save(options, "losses_memory_cpu", records, targets=[t.record() for t in targets])
    else:
        print("not written: bench/results holds whole runs, without --rows")


if __name__ == "__main__":
    main()
