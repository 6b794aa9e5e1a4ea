"""Peak extra memory of NT-Xent's forward + backward on the CPU against the number of rows.

    python bench/nt_xent_memory.py [--rows 4096,8192,16384,32768,131072] [--no-save]

Each size and back end runs in a process of its own (cjepa_kernels/bench/memory.py). The gradients
are counted, the inputs are not. The target for native at 131072 rows is four times the input. The
script reports a miss and goes on. Only a run of the default rows writes
bench/results/nt_xent_memory_cpu.json.
"""

from __future__ import annotations

from cjepa_kernels import backends
from cjepa_kernels.bench import memory
from cjepa_kernels.bench.candidates import CHUNKED, NATIVE, REFERENCE
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.bench.sizes import DTYPES, Size
from cjepa_kernels.bench.targets import Target, print_targets
from cjepa_kernels.tables import mebibytes

FEATURES, DTYPE = 256, "fp32"
ROWS = "4096,8192,16384,32768,131072"
ITEM_BYTES = DTYPES[DTYPE].itemsize
# The reference's peak beyond this size is M² arithmetic, and the chunked back end takes minutes.
LARGEST = {REFERENCE: 8192, CHUNKED: 32768}
TARGETS = {(NATIVE, 131072): 4.0}


def measure(rows: int, backend: str) -> Record:
    """One row of the results file."""
    size = Size(rows, FEATURES)
    extra = memory.peak_bytes(backend, size, device="cpu", dtype=DTYPE, temperature=TEMPERATURE)
    return {
        "backend": backend,
        "M": rows,
        "D": FEATURES,
        "extra_bytes": extra,
        "over_input": extra / (ITEM_BYTES * rows * FEATURES),
    }


def target_of(record: Record) -> Target:
    """The extra memory divided by the input's, and its target."""
    rows = record["M"]
    sizes = {"extra MiB": record["extra_bytes"], "one M x M MiB": ITEM_BYTES * rows**2}
    cell = {**record, **{name: mebibytes(size) for name, size in sizes.items()}}
    return Target(cell, record["over_input"], TARGETS.get((record["backend"], rows)))


def main() -> None:
    options = read_options(__doc__, {"--rows": {"default": ROWS, "help": "numbers of rows"}})
    records = []
    for backend in (NATIVE, CHUNKED, REFERENCE):
        if not backends()[backend].available:
            print(f"{backend} is left out: {backends()[backend].reason}")
            continue
        for rows in map(int, options.rows.split(",")):
            if rows <= LARGEST.get(backend, rows):
                print(f"measuring {backend} M={rows}", flush=True)
                records.append(measure(rows, backend))
    print_targets(list(map(target_of, records)), ["backend", "M", "extra MiB", "one M x M MiB"])
    if options.rows == ROWS:
        save(options, "nt_xent_memory_cpu", records)
    else:
        print("not written: bench/results holds whole runs, without --rows")


if __name__ == "__main__":
    main()
