"""Write the figures of the documents from the recorded results.

    python docs/generate_figures.py           # rewrites the blocks in README.md and docs/**/*.md
    python docs/generate_figures.py --check   # writes nothing, fails if a block would change

A page holds figures in blocks, between the lines ``<!-- figures: NAME -->`` and
``<!-- end of figures -->``. The template of a block is the function NAME of this file, which reads
the records in ``bench/results`` and ``docs/results``, rounds the numbers and returns the text. To
change a text that has a figure, change its template and run the script. All templates stand in
this one file, so that it is longer than others.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from cjepa_kernels.bench.candidates import BOTH, COMPILED, EAGER, FORWARD, MM, OURS
from cjepa_kernels.bench.losses import LOSSES
from cjepa_kernels.bench.records import RESULTS
from cjepa_kernels.bench.sources import since
from cjepa_kernels.environment import DEFAULT_MEBIBYTES
from cjepa_kernels.tables import markdown_table, mebibytes, milliseconds, two_digits
from cjepa_kernels.train.evaluation.comparison import HEADLINE_TITLES, load_comparison
from cjepa_kernels.train.loop import advisor
from cjepa_kernels.train.report.tables import comparison_markdown, text_tables

sys.path.insert(0, str(RESULTS.parent))  # The scripts of bench/ are no package.

import gpu_check_page
from gpu_check_record import NAME as GPU_CHECK
from gpu_targets import AUTOCAST, MM3
from gpu_targets import COMPILED as COMPILED_AUTOCAST
from gpu_targets import EAGER as EAGER_BF16
from gpu_targets import OURS as TRITON

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^<!-- figures: (\w+) -->\n.*?^<!-- end of figures -->$", re.M | re.S)
MARKER = re.compile(r"^<!-- (?:figures: \w+|end of figures) -->$", re.M)

CPU, GPU = "docs/results/amd-epyc-avx2.json", "docs/results/nvidia-h100-80gb-hbm3-bf16.json"
MIB = 2**20

TEMPLATES: dict[str, Callable[[], str]] = {}


class FigureError(ValueError):
    """A page and the records do not fit together. The message says where."""


class Fields(dict[str, Any]):
    """An object of a record. It names the record when it lacks a field."""

    path = ""

    def __missing__(self, field: str) -> Any:
        raise FigureError(f"{self.path}: no field {field!r} beside {', '.join(self)}")


@cache
def record(path: str) -> Fields:
    """The results in a file of the repository."""

    def fields(pairs: list[tuple[str, Any]]) -> Fields:
        made = Fields(pairs)
        made.path = path
        return made

    content: Fields = json.loads((ROOT / path).read_text("utf-8"), object_pairs_hook=fields)
    return content


def gpu_record() -> Fields:
    """The results of bench/gpu.py."""
    paths = list((ROOT / "bench" / "results").glob("NVIDIA-*.json"))
    if len(paths) != 1:
        raise FigureError(f"bench/results: {len(paths)} files NVIDIA-*.json instead of one")
    return record(paths[0].relative_to(ROOT).as_posix())


def select(content: Fields, section: str, **wanted: object) -> list[Fields]:
    """The entries of a section that have these values. ``pass_`` stands for the field ``pass``."""
    values = {name.rstrip("_"): value for name, value in wanted.items()}
    return [r for r in content[section] if all(r[name] == v for name, v in values.items())]


def only(content: Fields, section: str, **wanted: object) -> Fields:
    """The one entry of a section that has these values."""
    found = select(content, section, **wanted)
    if len(found) != 1:
        raise FigureError(f"{content.path}: {len(found)} entries of {section!r} have {wanted}")
    return found[0]


def template(function: Callable[[], str]) -> Callable[[], str]:
    """Make a function the template of the block of its name."""
    TEMPLATES[function.__name__] = function
    return function


def table(heads: str, rows: Iterable[Iterable[object]], *, text_columns: int = 0) -> str:
    """A Markdown table.

    Args:
        heads: Titles of the columns, separated by " | ".
        rows: Cells of each row.
        text_columns: Number of leading columns that hold text. The others are right-aligned.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    return "\n".join(markdown_table(heads.split(" | "), cells, left=text_columns))


def listed(path: str, heads: str, row: str, *, section: str = "rows", text_columns: int = 0) -> str:
    """A table with a line for each entry of a section; ``row`` formats the fields of an entry."""
    rows = [row.format_map(entry).split(" | ") for entry in record(path)[section]]
    return table(heads, rows, text_columns=text_columns)


