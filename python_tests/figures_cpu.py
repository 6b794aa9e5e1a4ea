"""What the records of the CPU say in the documents: NT-Xent, the whole loss, many ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_scripts import load
from documents import ROOT
from figures import NOTES, record

PERFORMANCE, README = "docs/performance.md", "README.md"
DISTRIBUTED, NUMERICS = "docs/distributed.md", "docs/numerics.md"
Texts = Iterator[tuple[str, str]]
GIB, MIB = 2**30, 2**20
TILE, KEPT_MIB, WORKSPACE_MIB = 192, 256, 64
((ONE_CORE, PEAK),) = (  # GFLOP/s
    (n["values"]["one"], n["values"]["two"])
    for n in record(NOTES)["notes"]
    if "multiply-adds from L1" in n["what"]
)


def row(*cells: object) -> str:
    return "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"


def table(head: str, rows: Iterable[str]) -> str:
    """As one text: which cell is what is a part of what is checked."""
    return "\n".join([head, *rows])


def versions(environment: dict[str, Any]) -> tuple[str, str]:
    """PyTorch's and the month."""
    day = datetime.fromisoformat(environment["date"])
    return f"PyTorch {environment['torch'].split('+')[0]}", f"{day:%B %Y}"


def kept_rows(size: int) -> int:
    """Rows up to which the tiles of the upper half fit what the forward may keep."""
    tiles = 0
    while (tiles + 1) * (tiles + 2) // 2 * TILE**2 * size <= KEPT_MIB * MIB:
        tiles += 1
    return tiles * TILE


