"""How bench/gpu.py times: CUDA events around calls, candidates in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from gpu_targets import Record

DEVICE = "cuda"
SECONDS = 0.6  # of a cell, but for its least rounds
FLUSH = 2**28  # bytes, more than any L2 cache
SHORTEST_WAIT, LONGEST_WAIT = 2**20, 2**27  # cycles, about half a millisecond and 70 ms

Run = Callable[[], object]
Build = Callable[[], Run]


class IdleDevice:
    """Times a call on a device that waits for it: what the host takes to launch counts."""

    of = "latency"

    def __call__(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class BusyDevice:
    """Times a call that is all launched before the device comes to it, its L2 cache emptied.

    The device waits for longer until the host is first; ``of`` says where it never was.
    """

    of = "device"

    def __init__(self) -> None:
        self.cycles = SHORTEST_WAIT
        self.other = torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)

    def __call__(self, run: Run) -> float:
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.other.zero_()
            torch.cuda._sleep(self.cycles)
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


Clock = type[IdleDevice] | type[BusyDevice]


def in_turn(
    candidates: dict[str, Build],
    clock: Clock = BusyDevice,
    seconds: float = SECONDS,
    least: int = 5,
) -> tuple[dict[str, Record], dict[str, str]]:
    """Median, p20 and p80 in seconds of each candidate, and why others have none."""
    runs: dict[str, Run] = {}
    errors: dict[str, str] = {}
    for name, build in candidates.items():
        try:
            runs[name] = build()
            for _ in range(3):
                runs[name]()
            torch.cuda.synchronize()
        except Exception as error:
            runs.pop(name, None)
            errors[name] = first_line(error)
        if name in errors:  # no sooner: the error holds on to tensors
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in runs}
    clocks = {name: clock() for name in runs}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while runs and (rounds < least or time.perf_counter() < deadline):
        for name, run in list(runs.items()):
            try:
                times[name].append(clocks[name](run))
            except Exception as error:
                del runs[name], times[name]
                errors[name] = first_line(error)
        rounds += 1
    return {name: summarise(times[name], clocks[name].of) for name in runs}, errors


def summarise(times: list[float], of: str) -> Record:
    """What a row of the results file says of some times."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    return {
        "of": of,
        "median": median,
        "p20": deciles[1],
        "p80": deciles[7],
        "rounds": len(times),
    }


def first_line(error: BaseException) -> str:
    """Kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def graphed(build: Build) -> Build:
    """The same from a CUDA graph."""

    def capture() -> Run:
        run = build()
        stream = torch.cuda.Stream()
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
