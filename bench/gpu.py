"""Time, memory and accuracy of the Triton kernels beside their targets, on a CUDA device.

    python bench/gpu.py [--quick] [--no-save]

Candidates run in turn, round after round, timed by CUDA events; the figures are medians in ms. A
missed target is reported, never an error. Without a CUDA device the script says so and ends.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import exact, relative_error
from formulas import TEMPERATURE, compiled, eager
from measurement import installed_version, print_table, write_results
from torch import Tensor

from cjepa_kernels import cross_logsumexp, nt_xent
from cjepa_kernels.extras import require

ROWS, FEATURES = (16384, 65536), (128, 256, 512, 768)
SMALL = (128, 256, 512, 1024)  # pairs
HEADER = ["part", "M", "D", "pass", "ratio of", "ms / ms", "ratio", "target", ""]
SECONDS = 0.6  # of a cell, but for its least rounds

Run = Callable[[], object]
Ratio = tuple[str, str, int, str, float | None]  # over, under, times of under, relation, target


def views(rows: int, features: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Two correlated views (B, D) that want gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (rows // 2, features)
    z_i = torch.randn(shape, generator=generator, device="cuda")
    z_j = z_i + torch.randn(shape, generator=generator, device="cuda")
    return z_i.to(dtype).requires_grad_(), z_j.to(dtype).requires_grad_()


def interleaved(candidates: dict[str, Run], seconds: float = SECONDS, least: int = 5) -> Any:
    """Median, p20 and p80 in seconds of each candidate, by CUDA events."""
    for run in candidates.values():
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < deadline:
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
        rounds += 1
    summary = {}
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        median = statistics.median(values)
        summary[name] = {"median": median, "p20": deciles[1], "p80": deciles[7], "rounds": rounds}
    return summary


def ours(inputs: tuple[Tensor, Tensor]) -> Tensor:
    """The loss under test."""
    return nt_xent(*inputs, temperature=TEMPERATURE, backend="triton").loss


def one_pass(loss: Callable[[], Tensor], inputs: tuple[Tensor, ...], backward: bool) -> Run:
    """Forward as in training, and the backward if it is asked for."""
    if not backward:
        return loss
    return lambda: torch.autograd.grad(loss(), inputs)


def graphed(run: Run) -> Run:
    """The same from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bare_products(inputs: tuple[Tensor, Tensor], count: int) -> Run:
    """``count`` products z @ z.T into one buffer."""
    z = F.normalize(torch.cat(inputs).detach().float(), dim=1).to(inputs[0].dtype)
    out = torch.empty(len(z), len(z), dtype=z.dtype, device="cuda")
    return lambda: [torch.mm(z, z.T, out=out) for _ in range(count)]


