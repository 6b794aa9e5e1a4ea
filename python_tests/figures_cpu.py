"""What the records of the CPU say in the documents: NT-Xent, the whole loss, many ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bench_scripts import load
from figures import NOTES, record

PERFORMANCE, README = "docs/performance.md", "README.md"
DISTRIBUTED, NUMERICS = "docs/distributed.md", "docs/numerics.md"
Texts = Iterator[tuple[str, str]]
GIB, MIB = 2**30, 2**20
TILE, KEPT_MIB, WORKSPACE_MIB = 192, 256, 64
(PEAK,) = (n["values"]["two"] for n in record(NOTES)["notes"] if "two" in n["values"])  # GFLOP/s


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


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
    counts = ((0.5, "none; the mm writes 4M²"), (0.5, "M²/2 numbers written once, read twice"))
    for part, text in zip(("forward / mm", "forward + backward / 3 mm, kept"), counts, strict=True):
        yield PERFORMANCE, row(part, f"{text[0]:.2f}", text[1])
    yield PERFORMANCE, f"| forward + backward / 3 mm, computed again | {4 / 6:.2f} |"
    yield PERFORMANCE, f"| backward by squares / 2 mm | {3 / 4:.2f} |"
    yield PERFORMANCE, f"| backward by owned rows / 2 mm | {4 / 4:.1f} |"
    yield PERFORMANCE, f"| forward / mm | {1 / 2:.2f} | partial sums"


def targets() -> Texts:
    """The table of what is missed, and how fast the bare product was beside it."""
    content = record("bench/results/nt_xent_cpu.json")
    judged = [r for r in content["targets"] if r["part"] == "targets" and r["target"] is not None]
    products = {
        (r["M"], r["D"], r["pass"]): r["median"]
        for r in content["rows"]
        if r["part"] == "targets" and r["name"] == "mm"
    }
    rates = []
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
        yield (
            PERFORMANCE,
            row(
                f"{r['M']}, {r['D']}",
                r["pass"].replace("+", " + "),
                f"{floor:.2f}",
                f"{r['target']:.2f}",
                f"{r['ratio']:.2f}{met}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            ),
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
    for count in sorted({r["M"] for r in rows}):
        names = ("native", "chunked", "reference")
        yield PERFORMANCE, row(count, *(extra.get((count, name), "not run") for name in names))
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
    for table in tables.values():
        for cells in (table["columns"], *table["rows"]):
            yield PERFORMANCE, row(*cells)
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
    for (batch, features, patches), of in times.items():
        speed_up = f"{of['eager whole'] / of['whole']:.1f}"
        cells = [f"{of[name]:.3g}" for name in columns]
        yield PERFORMANCE, row(batch, patches, features, *cells, speed_up)
        if batch == 128:
            yield (
                README,
                f"takes {of['whole']:.1f} ms where the usual eager formula takes "
                f"{of['eager whole']:.0f} ms, {speed_up} times as long",
            )
        if batch == 2048:
            yield README, f"where the contrastive term dominates, {speed_up} times"


def training_step() -> Texts:
    for r in record("bench/results/training_step_cpu.json")["rows"]:
        step, loss = (
            [1e3 * r[f"{what}_{when}"] for when in ("before", "after")] for what in ("step", "loss")
        )
        cells = [*(f"{x:.1f}" for x in step), *(f"{x:.2f}" for x in loss)]
        yield PERFORMANCE, row(f"`configs/{r['configuration']}.yaml`", *cells)
        yield PERFORMANCE, f"its loss was {loss[0]:.0f} ms of a step"


def temperatures() -> Texts:
    keys = ("textbook_loss", "here_loss", "textbook_gradient", "here_gradient")
    recorded = record("bench/results/temperature_error_cpu.json")
    for r in recorded["rows"]:
        yield NUMERICS, row(r["temperature"], *(f"{r[key]:.0e}" for key in keys))
    yield NUMERICS, f"{recorded['pairs']} pairs of {recorded['features']} features"


def _show(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def cost_of_ranks() -> Texts:
    costs = record("bench/results/distributed_cost.json")
    for key, unit in (("bytes", MIB), ("flops", 1e12)):
        of_ranks: dict[int, list[str]] = {}
        for r in costs["rows"]:
            of_ranks.setdefault(r["ranks"], []).append(_show(r[key] / unit))
        for ranks, cells in of_ranks.items():
            yield DISTRIBUTED, row(f"{ranks:,}", *cells)
    for r in costs["hidden"]:
        numbers = (r["ranks"], r["D"], f"{r['pairs']:,}", f"{r['whole_batch']:,}")
        yield DISTRIBUTED, row(r["link"], *numbers)


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
    candidates = ("ring", "all_gather", "strips", "lightly")
    for (rows, features), of in sizes.items():
        work = [_show(1e3 * of[name]["work"]) for name in candidates]
        ratio = of["ring"]["work"] / of["strips"]["work"]
        times = [_show(1e3 * of[name]["time"]) for name in ("ring", "all_gather")]
        yield DISTRIBUTED, row(rows, features, *work, f"{ratio:.2f}", *times)
    of = sizes[4096, 256]
    gather, strips, lightly = (of["ring"]["work"] / of[name]["work"] for name in candidates[1:])
    yield (
        README,
        f"the ring takes {strips:.2f} of the CPU time of two independent passes over row strips "
        f"with the same kernels, {gather:.2f} of our own all-gather and {lightly:.2f} of lightly's",
    )
    memory: dict[tuple[int, int, int], list[str]] = {}
    for r in measured["memory"]:
        if not r["kept"]:
            extra = [f"{r['extra_bytes'] / MIB:.0f}", f"{r['over_input']:.1f}"]
            memory.setdefault((r["ranks"], r["M_r"], r["D"]), []).extend(extra)
    for case, cells in memory.items():
        yield DISTRIBUTED, row(*case, *cells)


def expected() -> Texts:
    """Page and text of everything above."""
    for texts in (
        arithmetic,
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
