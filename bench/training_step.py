"""Time of the training program's step: encoders, predictor, loss, backward and optimiser.

    python bench/training_step.py --against REV [--rounds 5] [--seconds 4] [--no-save]

HEAD and the other revision take turns in checkouts and processes of their own, on random images of
the two example configurations' sizes, without loading or augmenting them. The median of each one's
quickest round counts, because a shared machine's speed varies by more than the difference.
The script writes bench/results/training_step_cpu.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import revisions
from revision_worker import IMAGES

from cjepa_kernels.bench.records import write_results
from cjepa_kernels.tables import print_table

HEADER = ["configuration", "before ms", "after ms", "before / after", "loss before ms", "after ms"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", required=True, help="another revision")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each revision")
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each round")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    options = parser.parse_args()
    base = revisions.git("rev-parse", "--short", options.against)
    requests = [
        {"task": "training_step", "configuration": name, "seconds": options.seconds}
        for name in IMAGES
    ]
    with revisions.checkouts([options.against, "HEAD"]) as (before, after):
        found = revisions.measure_in_turn(
            before, after, requests, processes=options.rounds, rounds=1
        )
    rows: list[dict[str, Any]] = []
    for name, of_request in zip(IMAGES, found, strict=True):
        pairs = [pair for turns in of_request for pair in turns]
        fastest = {
            f"{key}_{side}": min(pair[index][key] for pair in pairs)
            for key in ("step", "loss")
            for index, side in enumerate(("before", "after"))
        }
        rows.append({"configuration": name, "base": base, **fastest})
    print_table(
        HEADER,
        [
            [
                row["configuration"],
                f"{1e3 * row['step_before']:.2f}",
                f"{1e3 * row['step_after']:.2f}",
                f"{row['step_before'] / row['step_after']:.3f}",
                f"{1e3 * row['loss_before']:.2f}",
                f"{1e3 * row['loss_after']:.2f}",
            ]
            for row in rows
        ],
    )
    if not options.no_save:
        print(f"written: {write_results('training_step_cpu', rows)}")


if __name__ == "__main__":
    main()
