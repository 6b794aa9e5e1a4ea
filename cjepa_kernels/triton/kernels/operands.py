"""How kernels read and round the operands of their products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(x):
    """fp32 with 10 bits of mantissa. Tensor cores cut the others off, which has a bias to 0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def load_block(
    source, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Block from (row, column) of a padded matrix: by descriptor, or with TMA off by pointers.

    A chip without the tensor memory accelerator copies ahead from pointers only.
    """
    if TMA:
        block = source.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        block = tl.load(source + rows * stride + (column + tl.arange(0, COLUMNS))[None, :])
    return block
