"""The GPU path: Triton kernels behind the operators. Triton is imported when one is first called.

pack -> tiles of S, in strips or one by one -> reduction      forward.py
pack, weights -> coefficients and their products -> finish     backward.py
rows of both sides -> errors, or gradients                     prediction.py
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import chunked
from cjepa_kernels.backends import OLDEST_CAPABILITY


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


Implementation = Callable[..., tuple[Any, ...]]


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The first tensor, also inside a list. All have one device, and are of fp64 together."""
    flat = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)))
    return next(x for x in flat if isinstance(x, Tensor))


def _call(module: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if interpreted():
        importlib.import_module("cjepa_kernels.triton.interpreter").repair()
    function = getattr(importlib.import_module(f"cjepa_kernels.triton.{module}"), name)
    device = _first_tensor(args).device
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


def _implementation(operator: str, direction: str) -> Implementation:
    """One direction of an operator: its kernels, or the chunked back end for what they refuse."""
    chunked_function: Implementation = getattr(getattr(chunked, operator), direction)

    def implementation(*args: Any) -> tuple[Any, ...]:
        if _is_for_chunks(_first_tensor(args)):
            return chunked_function(*args)
        return _call(operator, direction, args)

    return implementation


# For each operator its implementation and that of its backward. Triton is imported by the first
# call.
OPERATORS = {
    operator: (_implementation(operator, "forward"), _implementation(operator, "backward"))
    for operator in ("nt_xent", "cross_logsumexp", "prediction_loss")
}
