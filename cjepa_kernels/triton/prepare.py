"""What is computed of a call's arguments before its tiles; see ``kernels/prepare.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.triton.kernels.prepare import largest_kernel, symmetric_mask_kernel
from cjepa_kernels.triton.pack import cdiv
from cjepa_kernels.triton.recording import new_zeros, run_kernel
from cjepa_kernels.triton.temperature import Temperature

LARGEST_BLOCK = 4096  # gradients that a program takes
MASK_BLOCK = 64  # rows and columns of the tile of a mask that a program takes


def largest_magnitude(
    *grads: Tensor, of_positives: Tensor | None = None, temperature: Temperature | None = None
) -> Tensor:
    """The largest |grad| of all upstream gradients.

    Args:
        *grads: Each of shape () or (rows,).
        of_positives: (rows,) gradients of similarities. These count times tau.
        temperature: The temperature for them.

    Returns:
        () fp32; NaN if a gradient is NaN. Of a single number it is that number, with its sign: the
        weights are divided by it, and the results multiplied.
    """
    if len(grads) == 1 and grads[0].ndim == 0:
        return grads[0]
    largest = new_zeros(grads[0], dtype=torch.float32)

    def raise_to(grad: Tensor, tau: Temperature | None) -> None:
        count = grad.numel()
        run_kernel(
            largest_kernel, cdiv(count, LARGEST_BLOCK), grad=grad,
            stride=grad.stride(0) if grad.ndim == 1 else 0, count=count, largest=largest,
            temperature=1.0 if tau is None else tau.argument, TIMES_TAU=tau is not None,
            TAU_TENSOR=tau is not None and tau.is_tensor, BLOCK=LARGEST_BLOCK, num_warps=4,
        )  # fmt: skip

    for grad in grads:
        raise_to(grad, None)
    if of_positives is not None:
        raise_to(of_positives, temperature)
    return largest


def symmetric(mask: Tensor) -> Tensor:
    """``mask | mask.T`` of a (B, B) bool mask."""
    size = mask.shape[0]
    out = mask.new_empty(size, size)
    run_kernel(
        symmetric_mask_kernel, cdiv(size, MASK_BLOCK) ** 2, mask=mask.view(torch.uint8),
        out=out.view(torch.uint8), stride=mask.stride(0), column_stride=mask.stride(1), size=size,
        BLOCK=MASK_BLOCK, num_warps=4,
    )  # fmt: skip
    return out
