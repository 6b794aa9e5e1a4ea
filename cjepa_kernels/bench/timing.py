"""Interleaved timing: candidates take turns, so that a change of the machine's speed hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
Clock = Callable[[Run], float]
Times = dict[str, list[float]]  # seconds of each round, by name


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


def add_rounds(candidates: dict[str, Run], times: Times, *, clock: Clock) -> None:
    """Time every candidate once more, in turn.

    The order is reversed from one round to the next, so that none always runs after the same one
    and finds its caches.

    Args:
        candidates: Calls by name.
        times: Seconds of each name's rounds; one is appended.
        clock: Seconds of a call.
    """
    names = list(candidates)
    odd = max(map(len, times.values())) % 2
    for name in reversed(names) if odd else names:
        times[name].append(clock(candidates[name]))


def timed_rounds(
    candidates: dict[str, Run],
    *,
    seconds: float,
    least: int = 5,
    clock: Clock = host_clock,
    warm: bool = False,
    shares: bool = False,
    now: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time every candidate in turn, round after round, for about ``seconds``.

    Args:
        candidates: Calls by name.
        seconds: Time for all of them together.
        least: Rounds at least.
        clock: Seconds of a call.
        warm: They have run before; else each does once, untimed.
        shares: Each has an equal share of the time and leaves when it is used up, so that a slow
            one does not decide how often a quick one is timed. Else all run in every round.
        now: Seconds since some moment.

    Returns:
        For each name the seconds of its calls, by round.
    """
    if not warm:
        for run in candidates.values():
            run()
    times: Times = {name: [] for name in candidates}
    running = dict(candidates)
    deadline = now() + seconds
    rounds = 0
    while running:
        add_rounds(running, times, clock=clock)
        rounds += 1
        if rounds < least:
            continue
        if shares:
            share = seconds / len(candidates)
            running = {name: run for name, run in running.items() if sum(times[name]) < share}
        elif now() >= deadline:
            break
    return times


def interleaved(
    candidates: dict[str, Run],
    *,
    seconds: float,
    least: int = 5,
    clock: Clock = host_clock,
    shares: bool = False,
) -> dict[str, dict[str, float]]:
    """``timed_rounds``, of which each name's ``median``, ``p20``, ``p80`` and ``rounds`` are left.

    Args:
        candidates: Calls by name; each runs once before, untimed.
        seconds: Time for all of them together.
        least: Rounds at least.
        clock: Seconds of a call.
        shares: As of ``timed_rounds``.
    """
    times = timed_rounds(candidates, seconds=seconds, least=least, clock=clock, shares=shares)
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
