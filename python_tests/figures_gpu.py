"""What the records of a GPU say in the documents."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any

from bench_scripts import load
from documents import ROOT
from figures import NOTES, record

from cjepa_kernels.bench.candidates import BOTH, COMPILED, EAGER, MM, OURS
from cjepa_kernels.bench.tables import milliseconds

PAGE, PERFORMANCE, README = "docs/results/gpu.md", "docs/performance.md", "README.md"
TERA = 1e12
Texts = Iterator[tuple[str, str]]


def benchmark() -> tuple[str, Any]:
    """Name and content of what bench/gpu.py recorded."""
    (path,) = (ROOT / "bench/results").glob("NVIDIA-*.json")
    return path.name, record(f"bench/results/{path.name}")


def value(content: Any, target: str, rows: int, features: int) -> float:
    """Of a target of the benchmark."""
    (found,) = (
        t["value"]
        for t in content["targets"]
        if t["target"].startswith(target) and (t["M"], t["D"]) == (rows, features)
    )
    return float(found)


HEADS = {  # in the order of bench/gpu_tables.py's cells
    "large": (
        "M = 2B | D | mm | forward | / mm | forward + backward | / 3 mm | eager, f + b | / ours"
    ),
    "others": " | rows | D | ours | the other | ratio",
    "small": "M | D | as called | eager | CUDA graph | eager",
    "accuracy": "dtype | back end | loss | gradient",
}
LEADS = {  # above each table of the page
    "large": "*eager* is the plain formula under autocast, without metrics.",
    "others": "and so does `cross_logsumexp` beside it.",
    "small": "it is not.",
    "accuracy": "M = {M}, D = {D}, largest difference over largest magnitude.",
}


def tables() -> Texts:
    name, content = benchmark()
    scripts = load("gpu_tables")
    made = {
        key: "\n".join([f"|{'' if head.startswith(' ') else ' '}{head} |", *rows])
        for key, head in HEADS.items()
        if (rows := getattr(scripts, key)(content))
    }
    (size,) = {(r["M"], r["D"]) for r in content["accuracy"]}
    for key, table in made.items():
        yield PAGE, f"{LEADS[key].format(M=size[0], D=size[1])}\n{table}"
    (device,) = content["gpu"]
    yield (
        README,
        f"On an {' '.join(device['device'].split()[1:2])}, bf16, ms of the device ([all of it, "
        f"with what is missed and why](docs/results/gpu.md)):\n{made['large']}",
    )
    yield PAGE, name
    environment = content["environment"]
    (driver,) = {  # which the record does not have
        versions.split(",")[0]
        for of in record(NOTES)["environments"].values()
        if of["device"] == device["device"] and (versions := of["versions"])
    }
    day = date.fromisoformat(environment["date"][:10])
    yield (
        PAGE,
        f"{device['device']} (132 multiprocessors), {driver}, PyTorch {environment['torch']}, "
        f"Triton {device['triton']}, Python {environment['python']}, {day.day} {day:%B %Y}, commit "
        f"{environment['commit']}; `{environment['command']}`.",
    )
    yield PAGE, f"{load('gpu_targets').summary(content['targets'])}. The targets were written"


def sentences() -> Texts:
    _, content = benchmark()
    memory = content["memory"][-1]
    similarities = 2 * memory["M"] ** 2 / 2**40
    yield (
        PAGE,
        f"A large product of 8192³ runs at {content['matmul'][0]['flops'] / TERA:.0f} TFLOP/s",
    )
    yield (
        PAGE,
        f"is {memory['over_input']:.2f} times the input (a matrix of bf16 similarities would be "
        f"{similarities:.0f} TiB); forward + backward takes {memory['seconds']:.1f} s there",
    )
    yield PAGE, f"for a new size, takes {content['first_use'][0]['seconds']:.1f} s"
    ratios = {(t["target"], t["M"], t["D"]): t["value"] for t in content["targets"]}
    forward = {key[1:]: v for key, v in ratios.items() if key[0] == "forward / one product"}
    met = forward.pop((65536, 128))
    bound = next(t["bound"] for t in content["targets"] if t["target"] == "forward / one product")
    yield (
        PAGE,
        f"*Forward / mm at most {bound}*: met at D = 128, M = 65536; "
        f"{min(forward.values()):.2f} to {max(forward.values()):.2f} elsewhere",
    )
    assert met <= bound < min(forward.values())
    wide = [value(content, "forward+backward / three", 16384, d) for d in (512, 768)]
    yield (
        PAGE,
        "*Forward + backward / 3 mm at most 0.9*: met but for D = 512 and 768 at M = 16384 "
        f"({wide[0]:.2f}, {wide[1]:.2f})",
    )
    compiled = [value(content, "compiled eager", m, 256) for m in (16384, 65536)]
    other = value(content, "inf_cl", 16384, 256)
    yield (
        PAGE,
        "*Eager at least 8 times, `torch.compile` 4 times, Inf-CL 10 times*: eager at D ≤ 256; the "
        f"others are {compiled[0]:.1f} and {other:.1f} times as slow as this",
    )
    graphs = [v for key, v in ratios.items() if key[0].endswith("CUDA graphs")]
    yield (
        PAGE,
        f"from CUDA graphs {min(graphs):.2f} to {max(graphs):.2f} of it, where 0.8 was asked",
    )
    over_bytes = value(content, "prediction loss", 25088, 768)
    yield PAGE, f"*Prediction loss at most 1.3 times its bytes*: {over_bytes:.2f}."
    measured = [value(content, "forward / one product", 65536, d) for d in (128, 256, 768)]
    yield (
        PERFORMANCE,
        "{:.2f} at D = 128, {:.2f} at 256 and {:.2f} at 768 of the mm at M = 65536".format(
            *measured
        ),
    )
    yield PERFORMANCE, f"The target is {bound}, so two tiles"


def in_the_readme() -> Texts:
    _, gpu = benchmark()
    cpu = record("docs/results/amd-epyc-avx2.json")
    headline, scripts = load("headline"), load("gpu_tables")
    yield README, headline.sentence(cpu, gpu)
    lead = "times of forward + backward in ms, peak memory beyond the inputs in MiB:"
    yield README, f"{lead}\n{headline.cpu_table(cpu)}"
    of = scripts.milliseconds(gpu)
    called, graphed = (
        [1e3 * of(part, 1024, 256, "forward+backward", name) for name in ("triton", "eager bf16")]
        for part in ("latency", "latency_graphed")
    )
    yield (
        README,
        f"({called[0]:.0f} against {called[1]:.0f} µs at M = 1024, on a virtual machine with a "
        f"slow host); from a CUDA graph it is {graphed[0]:.0f} against {graphed[1]:.0f} µs.",
    )
    size, comparison = (16384, 256), record("docs/results/nvidia-h100-80gb-hbm3-bf16.json")
    took = {
        row["name"]: milliseconds(row["median"])
        for row in comparison["rows"]
        if (row["M"], row["D"], row["pass"]) == (*size, BOTH)
    }
    yield (
        README,
        f"on that machine ours took {took[OURS]} ms at M = {size[0]}, D = {size[1]}, the plain "
        f"formula {took[EAGER]}, `torch.compile` of it {took[COMPILED]}, the bare products "
        f"{took[MM]} ([",
    )


def exploration() -> Texts:
    content = record("bench/results/gpu_exploration_h100.json")
    at = {(k["M"], k["D"]): k["microseconds"] for k in content["kernels"]}
    of = at[16384, 256]
    packing = of["pack_kernel, twice"] / 2
    forward = of["strips_kernel"] + packing + of["nt_xent_rows_kernel"] + of["tiles_kernel"]
    quarters = {3: "three quarters"}[round(4 * of["strips_kernel"] / forward)]
    yield (
        PAGE,
        f"At M = 16384 the tiles themselves are {quarters} of the time "
        f"(D = 256: strips {of['strips_kernel'] + 1e-9:.0f} µs, packing {packing:.0f}, reduction "
        f"{of['nt_xent_rows_kernel']:.0f}, edge {of['tiles_kernel']:.0f})",
    )
    rates = [4 * m**2 * 256 / at[m, 256]["owned_rows_kernel"] / 1e6 for m in (65536, 16384)]
    yield PAGE, "(D ≤ 256) run at {:.0f} to {:.0f} TFLOP/s of their 4 M²D operations".format(*rates)

    def best(kind: str, features: int, **sides: int) -> float:
        return float(
            max(
                v["tflops"]
                for v in content["variants"]
                if (v["kind"], v["D"]) == (kind, features)
                and all(v[side] == length for side, length in sides.items())
            )
        )

    narrow, broad = (best("strip", 256, columns=n) for n in (128, 256))
    rounded = " to ".join(f"{round(rate, -1):.0f}" for rate in (narrow, broad))
    yield PAGE, f"Strips at D = 256 run at {rounded} TFLOP/s of a product"
    yield PAGE, f"(half the traffic from L2; {narrow:.0f} and {broad:.0f} TFLOP/s)"
    wide = sorted(
        v["tflops"]
        for v in content["variants"]
        if (v["kind"], v["D"], v["option"]) == ("tile", 512, 64)
        and {v["rows"], v["columns"]} == {128, 256}
    )
    square = best("tile", 512, rows=128, columns=128)
    yield PAGE, f"({wide[-1]:.0f} to {wide[0]:.0f} instead of {square:.0f} TFLOP/s at D = 512)"
    swept = [s for s in content["sweep"] if s["kernel"] != "mm"]
    yield PAGE, f"Chosen by measuring {sum(s['M'] == 16384 for s in swept)} configurations"
    times = {
        tuple(s[key] for key in ("M", "D", "stages", "warps")): s["ms"]
        for s in swept
        if s["kernel"] == "coefficients"
    }
    at_three = [
        100 * (times[m, d, 3, 8] / times[m, d, 3, 4] - 1)
        for m, d, stages, warps in times
        if (stages, warps) == (3, 8) and times[m, d, 3, 8] and times[m, d, 3, 4]
    ]
    yield (
        PAGE,
        "coefficients with 8 warps instead of 4 "
        f"({min(at_three):.1f} to {max(at_three):.1f} % slower in the sweep",
    )
    strips = {
        pipelined: min(
            s["ms"]
            for s in swept
            if (s["kernel"], s["M"], s["D"], s["pipelined"]) == ("strips", 16384, 256, pipelined)
            and s["ms"]
        )
        for pipelined in (False, True)
    }
    faster = 100 * (strips[False] / strips[True] - 1)
    registers = max(
        r["registers"]
        for r in record("bench/results/gpu_instructions_sm90.json")["rows"]
        if r["kernel"] == "strips_kernel"
    )
    yield PERFORMANCE, f"({registers} registers): {faster:.0f} % faster at D = 256 on an H100"


def instructions() -> Texts:
    names = {
        "strips_kernel": "strips",
        "owned_rows_kernel": "owned rows",
        "tiles_kernel": "tiles",
        "coefficient_tiles_kernel": "coefficients",
    }
    rows = record("bench/results/gpu_instructions_sm90.json")["rows"]
    columns = {"product": "product", "exponential": "exponentials", "issue": "all instructions"}
    table = [f"| D | kernel | instructions an element | {' | '.join(columns.values())} |"]
    for r in rows:
        if r["place"] != "edge":
            cycles = [f"{r[f'{key}_cycles']:.0f}" for key in columns]
            cells = [str(r["D"]), names[r["kernel"]], f"{r['instructions']:.1f}", *cycles]
            table.append(f"| {' | '.join(cells)} |")
    yield PERFORMANCE, "\n".join(table)
    forward = {
        r["D"]: r
        for r in rows
        if r["kernel"] == "strips_kernel" or (r["kernel"], r["D"]) == ("tiles_kernel", 768)
    }
    overlapped = {
        d: 0.5 * max(r[f"{k}_cycles"] for k in ("product", "exponential", "issue")) / product
        for d, r in forward.items()
        if (product := r["product_cycles"])
    }
    apart = {
        d: 0.5 * (r["product_cycles"] + r["issue_cycles"]) / r["product_cycles"]
        for d, r in forward.items()
    }
    assert {f"{overlapped[d]:.1f}" for d in (256, 768)} == {f"{overlapped[128]:.1f}"}
    yield (
        PERFORMANCE,
        f"0.5 × their maximum over the product: {overlapped[64]:.1f} of the mm at D = 64, "
        f"{overlapped[128]:.1f} from D = 128 on",
    )
    yield (
        PERFORMANCE,
        f"{apart[128]:.2f} at D = 128, {apart[256]:.2f} at 256, {apart[768]:.2f} at 768. The",
    )
    strips, tiles = (
        [r["instructions"] for r in rows if r["kernel"] == kernel]
        for kernel in ("strips_kernel", "tiles_kernel")
    )
    yield (
        PERFORMANCE,
        f"Of a strip's {min(strips):.1f} to {max(strips):.1f} instructions an element 1 is",
    )
    yield PERFORMANCE, f"A tile by itself pays {min(tiles):.1f} to {max(tiles):.0f}: its column"


def expected() -> Texts:
    """Page and text of everything above."""
    for texts in (tables, sentences, in_the_readme, exploration, instructions):
        yield from texts()
