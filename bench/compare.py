"""Whether HEAD is slower than another revision: both take turns, and the ratio has an interval.

    python bench/compare.py BASE [--head HEAD] [--sizes 256x256,...] [--processes 8] [--rounds 6]
    python bench/compare.py BASE --training-step [--no-save]

Each revision is a checkout of its own with a compiled module of its own (one for both where the
native sources are the same), removed at the end. Two processes, one of each revision, take turns.
That is repeated with new processes, because where memory lies changes times from process to
process. A pair of processes counts once, by the median of its turns' ratios, and the interval is
that of the sign test (cjepa_kernels/bench/verdict.py), which needs 8 pairs. Uncommitted changes
are not measured. The exit code is 1 if HEAD is slower.

``--training-step`` times the training program's step and its loss instead: encoders, predictor,
loss, backward and optimiser, on random images of the two example configurations' sizes, without
loading or augmenting them. The quickest process of each revision counts, because a shared
machine's speed varies by more than the difference. It writes bench/results/training_step_cpu.json.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import revisions
from revision_worker import IMAGES

from cjepa_kernels.bench.candidates import DIRECTIONS
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.report import LEVEL
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.bench.sizes import Size, parse_sizes
from cjepa_kernels.bench.verdict import MARGIN, MIN_ROUNDS, Ratio, Verdict, ratio_of_blocks
from cjepa_kernels.tables import print_table

SIZES = "256x256,1024x256,4096x256,8192x256"
TURN_SECONDS = 0.1  # A turn makes at least one call.
STEP_SECONDS = 4.0  # Time of a process's training steps.
HEADER = ["M", "D", "pass", "base ms", "HEAD ms", "HEAD / base", f"{LEVEL} interval", "HEAD is"]
WITHIN = f"{100 * (MARGIN - 1):.0f} %"
STATEMENTS: dict[Verdict, str] = {
    "slower": "HEAD is slower",
    "faster": "HEAD is faster",
    "equal": f"HEAD is as fast, within {WITHIN}",
    "unclear": "Too noisy to tell",
}

Turns = list[list[tuple[float, float]]]  # Medians (base, head) of each turn, by pair of processes.


class Case(NamedTuple):
    """What is timed."""

    size: Size
    direction: str

    def __str__(self) -> str:
        return f"M={self.size.rows} D={self.size.features} {self.direction}"


class Change(NamedTuple):
    """The median seconds of both revisions, and the ratio HEAD / base."""

    base: float
    head: float
    ratio: Ratio

    @property
    def verdict(self) -> Verdict:
        """What HEAD is."""
        return self.ratio.inverse().verdict()


def summarise(turns: Turns) -> Change:
    """The medians and the ratio; each pair of processes counts once."""
    everything = [pair for pairs in turns for pair in pairs]
    return Change(
        base=statistics.median(base for base, _ in everything),
        head=statistics.median(head for _, head in everything),
        ratio=ratio_of_blocks(
            [statistics.median(head / base for base, head in pairs) for pairs in turns],
            rounds=len(everything),
        ),
    )


def statement(changes: dict[Case, Change]) -> str:
    """What the ratios say, a line for each verdict."""
    lines = []
    for verdict, text in STATEMENTS.items():
        where = [
            f"{case} ({100 * abs(change.ratio.value - 1):.0f} %)"
            if verdict in ("slower", "faster")
            else str(case)
            for case, change in changes.items()
            if change.verdict == verdict
        ]
        if where:
            lines.append(f"{text}: {', '.join(where)}")
    return "\n".join(lines)


def table(changes: dict[Case, Change]) -> list[list[str]]:
    """Rows under ``HEADER``."""
    return [
        [
            str(case.size.rows),
            str(case.size.features),
            case.direction,
            f"{1e3 * change.base:.3f}",
            f"{1e3 * change.head:.3f}",
            f"{change.ratio.value:.3f}",
            ""
            if change.ratio.low is None
            else f"{change.ratio.low:.3f} to {change.ratio.high:.3f}",
            change.verdict,
        ]
        for case, change in changes.items()
    ]


def parse_revision(text: str) -> str:
    """The name of a revision that exists."""
    if not text:
        raise argparse.ArgumentTypeError("a revision is needed: make bench-compare BASE=main")
    try:
        revisions.resolve(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse_count(text: str) -> int:
    """A number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None = None) -> Any:
    return read_options(
        __doc__,
        {
            "base": {
                "nargs": "?",
                "default": "",
                "type": parse_revision,
                "help": "revision to compare with",
            },
            "--head": {
                "default": "HEAD",
                "type": parse_revision,
                "help": "revision that is judged",
            },
            "--sizes": {
                "default": SIZES,
                "type": parse_sizes,
                "help": "MxD, separated by commas",
            },
            "--processes": {
                "default": MIN_ROUNDS,
                "type": parse_count,
                "help": "number of processes of each revision",
            },
            "--rounds": {"default": 6, "type": parse_count, "help": "turns of each process"},
            "--seconds": {"default": TURN_SECONDS, "type": float, "help": "time of a turn"},
            "--training-step": {"action": "store_true", "help": "time training steps instead"},
        },
        command_line=arguments,
    )


def compare_losses(base: Path, head: Path, options: Any) -> bool:
    """Compare NT-Xent at every size, and return whether HEAD is slower anywhere."""
    cases = [Case(size, direction) for size in options.sizes for direction in DIRECTIONS]
    times = revisions.measure_in_turn(
        base,
        head,
        [
            {
                "task": "nt_xent",
                "rows": case.size.rows,
                "features": case.size.features,
                "direction": case.direction,
                "seconds": options.seconds,
            }
            for case in cases
        ],
        processes=options.processes,
        rounds=options.rounds,
    )
    changes = {case: summarise(turns) for case, turns in zip(cases, times, strict=True)}
    print_table(HEADER, table(changes))
    print(statement(changes))
    return any(change.verdict == "slower" for change in changes.values())


def compare_training_steps(base: Path, head: Path, options: Any) -> None:
    """Time the training steps of both revisions, and record them."""
    requests = [
        {"task": "training_step", "configuration": name, "seconds": STEP_SECONDS} for name in IMAGES
    ]
    times = revisions.measure_in_turn(base, head, requests, processes=options.processes, rounds=1)
    rows: list[Record] = []
    for name, turns in zip(IMAGES, times, strict=True):
        row: Record = {"configuration": name, "base": revisions.resolve(options.base)[:7]}
        for key in ("step", "loss"):
            for side, when in enumerate(("before", "after")):
                row[f"{key}_{when}"] = min(pair[side][key] for pairs in turns for pair in pairs)
        rows.append(row)
    keys = ["step_before", "step_after", "loss_before", "loss_after"]
    print_table(
        ["configuration", *(f"{key}, ms" for key in keys)],
        [[row["configuration"], *(f"{1e3 * row[key]:.2f}" for key in keys)] for row in rows],
    )
    save(options, "training_step_cpu", rows)


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # The checkouts are removed.
    with revisions.checkouts([options.base, options.head]) as (base, head):
        if not options.training_step:
            return int(compare_losses(base, head, options))
        compare_training_steps(base, head, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
