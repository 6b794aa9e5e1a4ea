"""Run the tests and the benchmark that need a GPU, in at most 8 minutes: ``make gpu-check``.

    python bench/gpu_check.py [--small]

Each step runs even if another fails, and a table at the end says which did. The steps need
PyTorch, Triton, pytest and hypothesis, and no network. The first step installs the package, which
also needs setuptools, CMake, Ninja, pybind11 and a compiler. The other steps do not depend on it,
because they import the package from the checkout.
``--small`` only calls the kernels of the contrastive losses on small inputs. The steps run that
under compute-sanitizer, which slows kernels down a lot.
"""

from __future__ import annotations

import argparse
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
# The tests of operators that run on every back end.
PARITY = (
    "nt_xent",
    "cross_logsumexp",
    "cross_logsumexp_calls",
    "limits",
    "prediction_loss",
    "registration",
)
TOTAL = 480.0  # Seconds of all steps together.
GRACE = 15.0  # Seconds that a step has to stop by itself; pytest-xdist takes ten.
SHORTEST = 5.0  # A step with fewer seconds left is not started.


@dataclass(frozen=True)
class Step:
    """A command and its limits.

    Attributes:
        name: Its name in the table at the end.
        command: Program and arguments.
        limit: Seconds that it may take at most.
        reserved: Seconds that the earlier steps must leave for it.
        needs: Modules that it cannot run without.
        environment: Variables that are added to those of this process.
    """

    name: str
    command: list[str]
    limit: float
    reserved: float = 0.0
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def pytest(*arguments: str) -> list[str]:
    """The command of pytest, on several processes if xdist is installed, because compiling is slow.

    It leaves out the project's own options, which ask for plugins that may be missing.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--strict-markers"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if installed("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    return [*command, *arguments]


def pip_install() -> list[str]:
    """The command that installs the checkout in place, with the build tools of this machine."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--editable", str(ROOT)]
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    if managed and sys.prefix == sys.base_prefix:
        command.append("--break-system-packages")
    return command


def sanitizer() -> str | None:
    """Path of compute-sanitizer, which CUDA's toolkit often does not put on PATH."""
    on_path = shutil.which("compute-sanitizer")
    return on_path or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def steps() -> list[Step]:
    """The steps, the most useful first, because the time may run out."""
    tests = ROOT / "python_tests"
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    repeatable = {"CUBLAS_WORKSPACE_CONFIG": workspace}  # Makes products deterministic.
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
    # One process alone compiles for minutes, so the tests of what users call come first.
    tested = (kernels, parity) if installed("xdist") else (parity, kernels)
    small = [sys.executable, __file__, "--small"]
    all_steps = [
        Step("build", pip_install(), 120, needs=("pip", "setuptools", "pybind11")),
        device,
        *tested,
        Step("benchmark", [sys.executable, str(ROOT / "bench/gpu.py")], 270, reserved=180),
    ]
    checker = sanitizer()
    if checker is not None:
        checked = [checker, "--error-exitcode", "1"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # Every tensor has its own bounds.
        all_steps += [
            Step("small", small, 90),  # Compiles the kernels that the next steps check.
            Step("memcheck", [*checked, *small], 120, reserved=30, environment=uncached),
            Step("racecheck", [*checked, "--tool", "racecheck", *small], 90),
        ]
    return all_steps


def allowance(step: Step, later: list[Step], left: float) -> float:
    """The seconds that a step may take of those that are left."""
    return min(step.limit, left - GRACE - sum(other.reserved for other in later))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a step and all of its children. An interrupt first lets it print what it has."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(step: Step, limit: float) -> tuple[str, float]:
    """Run a step for at most ``limit`` seconds; its outcome and the seconds that it took."""
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
    """Start the process of a step and wait for it; its outcome and the seconds that it took."""
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
    """Run every step, within ``total`` seconds; the name, outcome and seconds of each."""
    deadline = clock() + total
    outcomes = []
    for index, step in enumerate(todo):
        limit = allowance(step, todo[index + 1 :], deadline - clock())
        outcomes.append((step.name, *runner(step, limit)))
    return outcomes


def call_small() -> None:
    """Call every Triton kernel of the contrastive losses on small inputs."""
    import torch

    from cjepa_kernels import cross_logsumexp, nt_xent

    torch.manual_seed(0)
    for batch, features, dtype in (
        (3, 5, torch.float32),
        (70, 64, torch.bfloat16),
        (201, 300, torch.float16),
        (2200, 128, torch.bfloat16),
    ):
        z = [torch.randn(batch, features, device="cuda").to(dtype) for _ in range(2)]
        z = [x.requires_grad_() for x in z]
        mask = torch.rand(batch, batch, device="cuda") < 0.1 if batch < 300 else None
        for options in ({}, {"temperature": 0.01}, {"mask": mask}):
            loss = nt_xent(z[0], z[1], backend="triton", **options).loss
            torch.autograd.grad(loss, z)
        out = cross_logsumexp(z[0], z[1][: batch // 2 + 1], backend="triton")
        torch.autograd.grad(out.row_lse.sum() + out.column_lse.sum(), z)
    torch.cuda.synchronize()


def end(signum: int, frame: FrameType | None) -> None:
    """Exit by an exception, so that ``finally`` stops the running step."""
    sys.exit(128 + signum)


def main() -> int:
    if not installed("torch"):
        print(f"PyTorch is not installed for {sys.executable}: nothing was checked")
        return 1
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was checked")
        return 1
    signal.signal(signal.SIGTERM, end)
    # In a process that a shell started in the background, SIGINT is ignored. Its children inherit
    # that, and pytest would not stop.
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="call the kernels on small inputs")
    if not parser.parse_args().small:
        sys.exit(main())
    call_small()
