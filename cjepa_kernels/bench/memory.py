"""Peak extra memory of forward + backward. The gradients are counted, the inputs are not.

On a CUDA device PyTorch's allocator counts it. On the CPU it is the growth of the peak resident
memory of a new process, which has made the inputs and a tiny warm-up call before.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import sys
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cjepa_kernels.bench import candidates, losses
from cjepa_kernels.bench.sizes import DTYPES, Size, views
from cjepa_kernels.bench.timing import Run
from cjepa_kernels.error_lines import kind_and_first_line

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARM_UP = Size(128, 16)
SECONDS = 300.0  # Limit for one process.


def supported(device: str) -> bool:
    """Whether peak memory can be measured: on CUDA devices and on Linux."""
    return torch.device(device).type == "cuda" or sys.platform == "linux"


def peak_bytes(name: str, size: Size, *, device: str, dtype: str, temperature: float) -> int:
    """Peak extra bytes of a candidate.

    Raises:
        RuntimeError: If it failed; the message says how.
    """
    if torch.device(device).type == "cuda":
        return _on_cuda(name, size, device=device, dtype=dtype, temperature=temperature)
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # Each process starts with PyTorch loaded.
        context.set_forkserver_preload([__name__])
    threads = torch.get_num_threads()
    pool = ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,))
    before = set(multiprocessing.active_children())
    future = pool.submit(_on_cpu, name, size, dtype, temperature)
    try:
        return future.result(SECONDS)
    except futures.BrokenExecutor:
        raise RuntimeError("its process ended, for lack of memory perhaps") from None
    except futures.TimeoutError:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise RuntimeError(f"no result within {SECONDS:.0f} s") from None
    except Exception as error:
        raise RuntimeError(kind_and_first_line(error)) from error
    finally:
        pool.shutdown()


def _on_cpu(name: str, size: Size, dtype: str, temperature: float) -> int:
    """Growth of the peak resident memory in bytes, in a new process."""
    # A compiled formula is compiled first, so that the compiler's memory is not counted.
    warm_up = size if name == candidates.COMPILED else WARM_UP
    formula = losses.find(name).make(temperature)
    inputs = views(size, dtype=DTYPES[dtype])
    before = views(warm_up, dtype=DTYPES[dtype])
    torch.autograd.grad(formula(*before), before)
    gc.collect()
    RESET.write_text("5")  # The peak is reset to the memory that is resident now.
    start = _status("VmRSS")
    loss = formula(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    peak = _status("VmHWM") - start
    if not all(bool(x.isfinite().all()) for x in (loss, *gradients)):
        raise RuntimeError("the result is not finite")
    return peak


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{STATUS} has no {field}")
    return 1024 * int(match[1])


def _on_cuda(name: str, size: Size, *, device: str, dtype: str, temperature: float) -> int:
    formula = losses.find(name).make(temperature)
    inputs = views(size, device=device, dtype=DTYPES[dtype])
    torch.autograd.grad(formula(*inputs), inputs)
    gc.collect()
    return peak_allocated(lambda: torch.autograd.grad(formula(*inputs), inputs), device)


def peak_allocated(run: Run, device: str) -> int:
    """Bytes that a call allocates on a CUDA device at its peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - start
