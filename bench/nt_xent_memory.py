"""Peak extra memory of forward + backward against the number of rows.

    python bench/nt_xent_memory.py [--rows 4096,8192,16384,32768] [--no-save]

Each size runs in a process of its own, which first makes the inputs and a tiny warm-up call; the
growth of its peak resident memory from there is what the call needed, gradients included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch
from measurement import print_table, write_results

from cjepa_kernels import backends, nt_xent

FEATURES = 256
# What the reference holds at its peak was measured up to this size; beyond, it is M^2 arithmetic.
LARGEST_REFERENCE = 8192


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(rows: int, backend: Any) -> dict[str, float]:
    """Run in a fresh process: extra bytes at the peak and the seconds taken."""
    import time

    torch.manual_seed(0)
    z_i, z_j = (torch.randn(rows // 2, FEATURES, requires_grad=True) for _ in range(2))
    small = [z[:64].detach().requires_grad_() for z in (z_i, z_j)]
    nt_xent(small[0], small[1], backend=backend).loss.backward()
    before = peak_bytes()
    start = time.perf_counter()
    loss = nt_xent(z_i, z_j, backend=backend).loss
    loss.backward()
    seconds = time.perf_counter() - start
    if not (loss.isfinite() and z_i.grad is not None and bool(z_i.grad.isfinite().all())):
        raise RuntimeError(f"the result at {rows} rows is not finite")
    return {"extra_bytes": peak_bytes() - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="4096,8192,16384,32768")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rows, backend = options.one.split(",")
        print(json.dumps(measure(int(rows), backend)))
        return
    records, table = [], []
    for backend in ("native", "chunked", "reference"):
        if not backends()[backend].available:
            print(f"{backend} is left out: {backends()[backend].reason}")
            continue
        for rows in map(int, options.rows.split(",")):
            if backend == "reference" and rows > LARGEST_REFERENCE:
                continue
            command = [sys.executable, __file__, "--one", f"{rows},{backend}"]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            record = {"backend": backend, "M": rows, "D": FEATURES, **json.loads(result.stdout)}
            records.append(record)
            extra = record["extra_bytes"]
            table.append(
                [
                    backend,
                    str(rows),
                    f"{extra / 2**20:.0f}",
                    f"{extra / rows / 2**10:.2f}",
                    f"{4 * rows * rows / 2**20:.0f}",
                    f"{record['seconds']:.2f}",
                ]
            )
            print(f"measured {backend} M={rows}", flush=True)
    print_table(["backend", "M", "extra MiB", "KiB a row", "one M x M MiB", "s"], table)
    if not options.no_save:
        print(f"written: {write_results('nt_xent_memory_cpu', records)}")


if __name__ == "__main__":
    main()