def digits(value: float) -> str:
    """Three significant digits, or the whole number if it has more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def measured(content: Fields) -> str:
    """How a record came about: command, machine, versions, date and commit."""
    at = content["environment"]
    date = datetime.fromisoformat(at["date"])
    device = f"{at['device']}, {at['threads']} threads, {at['instruction_set'].upper()}"
    if "gpu" in content:
        device = f"{content['gpu'][0]['device']}, Triton {at['triton']}, Python {at['python']}"
    return (
        f"Measured by `{at['command']}`: {device}, PyTorch {at['torch'].split('+')[0]}, "
        f"{date.day} {date:%B %Y}, commit {at['commit']}."
    )


def measured_cpu(name: str) -> str:
    return measured(record(f"bench/results/{name}_cpu.json"))


for name in ("nt_xent", "nt_xent_memory", "prediction_loss", "temperature_error", "distributed"):
    TEMPLATES[f"measured_{name}"] = partial(measured_cpu, name)


@template
def measured_gpu() -> str:
    path = gpu_record().path
    now = since(gpu_record()["environment"]["sources"])
    return f"{measured(gpu_record())} [All results](../../{path}) include p20 and p80. {now}"


@template
def gpu_since() -> str:
    at = gpu_record()["environment"]
    return f"The figures are those of commit {at['commit']}. {since(at['sources'])}"


def median(path: str, rows: int, name: str, direction: str = BOTH) -> float:
    """Seconds of a candidate of `cjepa bench` at D = 256."""
    found = only(record(path), "rows", M=rows, D=256, pass_=direction, name=name)
    return float(found["median"])


def gpu_median(part: str, size: tuple[int, int], name: str, direction: str = BOTH) -> float:
    """Seconds of a candidate of bench/gpu.py at (M, D)."""
    of = {"part": part, "M": size[0], "D": size[1], "name": name, "pass_": direction}
    return float(only(gpu_record(), "rows", **of)["median"])


@template
def headline() -> str:
    rows, gpu = 8192, (65536, 256)
    at = record(CPU)["environment"]
    machine = f"{at['threads']} threads of an {at['device']}, {at['instruction_set'].upper()}"
    eager, compiled, lightly, hjepa = (
        f"{median(CPU, rows, name) / median(CPU, rows, OURS):.1f}"
        for name in (EAGER, COMPILED, "lightly", "hjepa")
    )
    eager_gpu, compiled_gpu = (
        f"{gpu_median(part, gpu, name) / gpu_median(part, gpu, TRITON):.1f}"
        for part, name in (("targets", AUTOCAST), ("compiled", COMPILED_AUTOCAST))
    )
    products = gpu_median("targets", gpu, TRITON) / gpu_median("targets", gpu, MM3)
    return f"""
