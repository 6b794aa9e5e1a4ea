"""The temperature as the kernels take it: the scale of the logits in powers of 2."""

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
    """log2(e) / tau, NaN for a tensor that is out of range: exp(s / tau) = 2^(s scale).

    Rounding it to fp32 amounts to a temperature that is off by 6e-8, the same one in every kernel.
    """
    tau = temperature
    if IS_TENSOR:
        tau = tl.load(temperature).to(tl.float32)
        tau = tl.where((tau >= SMALLEST) & (tau <= LARGEST), tau, float("nan"))
    return tl.full((), LOG2E, tl.float32) / tau
