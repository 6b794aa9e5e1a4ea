"""Interleaved timing: candidates take turns, so that a change of the machine's speed hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]


def host_clock(run: Run) -> float:
    """Seconds of a call that ends when its work has ended."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Run) -> float:
    """Seconds between two CUDA events around a call, on a device that waits for it."""
    events = torch.cuda.Event
    start, end = (events(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: str) -> Clock:
    """How calls on a device are timed."""
    return cuda_clock if torch.device(device).type == "cuda" else host_clock


def interleaved(
    candidates: dict[str, Run],
    *,
    seconds: float,
    least: int = 5,
    clock: Clock = host_clock,
    warm: bool = False,
    shares: bool = False,
) -> dict[str, dict[str, float]]:
    """Time every candidate in turn, round after round, for about ``seconds``.

    Args:
        candidates: Calls by name.
        seconds: Time for all of them together.
        least: Rounds at least.
        clock: Seconds of a call.
        warm: They have run before; else each does once, untimed.
        shares: Each has an equal share of the time and leaves when it is used up, so that a slow
            one does not decide how often a quick one is timed. Else all run in every round.

    Returns:
        For each name: ``median``, ``p20``, ``p80`` in seconds and the number of ``rounds``.
    """
    if not warm:
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    running = dict(candidates)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while running:
        for name, run in running.items():
            times[name].append(clock(run))
        rounds += 1
        if rounds < least:
            continue
        if shares:
            share = seconds / len(candidates)
            running = {name: run for name, run in running.items() if sum(times[name]) < share}
        elif time.perf_counter() >= deadline:
            break
    return {name: summarise(values) for name, values in times.items()}


def summarise(values: list[float]) -> dict[str, float]:
    """Median, p20, p80 and number of times."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": statistics.median(values),
        "p20": deciles[1],
        "p80": deciles[7],
        "rounds": float(len(values)),
    }