The bars show forward + backward of NT-Xent with D = 256 features. On the CPU ({machine}, fp32,
{rows // 2:,} pairs) the loss is {eager} times as fast as the plain formula, {compiled} times as
fast as `torch.compile` of it, {lightly} times as fast as lightly's formula and {hjepa} times as
fast as H-JEPA's. On an NVIDIA H100 (bf16, {gpu[0] // 2:,} pairs) it is {eager_gpu} times as fast as
the plain formula and {compiled_gpu} times as fast as `torch.compile` of it, and takes
{products:.2f} of the time of its three matrix products.
"""


@template
def nt_xent_cpu() -> str:
    content, losses = record(CPU), (OURS, EAGER, COMPILED, "lightly", "hjepa")
    rows = []
    for count in sorted({r["M"] for r in content["rows"]}):
        seconds = {(r["pass"], r["name"]): r["median"] for r in select(content, "rows", M=count)}
        extra = {r["name"]: r["extra_bytes"] for r in select(content, "memory", M=count)}
        ratios = (seconds[way, OURS] / seconds[way, MM] for way in (FORWARD, BOTH))
        cells = [
            *(f"{ratio:.2f}" for ratio in ratios),
            *(milliseconds(seconds[BOTH, n]) if (BOTH, n) in seconds else "-" for n in losses),
            *(f"{extra[n] / MIB:.0f}" if n in extra else "-" for n in (OURS, EAGER)),
        ]
        rows.append([count, *cells])
    heads = (
        "M = 2B | forward / mm | forward + backward / 3 mm | cjepa_kernels | plain formula "
        "| `torch.compile` | lightly's formula | H-JEPA's formula | cjepa_kernels, MiB "
        "| plain formula, MiB"
    )
    return table(heads, rows)


def gain(peer: str, title: str) -> str:
    """Time and memory of another project's loss beside ours, up to the first size it cannot do."""
    rows = []
    for path in (CPU, GPU):
        content = record(path)
        at, dtype = content["environment"], content["settings"]["dtype"]
        threads = "" if at["cuda"] else f"{at['threads']} threads, "
        for count in sorted({r["M"] for r in select(content, "rows", name=OURS, pass_=BOTH)}):
            ours = median(path, count, OURS)
            memory = {r["name"]: r["extra_bytes"] for r in select(content, "memory", M=count)}
            theirs = select(content, "rows", M=count, name=peer, pass_=BOTH)
            if theirs:
                seconds, size = theirs[0]["median"], mebibytes(memory[peer])
                time, faster = milliseconds(seconds), two_digits(seconds / ours)
            else:
                left_out = only(content, "left_out", M=count, name=peer)
                time, faster, size = "not run", "", f"({left_out['needed_bytes'] / MIB:,.0f})"
            where = f"{at['device']}, {threads}{dtype}"
            cells = [time, milliseconds(ours), faster, size, mebibytes(memory[OURS])]
            rows.append([where, f"{count // 2:,}", *cells])
            if not theirs:
                break
    heads = f" | B | {title}, ms | here, ms | times as fast | {title}, MiB | here, MiB"
    return table(heads, rows, text_columns=1)


TEMPLATES["gain_lightly"] = partial(gain, "lightly", "lightly's")
TEMPLATES["gain_metric_learning"] = partial(gain, "metric_learning", "pytorch-metric-learning")


@template
def memory_cpu() -> str:
    names = ("native", "chunked", "reference")
    content = record("bench/results/nt_xent_memory_cpu.json")
    rows = []
    for count in sorted({r["M"] for r in content["rows"]}):
        of = {r["backend"]: r for r in select(content, "rows", M=count)}
        sizes = (f"{of[n]['extra_bytes'] / MIB:.0f}" if n in of else "not run" for n in names)
        rows.append([count, *sizes, f"{of['native']['over_input']:.1f}"])
    return table("M | `native` | `chunked` | `reference` | `native` / input", rows)


def record_of_losses(name: str) -> Fields | None:
    """A record of the losses beside NT-Xent, if there is one."""
    path = f"bench/results/{name}_cpu.json"
    return record(path) if (ROOT / path).is_file() else None


def not_recorded(script: str) -> str:
    return f"There is no record yet: `python bench/{script}.py` has to be run on a quiet machine."


@template
def losses_cpu() -> str:
    content = record_of_losses("losses")
    if content is None:
        return not_recorded("losses")
    rows = []
    for name, loss in LOSSES.items():
        for count in sorted({r["M"] for r in select(content, "rows", loss=name)}):
            cell = {"loss": name, "M": count}
            memory = {r["name"]: r["extra_bytes"] for r in select(content, "memory", **cell)}
            errors = {r["name"]: r["error_of_gradient"] for r in select(content, "errors", **cell)}
            for one in loss.candidates().values():
                cells = [loss.title, one.title, f"{count:,}"]
                timed = select(content, "rows", **cell, name=one.name)
                if not timed:
                    rows.append([*cells, "not run", "", "", ""])
                    continue
                ratio = timed[0].get("ours_over_it")
                share = "" if ratio is None else f"{ratio['value']:.3f}"
                if ratio is not None and ratio["low"] is not None:
                    share += f" ({ratio['low']:.3f} to {ratio['high']:.3f})"
                size = mebibytes(memory[one.name]) if one.name in memory else "-"
                error = f"{errors[one.name]:.1e}" if one.name in errors else "-"
                rows.append([*cells, milliseconds(timed[0]["median"]), share, size, error])
    heads = (
        "loss | computed by | rows | ms | ours / this (99 % interval) | extra MiB "
        "| error of the gradient"
    )
    return f"{measured(content)}\n\n{table(heads, rows, text_columns=2)}"


def gain_of_loss(name: str, other: str, title: str) -> str:
    """A loss beside another project's formula, up to the first size that was not run."""
    content = record_of_losses("losses")
    if content is None:
        return not_recorded("losses")
    ours, rows = LOSSES[name].ours.name, []
    for count in sorted({r["M"] for r in select(content, "rows", loss=name)}):
        cell = {"loss": name, "M": count}
        memory = {r["name"]: mebibytes(r["extra_bytes"]) for r in select(content, "memory", **cell)}
        here = milliseconds(only(content, "rows", **cell, name=ours)["median"])
        theirs = select(content, "rows", **cell, name=other)
        if not theirs:
            rows.append([f"{count:,}", "not run", here, "", "", memory[ours]])
            break
        faster = two_digits(1 / theirs[0]["ours_over_it"]["value"])
        time = milliseconds(theirs[0]["median"])
        rows.append([f"{count:,}", time, here, faster, memory[other], memory[ours]])
    heads = f"rows | {title}, ms | here, ms | times as fast | {title}, MiB | here, MiB"
    return f"{measured(content)}\n\n{table(heads, rows)}"


TEMPLATES["gain_open_clip"] = partial(gain_of_loss, "clip", "open_clip", "open_clip's")
TEMPLATES["gain_info_nce"] = partial(
    gain_of_loss, "info_nce", "plain_info_nce", "info-nce-pytorch's"
)
TEMPLATES["gain_sup_con"] = partial(
    gain_of_loss, "sup_con", "metric_learning_sup_con", "pytorch-metric-learning"
)


@template
def losses_targets() -> str:
    content = record_of_losses("losses")
    if content is None:
        return not_recorded("losses")
    # Records from before these times were measured have no such section.
    products = {(p["loss"], p["M"]): p["seconds"] for p in content.get("products", [])}
    rows = []
    for t in content["targets"]:
        if t["target"] is not None:
            loss = LOSSES[t["loss"]]
            other = loss.candidates()[t["other"]].title
            value = "not run" if t["ratio"] is None else f"{t['ratio']:.3f}"
            cell = {"loss": t["loss"], "M": t["M"]}
            timed = select(content, "rows", **cell, name=t["other"])
            alone = products.get((t["loss"], t["M"]))
            least = "-" if alone is None or not timed else f"{alone / timed[0]['median']:.3f}"
            rows.append([loss.title, other, f"{t['target']:g}", least, value, t["verdict"]])
    heads = "loss | over | at most | matrix products alone | measured | "
    return table(heads, rows, text_columns=2)


@template
def losses_memory() -> str:
    content = record_of_losses("losses_memory")
    if content is None:
        return not_recorded("losses_memory")
    rows = [
        [
            r["title"],
            f"{r['M']:,}",
            mebibytes(r["input_bytes"]),
            mebibytes(r["extra_bytes"]),
            f"{r['over_input']:.2f}",
        ]
        for r in content["rows"]
    ]
    heads = "loss | rows | input, MiB | extra memory, MiB | extra / input"
    return f"{measured(content)}\n\n{table(heads, rows, text_columns=1)}"


STAGES = "bench/results/cpu_kernel_stages.json"
TILE_CORE = "tile core alone, GFLOP/s of one core"
# Wording of that record, and the words of the pages for it.
WORDS = {
    "exponentials kept": "exponentials saved",
    "kept exponentials": "saved exponentials",
}


def stages(name: str, text_columns: int) -> str:
    """A table of the CPU kernel's stages, which is recorded as text."""
    of = record(STAGES)["tables"][name]
    text = table(" | ".join(of["columns"]), of["rows"], text_columns=text_columns)
    for recorded, shown in WORDS.items():
        text = text.replace(recorded, shown)
    return text


TEMPLATES["tile_core"] = partial(stages, TILE_CORE, 0)
TEMPLATES["call_stages"] = partial(stages, "stages of one call, ms", 1)
TEMPLATES["changes_tried"] = partial(stages, "changes tried", 1)


@template
def targets_cpu() -> str:
    content = record("bench/results/nt_xent_cpu.json")
    best = max(float(x) for row in record(STAGES)["tables"][TILE_CORE]["rows"] for x in row[1:])
    rows = []
    for t in select(content, "targets", part="targets", numerator="native"):
        size = {"M": t["M"], "D": t["D"], "pass": t["pass"]}
        products = only(content, "rows", part="targets", name=MM, **size)["median"]
        # The backward pass computes the M²/2 exponentials again where they exceed the limit.
        saves_exponentials = 2 * t["M"] ** 2 <= DEFAULT_MEBIBYTES * MIB
        passes = 1 if t["pass"] == FORWARD else 3 if saves_exponentials else 4
        floor = passes * t["M"] ** 2 * t["D"] / (2e9 * best) / products
        place = [f"{t['M']}, {t['D']}", t["pass"].replace("+", " + ")]
        ratios = [f"{x:.2f}" for x in (floor, t["target"], t["ratio"])]
        rows.append([*place, *ratios, "met" if t["verdict"] == "met" else "missed"])
    return table("M, D | pass | floor | target | recorded | ", rows, text_columns=2)


def whole_loss_times(**size: object) -> dict[str, float]:
    """Milliseconds of each part of the whole loss at a size."""
    rows = select(record("bench/results/prediction_loss_cpu.json"), "rows", **size)
    return {r["name"]: 1e3 * r["median"] for r in rows}


@template
def whole_loss() -> str:
    names = ("eager prediction", "prediction", "limit, fresh gradient", "eager whole", "whole")
    content = record("bench/results/prediction_loss_cpu.json")
    rows = []
    for pairs, features, *patches in sorted({(r["B"], r["D"], *r["N"]) for r in content["rows"]}):
        times = whole_loss_times(B=pairs, D=features, N=patches)
        cells = [f"{times[name]:.3g}" for name in names]
        speed_up = f"{times['eager whole'] / times['whole']:.1f}"
        rows.append([pairs, "/".join(map(str, patches)), features, *cells, speed_up])
    heads = (
        "B | N | D | prediction term: eager | native | byte limit | whole loss: eager | native "
        "| speed-up"
    )
    return table(heads, rows)


@template
def whole_loss_speed_up() -> str:
    times, large = whole_loss_times(B=128, D=768), whole_loss_times(B=2048, D=384)
    return f"""
At B = 128 pairs, 196/49/16 patches and D = 768 the whole C-JEPA loss takes {times["whole"]:.1f} ms,
forward + backward with the gradients of all inputs. The usual eager formula takes
{times["eager whole"]:.0f} ms, {times["eager whole"] / times["whole"]:.1f} times as long. At
B = 2048, 16/4/1 patches and D = 384 the contrastive term dominates, and eager takes
{large["eager whole"] / large["whole"]:.1f} times as long.
"""


@template
def training_step() -> str:
    rows = [
        [
            f"`configs/{r['configuration']}.yaml`",
            *(f"{1e3 * r[f'step_{when}']:.1f}" for when in ("before", "after")),
            *(f"{1e3 * r[f'loss_{when}']:.2f}" for when in ("before", "after")),
        ]
        for r in record("bench/results/training_step_cpu.json")["rows"]
    ]
    heads = "configuration | step before, ms | after | loss before, ms | after"
    return table(heads, rows, text_columns=1)


TEMPLATES["temperature_errors"] = partial(
    listed,
    "bench/results/temperature_error_cpu.json",
    "τ | loss, textbook | loss, here | gradient, textbook | gradient, here",
    "{temperature} | {textbook_loss:.0e} | {here_loss:.0e} | {textbook_gradient:.0e} "
    "| {here_gradient:.0e}",
)
SCHEMES = {
    "ring": "ring",
    "all_gather": "all-gather",
    "lightly": "lightly",
    "open_clip": "open_clip",
    "inf_cl": "Inf-CL's ring",
}
RANKS = "bench/results/distributed_cpu.json"


def cost_of_ranks(field: str, unit: float, head: str) -> str:
    """What each scheme costs a rank, by the number of ranks."""
    content = record("bench/results/distributed_cost.json")
    rows = []
    for ranks in sorted({r["ranks"] for r in content["rows"]}):
        costs = (only(content, "rows", ranks=ranks, scheme=name)[field] for name in SCHEMES)
        rows.append([f"{ranks:,}", *(digits(cost / unit) for cost in costs)])
    return table(" | ".join([head, *SCHEMES.values()]), rows)


TEMPLATES["ranks_sent"] = partial(cost_of_ranks, "bytes", MIB, "R, sent in MiB")
TEMPLATES["ranks_flops"] = partial(cost_of_ranks, "flops", 1e12, "R, TFLOP")


TEMPLATES["ranks_hidden"] = partial(
    listed,
    "bench/results/distributed_cost.json",
    "link | R | D | pairs a rank | whole batch",
    "{link} | {ranks} | {D} | {pairs:,} | {whole_batch:,}",
    section="hidden",
    text_columns=1,
)


@template
def ranks_times() -> str:
    content = record(RANKS)
    rows = []
    for own, features in sorted({(r["M_r"], r["D"]) for r in content["rows"]}):
        of = {r["name"]: r for r in select(content, "rows", M_r=own, D=features)}
        work = [of[name]["work"] for name in ("ring", "all_gather", "strips", "lightly")]
        times = [of[name]["time"] for name in ("ring", "all_gather")]
        cells = [*(digits(1e3 * x) for x in work), f"{work[0] / work[2]:.2f}"]
        rows.append([own, features, *cells, *(digits(1e3 * x) for x in times)])
    heads = (
        "M_r | D | ring: work, ms | all-gather | strips | lightly | work of the ring / strips "
        "| ring: time, ms | all-gather"
    )
    return table(heads, rows)


@template
def ranks_speed_up() -> str:
    work = {r["name"]: r["work"] for r in select(record(RANKS), "rows", M_r=4096, D=256)}
    strips, gather, lightly = (
        f"{work['ring'] / work[name]:.2f}" for name in ("strips", "all_gather", "lightly")
    )
    return f"""
On two processes of 4096 rows each, D = 256, the ring takes {strips} of the CPU time of two
independent passes over row strips with the same kernels, {gather} of that of our all-gather and
{lightly} of that of lightly's formula.
"""


@template
def ranks_memory() -> str:
    rows: dict[tuple[int, ...], list[str]] = {}
    for strategy in ("ring", "all_gather"):
        for r in select(record(RANKS), "memory", strategy=strategy, saved=False):
            cells = rows.setdefault((r["ranks"], r["M_r"], r["D"]), [])
            cells += [f"{r['extra_bytes'] / MIB:.0f}", f"{r['over_input']:.1f}"]
    heads = "R | M_r | D | ring, MiB | / own rows | all-gather, MiB | / own rows"
    return table(heads, ([*size, *cells] for size, cells in rows.items()))


@template
def gpu_large() -> str:
    rows = []
    for d, m in sorted({(r["D"], r["M"]) for r in select(gpu_record(), "rows", part="targets")}):
        of = partial(gpu_median, "targets", (m, d))
        mm, forward = (1e3 * of(name, FORWARD) for name in (MM, TRITON))
        mm3, both, eager = (1e3 * of(name) for name in (MM3, TRITON, AUTOCAST))
        ratios = f"{forward / mm:.2f}", f"{both / mm3:.2f}"
        cells = [f"{mm:.3f}", f"{forward:.3f}", ratios[0], f"{both:.3f}", ratios[1]]
        rows.append([m, d, *cells, f"{eager:.1f}", f"{eager / both:.1f}"])
    heads = (
        "M = 2B | D | mm | forward | / mm | forward + backward | / 3 mm "
        "| eager, forward + backward | / cjepa_kernels"
    )
    return table(heads, rows)


@template
def gpu_limits() -> str:
    content = gpu_record()
    memory = max(content["memory"], key=lambda r: r["M"])
    (product,), (first,) = content["matmul"], content["first_use"]
    return f"""
A product of two {product["size"]} × {product["size"]} matrices runs at
{product["flops"] / 1e12:.0f} TFLOP/s here. At M = {memory["M"]:,}, D = {memory["D"]} the peak
memory beyond inputs and gradients is {memory["over_input"]:.2f} times the input; a matrix of bf16
similarities would take {2 * memory["M"] ** 2 / 2**40:.0f} TiB. Forward + backward takes
{memory["seconds"]:.1f} s there. The first call at a new size compiles the kernels and takes
{first["seconds"]:.1f} s.
"""


@template
def gpu_others() -> str:
    parts = {
        ("compiled", COMPILED_AUTOCAST): "`torch.compile` of eager, bf16 under autocast",
        ("inf_cl", "inf_cl"): "Inf-CL, symmetric InfoNCE, tf32",
        ("fp32", "eager fp32"): "eager, fp32",
        ("tf32", "eager tf32"): "eager, tf32",
        ("prediction", "its bytes copied"): "prediction loss: copies of as many bytes",
    }
    rows = []
    for (part, name), title in parts.items():
        for r in select(gpu_record(), "rows", part=part, name=name, pass_=BOTH):
            ours, theirs = 1e3 * gpu_median(part, (r["M"], r["D"]), TRITON), 1e3 * r["median"]
            cells = [f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"]
            rows.append([title, r["M"], r["D"], *cells])
    return table(" | rows | D | cjepa_kernels | the other | ratio", rows, text_columns=1)


@template
def gpu_small() -> str:
    parts = ("latency", "latency_graphed")
    rows = []
    for r in select(gpu_record(), "rows", part="latency", name=TRITON, pass_=BOTH):
        size = (r["M"], r["D"])
        times = (gpu_median(part, size, name) for part in parts for name in (TRITON, EAGER_BF16))
        rows.append([*size, *(f"{1e6 * seconds:.0f}" for seconds in times)])
    return table("M | D | as called | eager | CUDA graph | eager", sorted(rows))


def checked() -> Fields | None:
    """The record of ``make gpu-check``, if one has been taken over."""
    path = f"bench/results/{GPU_CHECK}"
    return record(path) if (ROOT / path).is_file() else None


@template
def gpu_check() -> str:
    return gpu_check_page.body(checked())


@template
def latency_as_called() -> str:
    return gpu_check_page.latency(checked(), earlier=record(GPU))


@template
def gpu_accuracy() -> str:
    heads, row = (
        "dtype | back end | loss | gradient",
        "{dtype} | {name} | {loss:.1e} | {gradient:.1e}",
    )
    return listed(gpu_record().path, heads, row, section="accuracy", text_columns=2)


@template
def gpu_targets() -> str:
    groups: dict[tuple[str, str], list[Fields]] = {}
    for t in gpu_record()["targets"]:
        groups.setdefault((t["target"], f"{t['relation']} {t['bound']}"), []).append(t)
    rows = []
    for (target, bound), found in groups.items():
        values = [t["value"] for t in found if t["value"] is not None] or [math.nan]
        span = dict.fromkeys(digits(extreme) for extreme in (min(values), max(values)))
        met = [t["verdict"] for t in found].count("met")
        rows.append([target, bound, " to ".join(span), f"{met} of {len(found)}"])
    return table("target | bound | values | met", rows, text_columns=1)


@template
def gpu_instructions() -> str:
    names = {
        "strips_kernel": "strips",
        "owned_rows_kernel": "owned rows",
        "tiles_kernel": "tiles",
        "coefficient_tiles_kernel": "coefficients",
    }
    units = ("product", "exponential", "issue")
    rows = []
    content = record("bench/results/gpu_instructions_sm90.json")
    for r in content["rows"]:
        cycles = [r[f"{unit}_cycles"] for unit in units]
        kernel = names[r["kernel"]] + (", edge" if r["place"] == "edge" else "")
        rows.append([r["D"], kernel, f"{r['instructions']:.1f}", *(f"{x:.0f}" for x in cycles)])
    heads = "D | kernel | instructions an element | product | exponentials | all instructions"
    at = content["environment"]
    made = f"Counted at commit {at['commit']}. {since(at['sources'])}"
    return f"{table(heads, rows, text_columns=2)}\n\n{made}"


def comparison(name: str) -> str:
    """Tables and environment of a comparison of training runs."""
    return comparison_markdown(load_comparison(ROOT / "docs" / "results" / f"{name}.json"))


def mean_pooled(name: str) -> str:
    """The comparison's table of mean-pooled features."""
    content = load_comparison(ROOT / "docs" / "results" / f"{name}.json")
    return f"""
The table has the accuracy of mean-pooled patch features on the test images after
{content.config["trainer"]["epochs"]} epochs, as mean ± standard deviation over
{len(content.seeds)} seeds.

{text_tables(content)[0].markdown()}
"""


for name in ("digits", "digits-transfer", "cifar10"):
    TEMPLATES[f"comparison_{name.replace('-', '_')}"] = partial(comparison, name)
TEMPLATES["mean_pooled_digits"] = partial(mean_pooled, "digits")
TEMPLATES["mean_pooled_cifar10"] = partial(mean_pooled, "cifar10")

TUNING = "docs/results/tuning.json"
ENDS = {
    "contrastive_accuracy": "accuracy at the end",
    "term_ratio": "ratio of the terms",
    "gap": "pos − neg",
}


@template
def tuning() -> str:
    rows = [
        [
            r["setting"],
            *(
                f"{statistics.mean(r[k]):.1f} ± {statistics.stdev(r[k]):.1f}"
                for k in HEADLINE_TITLES
            ),
            *(f"{statistics.mean(r[k]):.2f}" for k in ENDS),
        ]
        for r in record(TUNING)["rows"]
    ]
    return table(
        " | ".join(["setting", *HEADLINE_TITLES.values(), *ENDS.values()]), rows, text_columns=1
    )


@template
def one_mask() -> str:
    shared, apart = record(TUNING)["one mask for both views"], record(TUNING)["rows"][0]
    probes = {**HEADLINE_TITLES, "mean/linear": "linear, mean-pooled"}
    rows = [
        ["one mask for both views", *(f"{shared[key]:.1f}" for key in probes)],
        ["independent masks", *(f"{apart[key][0]:.1f}" for key in probes)],
    ]
    accuracy = shared["accuracy_at_epoch_7"], shared["contrastive_accuracy"]
    return f"""
{table(" | ".join(["seed 0", *probes.values()]), rows, text_columns=1)}

With one mask the accuracy was {accuracy[0]:.2f} at epoch 7 and {accuracy[1]:.2f} at the end, and
the contrastive loss ended at {shared["contrastive_loss"]:.2f}.
"""


@template
def advisor_rules() -> str:
    chance = f"{advisor.AT_CHANCE_LOSS} of log(2B − 1)"
    rules = {
        "contrastive_at_chance": f"the contrastive loss is above {chance} and the accuracy below "
        f"{advisor.AT_CHANCE_ACCURACY:g} / (2B − 1), both of chance, {advisor.PATIENCE} epochs "
        "after warm-up: the term does not learn",
        "high_accuracy": f"accuracy > {advisor.HIGH_ACCURACY}: the task is almost solved; check "
        "the masks, or make it harder",
        "contrastive_dominates": "the weighted contrastive term is above "
        f"{advisor.DOMINATING_RATIO:g} times the weighted JEPA term",
        "gap_not_growing": f"the gap pos − neg is below {advisor.SEPARATED_GAP} and grew by less "
        f"than {advisor.MIN_GAP_GROWTH} over {advisor.PATIENCE} epochs",
        "shared_mask_shortcut": "accuracy near 1 soon after warm-up, with a collapsing "
        "contrastive loss",
        "collapse": "the CLS features of different images are almost equal",
    }
    rows = [[f"`{name}`", rules[name], note] for name, note in advisor.NOTES.items()]
    return table("finding | rule | what our own runs showed", rows, text_columns=3)


@template
def advisor_runs() -> str:
    recipe = load_comparison(ROOT / "docs" / "results" / "digits.json").arm_runs("cjepa")[0]
    runs = [("the recipe, weight 0.1", recipe.evaluation)]
    runs += [(r["setting"], r["evaluation"]) for r in record("docs/results/advisor.json")["runs"]]
    rows = [
        [setting, *(f"{values[key]:.1f}" for key in HEADLINE_TITLES)] for setting, values in runs
    ]
    return table(" | ".join(["setting", *HEADLINE_TITLES.values()]), rows, text_columns=1)


def pages() -> list[Path]:
    """The pages that may hold blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generate(text: str, page: str) -> str:
    """A page's text with every block written anew.

    Args:
        text: The page.
        page: Its name, for errors.

    Raises:
        FigureError: If a marker has no partner or no template, or a record does not fit.
    """
    if len(MARKER.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise FigureError(f"{page}: a marker of a block has no partner")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TEMPLATES:
            raise FigureError(f"{page}: docs/generate_figures.py has no template {name!r}")
        try:
            parts = TEMPLATES[name]().strip("\n").split("\n\n")
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise FigureError(f"{page}, block {name!r}: {error or type(error).__name__}") from error
        # A paragraph is one line, because a line that began with the "+" of a sum would be a list.
        parts = [p if p[0] in "|-*" else " ".join(p.split()) for p in parts]
        return "\n\n".join([f"<!-- figures: {name} -->", *parts, "<!-- end of figures -->"])

    return BLOCK.sub(made, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a change")
    check = parser.parse_args().check
    changed = 0
    for path in pages():
        text = path.read_text(encoding="utf-8")
        try:
            new = generate(text, path.relative_to(ROOT).as_posix())
        except FigureError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if new != text:
            changed += 1
            print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
            if not check:
                path.write_text(new, encoding="utf-8")
    return int(check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
