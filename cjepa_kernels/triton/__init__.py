"""The GPU back end: what each operator calls. Triton is imported when one is first called.

nt_xent.py, cross_logsumexp.py, prediction_loss.py    each operator, both directions
tiles.py, gradients.py                                the tiles of S = X Y^T, and their backward
pack.py, launch.py, configs.py                        operands, sizes of launches, compilation
kernels/                                              the functions that run on the GPU
interpreter.py                                        repairs of Triton's interpreter

This module does not import the others: their names are those of the operators, and Triton may be
missing.
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


def _call(module: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call a function of a module of this package, with the device of its tensors as current."""
    if interpreted():
        importlib.import_module("cjepa_kernels.triton.interpreter").repair()
    function = getattr(importlib.import_module(f"cjepa_kernels.triton.{module}"), name)
    flat = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)))
    device = next(x for x in flat if isinstance(x, Tensor)).device
    # Triton launches on the current device.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.no_grad(), torch.cuda.device(device) if elsewhere else nullcontext():
        return function(*args)  # type: ignore[no-any-return]


@lru_cache
def _is_old(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY


def _goes_to_chunked(x: Tensor) -> bool:
    """Whether the chunked back end computes this input.

    It serves old GPUs. It also serves fp64, where tensor cores gain too little for kernels of our
    own.
    """
    return x.dtype == torch.float64 or _is_old(x.device)


def allows_tf32() -> bool:
    """Whether PyTorch lets products of fp32 use tf32, by whichever of its settings was set.

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


# torch.compile cannot trace the settings. It reads them once, when it compiles. This is what
# torch.compiler.assume_constant_result does, after importing the whole compiler.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether the kernels would round operands of fp32 to tf32."""
    return not _goes_to_chunked(x) and allows_tf32()


def nt_xent_forward(z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The operator ``nt_xent``."""
    if _goes_to_chunked(z_i):
        return chunked.forward(z_i, *args)
    return _call("nt_xent", "forward", (z_i, *args))


def nt_xent_backward(grad_loss: Tensor, z_i: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The operator ``nt_xent_backward``."""
    if _goes_to_chunked(z_i):
        return chunked.backward(grad_loss, z_i, *args)
    return _call("nt_xent", "backward", (grad_loss, z_i, *args))


def cross_logsumexp_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The operator ``cross_logsumexp``."""
    if _goes_to_chunked(x):
        return chunked_cross_logsumexp.forward(x, *args)
    return _call("cross_logsumexp", "forward", (x, *args))


def cross_logsumexp_backward(
    grad_row_lse: Tensor, grad_column_lse: Tensor, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """The operator ``cross_logsumexp_backward``."""
    args = (grad_row_lse, grad_column_lse, x, *args)
    if _goes_to_chunked(x):
        return chunked_cross_logsumexp.backward(*args)
    return _call("cross_logsumexp", "backward", args)


def prediction_loss_forward(predictions: list[Tensor], *args: Any) -> tuple[Tensor, ...]:
    """The operator ``prediction_loss``."""
    if _goes_to_chunked(predictions[0]):
        return chunked_prediction_loss.forward(predictions, *args)
    return _call("prediction_loss", "forward", (predictions, *args))


def prediction_loss_backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    grad_levels: Tensor | None,
    predictions: list[Tensor],
    *args: Any,
) -> tuple[Any, ...]:
    """The operator ``prediction_loss_backward``."""
    all_args = (grad_loss, grad_unweighted, grad_levels, predictions, *args)
    if _goes_to_chunked(predictions[0]):
        return chunked_prediction_loss.backward(*all_args)
    return _call("prediction_loss", "backward", all_args)
