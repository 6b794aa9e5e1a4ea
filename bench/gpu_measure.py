"""One measurement of ``make gpu-check``, in a process of its own.

    python bench/gpu_measure.py latency --rows 1024 --features 256

It writes what it finds line by line to the file that ``CJEPA_LINES`` names, and prints it. Without
a CUDA device it measures on the CPU, to try the check: times are real and say so, and what needs a
GPU is left out by name.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import step_lines
import torch
from gpu_check_targets import GRAPH, REDUCE_OVERHEAD, USUAL
from gpu_targets import BYTES, MM, MM3
from torch import Tensor

from cjepa_kernels import nt_xent, prediction_loss, tune
from cjepa_kernels.backends import Backend, compiled_module
from cjepa_kernels.bench import candidates, memory, sizes
from cjepa_kernels.bench.candidates import BOTH, DIRECTIONS, FORWARD, one_pass, products
from cjepa_kernels.bench.formulas import TEMPERATURE, Formula, eager
from cjepa_kernels.bench.latency import latencies, waiting_for
from cjepa_kernels.bench.losses import LOSSES
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.timing import (
    Build,
    BusyDevice,
    DeviceClock,
    IdleDevice,
    Run,
    graphed,
    interleaved,
    interleaved_on_gpu,
)
from cjepa_kernels.error_lines import kind_and_first_line
from cjepa_kernels.triton import configs
from cjepa_kernels.triton.configs import Config

PLAIN, COMPILED, OURS = candidates.EAGER, candidates.COMPILED, candidates.OURS
TRIED_COMPILER = "aot_eager"  # Without a GPU, where only the course of the check is tried.

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND: Backend = "triton" if ON_GPU else "auto"
TIMED = "device" if ON_GPU else "host"
LATENCY_SECONDS = 4.0 if ON_GPU else 0.2  # For all candidates of a size.
DEVICE_SECONDS = 0.6 if ON_GPU else 0.05  # For the candidates of one size and direction.


def write(section: str, **fields: Any) -> None:
    """Write a line and print it."""
    step_lines.write(section, **fields)
    print(section, *(f"{name} {value}" for name, value in fields.items()), flush=True)


def fail(part: str, size: Size, name: str, error: str) -> None:
    """Write that a candidate has failed."""
    write("errors", part=part, M=size.rows, D=size.features, name=name, error=error)


def leave_out(part: str, size: Size, name: str, reason: str) -> None:
    """Write that a candidate cannot be measured here."""
    write("left_out", part=part, M=size.rows, D=size.features, name=name, reason=reason)


def views(size: Size) -> tuple[Tensor, Tensor]:
    """Two correlated views (B, D) in bf16 that require gradients, drawn on the device."""
    return sizes.views(size, device=DEVICE, dtype=torch.bfloat16, drawn_on=DEVICE)


def ours(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The loss, as it is called by default on this device, with its metrics."""
    return nt_xent(z_i, z_j, temperature=TEMPERATURE, backend=BACKEND).loss


def compiled(formula: Formula, mode: str | None = None) -> Formula:
    """A formula under ``torch.compile``, for one size."""
    if not ON_GPU:
        tried: Formula = torch.compile(formula, dynamic=False, backend=TRIED_COMPILER)
        return tried
    result: Formula = torch.compile(formula, dynamic=False, mode=mode)
    return result


def reduced_overhead(inputs: tuple[Tensor, Tensor]) -> Run:
    """The call of the loss under ``torch.compile(mode="reduce-overhead")``, as in a training loop.

    The mark tells CUDA graph trees that a new step begins, so that they may reuse the memory of the
    results of the step before.
    """
    call = one_pass(compiled(ours, "reduce-overhead"), inputs, BOTH)

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return run


def calls(size: Size) -> dict[str, Build]:
    """The candidates of the latency as called: forward and backward of each."""
    inputs = views(size)
    builds: dict[str, Build] = {
        PLAIN: lambda: one_pass(eager, inputs, BOTH),
        COMPILED: lambda: one_pass(compiled(eager), inputs, BOTH),
        OURS: lambda: one_pass(ours, inputs, BOTH),
        REDUCE_OVERHEAD: lambda: reduced_overhead(inputs),
    }
    if ON_GPU:
        builds[GRAPH] = graphed(builds[OURS])
    return builds


