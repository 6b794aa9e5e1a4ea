"""pytest-benchmark micro-benchmarks: python -m pytest bench/test_micro.py --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_kernels import HJEPALoss, backends, cross_logsumexp, nt_xent, ops

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=3)

CPU_BACKENDS = [
    name
    for name, status in backends().items()
    if status.available and not {"cpu", "any"}.isdisjoint(status.devices)
]
PATHS = {"": "auto", ".chunked": "chunked"}  # of the operators' overloads
SIZES = [(16, 64), (64, 128), (256, 768), (1024, 128), (2048, 256)]

sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def views(size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views (B, D) of M = 2B rows, as leaves of the graph."""
    rows, features = size
    z_i, z_j = torch.randn(2, rows // 2, features).to(dtype)
    return z_i.clone().requires_grad_(), z_j.clone().requires_grad_()


@sizes
@dtypes
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("direction", ["forward", "backward", "forward_backward"])
def test_nt_xent(
    benchmark: Any, backend: Any, direction: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    z = views(size, dtype)

    def forward() -> Tensor:
        return nt_xent(*z, backend=backend).loss

    if direction == "forward":
        benchmark(forward)
    elif direction == "backward":
        loss = forward()
        benchmark(lambda: torch.autograd.grad(loss, z, retain_graph=True))
    else:
        benchmark(lambda: torch.autograd.grad(forward(), z))


class RecordedCalls(TorchDispatchMode):
    """Calls of this package's operators, below autograd: each with the arguments it got."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == ops.NAMESPACE:
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


def nt_xent_outputs(z_i: Tensor, z_j: Tensor, backend: Any) -> tuple[Tensor, ...]:
    return (nt_xent(z_i, z_j, backend=backend).loss,)


def cross_logsumexp_outputs(x: Tensor, y: Tensor, backend: Any) -> tuple[Tensor, ...]:
    """Of the rectangle of the two views, (B, B): both outputs that have a gradient."""
    return cross_logsumexp(x, y, backend=backend)[:2]


OUTPUTS = {"nt_xent": nt_xent_outputs, "cross_logsumexp": cross_logsumexp_outputs}


@sizes
@dtypes
@pytest.mark.parametrize("overload", PATHS, ids=["dispatched", "chunked"])
@pytest.mark.parametrize(
    "name", [name + suffix for name in OUTPUTS for suffix in ("", "_backward")]
)
def test_operator(
    benchmark: Any, name: str, overload: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    """The operator alone, with the arguments that the function gives it."""
    z = views(size, dtype)
    with RecordedCalls() as recorded:
        outputs = OUTPUTS[name.removesuffix("_backward")](*z, PATHS[overload])
        torch.autograd.grad(outputs, z, [torch.ones_like(output) for output in outputs])
    operator = ops.operator(name, overload)
    arguments = recorded.calls[operator]
    with torch.no_grad():
        benchmark(operator, *arguments)


@dtypes
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("recipe", ["l2", "layer"])
@pytest.mark.parametrize("features", [64, 192])
def test_hjepa(
    benchmark: Any, features: int, recipe: str, direction: str, dtype: torch.dtype
) -> None:
    levels = [torch.randn(16, n, features).to(dtype).requires_grad_() for n in (64, 32, 16)]
    targets = [torch.randn_like(level) for level in levels]
    loss_fn = HJEPALoss(target_norm="layer" if recipe == "layer" else None)

    def forward() -> Tensor:
        loss: Tensor = loss_fn(levels, targets)["loss"]
        return loss

    if direction == "forward":
        benchmark(forward)
    else:
        benchmark(lambda: torch.autograd.grad(forward(), levels))
