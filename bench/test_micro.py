"""pytest-benchmark micro-benchmarks: python -m pytest bench/test_micro.py --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_kernels import HJEPALoss, backends, cross_logsumexp, nt_xent, ops
from cjepa_kernels.bench import candidates
from cjepa_kernels.bench.candidates import CHUNKED, DIRECTIONS, FORWARD, NATIVE, REFERENCE
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.sizes import Size, views

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=3)

BACKENDS = [name for name in (NATIVE, CHUNKED, REFERENCE) if backends()[name].available]
PATHS = {"": "auto", ".chunked": "chunked"}  # Of the operators' overloads.
SIZES = [Size(16, 64), Size(64, 128), Size(256, 768), Size(1024, 128), Size(2048, 256)]

sizes = pytest.mark.parametrize("size", SIZES, ids=str)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@sizes
@dtypes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", [*DIRECTIONS, "backward"])
def test_nt_xent(
    benchmark: Any, backend: str, direction: str, dtype: torch.dtype, size: Size
) -> None:
    z = views(size, dtype=dtype)
    formula = candidates.find(backend).make(TEMPERATURE)
    if direction == "backward":
        loss = formula(*z)
        benchmark(lambda: torch.autograd.grad(loss, z, retain_graph=True))
    else:
        benchmark(candidates.one_pass(formula, z, direction))


class RecordedCalls(TorchDispatchMode):
    """The arguments of each of this package's operators in its last call, below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == ops.NAMESPACE:
            self.calls[func] = args, kwargs or {}
        return func(*args, **(kwargs or {}))


def nt_xent_outputs(z_i: Tensor, z_j: Tensor, backend: Any) -> tuple[Tensor, ...]:
    return (nt_xent(z_i, z_j, backend=backend).loss,)


def cross_logsumexp_outputs(x: Tensor, y: Tensor, backend: Any) -> tuple[Tensor, ...]:
    """Both outputs that have a gradient, of the rectangle (B, B) of the two views."""
    outputs = cross_logsumexp(x, y, backend=backend)
    return outputs.row_lse, outputs.column_lse


OUTPUTS = {"nt_xent": nt_xent_outputs, "cross_logsumexp": cross_logsumexp_outputs}


@sizes
@dtypes
@pytest.mark.parametrize("overload", PATHS, ids=["dispatched", "chunked"])
@pytest.mark.parametrize(
    "name", [name + suffix for name in OUTPUTS for suffix in ("", "_backward")]
)
def test_operator(benchmark: Any, name: str, overload: str, dtype: torch.dtype, size: Size) -> None:
    """The operator alone, with the arguments that the function gives it."""
    z = views(size, dtype=dtype)
    with RecordedCalls() as recorded:
        outputs = OUTPUTS[name.removesuffix("_backward")](*z, PATHS[overload])
        torch.autograd.grad(outputs, z, [torch.ones_like(output) for output in outputs])
    operator = ops.operator(name, overload)
    args, kwargs = recorded.calls[operator]
    with torch.no_grad():
        benchmark(operator, *args, **kwargs)


@dtypes
@pytest.mark.parametrize("direction", DIRECTIONS)
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

    if direction == FORWARD:
        benchmark(forward)
    else:
        benchmark(lambda: torch.autograd.grad(forward(), levels))
