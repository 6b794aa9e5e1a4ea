"""Peak extra memory of NT-Xent's forward + backward on the CPU against the number of rows.

    python bench/nt_xent_memory.py [--rows 4096,8192,16384,32768,131072] [--no-save]

Each size and back end runs in a process of its own (cjepa_kernels/bench/memory.py). The gradients
are counted, the inputs are not. The target for native at 131072 rows is four times the input. The
script reports a miss and goes on. It writes bench/results/nt_xent_memory_cpu.json.
"""

from __future__ import annotations

import argparse
from typing import Any

from cjepa_kernels import backends
from cjepa_kernels.bench import memory
from cjepa_kernels.bench.candidates import CHUNKED, NATIVE, REFERENCE
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.records import write_results
from cjepa_kernels.bench.sizes import DTYPES, Size
from cjepa_kernels.tables import mebibytes, print_table

FEATURES, DTYPE = 256, "fp32"
ITEM_BYTES = DTYPES[DTYPE].itemsize
# The reference's peak beyond this size is M² arithmetic, and the chunked back end takes minutes.
LARGEST = {REFERENCE: 8192, CHUNKED: 32768}
TARGETS = {(NATIVE, 131072): 4.0}
HEADER = ["backend", "M", "extra MiB", "/ input", "target", "", "one M x M MiB"]


def measure(rows: int, backend: str) -> dict[str, Any]:
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


def table_row(record: dict[str, Any]) -> list[str]:
    """The printed row, in the order of ``HEADER``."""
    rows, over_input = record["M"], record["over_input"]
    target = TARGETS.get((record["backend"], rows))
    return [
        record["backend"],
        str(rows),
        mebibytes(record["extra_bytes"]),
        f"{over_input:.2f}",
        "" if target is None else f"<= {target:g}",
        "" if target is None else "met" if over_input <= target else "not met",
        mebibytes(ITEM_BYTES * rows**2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="4096,8192,16384,32768,131072")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    options = parser.parse_args()
    records = []
    for backend in (NATIVE, CHUNKED, REFERENCE):
        if not backends()[backend].available:
            print(f"{backend} is left out: {backends()[backend].reason}")
            continue
        for rows in map(int, options.rows.split(",")):
            if rows <= LARGEST.get(backend, rows):
                print(f"measuring {backend} M={rows}", flush=True)
                records.append(measure(rows, backend))
    print_table(HEADER, [table_row(record) for record in records])
    if not options.no_save:
        print(f"written: {write_results('nt_xent_memory_cpu', records)}")


if __name__ == "__main__":
    main()
