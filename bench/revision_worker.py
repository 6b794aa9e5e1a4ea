"""Measures the package that PYTHONPATH names, on request, for bench/revisions.py.

Reads a request a line from standard input and answers with a line, both JSON. It must run with old
revisions of the package, so it uses public functions, and both places in which the training
program's module has been.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from revisions import ROOT, check_package

from cjepa_kernels import nt_xent

IMAGES = {"cjepa": (1, 8, 8), "cifar10": (3, 32, 32)}  # Shape of an image, by configuration.
FIRST = 3  # The first steps are not counted.


@cache
def make_call(rows: int, features: int, direction: str) -> Callable[[], Any]:
    """NT-Xent: forward as in training, or forward and backward. It has run once."""
    generator = torch.Generator().manual_seed(0)
    z_i, noise = torch.randn(2, rows // 2, features, generator=generator)
    z_i, z_j = z_i.clone().requires_grad_(), (z_i + noise).requires_grad_()

    def forward() -> torch.Tensor:
        return nt_xent(z_i, z_j, temperature=0.1).loss

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), (z_i, z_j))

    call = forward if direction == "forward" else both
    call()
    return call


def time_nt_xent(rows: int, features: int, direction: str, seconds: float) -> float:
    """Median seconds of the calls that fit into ``seconds``, one at least."""
    call = make_call(rows, features, direction)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _train_module(*names: str) -> Any:
    """The first of the training program's modules that this revision has."""
    for name in names:
        try:
            return importlib.import_module(f"cjepa_kernels.train.{name}")
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(f"the training program has none of {', '.join(names)}")


def time_training_step(configuration: str, seconds: float) -> dict[str, float]:
    """Median seconds of a training step and of its loss, forward and backward."""
    train = _train_module("loop.module", "module")
    load_config: Any = _train_module("config").load_config
    config = load_config(ROOT / "configs" / f"{configuration}.yaml", [])
    shape = IMAGES[configuration]
    torch.manual_seed(0)
    mean, deviation = torch.full((shape[0],), 0.5), torch.full((shape[0],), 0.25)
    module = train.CJEPAModule(
        config, shape, channel_mean=mean, channel_std=deviation, total_steps=1000
    )
    size = config.trainer.batch_size
    images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
    views = module.on_after_batch_transfer(train.IndexedImages(images, torch.arange(size)), 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    forward = module.loss.forward
    losses: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        """The loss with its gradients, on detached copies of its inputs."""
        detached = {
            key: _detach(value)
            for key, value in kwargs.items()
            if key != "targets" and _has_gradient(value)
        }
        start = time.perf_counter()
        out = forward(*args, **(kwargs | detached))
        inputs = [x for value in detached.values() for x in _list(value)]
        torch.autograd.grad(out["loss"], inputs)
        losses.append(time.perf_counter() - start)
        return forward(*args, **kwargs)

    def run() -> list[float]:
        steps: list[float] = []
        deadline = time.perf_counter() + seconds / 2
        while len(steps) < 2 * FIRST or time.perf_counter() < deadline:
            start = time.perf_counter()
            loss = module.training_step(views, 0)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(time.perf_counter() - start)
        return steps[FIRST:]

    step = statistics.median(run())
    module.loss.forward = timed
    run()
    return {"step": step, "loss": statistics.median(losses[FIRST:])}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _has_gradient(value: Any) -> bool:
    """Labels, masks and arguments that are None have none."""
    return all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in _list(value))


def _detach(value: Any) -> Any:
    leaves = [x.detach().requires_grad_() for x in _list(value)]
    return leaves if isinstance(value, (list, tuple)) else leaves[0]


TASKS: dict[str, Callable[..., Any]] = {
    "nt_xent": time_nt_xent,
    "training_step": time_training_step,
}


def main() -> None:
    check_package(Path(os.environ["PYTHONPATH"]))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(TASKS[request.pop("task")](**request)), flush=True)


if __name__ == "__main__":
    main()
