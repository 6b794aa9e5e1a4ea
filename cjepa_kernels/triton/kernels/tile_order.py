"""The order in which programs take tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangle(p):
    """The p-th of the pairs (i, j) with i <= j, taken column by column."""
    j = ((tl.sqrt(8.0 * p.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j.to(tl.int64) * (j + 1) // 2 > p, j - 1, j)
    j = tl.where((j + 1).to(tl.int64) * (j + 2) // 2 <= p, j + 1, j)
    return (p - j.to(tl.int64) * (j + 1) // 2).to(tl.int32), j


@triton.jit
def tile_of(p, first_group, row_groups, SELF: tl.constexpr, GROUP: tl.constexpr):
    """Tile (i, j) of the p-th program.

    Programs that run at one time share their operands in the L2 cache: tiles are taken in squares
    of GROUP x GROUP. With SELF only squares on and above the diagonal are counted; of one on it,
    the caller leaves out what lies below. ``first_group`` is the first column of squares.
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
def edge_tile(p, row_blocks, column_blocks, first_column, along, SELF: tl.constexpr):
    """The p-th tile of the edge: ``along`` of the diagonal or of the last row of blocks, then those
    of the last column of blocks."""
    if SELF:
        i = first_column + p
    else:
        i = row_blocks - 1
    i = tl.where(p < along, i, p - along)
    j = tl.where(p < along, first_column + p, column_blocks - 1)
    return i, j