def square(size: int) -> int:
    """Edge, in tiles, of a square that fits the workspace."""
    return math.isqrt(WORKSPACE_MIB * MIB // (TILE**2 * size))


def arithmetic() -> Texts:
    """What follows from sizes, and stands in the pages as a number."""
    yield PERFORMANCE, f"up to M = {kept_rows(4):,} in fp32, {kept_rows(8):,} in fp64"
    edges = [square(size) for size in (4, 8)]
    yield PERFORMANCE, "a square of {0} x {0} tiles ({1} x {1} in fp64)".format(*edges)
    shift = 2.05 * math.log2(math.e) / 124
    yield PERFORMANCE, f"2.05/τ · log2 e < 124; below τ = {shift:.3f}"
    yield NUMERICS, f"below about τ = {shift:.3f} on the CPU"
    yield "docs/faq.md", f"takes 16·B² bytes, {16 * 8192**2 / GIB:.0f} GiB at B = 8192"
    yield PERFORMANCE, f"A row of both sides ({2 * 768 * 4 / 1024:.0f} KiB at D = 768)"
    flops = 256**2 * 768
    yield PERFORMANCE, f"The upper half is {flops / 1e6:.0f} MFLOP, {flops / PEAK / 1e6:.2f} ms"
    rows = 256 * 768 * 4 / 1e6  # packed twice
    yield PERFORMANCE, f"{rows:.1f} MB of input and {2 * rows:.1f} MB of packed rows stay in L2"
    small = 16 * 768 * 4 / 1e3
    yield PERFORMANCE, f"{small:.0f} KB of input become {2 * small:.0f} packed"
    logit = 1 / 0.05
    step = 2.0 ** (math.floor(math.log2(logit)) - 23)
    yield NUMERICS, f"a logit is about {logit:.0f}, where fp32 resolves {step * 1e6:.0f}·10⁻⁶"
    tiles = math.ceil(2048 / TILE)
    kept = tiles * (tiles + 1) // 2 * TILE**2 * 4 / MIB
    yield PERFORMANCE, f"the exponentials, {kept:.0f} MiB, are written too"
    head = "| | FLOPs / those of the {} | bytes beyond the operands |"
    written = "M²/2 numbers written{} read twice, in squares of "
    counts = (
        ("forward / mm", f"{1 / 2:.2f}", "none; the mm writes 4M²"),
        (
            "forward + backward / 3 mm, kept",
            f"{3 / 6:.2f}",
            "M²/2 numbers written once, read twice",
        ),
        (
            "forward + backward / 3 mm, computed again",
            f"{4 / 6:.2f}",
            f"the same, in squares of {WORKSPACE_MIB} MiB",
        ),
    )
    yield PERFORMANCE, table(head.format("mm it is compared with"), (row(*c) for c in counts))
    on_gpu = (
        ("forward / mm", f"{1 / 2:.2f}", "partial sums and maxima: 8 M²/128 written and read"),
        (
            "backward by squares / 2 mm",
            f"{3 / 4:.2f}",
            f"G: {written.format(',')}`CJEPA_WORKSPACE_MIB`",
        ),
        ("backward by owned rows / 2 mm", f"{4 / 4:.1f}", "none"),
    )
    yield PERFORMANCE, table(head.format("mm"), (row(*c) for c in on_gpu))


def polynomial() -> Texts:
    """Errors of 2^x in fp32 as the kernel evaluates it, and of the polynomial itself."""
    source = (ROOT / "csrc/cpu/core/micro_tile.h").read_text(encoding="utf-8")
    values = re.search(r"Exp2Table<float>.*?kValues\[\] = {(.*?)}", source, re.DOTALL)
    assert values
    *coefficients, _ = (np.float32(x.strip().rstrip("f")) for x in values[1].split(","))
    x = np.linspace(-0.5, 0.5, 2**20 + 1).astype(np.float32).astype(np.float64)
    exact = np.float64(coefficients[0])
    rounded = np.full(x.shape, coefficients[0])
    for coefficient in map(np.float64, coefficients[1:]):
        exact = exact * x + coefficient
        rounded = (rounded * x + coefficient).astype(np.float32)  # a fused multiply-add
    largest = np.abs(rounded / np.exp2(x) - 1).max()
    mean = abs((exact / np.exp2(x) - 1).mean())
    degree = f"a polynomial of degree {len(coefficients) - 1} on [-1/2, 1/2]"
    errors = f"(relative error {largest:.0e}, mean {mean:.0e}: a biased"
    yield PERFORMANCE, f"{degree} {errors}".replace("e-0", "e-")


def rounding_to_bf16() -> Texts:
    """The largest change of a cosine between different random rows."""
    rows, features, seeds = 256, 32, 5
    changed = 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        unit = F.normalize(torch.randn(rows, features, generator=generator).double(), dim=1)
        rounded = unit.bfloat16().double()
        change = (rounded @ rounded.T - unit @ unit.T).fill_diagonal_(0)
        changed = max(changed, change.abs().max().item())
    yield (
        NUMERICS,
        f"rounding {rows} random unit rows of {features} features moves a cosine by up to "
        f"{changed:.3f}, and at τ = 0.01 a logit by {changed / 0.01:.1f}",
    )


def targets() -> Texts:
    """The table of what is missed, and how fast the bare product was beside it."""
    content = record("bench/results/nt_xent_cpu.json")
    judged = [r for r in content["targets"] if r["part"] == "targets" and r["target"] is not None]
    products = {
        (r["M"], r["D"], r["pass"]): r["median"]
        for r in content["rows"]
        if r["part"] == "targets" and r["name"] == "mm"
    }
    rates, lines = [], []
    earlier = record(NOTES)["earlier runs of the targets"]["ratios"]
    for r, before in zip(judged, earlier, strict=True):
        size = (r["M"], r["D"], r["pass"])
        assert size == (before["M"], before["D"], before["pass"])
        ratios = [*before["ratios"], r["ratio"]]
        flops = r["M"] ** 2 * r["D"]
        both = r["pass"] != "forward"
        rates.append(2 * flops * (3 if both else 1) / products[size] / 1e9)
        work = flops * (1 if not both else 3 if r["M"] <= kept_rows(4) else 4)
        met = ", met" if r["verdict"] == "met" else ""
        floor = work / (PEAK * 1e9) / products[size]
        lines.append(
            row(
                f"{r['M']}, {r['D']}",
                r["pass"].replace("+", " + "),
                f"{floor:.2f}",
                f"{r['target']:.2f}",
                f"{r['ratio']:.2f}{met}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            )
        )
    yield PERFORMANCE, table("| M, D | pass | floor | target | recorded | three runs |", lines)
    environment = content["environment"]
    assert environment["instruction_set"].startswith("avx512")
    (dtype,) = {r["dtype"] for r in content["rows"] if r["part"] == "targets"}
    pytorch, month = versions(environment)
    yield (
        PERFORMANCE,
        f"All figures: {environment['threads']} threads of an {environment['device']} (Zen 4, "
        "AVX-512, 1 MiB of L2 a core, 32 MiB of L3), GCC 12, "
        f"{pytorch}, {dtype}, τ = 0.1, {month}.",
    )
    span = f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s of {PEAK}"
    yield PERFORMANCE, f"In the recorded run the bare product ran at {span}"
    small = {
        (r["M"], r["D"]): r["target"]
        for r in content["targets"]
        if r["part"] == "small" and r["pass"] == "forward"
    }
    yield PERFORMANCE, f"(targets {small[16, 768]:.1f} and {small[256, 768]:.1f})"


def memory() -> Texts:
    rows = record("bench/results/nt_xent_memory_cpu.json")["rows"]
    extra = {(r["M"], r["backend"]): f"{r['extra_bytes'] / MIB:.0f}" for r in rows}
    names = ("native", "chunked", "reference")
    lines = [
        row(count, *(extra.get((count, name), "not run") for name in names))
        for count in sorted({r["M"] for r in rows})
    ]
    yield PERFORMANCE, table(row("M", *(f"`{name}`" for name in names)), lines)
    (features,) = {r["D"] for r in rows}
    yield PERFORMANCE, f"in MiB, gradients included, D = {features} (`make memory`"
    largest = next(r for r in rows if r["M"] == 131072)
    over = f"{largest['over_input']:.1f}"
    reference = next(r for r in rows if (r["M"], r["backend"]) == (8192, "reference"))
    at_largest = reference["extra_bytes"] * (131072 / 8192) ** 2 / GIB
    yield (
        PERFORMANCE,
        f"At M = 131072, D = 256 forward + backward takes {extra[131072, 'native']} MiB, {over} "
        "times the input",
    )
    yield PERFORMANCE, f"at M = 131072 it is {over} times the input"
    yield (
        PERFORMANCE,
        f"{extra[8192, 'reference']} MiB at M = 8192 are {at_largest:.0f} GiB there",
    )


def stages() -> Texts:
    tables = record("bench/results/cpu_kernel_stages.json")["tables"]
    for of in tables.values():
        yield PERFORMANCE, table(row(*of["columns"]), (row(*cells) for cells in of["rows"]))
    yield PERFORMANCE, f"operands from the caches, GFLOP/s of {ONE_CORE}:"
    (of_stages,) = (t for t in tables.values() if t["columns"][0] == "M, D")
    (times,) = (cells for cells in of_stages["rows"] if cells[0] == "8192, 256")
    flops = 8192**2 * 256 / 1e6  # of a ms in GFLOP/s
    tiles, products = flops / float(times[2]), 2 * flops / float(times[6])
    yield PERFORMANCE, f"do M²D FLOPs at {tiles:.0f} GFLOP/s of {PEAK}"
    yield PERFORMANCE, f"the products of the backward 2M²D at {products:.0f}"


def whole_loss() -> Texts:
    times: dict[tuple[int, int, str], dict[str, float]] = {}
    for r in record("bench/results/cjepa_loss_cpu.json")["rows"]:
        case = (r["B"], r["D"], "/".join(map(str, r["N"])))
        times.setdefault(case, {})[r["name"]] = 1e3 * r["median"]
    columns = ("eager prediction", "prediction", "limit, fresh gradient", "eager whole", "whole")
    lines = []
    for (batch, features, patches), of in sorted(times.items()):
        speed_up = f"{of['eager whole'] / of['whole']:.1f}"
        cells = [f"{of[name]:.3g}" for name in columns]
        lines.append(row(batch, patches, features, *cells, speed_up))
        if batch == 128:
            yield (
                README,
                f"B = {batch} pairs, {patches} patches and D = {features}, "
                f"takes {of['whole']:.1f} ms where the usual eager formula takes "
                f"{of['eager whole']:.0f} ms, {speed_up} times as long",
            )
        if batch == 2048:
            yield (
                README,
                f"at B = {batch}, {patches} patches and D = {features}, where the contrastive term "
                f"dominates, {speed_up} times",
            )
    head = (
        "| B | N | D | prediction term: eager | native | byte limit | whole loss: eager | native "
        "| speed-up |"
    )
    yield PERFORMANCE, table(head, lines)


def training_step() -> Texts:
    lines = []
    for r in record("bench/results/training_step_cpu.json")["rows"]:
        step, loss = (
            [1e3 * r[f"{what}_{when}"] for when in ("before", "after")] for what in ("step", "loss")
        )
        cells = [*(f"{x:.1f}" for x in step), *(f"{x:.2f}" for x in loss)]
        lines.append(row(f"`configs/{r['configuration']}.yaml`", *cells))
        yield PERFORMANCE, f"revision {r['base']}; its models are small"
        yield PERFORMANCE, f"its loss was {loss[0]:.0f} ms of a step"
    head = "| configuration | step before, ms | after | loss before, ms | after |"
    yield PERFORMANCE, table(head, lines)


def temperatures() -> Texts:
    keys = ("textbook_loss", "here_loss", "textbook_gradient", "here_gradient")
    recorded = record("bench/results/temperature_error_cpu.json")
    lines = [row(r["temperature"], *(f"{r[key]:.0e}" for key in keys)) for r in recorded["rows"]]
    names = [key.replace("_", " ").split() for key in keys]
    head = row("τ", *(f"{quantity}, {formula}" for formula, quantity in names))
    yield NUMERICS, table(head, lines)
    seeds = {5: "five"}[len(load("temperature_error").SEEDS)]
    yield (
        NUMERICS,
        f"{recorded['pairs']} pairs of {recorded['features']} features, views 10 % apart, fp32 "
        f"against the float64 reference, relative to the largest value, the worst of {seeds} seeds",
    )


def _show(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def cost_of_ranks() -> Texts:
    costs = record("bench/results/distributed_cost.json")
    schemes = {
        "ring": "ring",
        "all_gather": "all-gather",
        "lightly": "lightly",
        "open_clip": "open_clip",
        "inf_cl": "Inf-CL's ring",
    }
    for key, unit, what in (("bytes", MIB, "R, sent in MiB"), ("flops", 1e12, "R, TFLOP")):
        of_ranks: dict[int, list[str]] = {}
        for r in sorted(costs["rows"], key=lambda r: (r["ranks"], [*schemes].index(r["scheme"]))):
            of_ranks.setdefault(r["ranks"], []).append(_show(r[key] / unit))
        lines = [row(f"{ranks:,}", *cells) for ranks, cells in of_ranks.items()]
        yield DISTRIBUTED, table(row(what, *schemes.values()), lines)
    hidden = [
        row(r["link"], r["ranks"], r["D"], f"{r['pairs']:,}", f"{r['whole_batch']:,}")
        for r in costs["hidden"]
    ]
    yield DISTRIBUTED, table("| link | R | D | pairs a rank | whole batch |", hidden)


def links() -> Texts:
    """The rates that the simulation assumes."""
    costs = load("distributed_cost")
    nvlink, network = (
        f"{link.bandwidth / 1e9:.0f} GB/s {way}with {1e6 * link.latency:.0f} µs ({link.name})"
        for link, way in ((costs.NVLINK, "each way "), (costs.NETWORK, ""))
    )
    rate = f"{costs.FLOP_RATE / 1e12:.0f} TFLOP/s for the products, which is an assumption"
    yield DISTRIBUTED, f"The rates are {nvlink}, {network}, and {rate}"
    yield DISTRIBUTED, f"exchanges add less than {100 * costs.HIDDEN:.0f} % to the time"


def measured_ranks() -> Texts:
    measured = record("bench/results/distributed_cpu.json")
    sizes: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for r in measured["rows"]:
        sizes.setdefault((r["M_r"], r["D"]), {})[r["name"]] = r
    environment = measured["environment"]
    yield (
        DISTRIBUTED,
        f"Two gloo processes of one thread each on {environment['cores']} cores "
        f"({environment['device']}, {environment['instruction_set'].upper()}, "
        f"{', '.join(versions(environment))}), forward + backward, fp32",
    )
    candidates = ("ring", "all_gather", "strips", "lightly")
    lines = []
    for (rows, features), of in sizes.items():
        work = [_show(1e3 * of[name]["work"]) for name in candidates]
        ratio = of["ring"]["work"] / of["strips"]["work"]
        times = [_show(1e3 * of[name]["time"]) for name in ("ring", "all_gather")]
        lines.append(row(rows, features, *work, f"{ratio:.2f}", *times))
    head = (
        "| M_r | D | ring: work, ms | all-gather | strips | lightly | work of the ring / strips "
        "| ring: time, ms | all-gather |"
    )
    yield DISTRIBUTED, table(head, lines)
    of = sizes[4096, 256]
    gather, strips, lightly = (of["ring"]["work"] / of[name]["work"] for name in candidates[1:])
    yield (
        README,
        "On two processes of 4096 rows each, D = 256, "
        f"the ring takes {strips:.2f} of the CPU time of two independent passes over row strips "
        f"with the same kernels, {gather:.2f} of our own all-gather and {lightly:.2f} of lightly's",
    )
    memory: dict[tuple[int, int, int], dict[str, list[str]]] = {}
    for r in measured["memory"]:
        if not r["kept"]:
            extra = [f"{r['extra_bytes'] / MIB:.0f}", f"{r['over_input']:.1f}"]
            of_case = memory.setdefault((r["ranks"], r["M_r"], r["D"]), {})
            of_case[r["strategy"]] = extra
    lines = [
        row(*case, *(cell for name in candidates[:2] for cell in of_case[name]))
        for case, of_case in memory.items()
    ]
    head = "| R | M_r | D | ring, MiB | / own rows | all-gather, MiB | / own rows |"
    yield DISTRIBUTED, table(head, lines)


def expected() -> Texts:
    """Page and text of everything above."""
    for texts in (
        arithmetic,
        polynomial,
        rounding_to_bf16,
        targets,
        memory,
        stages,
        whole_loss,
        training_step,
        temperatures,
        cost_of_ranks,
        links,
        measured_ranks,
    ):
        yield from texts()
