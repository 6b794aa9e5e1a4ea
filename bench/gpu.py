"""Time, memory and accuracy of the Triton kernels beside their targets, on a CUDA device.

    python bench/gpu.py [--quick] [--no-save]

The candidates of a size are timed in turn, round after round, by CUDA events; the figures are
medians. A target that is missed is reported and is no error. A candidate that fails is named at the
end, the others are measured all the same, and the exit code is 1. The script writes
bench/results/<device>-<date>.json after every size. Without a CUDA device it says so and ends.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_targets import (
    AUTOCAST,
    BYTES,
    COLUMNS,
    COMPILED,
    EAGER,
    FULL,
    INF_CL,
    MM,
    MM3,
    OURS,
    QUICK,
    Results,
    Sizes,
    as_records,
    judge,
)
from torch import Tensor

from cjepa_kernels import cross_logsumexp, nt_xent, prediction_loss
from cjepa_kernels.backends import Backend
from cjepa_kernels.bench import sizes as bench_sizes
from cjepa_kernels.bench.candidates import BOTH, FORWARD, one_pass, products
from cjepa_kernels.bench.errors import exact, of_formula
from cjepa_kernels.bench.formulas import TEMPERATURE, Formula, eager
from cjepa_kernels.bench.memory import peak_allocated
from cjepa_kernels.bench.records import Record, write_results
from cjepa_kernels.bench.script_options import read_options
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.bench.targets import print_targets, summary
from cjepa_kernels.bench.timing import (
    Build,
    BusyDevice,
    DeviceClock,
    IdleDevice,
    Run,
    graphed,
    interleaved_on_gpu,
)
from cjepa_kernels.error_lines import kind_and_first_line
from cjepa_kernels.extras import require
from cjepa_kernels.provenance import installed_version

DEVICE = "cuda"
BACKEND: Backend = "triton"
SECONDS = 0.6  # Time for the candidates of one size; at least five rounds are made.
SECTIONS = (
    "rows",
    "matmul",
    "accuracy",
    "memory",
    "first_use",
    "missing",
    "out_of_memory",
    "failed",
)


class Cell(NamedTuple):
    """One measurement. If it fails, the others are made all the same."""

    part: str
    size: Size
    measure: Callable[[], None]


def views(size: Size, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Two correlated views (B, D) that require gradients, drawn on the device."""
    return bench_sizes.views(size, device=DEVICE, dtype=dtype, drawn_on=DEVICE)