def skipped_graphs() -> int:
    """How many CUDA graphs ``torch.compile`` has left out in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def launch_plans() -> int | None:
    """How many launch plans this process has; None if the compiled module is missing."""
    count = getattr(compiled_module(), "plan_count", None)
    return None if count is None or not ON_GPU else int(count())


def usual(builds: dict[str, Build]) -> dict[str, Build]:
    """Our candidate alone, under the name that says what has been switched off."""
    return {USUAL: builds[OURS]}


def compile_first(size: Size, name: str) -> None:
    """Call a candidate twice, so that its kernels are in the caches on disk."""
    start = time.perf_counter()
    run = prediction_call(size) if name == "prediction" else calls(size)[name]()
    for _ in range(2):
        run()
    if name == "prediction" and ON_GPU:
        for build in prediction_choices(size).values():
            build()
    waiting_for(DEVICE)()
    seconds = round(time.perf_counter() - start, 2)
    write("compile", name=name, M=size.rows, D=size.features, seconds=seconds)


def latency(size: Size, *, only_usual: bool = False) -> None:
    """The latency as called, in a row and of the host, of every candidate of a size."""
    builds = usual(calls(size)) if only_usual else calls(size)
    if GRAPH not in builds and not only_usual:
        leave_out("latency", size, GRAPH, "needs a GPU")
    rows, errors = latencies(builds, wait=waiting_for(DEVICE), seconds=LATENCY_SECONDS)
    for name, row in rows.items():
        counts = {
            "skipped_graphs": skipped_graphs() if name == REDUCE_OVERHEAD else None,
            "launch_plans": launch_plans() if name in (OURS, USUAL) else None,
        }
        write("latency", M=size.rows, D=size.features, name=name, **row, **counts)
    for name, error in errors.items():
        fail("latency", size, name, error)


def device_times(
    part: str,
    size: Size,
    direction: str,
    builds: dict[str, Build],
    *,
    clock: Callable[[], DeviceClock] = BusyDevice,
) -> None:
    """The time of each candidate by a clock; without a GPU that of the whole call.

    Args:
        part: What is measured.
        size: Rows and features.
        direction: ``FORWARD`` or ``BOTH``.
        builds: Makers of the candidates' calls.
        clock: Makes the timer of one candidate. Default: the time on the device alone.
    """
    times: dict[str, dict[str, Any]]
    if ON_GPU:
        times, errors = interleaved_on_gpu(builds, seconds=DEVICE_SECONDS, clock=clock)
    else:
        runs = {name: build() for name, build in builds.items()}
        errors = {}
        times = {
            name: {"of": TIMED, **row}
            for name, row in interleaved(runs, seconds=DEVICE_SECONDS).items()
        }
    cell = {"part": part, "M": size.rows, "D": size.features, "pass": direction}
    for name, row in times.items():
        write("device", **cell, name=name, **row)
    for name, error in errors.items():
        fail(part, size, name, error)


def loss(size: Size, *, only_usual: bool = False) -> None:
    """Both directions of the loss beside the matrix products that they contain."""
    inputs = views(size)
    for direction in DIRECTIONS:
        builds: dict[str, Build] = {
            OURS: partial(one_pass, ours, inputs, direction),
            MM if direction == FORWARD else MM3: partial(products, inputs, direction),
        }
        device_times("loss", size, direction, usual(builds) if only_usual else builds)


def losses(size: Size) -> None:
    """The losses beside NT-Xent, each beside other projects' formulas, on a device that waits.

    One of these waits for the device within its call, so the time of the device alone is not known.
    """
    for part, of in LOSSES.items():
        inputs = views(of.size(size.rows, size.features))
        builds: dict[str, Build] = {}
        for name, candidate in of.candidates().items():
            try:
                builds[name] = partial(one_pass, candidate.make(TEMPERATURE), inputs, BOTH)
            except ImportError as error:
                leave_out(part, size, name, kind_and_first_line(error))
        device_times(part, size, BOTH, builds, clock=IdleDevice)


def prediction_call(size: Size) -> Run:
    """Forward and backward of the prediction loss of (rows, features)."""
    target = torch.randn(size.rows, size.features, device=DEVICE).bfloat16()
    prediction = torch.randn_like(target).requires_grad_()
    return lambda: torch.autograd.grad(
        prediction_loss(prediction, target, backend=BACKEND), prediction
    )


# Configurations of both kernels of the prediction loss that are timed beside the table's: what
# cannot be decided without a device. With so many programs each takes a single block of rows.
PREDICTION_CHOICES: tuple[dict[str, int], ...] = (
    {"stages": 1, "programs": 8},
    {"stages": 1, "programs": 10**6},
    {"stages": 2, "programs": 4},
    {"stages": 3, "programs": 8},
    {"stages": 3, "programs": 4, "elements": 2048, "warps": 2},
    {"stages": 2, "programs": 4, "elements": 8192, "warps": 8},
)


def prediction_configurations(features: int, choice: dict[str, int]) -> list[Config]:
    """Entries for both kernels with some of their fields changed."""
    architecture = configs.architecture(torch.device(DEVICE))
    entries = [
        configs.choose(kernel, architecture, torch.bfloat16, features) for kernel in tune.PREDICTION
    ]
    return [replace(entry, architecture=architecture, **choice) for entry in entries]


def prediction_choice(size: Size, choice: dict[str, int]) -> Run:
    """The prediction loss with another configuration, in a CUDA graph, which holds on to it."""
    with configs.tuned(prediction_configurations(size.features, choice)):
        return graphed(lambda: prediction_call(size))()


def prediction_choices(size: Size) -> dict[str, Build]:
    """Makers of these calls by the names of the choices; none without a GPU."""
    builds: dict[str, Build] = {}
    for choice in PREDICTION_CHOICES:
        name = ", ".join(f"{field} {value}" for field, value in choice.items())
        if ON_GPU:
            builds[name] = partial(prediction_choice, size, choice)
        else:
            leave_out("prediction", size, name, "needs a GPU")
    return builds


def prediction(size: Size) -> None:
    """The prediction loss, which reads four tensors and writes one, beside copies of these.

    Other configurations of its kernels are timed too.
    """
    source = torch.randn(size.rows, size.features, device=DEVICE).bfloat16()
    buffer = torch.empty_like(source)

    def copies() -> None:
        for _ in range(2):
            buffer.copy_(source)
        buffer.fill_(1.0)

    builds: dict[str, Build] = {OURS: lambda: prediction_call(size), BYTES: lambda: copies}
    device_times("prediction", size, BOTH, {**builds, **prediction_choices(size)})


def extra_memory(size: Size) -> None:
    """Peak memory of forward and backward beyond the inputs and the gradients, over the input."""
    inputs = views(size)
    bytes_in = sum(x.numel() * x.element_size() for x in inputs)
    if ON_GPU:
        times: list[float] = []

        def run() -> None:
            times.append(IdleDevice()(lambda: torch.autograd.grad(ours(*inputs), inputs)))

        peak = memory.peak_allocated(run, DEVICE)
        (seconds,) = times
    else:
        start = time.perf_counter()
        torch.autograd.grad(ours(*inputs), inputs)
        seconds = time.perf_counter() - start
        peak = memory.peak_bytes(OURS, size, device=DEVICE, dtype="bf16", temperature=TEMPERATURE)
    write(
        "memory",
        M=size.rows,
        D=size.features,
        over_input=peak / bytes_in - 1,
        seconds=seconds,
    )


def small() -> None:
    """Call every kernel of the contrastive losses on small inputs, for compute-sanitizer."""
    from cjepa_kernels import cross_logsumexp, self_logsumexp, sup_con

    torch.manual_seed(0)
    for batch, features, dtype in (
        (3, 5, torch.float32),
        (70, 64, torch.bfloat16),
        (201, 300, torch.float16),
        (2200, 128, torch.bfloat16),
    ):
        z = [torch.randn(batch, features, device=DEVICE).to(dtype) for _ in range(2)]
        z = [x.requires_grad_() for x in z]
        mask = torch.rand(batch, batch, device=DEVICE) < 0.1 if batch < 300 else None
        options: dict[str, Any]
        for options in ({}, {"temperature": 0.01}, {"mask": mask}):
            torch.autograd.grad(nt_xent(z[0], z[1], backend=BACKEND, **options).loss, z)
        out = cross_logsumexp(z[0], z[1][: batch // 2 + 1], backend=BACKEND)
        torch.autograd.grad(out.row_lse.sum() + out.column_lse.sum(), z)
        order = torch.arange(batch, device=DEVICE)
        labels = order % 5
        positives = order.flip(0).where(order.flip(0) != order, -1)
        for options in ({}, {"labels": labels}, {"positives": positives}):
            own = self_logsumexp(z[0], backend=BACKEND, **options)
            torch.autograd.grad(own.lse.sum() + own.positive.sum(), z[0])
        torch.autograd.grad(sup_con(z[0], labels, backend=BACKEND).loss, z[0])
    waiting_for(DEVICE)()


PARTS: dict[str, Callable[..., None]] = {
    "latency": latency,
    "loss": loss,
    "losses": losses,
    "prediction": prediction,
    "memory": extra_memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "compile", "small"])
    parser.add_argument("--rows", default="1024", help="M, or rows of predictions, by commas")
    parser.add_argument("--features", type=int, default=256, help="D")
    parser.add_argument("--name", default=OURS, help="the candidate that is compiled")
    parser.add_argument(
        "--usual", action="store_true", help="only our loss; of the parts latency and loss"
    )
    options = parser.parse_args()
    failed = False
    for rows in map(int, options.rows.split(",")):
        size = Size(rows, options.features)
        try:
            if options.part == "small":
                small()
            elif options.part == "compile":
                compile_first(size, options.name)
            else:
                PARTS[options.part](size, **({"only_usual": True} if options.usual else {}))
        except Exception as error:
            failed = True
            traceback.print_exc()
            fail(options.part, size, options.name, kind_and_first_line(error))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
