"""NT-Xent of two processes: work, time and memory of the ring beside other ways to share it.

    python bench/distributed.py [--seconds 6] [--quick] [--no-save]

Each of two gloo processes has one thread and holds M_r of the M = 2 M_r rows in fp32. A round runs
forward + backward of every candidate in turn. *Work* is the CPU time of both processes, in which
waiting does not count. *Time* is the wall-clock time of the slower one.

    ring        each pair of shards is multiplied once
    all_gather  a rank gathers all features and multiplies its own rows with all others; the ranks
                exchange (g r, LSE-) for the backward
    strips      a rank gathers all features, computes one rectangle of its own rows and all rows
                with the same kernels, and the gradients of both sides; the ranks add up the
                gradients of the gathered rows. Its sums leave nothing out, which changes no work
    lightly     lightly's formula with gather_distributed=True, in eager PyTorch

Then the script measures the peak memory of a rank, with exponentials saved for the backward (see
CJEPA_KEPT_MIB) and without. A target that is missed is reported and is no error. The script writes
bench/results/distributed_cpu.json. What a rank sends and multiplies is the subject of
distributed_cost.py.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cjepa_kernels import cross_logsumexp, nt_xent, pair_similarity
from cjepa_kernels.bench.candidates import BOTH, one_pass
from cjepa_kernels.bench.formulas import TEMPERATURE, gather_with_gradient, lightly_of_group
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.bench.targets import Target, print_targets
from cjepa_kernels.bench.timing import RankClock, Run, now_on_rank_0, summarise, timed_rounds
from cjepa_kernels.functional import dispatch
from cjepa_kernels.tables import print_table

Round = dict[str, float]  # Seconds of ``work`` and of ``time``.

SIZES = ((128, 128), (512, 128), (1024, 256), (4096, 256), (4096, 768))  # M_r, D
QUICK_SIZES = ((128, 16),)
STRATEGIES = ("ring", "all_gather")
WORK_TARGET = 0.6  # ring / strips
# Ranks, M_r, D, and whether exponentials may be saved. First M_r doubles, then the ranks do.
MEMORY_CASES = (
    *((2, rows, 256, saved) for saved in (True, False) for rows in (4096, 8192, 16384, 32768)),
    *((ranks, 512, 2048, False) for ranks in (2, 4, 8, 16)),
)
M_MMAP_THRESHOLD = -3  # An option of glibc's mallopt.
QUICK_MEMORY_CASES = ((2, 256, 16, True),)


def strips(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The mean over the own anchors, from the row sums of one rectangle of own and all rows."""
    own = torch.cat([z_i, z_j])
    out = cross_logsumexp(own, gather_with_gradient(own), temperature=TEMPERATURE)
    positive = pair_similarity(z_i, z_j).repeat(2)
    return (out.row_lse - positive / TEMPERATURE).mean()


