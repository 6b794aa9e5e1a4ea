"""Operands that the Hopper kernels of the backward need beside the packed rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reorder_kernel(z, out, features, COLUMNS: tl.constexpr):
    """Rows in the order in which the right operand of S has them (see ``hopper_squares.py``).

    A program takes 32 rows. Of the eight numbers of a row that a thread holds of 32 columns of a
    product, numbers 2i and 2i + 1 are those of columns 8i + 2q and 8i + 2q + 1 for thread q of
    four. So these two columns get rows 8q + 2i and 8q + 2i + 1.
    """
    column = tl.arange(0, 32)
    i, q, odd = column // 8, column % 8 // 2, column % 2
    first = tl.program_id(0).to(tl.int64) * 32
    source = (first + 8 * q + 2 * i + odd)[:, None] * features
    target = (first + column)[:, None] * features
    for start in range(0, features, COLUMNS):
        feature = start + tl.arange(0, COLUMNS)[None, :]
        inside = feature < features
        block = tl.load(z + source + feature, mask=inside, other=0.0)
        tl.store(out + target + feature, block, mask=inside)


@triton.jit
def clear_kernel(out, size, BLOCK: tl.constexpr):
    """Write zeros to the first ``size`` numbers of ``out``."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, 0.0, mask=offsets < size)
