"""Time of the training program's step: encoders, predictor, loss, backward and optimiser.

    python bench/training_step.py --against REV [--rounds 5] [--seconds 4] [--no-save]

HEAD and the other revision take turns in checkouts and processes of their own, on random images of
the two example configurations' sizes, without loading or augmenting them. The median of each one's
quickest round counts: a shared machine's speed varies by more than is sought.
Writes bench/results/training_step_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import revisions
from revisions import ROOT

CASES = {"cjepa": (1, 8, 8), "cifar10": (3, 32, 32)}  # configuration and the shape of its images
HEADER = ["configuration", "before ms", "after ms", "before / after", "loss before ms", "after ms"]


def measure(name: str, seconds: float) -> dict[str, float]:
    """Median seconds of a step and of its loss, forward and backward, in this process."""
    import torch

    from cjepa_kernels.train.config import load_config
    from cjepa_kernels.train.loop.module import CJEPAModule, IndexedImages

    revisions.check_package(os.environ.get("PYTHONPATH", str(ROOT)))
    config = load_config(ROOT / "configs" / f"{name}.yaml", [])
    shape = CASES[name]
    torch.manual_seed(0)
    mean, deviation = torch.full((shape[0],), 0.5), torch.full((shape[0],), 0.25)
    module = CJEPAModule(config, shape, mean, deviation, 1000)
    size = config.trainer.batch_size
    batch = IndexedImages(
        torch.randint(0, 256, (size, *shape), dtype=torch.uint8), torch.arange(size)
    )
    views = module.on_after_batch_transfer(batch, 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    forward = module.loss.forward
    losses: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        """The loss with its gradients, on copies of its inputs that end there."""
        detached = {
            key: _detach(value) if key != "targets" else value for key, value in kwargs.items()
        }
        start = time.perf_counter()
        out = forward(*args, **detached)
        inputs = [x for key, value in detached.items() if key != "targets" for x in _list(value)]
        torch.autograd.grad(out["loss"], inputs)
        losses.append(time.perf_counter() - start)
        return forward(*args, **kwargs)

    def run() -> list[float]:
        steps: list[float] = []
        deadline = time.perf_counter() + seconds / 2
        while len(steps) < 6 or time.perf_counter() < deadline:
            start = time.perf_counter()
            loss = module.training_step(views, 0)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(time.perf_counter() - start)
        return steps[3:]

    step = statistics.median(run())
    module.loss.forward = timed  # type: ignore[method-assign]
    run()
    return {"step": step, "loss": statistics.median(losses[3:])}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _detach(value: Any) -> Any:
    found = [x.detach().requires_grad_() for x in _list(value)]
    return found if isinstance(value, (list, tuple)) else found[0]


def measure_in_a_process(checkout: Path, name: str, seconds: float) -> dict[str, float]:
    """The same with the package of a checkout."""
    command = [sys.executable, __file__, "--one", f"{name},{seconds}"]
    environment = revisions.environment(checkout)
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured: dict[str, float] = json.loads(result.stdout)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="another revision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, seconds = options.one.split(",")
        print(json.dumps(measure(name, float(seconds))))
        return
    if options.against is None:
        parser.error("--against is needed")
    # Not for --one: a revision may lack what this imports.
    from cjepa_kernels.bench.records import write_results
    from cjepa_kernels.bench.tables import print_table

    revision = revisions.git("rev-parse", "--short", options.against)
    rows: list[dict[str, Any]] = []
    with revisions.checkouts([options.against, "HEAD"]) as (before, after):
        for name in CASES:
            found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
            for turn in range(options.rounds):
                print(f"{name}: round {turn + 1} of {options.rounds}", flush=True)
                sides = [("before", before), ("after", after)]
                for side, checkout in sides[:: 1 if turn % 2 == 0 else -1]:
                    found[side].append(measure_in_a_process(checkout, name, options.seconds))
            fastest = {
                f"{key}_{side}": min(m[key] for m in found[side])
                for key in ("step", "loss")
                for side in found
            }
            rows.append({"configuration": name, "base": revision, **fastest})
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
