"""One side of bench/compare.py: times nt_xent of the package that PYTHONPATH names, on request.

Reads a case a line from standard input, ``{"M", "D", "pass", "seconds"}``, and answers with a line
of seconds. It uses nothing but the public function, so that old revisions run it, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from revisions import check_package

from cjepa_kernels import nt_xent


def make_call(rows: int, features: int, direction: str) -> Callable[[], Any]:
    """Forward as in training, or forward and backward."""
    generator = torch.Generator().manual_seed(0)
    z_i, noise = torch.randn(2, rows // 2, features, generator=generator)
    z_i, z_j = z_i.clone().requires_grad_(), (z_i + noise).requires_grad_()

    def forward() -> torch.Tensor:
        return nt_xent(z_i, z_j, temperature=0.1).loss

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), (z_i, z_j))

    return forward if direction == "forward" else both


def main() -> None:
    check_package(os.environ["PYTHONPATH"])
    calls: dict[tuple[int, int, str], Callable[[], Any]] = {}
    for line in sys.stdin:
        case = json.loads(line)
        key = (case["M"], case["D"], case["pass"])
        if key not in calls:
            calls[key] = make_call(*key)
            calls[key]()
        times: list[float] = []
        deadline = time.perf_counter() + case["seconds"]
        while not times or time.perf_counter() < deadline:
            start = time.perf_counter()
            calls[key]()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
