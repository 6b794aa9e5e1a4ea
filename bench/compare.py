"""Whether HEAD is slower than another revision: both in turn, ratios with their spread.

    python bench/compare.py BASE [--head HEAD] [--sizes 256x256,...] [--processes 5] [--rounds 6]

Each revision is a checkout of its own with a compiled module of its own (one for both where the
native sources are the same), removed at the end. Two processes, one of each, take turns; that is
repeated with new processes, because where memory lies changes times from process to process. The
interval of a ratio is a bootstrap over processes and the turns within them. Uncommitted changes
are not measured. Exit code 1 if HEAD is slower.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import revisions

from cjepa_kernels.bench.candidates import DIRECTIONS
from cjepa_kernels.bench.sizes import Size, parse_sizes
from cjepa_kernels.bench.tables import print_table

SIZES = "256x256,1024x256,4096x256,8192x256"
TURN = 0.1  # seconds of a turn, one call at least
DRAWS = 2000
CONFIDENCE = 0.99
LEAST = 0.02  # a change that counts
HEADER = ["M", "D", "pass", "base ms", "HEAD ms", "HEAD / base", "99 % interval", ""]
WORKER = Path(__file__).with_name("revision_worker.py")

Turns = list[list[tuple[float, float]]]  # of each process pair: medians (base, head) of each turn


class Case(NamedTuple):
    """What is timed."""

    size: Size
    direction: str


class Ratio(NamedTuple):
    """HEAD / base with its interval, and the medians in seconds."""

    base: float
    head: float
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` if the whole interval is, by what counts; else empty."""
        if self.low > 1 + LEAST:
            return "slower"
        return "faster" if self.high < 1 - LEAST else ""


class Worker:
    """A process that times one revision."""

    def __init__(self, checkout: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=revisions.environment(checkout),
        )

    def time(self, case: Case, seconds: float) -> float:
        """Median seconds of a turn."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"M": case.size.rows, "D": case.size.features, "pass": case.direction}
        self.process.stdin.write(json.dumps({**request, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.process.args} ended: see above")
        return statistics.median(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def measure(
    base: Path, head: Path, cases: Sequence[Case], *, processes: int, rounds: int, seconds: float
) -> dict[Case, Turns]:
    """Turns of every case."""
    turns: dict[Case, Turns] = {case: [] for case in cases}
    for number in range(processes):
        print(f"processes {number + 1} of {processes}", flush=True)
        workers = [Worker(base), Worker(head)]
        try:
            for case in cases:
                pairs = []
                for turn in range(rounds):
                    order = (0, 1) if turn % 2 == 0 else (1, 0)
                    found = {side: workers[side].time(case, seconds) for side in order}
                    pairs.append((found[0], found[1]))
                turns[case].append(pairs)
        finally:
            for worker in workers:
                worker.close()
    return turns


def summarise(turns: Turns, *, seed: int = 0) -> Ratio:
    """The ratio of the medians and its bootstrap interval.

    Args:
        turns: Of each process pair, the medians of its turns.
        seed: Of the draws.
    """
    everything = [pair for pairs in turns for pair in pairs]
    draw = random.Random(seed)
    ratios = sorted(_ratio(_drawn(turns, draw)) for _ in range(DRAWS))
    tail = (1 - CONFIDENCE) / 2
    return Ratio(
        base=statistics.median(base for base, _ in everything),
        head=statistics.median(head for _, head in everything),
        value=_ratio(everything),
        low=ratios[int(tail * DRAWS)],
        high=ratios[int((1 - tail) * DRAWS) - 1],
    )


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(head for _, head in pairs) / statistics.median(
        base for base, _ in pairs
    )


def _drawn(turns: Turns, draw: random.Random) -> list[tuple[float, float]]:
    """Processes with replacement, and turns of each with replacement."""
    processes = draw.choices(turns, k=len(turns))
    return [pair for pairs in processes for pair in draw.choices(pairs, k=len(pairs))]


def statement(ratios: dict[Case, Ratio]) -> str:
    """What the ratios say, plainly."""
    lines = []
    for verdict in ("slower", "faster"):
        where = [
            f"M={case.size.rows} D={case.size.features} {case.direction} "
            f"({100 * abs(ratio.value - 1):.0f} %)"
            for case, ratio in ratios.items()
            if ratio.verdict == verdict
        ]
        if where:
            lines.append(f"HEAD is {verdict}: {', '.join(where)}")
    return "\n".join(lines) or "no change beyond the noise"


def table(ratios: dict[Case, Ratio]) -> list[list[str]]:
    """Rows under ``HEADER``."""
    return [
        [
            str(case.size.rows),
            str(case.size.features),
            case.direction,
            f"{1e3 * ratio.base:.3f}",
            f"{1e3 * ratio.head:.3f}",
            f"{ratio.value:.3f}",
            f"{ratio.low:.3f} to {ratio.high:.3f}",
            ratio.verdict,
        ]
        for case, ratio in ratios.items()
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", help="revision to compare with")
    parser.add_argument("--head", default="HEAD", help="revision that is judged")
    parser.add_argument("--sizes", default=SIZES, help="MxD, separated by commas")
    parser.add_argument("--processes", type=int, default=5, help="of each revision")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each process")
    parser.add_argument("--seconds", type=float, default=TURN, help="of a turn")
    options = parser.parse_args(arguments)
    if options.base is None:
        parser.error("a revision is needed: make bench-compare BASE=main")
    for name in ("processes", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    try:
        options.sizes = parse_sizes(options.sizes)
        for revision in (options.base, options.head):
            revisions.resolve(revision)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the checkouts are removed
    cases = [Case(size, direction) for size in options.sizes for direction in DIRECTIONS]
    with revisions.checkouts([options.base, options.head]) as (base, head):
        turns = measure(
            base,
            head,
            cases,
            processes=options.processes,
            rounds=options.rounds,
            seconds=options.seconds,
        )
    ratios = {case: summarise(of_case) for case, of_case in turns.items()}
    print_table(HEADER, table(ratios))
    print(statement(ratios))
    return int(any(ratio.verdict == "slower" for ratio in ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
