"""pytest-benchmark micro-benchmarks: python -m pytest bench/test_micro.py --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cjepa_kernels import HJEPALoss, backends, nt_xent

CPU_BACKENDS = [
    name for name, status in backends().items() if status.available and "cuda" not in status.devices
]


@pytest.mark.parametrize(("batch", "features"), [(32, 128), (128, 768), (512, 256)], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_nt_xent(benchmark: Any, backend: Any, batch: int, features: int, backward: bool) -> None:
    z_i, z_j = (torch.randn(batch, features, requires_grad=True) for _ in range(2))

    def run() -> None:
        loss = nt_xent(z_i, z_j, backend=backend).loss
        if backward:
            torch.autograd.grad(loss, (z_i, z_j))

    benchmark(run)


@pytest.mark.parametrize("treatment", ["l2", "layer"])
def test_hjepa(benchmark: Any, treatment: str) -> None:
    levels = [torch.randn(16, n, 192, requires_grad=True) for n in (64, 32, 16)]
    targets = [torch.randn_like(level) for level in levels]
    loss_fn = HJEPALoss(target_norm="layer" if treatment == "layer" else None)

    def run() -> None:
        torch.autograd.grad(loss_fn(levels, targets)["loss"], levels)

    benchmark(run)
