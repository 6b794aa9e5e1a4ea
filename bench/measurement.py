"""How bench/ measures: interleaved runs, medians, and the environment beside them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cjepa_kernels
from cjepa_kernels.backends import compiled_module

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: dict[str, Callable[[], object]], *, seconds: float, least: int = 5
) -> dict[str, dict[str, float]]:
    """Time every candidate in turn, round after round, for about ``seconds``.

    One round runs each candidate once, so a change of the machine's speed hits all alike.

    Returns:
        For each name: ``median``, ``p20``, ``p80`` in seconds and the number of ``rounds``.
    """
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < deadline:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    summary = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        summary[name] = {
            "median": statistics.median(values),
            "p20": deciles[1],
            "p80": deciles[7],
            "rounds": float(rounds),
        }
    return summary


def instruction_set() -> str:
    """Instruction set that the native back end uses here, ``none`` where it is not built."""
    module = compiled_module()
    return "none" if module is None else str(module.build_info()["instruction_set"])


def installed_version(distribution: str) -> str | None:
    """Version of a library, None where it is missing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*args: str) -> str:
    """What git says in this folder, empty without one."""
    try:
        result = subprocess.run(
            ["git", *args], capture_output=True, text=True, cwd=RESULTS.parent, check=False
        )
    except OSError:
        return ""
    return result.stdout.strip()


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    commit = git("describe", "--always", "--abbrev=12")
    if git("status", "--porcelain", "--", "..", f":(exclude){RESULTS.name}"):  # but for results
        commit += "-dirty"
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "device": cpu,
        "instruction_set": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cjepa_kernels": cjepa_kernels.__version__,
        "pytorch_metric_learning": installed_version("pytorch-metric-learning"),
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def write_results(name: str, rows: list[dict[str, Any]], **sections: list[dict[str, Any]]) -> Path:
    """Write ``bench/results/<name>.json`` in one piece and return its path.

    Args:
        name: Stem of the file.
        rows: What was measured.
        **sections: Further lists, each under its own name.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    content = {"environment": environment(), "rows": rows, **sections}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows under a header, columns aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
