"""Timers, and rounds in which candidates take turns.

A change of the machine's speed then hits all candidates alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cjepa_kernels.error_lines import kind_and_first_line

Run = Callable[[], object]
Build = Callable[[], Run]
Clock = Callable[[Run], float]
Times = dict[str, list[float]]  # Seconds of each round, by name.

FLUSHED_BYTES = 2**28  # More than the L2 cache of any GPU.
SHORTEST_WAIT, LONGEST_WAIT = 2**20, 2**27  # GPU cycles: about 0.5 ms and 70 ms.


def host_clock(run: Run) -> float:
    """Time a call that ends when its work has ended, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class RankClock:
    """Times a call that every rank makes, and keeps the CPU time of each call beside it.

    The ranks wait for each other before the call. The CPU time of this process, in seconds, does
    not count the time for which the process waits within the call.
    """

    def __init__(self) -> None:
        self.work: list[float] = []

    def __call__(self, run: Run) -> float:
        dist.barrier()
        start = time.process_time()
        seconds = host_clock(run)
        self.work.append(time.process_time() - start)
        return seconds


def now_on_rank_0() -> float:
    """Seconds on the clock of rank 0, so that all ranks make as many rounds. All must call it."""
    seconds = torch.tensor(time.perf_counter(), dtype=torch.float64)
    dist.broadcast(seconds, src=0)
    return float(seconds)


class DeviceClock(Protocol):
    """Times calls on a CUDA device in seconds; ``of`` says in a record what was timed."""

    of: str

    def __call__(self, run: Run) -> float: ...


class IdleDevice:
    """Times a call on a device that waits for it, so the host's time to launch counts."""

    of = "latency"

    def __call__(self, run: Run) -> float:
        torch.cuda.synchronize()
        start, end = _events()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class BusyDevice:
    """Times only the device: the call is launched while the device still waits.

    The L2 cache is emptied before. If the host needs longer to launch than the device waits, the
    wait is doubled and the call repeated; ``of`` says when even the longest wait was too short.
    """

    of = "device"

    def __init__(self, device: str = "cuda") -> None:
        self.cycles = SHORTEST_WAIT
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> float:
        while True:
            start, end = _events()
            self.flushed.zero_()
            torch.cuda._sleep(self.cycles)  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            late = start.query()
            end.synchronize()
            if late and self.cycles < LONGEST_WAIT:
                self.cycles *= 2
                continue
            if late:
                self.of = "device and host"
            return float(start.elapsed_time(end)) / 1e3


def _events() -> tuple[Any, Any]:
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


def clock_of(device: str) -> Clock:
    """The timer of calls on a device."""
    return IdleDevice() if torch.device(device).type == "cuda" else host_clock


def add_rounds(
    candidates: dict[str, Run],
    times: Times,
    *,
    clock: Clock,
    errors: dict[str, str] | None = None,
) -> None:
    """Time every candidate once more, in turn.

    The order is reversed from one round to the next, so that none always runs after the same one
    and finds its caches.

    Args:
        candidates: Calls by name.
        times: Seconds of each name's rounds; one is appended.
        clock: Timer of a call.
        errors: A candidate that fails leaves ``candidates`` and ``times``, and its error is
            written here. Without it the error is raised.
    """
    names = list(candidates)
    odd = max(map(len, times.values())) % 2
    for name in reversed(names) if odd else names:
        try:
            times[name].append(clock(candidates[name]))
        except Exception as error:
            if errors is None:
                raise
            errors[name] = kind_and_first_line(error)
            del candidates[name], times[name]


def timed_rounds(
    candidates: dict[str, Run],
    *,
    seconds: float,
    least: int = 5,
    clock: Clock = host_clock,
    warm: bool = False,
    shares: bool = False,
    errors: dict[str, str] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time every candidate in turn, round after round, for about ``seconds``.

    Args:
        candidates: Calls by name.
        seconds: Time for all of them together.
        least: Least number of rounds.
        clock: Timer of a call.
        warm: Whether they have run before. Otherwise each runs once, untimed.
        shares: Whether each candidate has an equal share of the time and leaves when it is used
            up, so that a slow one does not decide how often a quick one is timed. Otherwise all
            run in every round.
        errors: As for ``add_rounds``.
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
        add_rounds(running, times, clock=clock, errors=errors)
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
    """``summarise`` of each candidate's ``timed_rounds``.

    Args:
        candidates: Calls by name. Each runs once before, untimed.
        seconds: Time for all of them together.
        least: Least number of rounds.
        clock: Timer of a call.
        shares: As for ``timed_rounds``.
    """
    times = timed_rounds(candidates, seconds=seconds, least=least, clock=clock, shares=shares)
    return {name: summarise(values) for name, values in times.items()}


def interleaved_on_gpu(
    candidates: dict[str, Build],
    *,
    seconds: float,
    least: int = 5,
    clock: Callable[[], DeviceClock] = BusyDevice,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """``summarise`` of each candidate's rounds on a GPU, and why the others have none.

    Args:
        candidates: Makers of the calls, by name.
        seconds: Time for all of them together.
        least: Least number of rounds.
        clock: Makes the timer of one candidate.

    Returns:
        ``summarise`` with the timer's ``of``, and the first line of the error of each candidate
        that failed.
    """
    clocks: dict[str, DeviceClock] = {}
    timed_calls: dict[str, Run] = {}
    errors: dict[str, str] = {}
    for name, build in candidates.items():
        try:
            run = build()
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            clocks[name] = clock()
            timed_calls[name] = partial(clocks[name], run)
        except Exception as error:
            errors[name] = kind_and_first_line(error)
        if name in errors:  # An error holds on to tensors until its block has ended.
            torch.cuda.empty_cache()
    times = timed_rounds(
        timed_calls,
        seconds=seconds,
        least=least,
        clock=lambda timed: timed(),  # type: ignore[arg-type,return-value]
        warm=True,
        errors=errors,
    )
    return {n: {"of": clocks[n].of, **summarise(values)} for n, values in times.items()}, errors


def graphed(build: Build) -> Build:
    """The same call, replayed from a CUDA graph."""

    def capture() -> Run:
        run = build()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay: Run = graph.replay
        return replay

    return capture


def summarise(values: list[float]) -> dict[str, float]:
    """Median, p20, p80 and number of times."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": statistics.median(values),
        "p20": deciles[1],
        "p80": deciles[7],
        "rounds": len(values),
    }
