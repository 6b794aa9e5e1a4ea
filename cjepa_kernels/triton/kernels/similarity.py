"""Forward kernels: tiles of S = X Y^T and the sums and maxima of their rows and columns.

    row_sum[j, a]: of row a over the columns of block j        (column blocks of a panel, rows)
    column_sum[k, b]: of column b over the rows of a slot k    (row blocks, columns of a panel)

and the maxima alike. A slot is a block of rows or, where strips are used, a run of blocks.
Every entry that a reduction reads is written once, by one program: the same bits on every run.
With SELF, X and Y are one batch whose views are interleaved; only tiles on and above the diagonal
are computed, and those above it serve their rows by row_sum and their columns by column_sum. One on
the diagonal is whole and serves its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.operands import load_block
from cjepa_kernels.triton.kernels.temperature import read_scale
from cjepa_kernels.triton.kernels.tile_order import edge_tile, tile_of

# Pairs of planes whose products make up one of fp32, two bits each, the smallest first: all down to
# 2^-24 of the largest, which comes last.
SMALL_TERMS = tl.constexpr(5)
PLANE_OF_X = tl.constexpr(0b00_01_01_00_10)
PLANE_OF_Y = tl.constexpr(0b01_00_01_10_00)
# Not 0: keeps the compiler from merging a sum in fp32 into the product before it.
APART = tl.constexpr(1)


@triton.jit
def product(
    x, y, row, column, x_plane, y_plane,
    DEPTH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The (BM, BN) tile of X Y^T from (row, column). Planes are x_plane and y_plane rows apart.

    Tensor cores cut off what does not fit their accumulator, which adds up over many steps. That
    is nothing beside operands of 11 bits, and what would spoil fp32 ones: the large products of
    planes are added up in fp32 beside the tensor cores.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    STEPS: tl.constexpr = DEPTH // BK
    if PLANES > 1:
        for step in range(0, SMALL_TERMS * STEPS):
            term = step // STEPS
            k = (step % STEPS) * BK
            x_row = ((PLANE_OF_X >> (2 * term)) & 3) * x_plane + row
            y_row = ((PLANE_OF_Y >> (2 * term)) & 3) * y_plane + column
            a = load_block(x, x_row, k, DEPTH, BM, BK, TMA)
            b = load_block(y, y_row, k, DEPTH, BN, BK, TMA)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    for k in range(0, DEPTH, BK):
        a = load_block(x, row, k, DEPTH, BM, BK, TMA)
        b = load_block(y, column, k, DEPTH, BN, BK, TMA)
        if PLANES > 1:
            acc += tl.dot(a, b.T, input_precision=PRECISION, max_num_imprecise_acc=APART)
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def negatives(
    a, b, rows, columns, mask,
    SELF: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Which of the pairs (a, b) count: no padding and, with SELF, no anchor with itself, with its
    positive (row ^ 1) or with a sample that the user's mask excludes."""
    keep = (a < rows)[:, None] & (b < columns)[None, :]
    if SELF:
        keep = keep & ((a[:, None] ^ b[None, :]) > 1)
    if MASKED:  # an entry for each pair of samples, which stands for four pairs of rows
        batch = rows // 2
        BM: tl.constexpr = a.shape[0] // 2
        BN: tl.constexpr = b.shape[0] // 2
        k = tl.min(a, 0) // 2 + tl.arange(0, BM)
        m = tl.min(b, 0) // 2 + tl.arange(0, BN)
        inside = (k < batch)[:, None] & (m < batch)[None, :]
        at = k.to(tl.int64)[:, None] * batch + m[None, :]
        allowed = (tl.load(mask + at, mask=inside, other=0) == 0)[:, None, :, None]
        keep = keep & tl.broadcast_to(allowed, (BM, 2, BN, 2)).reshape(2 * BM, 2 * BN)
    return keep


@triton.jit
def exponentials(s, top, scale):
    """2^((s - top) scale), top being a row's or a column's maximum; 0 where s is -inf."""
    return tl.exp2((s - tl.where(top == float("-inf"), 0.0, top)) * scale)


