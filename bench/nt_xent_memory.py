"""Peak extra memory of forward + backward against the number of rows.

    python bench/nt_xent_memory.py [--rows 4096,8192,16384,32768,131072] [--no-save]

Each size runs in a process of its own, which first makes the inputs and a tiny warm-up call; the
growth of its peak resident memory from there is what the call needed, gradients included. The
target, native at 131072 rows, is four times the input; a miss is reported, never an error.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from cjepa_kernels import backends, nt_xent
from cjepa_kernels.bench.records import write_results
from cjepa_kernels.bench.tables import print_table

FEATURES = 256
# What the reference holds at its peak was measured up to this size; beyond, it is M^2 arithmetic.
# The chunked path takes minutes beyond its own.
LARGEST = {"reference": 8192, "chunked": 32768}
TARGETS = {("native", 131072): 4.0}
HEADER = ["backend", "M", "extra MiB", "/ input", "target", "", "one M x M MiB", "s"]


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(rows: int, backend: Any) -> dict[str, float]:
    """Run in a fresh process: extra bytes at the peak and the seconds taken."""
    torch.manual_seed(0)
    z_i, z_j = (torch.randn(rows // 2, FEATURES, requires_grad=True) for _ in range(2))
    small = [z[:64].detach().requires_grad_() for z in (z_i, z_j)]
    torch.autograd.backward(nt_xent(small[0], small[1], backend=backend).loss)
    before = peak_bytes()
    start = time.perf_counter()
    loss = nt_xent(z_i, z_j, backend=backend).loss
    torch.autograd.backward(loss)
    seconds = time.perf_counter() - start
    if not (loss.isfinite() and z_i.grad is not None and bool(z_i.grad.isfinite().all())):
        raise RuntimeError(f"the result at {rows} rows is not finite")
    return {"extra_bytes": peak_bytes() - before, "seconds": seconds}


def measure_in_a_process(rows: int, backend: str) -> dict[str, Any]:
    """One row of the results file."""
    command = [sys.executable, __file__, "--one", f"{rows},{backend}"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    record = {"backend": backend, "M": rows, "D": FEATURES, **json.loads(result.stdout)}
    record["over_input"] = record["extra_bytes"] / (4 * rows * FEATURES)
    return record


def table_row(record: dict[str, Any]) -> list[str]:
    """The printed row, in the order of ``HEADER``."""
    rows, over_input = record["M"], record["over_input"]
    target = TARGETS.get((record["backend"], rows))
    verdict = "" if target is None else "met" if over_input <= target else "not met"
    return [
        record["backend"],
        str(rows),
        f"{record['extra_bytes'] / 2**20:.0f}",
        f"{over_input:.2f}",
        "" if target is None else f"<= {target:g}",
        verdict,
        f"{4 * rows * rows / 2**20:.0f}",
        f"{record['seconds']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="4096,8192,16384,32768,131072")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rows, backend = options.one.split(",")
        print(json.dumps(measure(int(rows), backend)))
        return
    records = []
    for backend in ("native", "chunked", "reference"):
        if not backends()[backend].available:
            print(f"{backend} is left out: {backends()[backend].reason}")
            continue
        for rows in map(int, options.rows.split(",")):
            if rows > LARGEST.get(backend, rows):
                continue
            print(f"measuring {backend} M={rows}", flush=True)
            records.append(measure_in_a_process(rows, backend))
    print_table(HEADER, [table_row(record) for record in records])
    if not options.no_save:
        print(f"written: {write_results('nt_xent_memory_cpu', records)}")


if __name__ == "__main__":
    main()
