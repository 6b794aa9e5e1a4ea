"""How kernels load and round the operands of their matrix products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(x):
    """Round fp32 to the 10 bits of mantissa that tf32 has.

    Tensor cores cut the other bits off, which would bias every number towards 0.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def load_block(
    source, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """The (ROWS, COLUMNS) block of a padded matrix whose first entry is at (row, column).

    With TMA, ``source`` is a descriptor, and the tensor memory accelerator copies the block. A GPU
    without that unit prefetches only loads from pointers, so ``source`` is a pointer there.
    """
    if TMA:
        block = source.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        block = tl.load(source + rows * stride + (column + tl.arange(0, COLUMNS))[None, :])
    return block