class Report:
    """Rows of the results file and of the printed table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.lines: list[list[str]] = []

    def add(
        self,
        part: str,
        rows: int,
        features: int,
        direction: str,
        times: dict[str, Any],
        ratios: list[Ratio],
    ) -> None:
        """Keep the times, and print the ratios."""
        for name, summary in times.items():
            self.rows.append(
                {"part": part, "M": rows, "D": features, "pass": direction, "name": name, **summary}
            )
        for over, under, count, relation, target in ratios:
            if over not in times or under not in times:
                continue
            a, b = times[over]["median"], times[under]["median"] * count
            met = target is not None and (a / b <= target if relation == "<=" else a / b >= target)
            self.lines.append(
                [
                    part,
                    str(rows),
                    str(features),
                    direction,
                    f"{over} / {under}",
                    f"{1e3 * a:.3f} / {1e3 * b:.3f}",
                    f"{a / b:.3f}",
                    "no target" if target is None else f"{relation} {target:g}",
                    "" if target is None else "met" if met else "not met",
                ]
            )
            print("  ".join(self.lines[-1]), flush=True)


def measure_targets(report: Report, rows: int, features: int, peak: float) -> None:
    """Against the bare product and eager, in bf16."""
    inputs = views(rows, features)
    for direction, count, target in (("forward", 1, 0.6), ("forward+backward", 3, 0.9)):
        backward = direction != "forward"
        times = interleaved(
            {
                "triton": one_pass(lambda: ours(inputs), inputs, backward),
                "mm": bare_products(inputs, 1),
                "eager": one_pass(lambda: eager(*inputs), inputs, backward),
            }
        )
        ratios: list[Ratio] = [("triton", "mm", count, "<=", target)]
        if backward:
            ratios.append(("eager", "triton", 1, ">=", 8))
        report.add("targets", rows, features, direction, times, ratios)
        if not backward:
            rate = 2 * rows * rows * features / times["triton"]["median"]
            print(f"useful FLOPs of the forward: {rate / peak:.2f} of the rate of a large product")
        torch.cuda.empty_cache()


def measure_compiled(report: Report, rows: int, features: int) -> None:
    """Against torch.compile of the plain formula."""
    inputs = views(rows, features)
    formula = compiled()
    candidates = {
        "triton": one_pass(lambda: ours(inputs), inputs, True),
        "compiled": one_pass(lambda: formula(*inputs), inputs, True),
    }
    report.add(
        "compiled",
        rows,
        features,
        "forward+backward",
        interleaved(candidates),
        [("compiled", "triton", 1, ">=", 4)],
    )


def measure_latency(report: Report, batch: int) -> None:
    """A small batch, as called and from a CUDA graph."""
    inputs = views(2 * batch, 256)
    candidates: dict[str, Run] = {
        "triton": one_pass(lambda: ours(inputs), inputs, True),
        "eager": one_pass(lambda: eager(*inputs), inputs, True),
    }
    candidates |= {f"{name}, graph": graphed(run) for name, run in candidates.items()}
    ratios: list[Ratio] = [
        ("triton", "eager", 1, "<=", 0.5),
        ("triton, graph", "eager, graph", 1, "<=", 0.8),
    ]
    times = interleaved(candidates, 0.3)
    report.add("latency", 2 * batch, 256, "forward+backward", times, ratios)


def measure_inf_cl(report: Report, rows: int, features: int) -> None:
    """Against Inf-CL's kernel for one GPU on its own problem: InfoNCE both ways in fp32.

    Its products take tf32, as Triton's do by default; so do ours here.
    """
    flash_loss = require("inf_cl.flash", extra="bench-gpu").cal_flash_loss
    scale = torch.tensor(1 / TEMPERATURE, device="cuda")
    unit = tuple(
        F.normalize(x.float(), dim=1).detach().requires_grad_() for x in views(2 * rows, features)
    )

    def both() -> Tensor:
        out = cross_logsumexp(*unit, temperature=TEMPERATURE, backend="triton")
        positive = (unit[0] * unit[1]).sum(dim=1) / TEMPERATURE
        return ((out.row_lse + out.column_lse) / 2 - positive).mean()

    def theirs() -> Tensor:
        loss: Tensor = (flash_loss(*unit, scale=scale) + flash_loss(*unit[::-1], scale=scale)) / 2
        return loss

    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        print(f"inf_cl: losses {both().item():.6f} and {theirs().item():.6f}")
        candidates = {
            "triton": one_pass(both, unit, True),
            "inf_cl": one_pass(theirs, unit, True),
        }
        ratios: list[Ratio] = [("inf_cl", "triton", 1, ">=", 10)]
        report.add("inf_cl", rows, features, "forward+backward", interleaved(candidates), ratios)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def measure_fp32(report: Report, rows: int, features: int) -> None:
    """Full fp32 accuracy and tf32, each against eager with the same setting."""
    inputs = views(rows, features, torch.float32)
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        candidates = {
            "triton": one_pass(lambda: ours(inputs), inputs, True),
            "eager": one_pass(lambda: eager(*inputs), inputs, True),
        }
        part = "tf32" if tf32 else "fp32"
        times = interleaved(candidates)
        ratios: list[Ratio] = [("triton", "eager", 1, "<=", None)]
        report.add(part, rows, features, "forward+backward", times, ratios)
    torch.backends.cuda.matmul.allow_tf32 = False


def measure_memory(rows: int, features: int) -> dict[str, Any]:
    """Peak memory of forward + backward beyond the inputs and the gradients that it returns."""
    inputs = views(rows, features)
    size = sum(x.numel() * x.element_size() for x in inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    torch.autograd.grad(ours(inputs), inputs)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - size
    seconds = time.perf_counter() - start
    print(f"M={rows} D={features}: extra {extra / size:.2f} x the input (<= 4), {seconds:.1f} s")
    return {"M": rows, "D": features, "over_input": extra / size, "seconds": seconds}


def measure_accuracy(rows: int, features: int) -> list[dict[str, Any]]:
    """Errors against float64 of ours and of eager, by dtype."""
    records = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = views(rows, features, dtype)
        anchors = torch.arange(rows, device="cuda")
        truth = exact(*inputs, anchors)
        for name, loss in (("triton", ours(inputs)), ("eager", eager(*inputs))):
            gradient = torch.cat(torch.autograd.grad(loss, inputs))
            errors = {
                "loss": relative_error(loss.detach(), truth.loss),
                "gradient": relative_error(gradient, truth.gradient),
            }
            records.append({"M": rows, "D": features, "dtype": str(dtype), "name": name, **errors})
            print(f"{dtype} {name}: loss {errors['loss']:.1e}, gradient {errors['gradient']:.1e}")
    return records


def matmul_rate(size: int = 8192) -> float:
    """FLOP/s of a product of size^3 in bf16."""
    a, b = torch.randn(2, size, size, device="cuda").bfloat16()
    out = torch.empty_like(a)
    times = interleaved({"mm": lambda: torch.mm(a, b, out=out)}, 0.3)
    rate = float(2 * size**3 / times["mm"]["median"])
    print(f"product of {size}^3 in bf16: {rate / 1e12:.0f} TFLOP/s")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small size of each part")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        return
    torch.set_default_device("cuda")
    report = Report()
    quick = options.quick
    peak = matmul_rate(2048 if quick else 8192)
    sizes = [(2048, 128)] if quick else [(m, d) for m in ROWS for d in FEATURES]
    accuracy: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    memory: list[dict[str, Any]] = []
    parts: dict[str, Run] = {
        "accuracy": lambda: accuracy.extend(measure_accuracy(1024 if quick else 8192, 256)),
        "targets": lambda: [measure_targets(report, *size, peak) for size in sizes],
        "latency": lambda: [measure_latency(report, b) for b in (SMALL[:1] if quick else SMALL)],
        "fp32": lambda: measure_fp32(report, 2048 if quick else 16384, 256),
        "memory": lambda: memory.append(measure_memory(2**14 if quick else 2**21, 256)),
        "compiled": lambda: measure_compiled(report, 1024 if quick else 32768, 256),
        "inf_cl": lambda: measure_inf_cl(report, 1024 if quick else 16384, 256),
    }
    device = torch.cuda.get_device_name()
    name = f"{device.replace(' ', '-')}-{datetime.date.today().isoformat()}"
    gpu = [{"device": device, "triton": installed_version("triton"), "matmul_flops": peak}]
    for part, run in parts.items():
        try:
            run()
        except Exception as error:  # the other parts go on, and the file says what failed
            failed.append({"part": part, "error": str(error).strip().splitlines()[0]})
            print(f"{part} failed: {error}")
        torch.cuda.empty_cache()
        if not options.no_save:  # after each part: the time may run out
            write_results(
                name, report.rows, accuracy=accuracy, memory=memory, failed=failed, gpu=gpu
            )
    print_table(HEADER, report.lines)


if __name__ == "__main__":
    main()
