"""The GPU path: Triton kernels behind the operators. Triton is imported when one is first called.

pack -> tiles of S, in strips or one by one -> reduction      forward.py
pack, weights -> coefficients and their products -> finish     backward.py
"""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import chunked, chunked_cross_logsumexp


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _call(module: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if interpreted():
        importlib.import_module("cjepa_kernels.triton.interpreter").repair()
    function = getattr(importlib.import_module(f"cjepa_kernels.triton.{module}"), name)
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    # Triton launches on the current device.
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), guard:
        return function(*args)  # type: ignore[no-any-return]


# Tensor cores have no fp64 worth the name: it takes the chunked path.
def nt_xent(z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.NT_XENT``."""
    if z_i.dtype == torch.float64:
        return chunked.forward(z_i, *args)
    return _call("forward", "nt_xent", (z_i, *args))


def nt_xent_backward(grad_loss: Tensor, z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.NT_XENT_BACKWARD``."""
    if z_i.dtype == torch.float64:
        return chunked.backward(grad_loss, z_i, *args)
    return _call("backward", "nt_xent_backward", (grad_loss, z_i, *args))


def cross_logsumexp(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.CROSS_LOGSUMEXP``."""
    if x.dtype == torch.float64:
        return chunked_cross_logsumexp.forward(x, *args)
    return _call("forward", "cross_logsumexp", (x, *args))


def cross_logsumexp_backward(
    grad_row_lse: Tensor, grad_column_lse: Tensor, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """As ``ops.CROSS_LOGSUMEXP_BACKWARD``."""
    args = (grad_row_lse, grad_column_lse, x, *args)
    if x.dtype == torch.float64:
        return chunked_cross_logsumexp.backward(*args)
    return _call("backward", "cross_logsumexp_backward", args)