def of_group(strategy: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """This package's loss over all ranks."""

    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        return nt_xent(
            z_i, z_j, temperature=TEMPERATURE, group=dist.group.WORLD, strategy=strategy
        ).loss

    return loss


def candidates() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The losses by name."""
    losses = {"ring": of_group("ring"), "all_gather": of_group("all_gather"), "strips": strips}
    return {**losses, "lightly": lightly_of_group}


def views(rows: int, features: int) -> tuple[Tensor, Tensor]:
    """The own pairs of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    z = torch.randn(2, rows // 2, features, generator=generator)
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


def start_rank(
    rank: int, ranks: int, directory: str, task: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    """Join the group as one process, run the task, and write its result as JSON."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    result = task(**arguments)
    Path(directory, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def on_ranks(ranks: int, task: Callable[..., Any], **arguments: Any) -> list[Any]:
    """Run a task on every rank of a new group; the results in the order of the ranks."""
    with tempfile.TemporaryDirectory() as directory:
        mp.start_processes(
            start_rank, (ranks, directory, task, arguments), nprocs=ranks, start_method="forkserver"
        )
        return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(ranks)]


def time_losses(rows: int, features: int, seconds: float) -> dict[str, list[Round]]:
    """The rounds of each candidate on this rank."""
    inputs = views(rows, features)
    clocks = {name: RankClock() for name in candidates()}
    timed_calls: dict[str, Run] = {}
    for name, loss in candidates().items():
        run = one_pass(loss, inputs, BOTH)
        run()
        timed_calls[name] = partial(clocks[name], run)
    times = timed_rounds(
        timed_calls,
        seconds=seconds,
        clock=lambda timed: timed(),  # type: ignore[arg-type,return-value]
        warm=True,
        now=now_on_rank_0,
    )
    return {
        name: [
            {"work": work, "time": time}
            for work, time in zip(clocks[name].work, times[name], strict=True)
        ]
        for name in times
    }


def peak_bytes() -> int:
    """The peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(strategy: str, saved: bool, rows: int, features: int) -> int:
    """Extra bytes at the peak of one forward and backward, gradients included."""
    if not saved:
        dispatch.SAVED_BYTES = 0
    if hasattr(ctypes.CDLL(None), "mallopt"):
        # Freed memory goes back to the system at once, so that the peak counts memory in use alone.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    z_i, z_j = views(rows, features)
    small = views(64, features)
    of_group(strategy)(*small).backward()
    before = peak_bytes()
    of_group(strategy)(z_i, z_j).backward()
    return peak_bytes() - before


def summary(per_rank: list[list[Round]]) -> dict[str, float]:
    """Medians over the rounds of the work of all ranks and the time of the slowest."""
    rounds = list(zip(*per_rank, strict=True))
    work = summarise([sum(rank["work"] for rank in ranks) for ranks in rounds])
    return {
        "work": work["median"],
        "work_p20": work["p20"],
        "work_p80": work["p80"],
        "time": statistics.median(max(rank["time"] for rank in ranks) for ranks in rounds),
        "rounds": len(rounds),
    }


def measure_times(sizes: tuple[tuple[int, int], ...], seconds: float) -> list[Record]:
    """Measure work and time: one record for each size and candidate."""
    rows = []
    for own_rows, features in sizes:
        print(f"measuring M_r={own_rows} D={features}", flush=True)
        per_rank = on_ranks(2, time_losses, rows=own_rows, features=features, seconds=seconds)
        for name in per_rank[0]:
            figures = summary([rank[name] for rank in per_rank])
            rows.append({"M_r": own_rows, "D": features, "name": name, **figures})
    return rows


def ratios(rows: list[Record]) -> list[Target]:
    """The ratios of the ring's work to that of each other candidate, with their targets."""
    rings = {(row["M_r"], row["D"]): row for row in rows if row["name"] == "ring"}
    targets = []
    for row in rows:
        if row["name"] != "ring":
            ring = rings[row["M_r"], row["D"]]
            name = f"work of the ring / {row['name']}"
            cell: Record = {"M_r": row["M_r"], "D": row["D"], "name": name}
            cell["time_ratio"] = ring["time"] / row["time"]
            limit = WORK_TARGET if row["name"] == "strips" else None
            targets.append(Target(cell, ring["work"] / row["work"], limit))
    return targets


def measure_memory(cases: tuple[tuple[int, int, int, bool], ...]) -> list[Record]:
    """Measure the peak extra memory of the rank that needs most, of each case and strategy."""
    records = []
    for ranks, rows, features, saved in cases:
        print(f"measuring the memory of {ranks} ranks of {rows} rows", flush=True)
        for strategy in STRATEGIES:
            extra = max(
                on_ranks(
                    ranks, peak_memory, strategy=strategy, saved=saved, rows=rows, features=features
                )
            )
            records.append(
                {
                    "strategy": strategy,
                    "ranks": ranks,
                    "M_r": rows,
                    "D": features,
                    "saved": saved,
                    "extra_bytes": extra,
                    "over_input": extra / (4 * rows * features),
                }
            )
    return records


def main() -> None:
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "cjepa_kernels"])
    options = read_options(__doc__, seconds=6.0, quick_seconds=0.1)
    rows = measure_times(QUICK_SIZES if options.quick else SIZES, options.seconds)
    print_table(
        ["M_r", "D", "candidate", "work, ms", "p20", "p80", "time, ms"],
        [
            [
                *(str(row[key]) for key in ("M_r", "D", "name")),
                *(f"{1e3 * row[key]:.1f}" for key in ("work", "work_p20", "work_p80", "time")),
            ]
            for row in rows
        ],
    )
    targets = ratios(rows)
    print_targets(targets, ["M_r", "D", "name"])
    memory = measure_memory(QUICK_MEMORY_CASES if options.quick else MEMORY_CASES)
    print_table(
        ["strategy", "R", "M_r", "D", "saved", "extra MiB", "/ own rows"],
        [
            [
                *(str(m[key]) for key in ("strategy", "ranks", "M_r", "D", "saved")),
                f"{m['extra_bytes'] / 2**20:.0f}",
                f"{m['over_input']:.1f}",
            ]
            for m in memory
        ],
    )
    judged = [target.record() for target in targets]
    save(options, "distributed_cpu", rows, targets=judged, memory=memory)


if __name__ == "__main__":
    main()
