"""What is computed of a call's arguments before its tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.temperature import LN2, read_scale


@triton.jit
def largest_kernel(
    grad, stride, count, largest, temperature,
    TIMES_TAU: tl.constexpr, TAU_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Raise ``largest``, a number that is not negative, to the largest |grad|; NaN beats all.

    With TIMES_TAU it is the largest tau |grad|.

    The bits of numbers that are not negative, taken as integers, have the order of the numbers, and
    those of a NaN come after infinity. The maximum of integers is the same in any order.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    magnitude = tl.abs(tl.load(grad + at * stride, mask=at < count, other=0.0))
    if TIMES_TAU:
        magnitude = magnitude / (read_scale(temperature, TAU_TENSOR) * LN2)
    bits = magnitude.to(tl.float32).to(tl.int32, bitcast=True)
    tl.atomic_max(largest.to(tl.pointer_type(tl.int32), bitcast=True), tl.max(bits, axis=0))


@triton.jit
def symmetric_mask_kernel(mask, out, stride, column_stride, size, BLOCK: tl.constexpr):
    """``out = mask | mask^T`` of a square mask, one program for each (BLOCK, BLOCK) tile."""
    blocks = tl.cdiv(size, BLOCK)
    row_block = tl.program_id(0) // blocks
    column_block = tl.program_id(0) % blocks
    row = (row_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = (column_block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (row < size) & (column < size)
    upper = tl.load(mask + row * stride + column * column_stride, mask=inside, other=0)
    lower = tl.load(mask + column * stride + row * column_stride, mask=inside, other=0)
    tl.store(out + row * size + column, upper | lower, mask=inside)
