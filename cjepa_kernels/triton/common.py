"""What the kernels share: the scale of the logits, and the order in which tiles are taken."""

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
