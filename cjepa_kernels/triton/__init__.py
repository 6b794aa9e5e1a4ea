"""The GPU back end: what each operator calls. Triton is imported when one is first called.

nt_xent.py, cross_logsumexp.py, self_logsumexp.py,
prediction_loss.py                                    each operator, both directions
tiles.py, gradients.py                                the tiles of S = X Y^T, and their backward
pack.py, operands.py, launch.py, configs.py           operands, sizes of launches, compilation
saved_rows.py                                         what a forward saves for its backward
prepare.py                                            what is computed of the arguments first
recording.py, plans.py, planned.py                    launch plans, which csrc/cuda repeats
proved.py                                             what has passed parity on a device
hopper.py, schedules.py                               Gluon kernels for Hopper, and their schedules
hopper_gradients.py, gradient_schedules.py            the same for the backward
kernels/                                              the functions that run on the GPU
interpreter.py                                        repairs of Triton's interpreter

This module does not import the others: their names are those of the operators, and Triton may be
missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import chunked
from cjepa_kernels.backends import OLDEST_CAPABILITY, triton_is_interpreted

Implementation = Callable[..., tuple[Any, ...]]


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The first tensor, also inside a list. All are on one device, and if one is fp64, all are."""
    flat = (x for arg in args for x in (arg if isinstance(arg, list) else (arg,)))
    return next(x for x in flat if isinstance(x, Tensor))


def _call(module: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call a function of a module of this package, with the device of its tensors as current."""
    if triton_is_interpreted():
        importlib.import_module("cjepa_kernels.triton.interpreter").repair()
    function = getattr(importlib.import_module(f"cjepa_kernels.triton.{module}"), name)
    device = _first_tensor(args).device
    # Triton launches on the current device.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.no_grad(), torch.cuda.device(device) if elsewhere else nullcontext():
        return function(*args)  # type: ignore[no-any-return]


@lru_cache
def _capability_is_old(device: torch.device) -> bool:
    # A fake tensor of a GPU needs no GPU.
    return (
        torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY
    )


def _is_old(device: torch.device) -> bool:
    return device.type == "cuda" and _capability_is_old(device)


def goes_to_chunked(x: Tensor) -> bool:
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


# torch.compile cannot trace the settings, and warns of a cache. It calls these functions once, when
# it compiles. This is what torch.compiler.assume_constant_result does, after importing the whole
# compiler.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether the kernels would round operands of fp32 to tf32."""
    return not goes_to_chunked(x) and allows_tf32()


def _implementation(operator: str, direction: str) -> Implementation:
    """One direction of an operator, by our kernels or, where they do not serve, by chunks."""
    chunked_function: Implementation = getattr(getattr(chunked, operator), direction)

    def implementation(*args: Any) -> tuple[Any, ...]:
        if goes_to_chunked(_first_tensor(args)):
            return chunked_function(*args)
        return _call(operator, direction, args)

    return implementation


# The implementations of each operator and of its backward. Their first call imports Triton.
OPERATORS = {
    operator: (_implementation(operator, "forward"), _implementation(operator, "backward"))
    for operator in ("nt_xent", "cross_logsumexp", "self_logsumexp", "prediction_loss")
}
