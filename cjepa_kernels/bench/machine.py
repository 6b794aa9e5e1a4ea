"""The machine and the versions that figures depend on, and the limits of the machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import cjepa_kernels
from cjepa_kernels import provenance
from cjepa_kernels.backends import compiled_module
from cjepa_kernels.bench import sources
from cjepa_kernels.bench.timing import clock_of, interleaved
from cjepa_kernels.provenance import cpu_name, installed_version

ROOT = Path(cjepa_kernels.__file__).parent.parent
# Distributions whose versions change the figures, by key of the results.
PEERS = {
    "pytorch_metric_learning": "pytorch-metric-learning",
    "triton": "triton",
    "inf_cl": "inf-cl",
    "siglip_kernel": "siglip-kernel",
}
CPU_EDGE, CUDA_EDGE = 4096, 8192  # Rows of the square product that shows the peak rate.
CPU_COPY, CUDA_COPY = 2**28, 2**31  # Bytes of the copy that shows the bandwidth.


def instruction_set() -> str:
    """The instruction set that the native back end uses here; ``none`` if it is not built."""
    module = compiled_module()
    return "none" if module is None else str(module.build_info()["instruction_set"])


def commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` if anything but results differs from it.

    ``CJEPA_COMMIT`` names it on a machine that has the files without git.
    """
    if os.environ.get("CJEPA_COMMIT"):
        return os.environ["CJEPA_COMMIT"]
    no_results = [f":(exclude){path}" for path in ("bench/results", "docs/results", "docs/images")]
    return provenance.commit(
        ("describe", "--always", "--abbrev=12"), changes=("--", ".", *no_results), mark="-dirty"
    )


def environment(device: str = "cpu", *, of_kernels: bool = False) -> dict[str, Any]:
    """The machine and the versions, for a results file.

    Args:
        device: ``"cpu"`` or a CUDA device.
        of_kernels: Whether the results are those of the kernels for GPUs although the device is
            the CPU. Results of these kernels name the hashes of their files.
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "cjepa_kernels": cjepa_kernels.__version__,
        **{key: installed_version(name) for key, name in PEERS.items()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        **({"sources": sources.of_files()} if on_cuda or of_kernels else {}),
    }


def command() -> str:
    """The command line of this process, without the folders of its program."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        start = ["python", "-m", f"cjepa_kernels.{program.parent.name}"]
    elif program.suffix == ".py":
        inside = program.resolve().is_relative_to(ROOT)
        start = ["python", str(program.resolve().relative_to(ROOT)) if inside else program.name]
    else:
        start = [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def total_memory(device: str = "cpu") -> int | None:
    """Bytes of memory of the device, or None if that is not known."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [_meminfo("MemTotal"), _cgroup("memory.max")]
    return min((size for size in limits if size is not None), default=None)


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that a new tensor may take, or None if that is not known."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    in_group = None if limit is None or used is None else limit - used
    limits = [_meminfo("MemAvailable"), in_group]
    return min((size for size in limits if size is not None), default=None)


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def _cgroup(name: str) -> int | None:
    """Bytes of a limit of the container's control group, or None without one."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def roofs(
    device: str, dtype: torch.dtype, *, seconds: float = 1.0, shrink: int = 1
) -> dict[str, float]:
    """How fast this machine multiplies and copies.

    Args:
        device: ``"cpu"`` or a CUDA device.
        dtype: Dtype of the product.
        seconds: Time for both.
        shrink: Divides the edge of the product and the square root of the copy.

    Returns:
        ``flops``, those of a square product per second, and ``bandwidth``, the bytes that a copy
        reads and writes per second.
    """
    on_cuda = torch.device(device).type == "cuda"
    edge = (CUDA_EDGE if on_cuda else CPU_EDGE) // shrink
    size = (CUDA_COPY if on_cuda else CPU_COPY) // shrink**2
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = interleaved(
        {"flops": lambda: torch.mm(a, b, out=product), "bandwidth": lambda: target.copy_(source)},
        seconds=seconds,
        least=3,
        clock=clock_of(device),
        shares=True,
    )
    return {
        "flops": 2 * edge**3 / times["flops"]["p20"],
        "bandwidth": 2 * size / times["bandwidth"]["p20"],
    }
