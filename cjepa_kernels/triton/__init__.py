"""The GPU path: Triton kernels behind the operators. Triton is imported when one is first called.

pack -> tiles of S, in strips or one by one -> reduction      forward.py
pack, weights -> coefficients and their products -> finish     backward.py
rows of both sides -> errors, or gradients                     prediction.py
"""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import chunked, chunked_cross_logsumexp, chunked_prediction_loss
from cjepa_kernels.backends import OLDEST_CAPABILITY


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _call(module: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if interpreted():
        importlib.import_module("cjepa_kernels.triton.interpreter").repair()
    function = getattr(importlib.import_module(f"cjepa_kernels.triton.{module}"), name)
    flat = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)))
    device = next(x for x in flat if isinstance(x, Tensor)).device
    # Triton launches on the current device.
    away = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.no_grad(), torch.cuda.device(device) if away else nullcontext():
        return function(*args)  # type: ignore[no-any-return]


@lru_cache
def _is_old(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY


def _is_for_chunks(x: Tensor) -> bool:
    """Old GPUs, and fp64, for which tensor cores have nothing worth the name."""
    return x.dtype == torch.float64 or _is_old(x.device)


def allows_tf32() -> bool:
    """Whether PyTorch's products of fp32 may take tf32, by whichever of its settings was used.

    Reading the old setting after the new one was set is an error.
    """
    matmul = torch.backends.cuda.matmul
    for setting in (matmul, torch.backends):
        precision = getattr(setting, "fp32_precision", "none")
        if precision in ("ieee", "tf32"):
            return bool(precision == "tf32")
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:
        return False


# As torch.compiler.assume_constant_result does, which would import the compiler: it cannot trace
# the settings, and takes what they are when it compiles.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether the kernels would round operands of fp32 to tf32."""
    return not _is_for_chunks(x) and allows_tf32()


def nt_xent_forward(z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.NT_XENT``."""
    if _is_for_chunks(z_i):
        return chunked.forward(z_i, *args)
    return _call("nt_xent", "forward", (z_i, *args))


def nt_xent_backward(grad_loss: Tensor, z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.NT_XENT_BACKWARD``."""
    if _is_for_chunks(z_i):
        return chunked.backward(grad_loss, z_i, *args)
    return _call("nt_xent", "backward", (grad_loss, z_i, *args))


def cross_logsumexp_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.CROSS_LOGSUMEXP``."""
    if _is_for_chunks(x):
        return chunked_cross_logsumexp.forward(x, *args)
    return _call("cross_logsumexp", "forward", (x, *args))


def cross_logsumexp_backward(
    grad_row_lse: Tensor, grad_column_lse: Tensor, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """As ``ops.CROSS_LOGSUMEXP_BACKWARD``."""
    args = (grad_row_lse, grad_column_lse, x, *args)
    if _is_for_chunks(x):
        return chunked_cross_logsumexp.backward(*args)
    return _call("cross_logsumexp", "backward", args)


def prediction_loss_forward(predictions: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """As ``ops.PREDICTION_LOSS``."""
    if _is_for_chunks(predictions[0]):
        return chunked_prediction_loss.forward(predictions, *args)
    return _call("prediction_loss", "forward", (predictions, *args))


def prediction_loss_backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    grad_levels: Tensor | None,
    predictions: list[Tensor],
    *args: Any,
) -> tuple[Any, ...]:
    """As ``ops.PREDICTION_LOSS_BACKWARD``."""
    all_args = (grad_loss, grad_unweighted, grad_levels, predictions, *args)
    if _is_for_chunks(predictions[0]):
        return chunked_prediction_loss.backward(*all_args)
    return _call("prediction_loss", "backward", all_args)