@triton.jit
def reduce_tile(
    s, scale, row_sum, row_max, column_sum, column_max, row_at, column_at, WITH_COLUMNS,
    CONSTANT: tl.constexpr,
):  # fmt: skip
    """Sums and maxima of a tile, to row_at and column_at of the buffers."""
    row_top = tl.max(s, 1)
    column_top = tl.max(s, 0)
    if CONSTANT:
        e = tl.exp2(s * scale - scale)
        row_total = tl.sum(e, 1)
        column_total = tl.sum(e, 0)
    else:
        row_total = tl.sum(exponentials(s, row_top[:, None], scale), 1)
        column_total = tl.sum(exponentials(s, column_top[None, :], scale), 0)
    tl.store(row_sum + row_at, row_total)
    tl.store(row_max + row_at, row_top)
    if WITH_COLUMNS:
        tl.store(column_sum + column_at, column_total)
        tl.store(column_max + column_at, column_top)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "row_blocks", "column_blocks", "first_column", "last_column", "along"
    ]
)  # fmt: skip
def tiles_kernel(
    x, y, row_sum, row_max, column_sum, column_max, positive, kept_sum, kept_count, temperature,
    mask, rows, columns, x_plane, y_plane,
    row_blocks, column_blocks, first_column, last_column, along,
    SELF: tl.constexpr, MASKED: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
    PLACE: tl.constexpr, DEPTH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Square tiles, a program each, of the panel of column blocks [first_column, last_column).

    PLACE: "all" tiles, each with its mask; the "inner" ones, which need none; or the "edge", the
    diagonal's with SELF and those of a ragged last block.
    """
    program = tl.program_id(0)
    if PLACE == "edge":
        i, j = edge_tile(program, row_blocks, column_blocks, first_column, along, SELF)
    else:
        i, j = tile_of(program, first_column // GROUP, tl.cdiv(row_blocks, GROUP), SELF, GROUP)
        inside = (i < row_blocks) & (j < last_column)
        if SELF:
            inside = inside & (i <= j)
        if PLACE == "inner":
            inside = inside & ((i + 1) * BM <= rows) & ((j + 1) * BM <= columns)
            if SELF:
                inside = inside & (i < j)
        if not inside:
            return
    scale = read_scale(temperature, TAU_TENSOR)
    s = product(
        x, y, i * BM, j * BM, x_plane, y_plane,
        DEPTH, PLANES, BM, BM, BK, PRECISION, TMA,
    )  # fmt: skip
    a = i * BM + tl.arange(0, BM)
    b = j * BM + tl.arange(0, BM)
    if PLACE != "inner":
        if SELF and i == j:
            # The same arithmetic as a negative's, so that a tie is a tie.
            tl.store(positive + a, tl.sum(tl.where((a ^ 1)[:, None] == b[None, :], s, 0.0), 1))
        keep = negatives(a, b, rows, columns, mask, SELF, MASKED)
        if MASKED:
            orders = tl.where(i == j, 1, 2)  # a tile above the diagonal stands for both orders
            slot = tl.cast(program, tl.int64)
            tl.store(kept_sum + slot, tl.sum(tl.where(keep, s, 0.0)) * orders)
            tl.store(kept_count + slot, tl.sum(keep.to(tl.int32)) * orders)
        s = tl.where(keep, s, float("-inf"))
    reduce_tile(
        s, scale, row_sum, row_max, column_sum, column_max,
        (j - first_column).to(tl.int64) * (row_blocks * BM) + a,
        i.to(tl.int64) * ((last_column - first_column) * BM) + b - first_column * BM,
        not SELF or i < j, CONSTANT,
    )  # fmt: skip


@triton.jit
def fold(x, LARGEST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr):
    """Rows r and r + 8 of each 16 become one: a thread holds both (the tensor cores' layout), so
    that it costs nothing but halves what is kept over a strip."""
    if FOLD:
        x = tl.reshape(x, (BM // 16, 2, 8, BN))
        if LARGEST:
            x = tl.max(x, 1)
        else:
            x = tl.sum(x, 1)
    return x


@triton.jit
def add_tile(
    s, column_total, column_top, row_sum, row_max, row_at, scale,
    BM: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Sums and maxima of a tile's rows to the buffers; those of its columns stay by element."""
    e = tl.exp2(s * scale - scale)
    tl.store(row_sum + row_at, tl.sum(e, 1))
    tl.store(row_max + row_at, tl.max(s, 1))
    column_total += fold(e, False, BM, BN, FOLD)
    return column_total, tl.maximum(column_top, fold(s, True, BM, BN, FOLD))


@triton.jit(
    do_not_specialize=[
        "row_blocks", "whole_rows", "first_column", "last_column", "whole_columns", "run"
    ]
)  # fmt: skip
def strips_kernel(
    x, y, row_sum, row_max, column_sum, column_max, temperature,
    row_blocks, whole_rows, first_column, last_column, whole_columns, run,
    SELF: tl.constexpr, TAU_TENSOR: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BM: tl.constexpr, PIPELINED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Inner tiles of whole rows of features: a column block stays, a run of row blocks streams by.

    A reduction over a tile's rows costs 5 shuffles a column, so sums and maxima of columns stay by
    element until the run ends. PIPELINED: a tile's exponentials are taken while the tensor cores
    compute the next. Blocks have TILE rows, of which BM are taken at a time.
    """
    panel = last_column - first_column
    j = first_column + tl.program_id(0) % panel
    k = tl.program_id(0) // panel
    last_row = tl.minimum((k + 1) * run, whole_rows)
    if SELF:
        last_row = tl.minimum(last_row, j)
    first = k * run * (TILE // BM)
    last = last_row * (TILE // BM)
    if (first >= last) | (j >= whole_columns):
        return
    scale = read_scale(temperature, TAU_TENSOR)
    stays = load_block(y, j * TILE, 0, WIDTH, TILE, WIDTH, TMA).T
    if FOLD:
        column_total = tl.zeros((BM // 16, 8, TILE), tl.float32)
        column_top = tl.full((BM // 16, 8, TILE), float("-inf"), tl.float32)
    else:
        column_total = tl.zeros((BM, TILE), tl.float32)
        column_top = tl.full((BM, TILE), float("-inf"), tl.float32)
    row = (j - first_column).to(tl.int64) * (row_blocks * TILE) + tl.arange(0, BM)
    if PIPELINED:
        s = tl.dot(
            load_block(x, first * BM, 0, WIDTH, BM, WIDTH, TMA), stays, input_precision=PRECISION
        )
        for i in range(first + 1, last):
            a = load_block(x, i * BM, 0, WIDTH, BM, WIDTH, TMA)
            following = tl.dot(a, stays, input_precision=PRECISION)
            column_total, column_top = add_tile(
                s, column_total, column_top, row_sum, row_max, row + (i - 1) * BM, scale,
                BM, TILE, FOLD,
            )  # fmt: skip
            s = following
        column_total, column_top = add_tile(
            s, column_total, column_top, row_sum, row_max, row + (last - 1) * BM, scale,
            BM, TILE, FOLD,
        )  # fmt: skip
    else:
        for i in range(first, last):
            a = load_block(x, i * BM, 0, WIDTH, BM, WIDTH, TMA)
            s = tl.dot(a, stays, input_precision=PRECISION)
            column_total, column_top = add_tile(
                s, column_total, column_top, row_sum, row_max, row + i * BM, scale, BM, TILE, FOLD
            )
    if FOLD:
        column_total = tl.sum(column_total, 1)
        column_top = tl.max(column_top, 1)
    at = k.to(tl.int64) * (panel * TILE) + (j - first_column) * TILE + tl.arange(0, TILE)
    tl.store(column_sum + at, tl.sum(column_total, 0))
    tl.store(column_max + at, tl.max(column_top, 0))