def ours(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The loss under test."""
    return nt_xent(z_i, z_j, temperature=TEMPERATURE, backend=BACKEND).loss


def under_autocast(formula: Formula) -> Formula:
    """The formula as in mixed-precision training."""

    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return formula(z_i, z_j)

    return loss


def passes(
    formulas: dict[str, Formula], inputs: tuple[Tensor, Tensor], direction: str
) -> dict[str, Build]:
    """One call of each formula on the same inputs."""
    return {name: partial(one_pass, loss, inputs, direction) for name, loss in formulas.items()}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether products of fp32 may use tf32, in our kernels and in PyTorch's."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


class Benchmark:
    """Measures every part at its sizes and keeps the lists of the results file."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.results: Results = {section: [] for section in SECTIONS}

    def cells(self) -> list[Cell]:
        """All measurements, the most useful first, because the time may run out."""
        sizes = self.sizes
        product = Size(sizes.product, sizes.product)
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return [
            *(
                Cell("accuracy", sizes.accuracy, partial(self.accuracy, sizes.accuracy, dtype))
                for dtype in dtypes
            ),
            Cell("matmul", product, self.matmul),
            *(
                Cell("targets", size, partial(self.targets, size, direction))
                for size in sizes.targets
                for direction in (FORWARD, BOTH)
            ),
            *(
                Cell(part, size, partial(self.latency, part, size, in_graph))
                for part, in_graph in (("latency", False), ("latency_graphed", True))
                for size in sizes.latency
            ),
            Cell("first_use", sizes.first_use, self.first_use),
            Cell("prediction", sizes.prediction, self.prediction),
            *(Cell("memory", size, partial(self.memory, size)) for size in sizes.memory),
            Cell("inf_cl", sizes.inf_cl, self.inf_cl),
            *(Cell("compiled", size, partial(self.compiled, size)) for size in sizes.compiled),
            *(Cell("fp32", sizes.fp32, partial(self.fp32, allowed)) for allowed in (False, True)),
        ]

    def fail(self, part: str, size: Size, name: str, error: str) -> None:
        """Record and print an error.

        Another candidate that needs more memory than the device has did not fail; it is recorded
        under ``out_of_memory``.
        """
        record = {"part": part, "M": size.rows, "D": size.features, "name": name, "error": error}
        too_large = "OutOfMemory" in error and name not in ("", OURS)
        self.results["out_of_memory" if too_large else "failed"].append(record)
        what = "out of memory" if too_large else "failed"
        print(f"{what}: {part} M={size.rows} D={size.features} {name}: {error}", flush=True)

    def time(
        self,
        part: str,
        size: Size,
        direction: str,
        candidates: dict[str, Build],
        *,
        clock: Callable[[], DeviceClock] | None = None,
        seconds: float = SECONDS,
    ) -> dict[str, Record]:
        """Time candidates in turn; record and print their times. Default: the busy device."""
        clock = clock or partial(BusyDevice, DEVICE)
        times, errors = interleaved_on_gpu(candidates, seconds=seconds, clock=clock)
        cell = {"part": part, "M": size.rows, "D": size.features, "pass": direction}
        self.results["rows"] += [{**cell, "name": name, **row} for name, row in times.items()]
        medians = ", ".join(f"{name} {1e3 * row['median']:.3f}" for name, row in times.items())
        print(f"{part} M={size.rows} D={size.features} {direction}, ms: {medians}", flush=True)
        for name, error in errors.items():
            self.fail(part, size, name, error)
        return times

    def matmul(self) -> None:
        """FLOP/s of a large product in bf16."""
        size = self.sizes.product

        def build() -> Run:
            a, b = torch.randn(2, size, size, device=DEVICE).bfloat16()
            out = torch.empty_like(a)
            return lambda: torch.mm(a, b, out=out)

        times = self.time("matmul", Size(size, size), FORWARD, {MM: build})
        for record in times.values():
            flops = 2 * size**3 / record["median"]
            self.results["matmul"].append({"size": size, "flops": flops})
            print(f"product of {size}³ in bf16: {flops / 1e12:.0f} TFLOP/s")

    def targets(self, size: Size, direction: str) -> None:
        """The loss beside its matrix products and beside the plain formula."""
        inputs = views(size)
        formulas = {OURS: ours, AUTOCAST: under_autocast(eager)}
        candidates = passes(formulas, inputs, direction)
        candidates[MM if direction == FORWARD else MM3] = partial(products, inputs, direction)
        self.time("targets", size, direction, candidates)

    def compiled(self, size: Size) -> None:
        """The loss beside ``torch.compile`` of the plain formula."""
        formulas = {
            OURS: ours,
            COMPILED: under_autocast(torch.compile(eager, dynamic=False)),
        }
        self.time("compiled", size, BOTH, passes(formulas, views(size), BOTH))

    def latency(self, part: str, size: Size, in_graph: bool) -> None:
        """A small batch, called from Python or replayed from a CUDA graph."""
        candidates = passes({OURS: ours, EAGER: eager}, views(size), BOTH)
        if in_graph:
            candidates = {name: graphed(build) for name, build in candidates.items()}
        self.time(part, size, BOTH, candidates, clock=IdleDevice, seconds=0.3)

    def inf_cl(self) -> None:
        """InfoNCE in both directions in fp32, beside Inf-CL's kernel for one GPU.

        Inf-CL's products use tf32, as Triton's do by default, so ours use it here too.
        """
        if importlib.util.find_spec("inf_cl") is None:
            self.results["missing"].append({"part": "inf_cl", "how": "pip install inf-cl"})
            print("inf_cl is not installed: left out")
            return
        flash_loss = require("inf_cl.flash", extra="bench-gpu").cal_flash_loss
        size = self.sizes.inf_cl
        scale = torch.tensor(1 / TEMPERATURE, device=DEVICE)
        raw = views(Size(2 * size.rows, size.features), torch.float32)
        x, y = (F.normalize(z, dim=1).detach().requires_grad_() for z in raw)

        def both(x: Tensor, y: Tensor) -> Tensor:
            out = cross_logsumexp(x, y, temperature=TEMPERATURE, backend=BACKEND)
            positive = (x * y).sum(dim=1) / TEMPERATURE
            return ((out.row_lse + out.column_lse) / 2 - positive).mean()

        def theirs(x: Tensor, y: Tensor) -> Tensor:
            losses: Tensor = flash_loss(x, y, scale=scale) + flash_loss(y, x, scale=scale)  # (M,)
            return losses.mean() / 2

        with tf32(True):
            print(f"inf_cl: losses {both(x, y).item():.6f} and {theirs(x, y).item():.6f}")
            self.time("inf_cl", size, BOTH, passes({OURS: both, INF_CL: theirs}, (x, y), BOTH))

    def prediction(self) -> None:
        """The prediction loss, which reads four tensors and writes one, beside copies of these."""
        size = self.sizes.prediction
        target = torch.randn(size.rows, size.features, device=DEVICE).bfloat16()
        prediction = torch.randn_like(target).requires_grad_()
        buffer = torch.empty_like(target)

        def run() -> tuple[Tensor, ...]:
            loss = prediction_loss(prediction, target, backend=BACKEND)
            return torch.autograd.grad(loss, prediction)

        def copies() -> None:
            for _ in range(2):
                buffer.copy_(target)
            buffer.fill_(1.0)

        self.time("prediction", size, BOTH, {OURS: lambda: run, BYTES: lambda: copies})

    def fp32(self, allowed: bool) -> None:
        """The loss in fp32, or in tf32 if allowed, beside the plain formula in the same."""
        setting = "tf32" if allowed else "fp32"
        inputs = views(self.sizes.fp32, torch.float32)
        candidates = passes({OURS: ours, f"eager {setting}": eager}, inputs, BOTH)
        with tf32(allowed):
            self.time(setting, self.sizes.fp32, BOTH, candidates)

    def memory(self, size: Size) -> None:
        """Peak memory of forward + backward beyond the inputs and the gradients."""
        inputs = views(size)
        bytes_in = sum(x.numel() * x.element_size() for x in inputs)
        times: list[float] = []

        def run() -> None:
            times.append(IdleDevice()(lambda: torch.autograd.grad(ours(*inputs), inputs)))

        extra = peak_allocated(run, DEVICE) / bytes_in - 1
        (seconds,) = times
        record = {"M": size.rows, "D": size.features, "over_input": extra, "seconds": seconds}
        self.results["memory"].append(record)
        print(f"memory M={size.rows}: extra {extra:.2f} x the input, {seconds:.1f} s", flush=True)

    def first_use(self) -> None:
        """Seconds of forward + backward in a new process that has nothing compiled yet."""
        size = self.sizes.first_use
        with tempfile.TemporaryDirectory() as cache:
            result = subprocess.run(
                [sys.executable, __file__, "--first-use", *map(str, size)],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if result.returncode != 0:
                last = result.stderr.strip().splitlines()[-1:] or [f"exit {result.returncode}"]
                raise RuntimeError(f"the new process failed: {last[0]}")
            if not os.listdir(cache):
                raise RuntimeError("nothing was compiled into TRITON_CACHE_DIR")
        seconds = float(result.stdout.split()[-1])
        self.results["first_use"].append({"M": size.rows, "D": size.features, "seconds": seconds})
        print(f"first use, compiling: {seconds:.1f} s", flush=True)

    def accuracy(self, size: Size, dtype: torch.dtype) -> None:
        """Errors of the loss and of the plain formula against float64."""
        inputs, anchors = views(size, dtype), torch.arange(size.rows)
        truth = exact(*inputs, anchors)
        for name, formula in ((OURS, ours), ("eager", eager)):
            record = {
                "M": size.rows,
                "D": size.features,
                "dtype": str(dtype).removeprefix("torch."),
                "name": name,
                **of_formula(formula, inputs, truth, anchors),
            }
            self.results["accuracy"].append(record)
            errors = f"loss {record['loss']:.1e}, gradient {record['gradient']:.1e}"
            print(f"accuracy {record['dtype']} {name}: {errors}", flush=True)


def time_first_use(size: Size) -> float:
    """Seconds of this process's first forward + backward."""
    inputs = views(size)
    # The plain formula starts CUDA's libraries, whose start is not timed.
    torch.autograd.grad(eager(*(z[:4] for z in inputs)), inputs)
    return IdleDevice()(lambda: torch.autograd.grad(ours(*inputs), inputs))


def save(name: str, results: Results, sizes: Sizes) -> None:
    """Write the results file."""
    gpu = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "inf_cl": installed_version("inf-cl"),
    }
    targets = as_records(judge(results, sizes))
    write_results(name, **results, of_kernels=True, targets=targets, gpu=[gpu])


def run(sizes: Sizes, name: str | None) -> int:
    """Measure everything, save it as ``name`` after each measurement, and print the targets.

    Returns:
        0 if nothing failed, else 1.
    """
    benchmark = Benchmark(sizes)
    results = benchmark.results
    for cell in benchmark.cells():
        stopped = False
        try:
            cell.measure()
        except Exception as error:
            benchmark.fail(cell.part, cell.size, "", kind_and_first_line(error))
        except KeyboardInterrupt:
            stopped = True
            benchmark.fail(cell.part, cell.size, "", "stopped here, the rest did not run")
        if name is not None:
            save(name, results, sizes)
        if stopped:
            break
        torch.cuda.empty_cache()
    targets = judge(results, sizes)
    print()
    print_targets(targets, COLUMNS)
    print(summary(targets, COLUMNS))
    for record in results["missing"]:
        print(f"not installed: {record['part']} ({record['how']})")
    for record in results["failed"]:
        where = f"{record['part']} M={record['M']} D={record['D']} {record['name']}".strip()
        print(f"failed: {where}: {record['error']}")
    return int(bool(results["failed"]))


def main() -> int:
    options = read_options(
        __doc__,
        {
            "--quick": {"action": "store_true", "help": "one small size of each part"},
            "--first-use": {"nargs": 2, "type": int, "help": argparse.SUPPRESS},
        },
    )
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        return 0
    if options.first_use is not None:
        print(time_first_use(Size(*options.first_use)))
        return 0
    device = re.sub(r"[^0-9A-Za-z]+", "-", torch.cuda.get_device_name()).strip("-")
    name = f"{device}-{datetime.date.today().isoformat()}" + ("-quick" if options.quick else "")
    return run(QUICK if options.quick else FULL, None if options.no_save else name)


if __name__ == "__main__":
    sys.exit(main())
