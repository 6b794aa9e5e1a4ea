"""Everything that needs a GPU, in one command: ``make gpu-check`` (within 8 minutes).

Each step goes on when another fails; the end says which did. Needs PyTorch, Triton, pytest and
hypothesis, for the first step setuptools, CMake, Ninja, pybind11 and a compiler too; no network.
Only that step installs: the others use the checkout as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARITY = ["nt_xent", "cross_logsumexp", "cross_logsumexp_calls", "ops"]


@dataclass(frozen=True)
class Step:
    """A command with its time limit in seconds."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


def pytest(*arguments: str) -> list[str]:
    """The suite's runner, on several processes if it can: compiling takes most of the time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    return [*command, *arguments]


def steps() -> list[Step]:
    """In the order of their worth, should the time run out."""
    tests = ROOT / "python_tests"
    on_device = {"CJEPA_TEST_DEVICE": "cuda"}
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    found = [
        Step("build", [sys.executable, "-m", "pip", *install], 120),
        Step("device", pytest(str(tests / "test_triton_gpu.py")), 90),
        Step("kernels", pytest(str(tests / "test_triton.py")), 150),
        Step(
            "parity",
            pytest("-k", "triton", *(str(tests / f"test_{name}.py") for name in PARITY)),
            150,
            on_device,
        ),
        Step("benchmark", [sys.executable, str(ROOT / "bench/gpu.py")], 240),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        script = [sys.executable, str(ROOT / "bench/gpu_small.py")]
        found.append(Step("memcheck", [sanitizer, "--error-exitcode", "1", *script], 60))
        racecheck = [sanitizer, "--tool", "racecheck", "--error-exitcode", "1", *script]
        found.append(Step("racecheck", racecheck, 60))
    return found


def run(step: Step) -> tuple[str, float]:
    """What became of a step, and the seconds that it took."""
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    environment = {**os.environ, **step.environment, "PYTHONPATH": str(ROOT)}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    start = time.perf_counter()
    try:
        result = subprocess.run(
            step.command, cwd=ROOT, env=environment, timeout=step.limit, check=False
        )
        outcome = "passed" if result.returncode == 0 else f"failed ({result.returncode})"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {step.limit:.0f} s"
    return outcome, time.perf_counter() - start


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was checked")
        return 1
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    outcomes = [(step.name, *run(step)) for step in steps()]
    print("\nstep        outcome              s")
    for name, outcome, seconds in outcomes:
        print(f"{name:11} {outcome:18} {seconds:4.0f}")
    return int(any(outcome != "passed" for _, outcome, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
