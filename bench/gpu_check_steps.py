"""The steps of ``make gpu-check``, as data. A further check is one more line of a list."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from step_runner import ROOT, Step, installed

from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.sources import CONFIGURATIONS, HOST, KERNELS, PARTS, PLANS
from cjepa_kernels.triton.proved import SWITCHES

BY_TORCH_COMPILE = ("compiled", "reduce-overhead")  # Compiled anew for each size.
TESTS = "python_tests"
KERNEL_TESTS = [f"{TESTS}/triton/test_{name}.py" for name in ("kernels", "saved_rows")]
DEVICE_TESTS = f"{TESTS}/triton/test_gpu.py"
PLAN_TESTS = f"{TESTS}/triton/test_plans_on_gpu.py"
SWITCHED_OFF = dict.fromkeys(SWITCHES.values(), "0")
# The tests of operators that run on every back end.
PARITY = (
    "nt_xent",
    "cross_logsumexp",
    "cross_logsumexp_calls",
    "paired_logsumexp",
    "info_nce",
    "self_logsumexp",
    "class_similarity",
    "nt_xent_labels",
    "sup_con",
    "limits",
    "prediction_loss",
    "registration",
)


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        latency: Sizes of the latency as called.
        loss: Sizes of the device time of both directions.
        losses: Rows and features of the losses beside NT-Xent.
        prediction: Rows and features of the prediction loss.
        memory: The largest batch.
    """

    latency: tuple[Size, ...]
    loss: tuple[Size, ...]
    losses: tuple[Size, ...]
    prediction: Size
    memory: Size


FULL = Sizes(
    # What matters most comes first, because the time may run out.
    latency=tuple(Size(rows, 256) for rows in (1024, 16384, 4096, 256)),
    loss=tuple(
        Size(rows, features) for features in (256, 512, 128, 768) for rows in (65536, 16384)
    ),
    losses=tuple(Size(rows, 256) for rows in (8192, 2048, 32768)),
    prediction=Size(128 * 196, 768),
    memory=Size(2**21, 256),
)
# For a try without a GPU.
TINY = Sizes(
    latency=(Size(64, 16),),
    loss=(Size(64, 16), Size(128, 16)),
    losses=(Size(64, 16),),
    prediction=Size(32, 16),
    memory=Size(512, 16),
)


def measure(part: str, sizes: Sequence[Size], *more: str) -> list[str]:
    """The command of a measurement at sizes of the same number of features."""
    script = str(ROOT / "bench" / "gpu_measure.py")
    (features,) = {size.features for size in sizes}
    shape = ["--rows", ",".join(str(size.rows) for size in sizes), "--features", str(features)]
    return [sys.executable, script, part, *shape, *more]


def pytest(*arguments: str, xdist: bool = True) -> list[str]:
    """The command of pytest, on several processes if xdist is installed, because compiling is slow.

    It leaves out the project's own options, which ask for plugins that may be missing.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "--strict-markers"]
    command += [
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-p",
        "step_lines",
    ]
    if xdist and installed("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    return [*command, *arguments]


def step_of_tests(
    name: str,
    arguments: Sequence[str],
    limit: float,
    *,
    command: Sequence[str] | None = None,
    needs: tuple[str, ...] = (),
    touches: tuple[str, ...] = PARTS,
    environment: dict[str, str] | None = None,
) -> Step:
    """A step that runs tests on the device."""
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    repeatable = {"CUBLAS_WORKSPACE_CONFIG": workspace}  # Makes products deterministic.
    return Step(
        name,
        pytest(*arguments) if command is None else command,
        limit,
        grace=10.0,  # pytest-xdist takes long to stop its processes.
        needs=("pytest", *needs),
        environment={
            **repeatable,
            "PYTHONPATH": str(ROOT / "bench"),  # For the plugin.
            **(environment or {}),
        },
        touches=touches,
    )


def build_module() -> Step:
    """Build the compiled module in place. Nothing is installed, and no other step depends on it."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return Step("build", command, 90, stage="prepare", needs=("setuptools", "pybind11"))


def compile_steps(sizes: Sizes) -> list[Step]:
    """Fill the caches of compiled kernels, each candidate in a process of its own."""
    jobs = [("cjepa_kernels", size) for size in dict.fromkeys((*sizes.loss, *sizes.latency))]
    jobs += [(name, size) for size in sizes.latency for name in BY_TORCH_COMPILE]
    jobs += [("prediction", sizes.prediction)]
    # Kernels depend on D, on whether M is small, and not otherwise on M.
    once: dict[tuple[str, int, object], Size] = {}
    for name, size in jobs:
        kind: object = size.rows <= 2048 if name == "cjepa_kernels" else size.rows
        key = (name, size.features, kind)
        once[key] = min(size, once.get(key, size))
    return [
        Step(
            f"compile {name} {size}",
            measure("compile", [size], "--name", name),
            75,
            stage="prepare",
        )
        for (name, _, _), size in once.items()
    ]


