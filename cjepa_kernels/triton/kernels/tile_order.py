"""Which tile a program takes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangle(p):
    """The p-th of the pairs (i, j) with i <= j, counted column by column."""
    j = ((tl.sqrt(8.0 * p.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root may be off by one where p is the first or the last pair of a column.
    j = tl.where(j.to(tl.int64) * (j + 1) // 2 > p, j - 1, j)
    j = tl.where((j + 1).to(tl.int64) * (j + 2) // 2 <= p, j + 1, j)
    return (p - j.to(tl.int64) * (j + 1) // 2).to(tl.int32), j


@triton.jit
def tile_of(p, first_group, row_groups, SELF: tl.constexpr, GROUP: tl.constexpr):
    """The tile (i, j) of the p-th program.

    Programs take the tiles in squares of GROUP x GROUP, because those that run at one time then
    share their operands in the L2 cache. ``first_group`` is the first column of squares. With SELF
    only the squares on and above the diagonal are counted. A square on the diagonal contains tiles
    below it, which the caller leaves out.
    """
    square = p // (GROUP * GROUP)
    within = p % (GROUP * GROUP)
    if SELF:
        start = tl.cast(first_group, tl.int64)
        i, j = triangle(square + start * (start + 1) // 2)
    else:
        i = square % row_groups
        j = first_group + square // row_groups
    return i * GROUP + within % GROUP, j * GROUP + within // GROUP


@triton.jit
def edge_tile(p, row_blocks, column_blocks, first_column, row_tiles, SELF: tl.constexpr):
    """The p-th of the tiles that need a mask.

    The first ``row_tiles`` of them lie on the diagonal (with SELF) or in the last row of blocks.
    The others are in the last column of blocks, from the top.
    """
    if SELF:
        i = first_column + p
    else:
        i = row_blocks - 1
    i = tl.where(p < row_tiles, i, p - row_tiles)
    j = tl.where(p < row_tiles, first_column + p, column_blocks - 1)
    return i, j
