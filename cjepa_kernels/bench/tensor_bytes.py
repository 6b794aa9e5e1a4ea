"""Bytes that a formula's operators hold at once and move, counted at a small size and scaled up.

With D = 1 only the matrices count, and they grow with M^degree. The bytes that D adds grow with
M D. The count sees what PyTorch's dispatcher shows: every tensor that an operator returns, until
its storage is freed, and every tensor that an operator reads or writes. It does not see the memory
that an operator takes within itself, which is next to nothing for the operators of this package.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cjepa_kernels.bench.formulas import Formula
from cjepa_kernels.bench.sizes import Size, views

SMALL = 64  # The M at which bytes are counted.
WIDE = 33  # They are counted with D = 1 and with this D.


class Bytes(NamedTuple):
    """Bytes of forward + backward without the inputs.

    Attributes:
        peak: Bytes held at once.
        moved: Bytes that the operators read and write.
    """

    peak: float
    moved: float


class Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that operators take and return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = self.moved = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.is_view:
            return results
        for tensor in tree_leaves((args, kwargs, results)):
            if isinstance(tensor, Tensor):
                self.moved += tensor.numel() * tensor.element_size()
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return results

    def _hold(self, storage: Any) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.held -= size


def count(formula: Formula, size: Size, dtype: torch.dtype) -> Bytes:
    """Bytes of one forward + backward on the CPU."""
    inputs = views(size, dtype=dtype)
    with Counter() as counter:
        torch.autograd.grad(formula(*inputs), inputs)
    return Bytes(counter.peak, counter.moved)


def scaled(formula: Formula, size: Size, dtype: torch.dtype, *, degree: int) -> Bytes:
    """Bytes of forward + backward at a size, from counts at ``SMALL`` rows.

    Args:
        formula: A loss of two views.
        size: The size for which the bytes are wanted.
        dtype: Dtype of the views.
        degree: Power of M with which its largest tensors grow.
    """
    narrow = count(formula, Size(SMALL, 1), dtype)
    wide = count(formula, Size(SMALL, WIDE), dtype)
    matrices = (size.rows / SMALL) ** degree
    features = size.rows * size.features / (SMALL * (WIDE - 1))
    return Bytes(
        *(n * matrices + (w - n) * features for n, w in zip(narrow, wide, strict=True)),
    )