def tests(processes: int) -> list[Step]:
    """The tests on the device.

    Args:
        processes: Number of GPUs.
    """
    folder = f"{TESTS}/distributed/test_nccl.py"
    on_cuda = {"CJEPA_TEST_DEVICE": "cuda"}
    parity_files = [f"{TESTS}/ops/test_{name}.py" for name in PARITY]
    kernels = step_of_tests("kernels", KERNEL_TESTS, 70, touches=(KERNELS,))
    parity = step_of_tests(
        "parity", ["-k", "triton", *parity_files], 90, needs=("hypothesis",), environment=on_cuda
    )
    # One process alone compiles for minutes, so the tests of what users call come first.
    parity_and_kernels = [kernels, parity] if installed("xdist") else [parity, kernels]
    steps = [
        step_of_tests("device", [DEVICE_TESTS], 45),
        step_of_tests(
            "plans", [PLAN_TESTS], 40, touches=(HOST, PLANS), environment={SWITCHES["plans"]: "1"}
        ),
        *parity_and_kernels,
        step_of_tests("gluon", [f"{TESTS}/bench/test_gpu_hopper.py"], 60),
        step_of_tests(
            "nccl",
            [],
            30,
            command=pytest(folder, xdist=False),
            touches=(KERNELS, CONFIGURATIONS, HOST, PLANS),
        ),
    ]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={processes}", "-m", *pytest(folder, xdist=False)[2:]]
        steps.append(step_of_tests("torchrun", [], 45, command=torchrun))
    return steps


def measurements(sizes: Sizes) -> list[Step]:
    """Latency as called, then the time of the device, then memory."""
    widths = dict.fromkeys(size.features for size in sizes.loss)
    by_width = {d: [size for size in sizes.loss if size.features == d] for d in widths}
    return [
        *(
            Step(f"latency {size}", measure("latency", [size]), 30, reserved=14)
            for size in sizes.latency
        ),
        *(
            Step(f"loss of {d} features", measure("loss", of), 25, reserved=12)
            for d, of in by_width.items()
        ),
        Step("Gluon kernels", [sys.executable, str(ROOT / "bench" / "gpu_hopper.py")], 60),
        Step("prediction", measure("prediction", [sizes.prediction]), 15, reserved=8),
        Step("memory", measure("memory", [sizes.memory]), 40, reserved=22),
        Step("other losses", measure("losses", sizes.losses), 45),
    ]


def usual_code(sizes: Sizes) -> list[Step]:
    """Tests and times of the kernels and launches that every other GPU takes."""
    off = SWITCHED_OFF
    called, timed = sizes.latency[0], [size for size in sizes.loss if size.features == 256]
    called_command = measure("latency", [called], "--usual")
    timed_command = measure("loss", timed, "--usual")
    return [
        Step(f"latency {called}, usual", called_command, 20, environment=off),
        Step("loss of 256 features, usual", timed_command, 20, environment=off),
        step_of_tests("device, usual", [DEVICE_TESTS], 30, environment=off),
        step_of_tests("kernels, usual", KERNEL_TESTS[:1], 60, environment=off),
    ]


def sanitizer() -> str | None:
    """Path of compute-sanitizer, which CUDA's toolkit often does not put on PATH."""
    on_path = shutil.which("compute-sanitizer")
    return on_path or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def sanitizer_steps() -> list[Step]:
    """Small calls under compute-sanitizer, if it is installed and time is left."""
    checker = sanitizer()
    if checker is None:
        return []
    call = measure("small", [Size(4, 4)])
    checked = [checker, "--error-exitcode", "1"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # Every tensor has its own bounds.
    return [
        Step("small calls", call, 60),  # Compiles the kernels that the next steps check.
        Step("memcheck", [*checked, *call], 90, environment=uncached),
        Step("racecheck", [*checked, "--tool", "racecheck", *call], 90),
    ]


def on_gpus(count: int, changed: Sequence[str] = PARTS) -> list[Step]:
    """Every step, in the order in which they run.

    Args:
        count: Number of GPUs.
        changed: The parts of the sources that have changed since the last record in which the
            tests passed. Tests that touch none of them come after the measurements.
    """
    first, last = [], []
    for step in tests(count):
        (first if set(step.touches) & set(changed) else last).append(step)
    prepare = [build_module(), *compile_steps(FULL)]
    end = [*usual_code(FULL), *last, *sanitizer_steps()]
    return [*prepare, *first, *measurements(FULL), *end]


def on_cpu() -> list[Step]:
    """The steps with which the course of the check is tried without a GPU."""
    return [*compile_steps(TINY), tests(0)[0], *measurements(TINY)]


def scripts_of(steps: Sequence[Step]) -> list[Path]:
    """The files that the commands of steps name."""
    arguments = (argument for step in steps for argument in step.command)
    return [ROOT / argument for argument in arguments if argument.endswith(".py")]


def missing_for_tests() -> list[str]:
    """What the tests need and this machine lacks."""
    return [name for name in ("pytest", "hypothesis", "xdist") if not installed(name)]
