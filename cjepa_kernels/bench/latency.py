"""Wall-clock time of calls on a device: one call alone, many in a row, and the host's share.

*As called* is the time of one call on an idle device, from the call until the device has finished.
*In a row* is the time of a call among others that are launched without waiting for the device.
*Host* is the time until a call on an idle device returns. A device that finishes later than the
host is what limits a call; otherwise the call is launch-bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from cjepa_kernels.bench.timing import Build, Clock, Run, summarise, timed_rounds
from cjepa_kernels.error_lines import kind_and_first_line

WARM_CALLS = 5  # torch.compile compiles in the first and records a CUDA graph in a later one.
BURST_SECONDS = 0.02  # Length of a burst of calls in a row.
SHORTEST_BURST, LONGEST_BURST = 5, 50  # Calls.

Wait = Callable[[], object]


def waiting_for(device: str) -> Wait:
    """The function that waits until a device has finished. A CPU has when a call returns."""
    if torch.device(device).type == "cuda":
        return partial(torch.cuda.synchronize, device)
    return lambda: None


class CallClock:
    """Times one call on an idle device in seconds, and keeps the host's share of each."""

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.host: list[float] = []

    def __call__(self, run: Run) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        returned = time.perf_counter()
        self.wait()
        end = time.perf_counter()
        self.host.append(returned - start)
        return end - start


class BurstClock:
    """Times a burst of calls in a row in seconds a call, until the device has finished all."""

    def __init__(self, wait: Wait, calls: int) -> None:
        self.wait, self.calls = wait, calls

    def __call__(self, run: Run) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(self.calls):
            run()
        self.wait()
        return (time.perf_counter() - start) / self.calls


def latencies(
    builds: dict[str, Build], *, wait: Wait, seconds: float, least: int = 5
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The three times of each candidate, and why the others have none.

    The candidates take turns, so that a change of the machine's speed affects all of them.

    Args:
        builds: Makers of the calls, by name.
        wait: Waits until the device has finished.
        seconds: Time for all candidates together, half of it for calls in a row.
        least: Least number of rounds.

    Returns:
        ``summarise`` of ``as_called``, ``host`` and ``in_a_row`` for each name, and the first line
        of the error of each candidate that failed.
    """
    runs: dict[str, Run] = {}
    errors: dict[str, str] = {}
    for name, build in builds.items():
        try:
            run = build()
            for _ in range(WARM_CALLS):
                run()
            wait()
        except Exception as error:
            errors[name] = kind_and_first_line(error)
        else:
            runs[name] = run
    single = {name: CallClock(wait) for name in runs}
    as_called = _rounds(runs, single, seconds / 2, least, errors)
    bursts = {
        name: BurstClock(wait, _calls(summarise(times)["median"]))
        for name, times in as_called.items()
    }
    still = {name: runs[name] for name in as_called}
    in_a_row = _rounds(still, bursts, seconds / 2, least, errors)
    rows = {
        name: {
            "as_called": summarise(as_called[name]),
            "in_a_row": summarise(times),
            "host": summarise(single[name].host),
        }
        for name, times in in_a_row.items()
    }
    return rows, errors


def _calls(seconds: float) -> int:
    """The number of calls in a burst."""
    return round(min(max(BURST_SECONDS / max(seconds, 1e-9), SHORTEST_BURST), LONGEST_BURST))


def _rounds(
    runs: dict[str, Run],
    clocks: Mapping[str, Clock],
    seconds: float,
    least: int,
    errors: dict[str, str],
) -> dict[str, list[float]]:
    """The seconds of each candidate's rounds, each taken by its own clock."""
    if not runs:
        return {}
    timed: dict[str, Run] = {name: partial(clocks[name], run) for name, run in runs.items()}
    return timed_rounds(
        timed,
        seconds=seconds,
        least=least,
        clock=lambda clocked: clocked(),  # type: ignore[arg-type,return-value]
        warm=True,
        errors=errors,
    )
