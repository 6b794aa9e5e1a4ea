"""The scale of the logits, which every kernel computes from the temperature.

exp(s / tau) = 2^(s scale)    with    scale = log2(e) / tau
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels import definitions

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SMALLEST = tl.constexpr(definitions.SMALLEST)
LARGEST = tl.constexpr(definitions.LARGEST)


@triton.jit
def read_scale(temperature, IS_TENSOR: tl.constexpr):
    """log2(e) / tau; NaN if the temperature is a tensor whose number is out of range.

    Rounding the scale to fp32 is the same as changing the temperature by 6e-8 of itself. Every
    kernel makes the same change.
    """
    tau = temperature
    if IS_TENSOR:
        tau = tl.load(temperature).to(tl.float32)
        tau = tl.where((tau >= SMALLEST) & (tau <= LARGEST), tau, float("nan"))
    return tl.full((), LOG2E, tl.float32) / tau
