"""Everything that needs a GPU, in one command: ``make gpu-check`` (within 8 minutes).

Each step goes on when another fails; the end says which did. Needs PyTorch, Triton, pytest and
hypothesis, for the first step setuptools, CMake, Ninja, pybind11 and a compiler too; no network.
Only that step installs: the others use the checkout as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
PARITY = ["nt_xent", "cross_logsumexp", "cross_logsumexp_calls", "limits"]
PARITY += ["prediction_loss", "registration"]
TOTAL = 480.0  # seconds of all steps
GRACE = 15.0  # seconds from asking a step to stop to stopping it; pytest-xdist takes ten
SHORTEST = 5.0  # seconds below which a step is not worth its start


@dataclass(frozen=True)
class Step:
    """A command with what it may take.

    Attributes:
        name: Of the printed line.
        command: Program and arguments.
        limit: Seconds at most.
        kept: Seconds that the steps before leave it.
        needs: Modules without which it cannot run.
        environment: Variables on top of this process's.
    """

    name: str
    command: list[str]
    limit: float
    kept: float = 0.0
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def pytest(*arguments: str) -> list[str]:
    """The suite's runner, on several processes if it can: compiling takes most of the time.

    The project's own options ask for pytest-benchmark, which may be missing.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--strict-markers"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if installed("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    return [*command, *arguments]


def pip_install() -> list[str]:
    """Installs the checkout where it is, with the build tools that are here."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--editable", str(ROOT)]
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    if managed and sys.prefix == sys.base_prefix:
        command.append("--break-system-packages")
    return command


def sanitizer() -> str | None:
    """compute-sanitizer, which CUDA's toolkit often keeps off the path."""
    found = shutil.which("compute-sanitizer")
    return found or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def steps() -> list[Step]:
    """In the order of their worth, should the time run out."""
    tests = ROOT / "python_tests"
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    repeatable = {"CUBLAS_WORKSPACE_CONFIG": workspace}  # for deterministic products
    device = Step(
        "device",
        pytest(str(tests / "triton/test_gpu.py")),
        90,
        needs=("pytest",),
        environment=repeatable,
    )
    kernels = Step(
        "kernels",
        pytest(str(tests / "triton/test_kernels.py")),
        150,
        needs=("pytest",),
        environment=repeatable,
    )
    parity = Step(
        "parity",
        pytest("-k", "triton", *(str(tests / f"ops/test_{name}.py") for name in PARITY)),
        150,
        needs=("pytest", "hypothesis"),
        environment={**repeatable, "CJEPA_TEST_DEVICE": "cuda"},
    )
    # One process compiles for minutes: then what users call goes before the ways inside.
    tested = (kernels, parity) if installed("xdist") else (parity, kernels)
    small = [sys.executable, str(ROOT / "bench/gpu_small.py")]
    found = [
        Step("build", pip_install(), 120, needs=("pip", "setuptools", "pybind11")),
        device,
        *tested,
        Step("benchmark", [sys.executable, str(ROOT / "bench/gpu.py")], 270, kept=180),
    ]
    checker = sanitizer()
    if checker is not None:
        checked = [checker, "--error-exitcode", "1"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor with its own bounds
        found += [
            Step("small", small, 90),  # compiles what is checked next
            Step("memcheck", [*checked, *small], 120, kept=30, environment=uncached),
            Step("racecheck", [*checked, "--tool", "racecheck", *small], 90),
        ]
    return found


def allowance(step: Step, later: list[Step], left: float) -> float:
    """Seconds that a step gets of those left."""
    return min(step.limit, left - GRACE - sum(other.kept for other in later))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step: it may say what it has so far, and none of its children stays on the device."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(step: Step, limit: float) -> tuple[str, float]:
    """What became of a step within ``limit``, and the seconds that it took."""
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    missing = [module for module in step.needs if not installed(module)]
    if missing:
        outcome = f"not run: {', '.join(missing)} not installed"
    elif limit < SHORTEST:
        outcome = "not run: no time left"
    else:
        return run_process(step, limit)
    print(outcome, flush=True)
    return outcome, 0.0


def run_process(step: Step, limit: float) -> tuple[str, float]:
    """The same of a step that can run."""
    environment = {**os.environ, **step.environment}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    start = time.monotonic()
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    except OSError as error:
        return f"failed ({error.strerror})", 0.0
    try:
        code = process.wait(limit)
        outcome = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {limit:.0f} s"
    finally:
        stop(process)
    return outcome, time.monotonic() - start


def run_all(
    todo: list[Step],
    total: float = TOTAL,
    runner: Callable[[Step, float], tuple[str, float]] = run,
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[str, str, float]]:
    """Name, outcome and seconds of every step, all within ``total`` seconds."""
    deadline = clock() + total
    outcomes = []
    for index, step in enumerate(todo):
        limit = allowance(step, todo[index + 1 :], deadline - clock())
        outcomes.append((step.name, *runner(step, limit)))
    return outcomes


def end(signum: int, frame: FrameType | None) -> None:
    """Leave through ``finally``, so that the step ends too."""
    sys.exit(128 + signum)


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was checked")
        return 1
    signal.signal(signal.SIGTERM, end)
    # A shell that starts this in the background has it and its steps ignore what ends pytest.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    outcomes = run_all(steps())
    print("\nstep        s  outcome")
    for name, outcome, seconds in outcomes:
        print(f"{name:9} {seconds:3.0f}  {outcome}")
    if sanitizer() is None:
        print("compute-sanitizer is not installed: no check of memory or races")
    return int(any(outcome != "passed" for _, outcome, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
