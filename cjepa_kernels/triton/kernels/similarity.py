"""Forward kernels: tiles of S = X Y^T, and the sums and maxima of their rows and columns.

A tile is one block of rows against one block of columns. With c a shift of the exponents,

    row_sum[j, a]    = sum of exp((s_ab - c) / tau) over the columns b of block j
    column_sum[k, b] = sum of exp((s_ab - c) / tau) over the rows a of slot k

and row_max, column_max are the largest s_ab of the same entries. A slot is a block of rows or, for
strips, a run of several blocks. The shift c is 1 (CONSTANT) or the maximum that is stored beside
the sum. The first axis of row_sum counts the column blocks of the panel that is being computed.

One program writes each entry once, so the results have the same bits on every run.

With PAIRED each row has one column as its positive, or -1. Its entry is no part of the sums and
maxima, and its similarity is stored by row.

With SELF only the tiles on and above the diagonal are computed. S is symmetric: a tile above the
diagonal serves its rows by row_sum and its columns by column_sum. A tile on the diagonal is
computed whole and serves its rows only. With SELF and PAIRED two rows are each other's positive,
and their one similarity is stored for both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.operands import load_block
from cjepa_kernels.triton.kernels.temperature import read_scale
from cjepa_kernels.triton.kernels.tile_order import edge_tile, tile_of

# An fp32 operand is the sum of three planes of bf16. A product of two fp32 operands is the sum of
# the products of those planes that are at least 2^-24 of the largest one. These are the pairs of
# planes without the largest, two bits for each pair, the smallest product first.
SMALL_TERMS = tl.constexpr(5)
PLANE_OF_X = tl.constexpr(0b00_01_01_00_10)
PLANE_OF_Y = tl.constexpr(0b01_00_01_10_00)
# Any number but 0 keeps the compiler from merging a sum in fp32 into the product before it.
IMPRECISE_SUMS = tl.constexpr(1)


@triton.jit
def product(
    x, y, row, column, x_plane, y_plane,
    DEPTH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The (BM, BN) tile of X Y^T whose first entry is at (row, column).

    The planes of X are x_plane rows apart, those of Y y_plane rows.

    Tensor cores cut off the bits that do not fit their accumulator, and this error grows with the
    number of steps. It is negligible beside the rounding of operands with 11 bits, but it would
    spoil fp32. The large products of planes are therefore added in fp32 outside the tensor cores.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    STEPS: tl.constexpr = DEPTH // BK
    if PLANES > 1:
        for step in range(0, SMALL_TERMS * STEPS):
            term = step // STEPS
            k = (step % STEPS) * BK
            x_row = ((PLANE_OF_X >> (2 * term)) & 3) * x_plane + row
            y_row = ((PLANE_OF_Y >> (2 * term)) & 3) * y_plane + column
            a = load_block(
                source=x, row=x_row, column=k, stride=DEPTH, ROWS=BM, COLUMNS=BK, TMA=TMA
            )
            b = load_block(
                source=y, row=y_row, column=k, stride=DEPTH, ROWS=BN, COLUMNS=BK, TMA=TMA
            )
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    for k in range(0, DEPTH, BK):
        a = load_block(source=x, row=row, column=k, stride=DEPTH, ROWS=BM, COLUMNS=BK, TMA=TMA)
        b = load_block(source=y, row=column, column=k, stride=DEPTH, ROWS=BN, COLUMNS=BK, TMA=TMA)
        if PLANES > 1:
            acc += tl.dot(a, b.T, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE_SUMS)
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def negatives(
    a, b, rows, columns, mask, classes,
    SELF: tl.constexpr, VIEWS: tl.constexpr, MASKED: tl.constexpr, CLASSED: tl.constexpr,
):  # fmt: skip
    """Which of the pairs (a, b) count in the sums.

    Padding does not count. With SELF neither does a row with itself or, of two views, with its
    positive. With MASKED no pair of samples counts that the user's mask excludes, and with CLASSED
    no pair of one class. ``classes`` has one number for each sample.
    """
    is_negative = (a < rows)[:, None] & (b < columns)[None, :]
    if SELF:
        if VIEWS == 2:
            is_negative = is_negative & ((a[:, None] ^ b[None, :]) > 1)
        else:
            is_negative = is_negative & (a[:, None] != b[None, :])
    if CLASSED:
        class_of_row = tl.load(classes + a // VIEWS, mask=a < rows, other=0)
        class_of_column = tl.load(classes + b // VIEWS, mask=b < columns, other=0)
        is_negative = is_negative & (class_of_row[:, None] != class_of_column[None, :])
    if MASKED:  # The mask has one entry for a pair of samples, which stands for four pairs of rows.
        batch = rows // 2
        BM: tl.constexpr = a.shape[0] // 2
        BN: tl.constexpr = b.shape[0] // 2
        k = tl.min(a, 0) // 2 + tl.arange(0, BM)
        m = tl.min(b, 0) // 2 + tl.arange(0, BN)
        inside = (k < batch)[:, None] & (m < batch)[None, :]
        offsets = k.to(tl.int64)[:, None] * batch + m[None, :]
        allowed = (tl.load(mask + offsets, mask=inside, other=0) == 0)[:, None, :, None]
        allowed = tl.broadcast_to(allowed, (BM, 2, BN, 2)).reshape(2 * BM, 2 * BN)
        is_negative = is_negative & allowed
    return is_negative


@triton.jit
def take_positives(s, positives, positive, a, b, rows, SELF: tl.constexpr):
    """The tile of S without the entries of positives, whose similarities are stored.

    Few tiles hold one, so the others pass by. Of a symmetric S the entry above the diagonal is the
    similarity of both rows of a pair: the one below may differ in its last bit.
    """
    p = tl.load(positives + a, mask=a < rows, other=-1)
    here = (p >= tl.min(b, 0)) & (p <= tl.max(b, 0))
    if tl.max(here.to(tl.int32), 0) > 0:
        is_positive = tl.where(here, p, -1).to(tl.int32)[:, None] == b[None, :]
        similarity = tl.sum(tl.where(is_positive, s, 0.0), 1)
        if SELF:
            here = here & (a < p) & (p < rows)
            tl.store(positive + p, similarity, mask=here)
        tl.store(positive + a, similarity, mask=here)
        s = tl.where(is_positive, float("-inf"), s)
    return s


@triton.jit
def exponentials(s, maximum, scale):
    """2^((s - maximum) scale) with the maximum of a row or a column; 0 where s is -inf."""
    return tl.exp2((s - tl.where(maximum == float("-inf"), 0.0, maximum)) * scale)


@triton.jit
def reduce_tile(
    s, scale, row_sum, row_max, column_sum, column_max, row_offsets, column_offsets, WITH_COLUMNS,
    CONSTANT: tl.constexpr,
):  # fmt: skip
    """Store the sums and maxima of a tile, those of its columns only if WITH_COLUMNS."""
    row_maximum = tl.max(s, 1)
    column_maximum = tl.max(s, 0)
    if CONSTANT:
        e = tl.exp2(s * scale - scale)
        row_total = tl.sum(e, 1)
        column_total = tl.sum(e, 0)
    else:
        row_total = tl.sum(exponentials(s, row_maximum[:, None], scale), 1)
        column_total = tl.sum(exponentials(s, column_maximum[None, :], scale), 0)
    tl.store(row_sum + row_offsets, row_total)
    tl.store(row_max + row_offsets, row_maximum)
    if WITH_COLUMNS:
        tl.store(column_sum + column_offsets, column_total)
        tl.store(column_max + column_offsets, column_maximum)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "row_blocks", "column_blocks", "first_column", "last_column", "row_tiles"
    ]
)  # fmt: skip
def tiles_kernel(
    x, y, row_sum, row_max, column_sum, column_max, positives, positive, negative_sum,
    negative_count, temperature, mask, classes, rows, columns, x_plane, y_plane,
    row_blocks, column_blocks, first_column, last_column, row_tiles,
    SELF: tl.constexpr, VIEWS: tl.constexpr, PAIRED: tl.constexpr, MASKED: tl.constexpr,
    CLASSED: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr, PLACE: tl.constexpr,
    DEPTH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One square tile for each program, from the column blocks [first_column, last_column).

    PLACE says which tiles the launch takes. "all" takes every tile and gives each a mask. "inner"
    takes the tiles that need no mask. "edge" takes the others: the tiles on the diagonal (with
    SELF) and those of the last blocks, if their rows or columns do not fill them (see
    ``edge_tile``).

    With MASKED each program also stores the sum and the number of the similarities that the user's
    mask leaves in its tile.
    """
    program = tl.program_id(0)
    if PLACE == "edge":
        i, j = edge_tile(
            p=program, row_blocks=row_blocks, column_blocks=column_blocks,
            first_column=first_column, row_tiles=row_tiles, SELF=SELF,
        )  # fmt: skip
    else:
        i, j = tile_of(
            p=program, first_group=first_column // GROUP, row_groups=tl.cdiv(row_blocks, GROUP),
            SELF=SELF, GROUP=GROUP,
        )  # fmt: skip
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
        x=x, y=y, row=i * BM, column=j * BM, x_plane=x_plane, y_plane=y_plane,
        DEPTH=DEPTH, PLANES=PLANES, BM=BM, BN=BM, BK=BK, PRECISION=PRECISION, TMA=TMA,
    )  # fmt: skip
    a = i * BM + tl.arange(0, BM)
    b = j * BM + tl.arange(0, BM)
    if PAIRED:  # First: a positive may be of the same class as its row, which the mask excludes.
        s = take_positives(
            s=s, positives=positives, positive=positive, a=a, b=b, rows=rows, SELF=SELF
        )
    if PLACE != "inner":
        if SELF and VIEWS == 2 and i == j:
            # The positive comes from the same arithmetic as a negative, so equal rows give equal
            # numbers, and a tie is seen as one.
            tl.store(positive + a, tl.sum(tl.where((a ^ 1)[:, None] == b[None, :], s, 0.0), 1))
        is_negative = negatives(
            a=a, b=b, rows=rows, columns=columns, mask=mask, classes=classes,
            SELF=SELF, VIEWS=VIEWS, MASKED=MASKED, CLASSED=CLASSED,
        )  # fmt: skip
        if MASKED:
            # A tile above the diagonal stands for two tiles of S.
            multiplicity = tl.where(i == j, 1, 2)
            slot = tl.cast(program, tl.int64)
            tl.store(negative_sum + slot, tl.sum(tl.where(is_negative, s, 0.0)) * multiplicity)
            tl.store(negative_count + slot, tl.sum(is_negative.to(tl.int32)) * multiplicity)
        s = tl.where(is_negative, s, float("-inf"))
    reduce_tile(
        s=s, scale=scale, row_sum=row_sum, row_max=row_max, column_sum=column_sum,
        column_max=column_max,
        row_offsets=(j - first_column).to(tl.int64) * (row_blocks * BM) + a,
        column_offsets=(
            i.to(tl.int64) * ((last_column - first_column) * BM) + b - first_column * BM
        ),
        WITH_COLUMNS=not SELF or i < j, CONSTANT=CONSTANT,
    )  # fmt: skip


@triton.jit
def fold(x, OF_MAXIMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr):
    """Combine rows r and r + 8 of every 16 rows by their sum or, with OF_MAXIMA, their maximum.

    One thread holds both rows in the layout of the tensor cores. Folding therefore moves no data,
    and it halves the registers that a strip needs for its columns.
    """
    if FOLD:
        x = tl.reshape(x, (BM // 16, 2, 8, BN))
        if OF_MAXIMA:
            x = tl.max(x, 1)
        else:
            x = tl.sum(x, 1)
    return x


@triton.jit
def add_tile(
    s, column_total, column_maximum, row_sum, row_max, row_offsets, scale,
    BM: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Store the sums and maxima of a tile's rows, and add its columns to those of the strip."""
    e = tl.exp2(s * scale - scale)
    tl.store(row_sum + row_offsets, tl.sum(e, 1))
    tl.store(row_max + row_offsets, tl.max(s, 1))
    column_total += fold(x=e, OF_MAXIMA=False, BM=BM, BN=BN, FOLD=FOLD)
    return column_total, tl.maximum(
        column_maximum, fold(x=s, OF_MAXIMA=True, BM=BM, BN=BN, FOLD=FOLD)
    )


@triton.jit(
    do_not_specialize=[
        "row_blocks", "whole_rows", "first_column", "last_column", "whole_columns", "run_length"
    ]
)  # fmt: skip
def strips_kernel(
    x, y, row_sum, row_max, column_sum, column_max, temperature,
    row_blocks, whole_rows, first_column, last_column, whole_columns, run_length,
    SELF: tl.constexpr, TAU_TENSOR: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BM: tl.constexpr, PIPELINED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The inner tiles of one column block against a run of ``run_length`` row blocks.

    A program keeps the column block in shared memory and loads the row blocks one after the other.
    Only whole blocks take part: ``whole_rows`` and ``whole_columns`` are their numbers.

    A sum over an axis that lies across threads costs 5 shuffles for each entry. The sums and maxima
    of columns therefore stay in registers, one for each element of the tile, until the run ends.

    With PIPELINED the exponentials of a tile are computed while the tensor cores multiply the next
    one. A block has TILE rows, of which the program multiplies BM at a time.
    """
    panel = last_column - first_column
    j = first_column + tl.program_id(0) % panel
    k = tl.program_id(0) // panel
    last_row = tl.minimum((k + 1) * run_length, whole_rows)
    if SELF:
        last_row = tl.minimum(last_row, j)
    first = k * run_length * (TILE // BM)
    last = last_row * (TILE // BM)
    if (first >= last) | (j >= whole_columns):
        return
    scale = read_scale(temperature, TAU_TENSOR)
    column_block = load_block(
        source=y, row=j * TILE, column=0, stride=WIDTH, ROWS=TILE, COLUMNS=WIDTH, TMA=TMA
    ).T
    if FOLD:
        column_total = tl.zeros((BM // 16, 8, TILE), tl.float32)
        column_maximum = tl.full((BM // 16, 8, TILE), float("-inf"), tl.float32)
    else:
        column_total = tl.zeros((BM, TILE), tl.float32)
        column_maximum = tl.full((BM, TILE), float("-inf"), tl.float32)
    row = (j - first_column).to(tl.int64) * (row_blocks * TILE) + tl.arange(0, BM)
    if PIPELINED:
        s = tl.dot(
            load_block(
                source=x, row=first * BM, column=0, stride=WIDTH, ROWS=BM, COLUMNS=WIDTH, TMA=TMA
            ),
            column_block,
            input_precision=PRECISION,
        )
        for i in range(first + 1, last):
            a = load_block(
                source=x, row=i * BM, column=0, stride=WIDTH, ROWS=BM, COLUMNS=WIDTH, TMA=TMA
            )
            next_s = tl.dot(a, column_block, input_precision=PRECISION)
            column_total, column_maximum = add_tile(
                s=s, column_total=column_total, column_maximum=column_maximum, row_sum=row_sum,
                row_max=row_max, row_offsets=row + (i - 1) * BM, scale=scale,
                BM=BM, BN=TILE, FOLD=FOLD,
            )  # fmt: skip
            s = next_s
        column_total, column_maximum = add_tile(
            s=s, column_total=column_total, column_maximum=column_maximum, row_sum=row_sum,
            row_max=row_max, row_offsets=row + (last - 1) * BM, scale=scale,
            BM=BM, BN=TILE, FOLD=FOLD,
        )  # fmt: skip
    else:
        for i in range(first, last):
            a = load_block(
                source=x, row=i * BM, column=0, stride=WIDTH, ROWS=BM, COLUMNS=WIDTH, TMA=TMA
            )
            s = tl.dot(a, column_block, input_precision=PRECISION)
            column_total, column_maximum = add_tile(
                s=s, column_total=column_total, column_maximum=column_maximum, row_sum=row_sum,
                row_max=row_max, row_offsets=row + i * BM, scale=scale,
                BM=BM, BN=TILE, FOLD=FOLD,
            )  # fmt: skip
    if FOLD:
        column_total = tl.sum(column_total, 1)
        column_maximum = tl.max(column_maximum, 1)
    offsets = k.to(tl.int64) * (panel * TILE) + (j - first_column) * TILE + tl.arange(0, TILE)
    tl.store(column_sum + offsets, tl.sum(column_total, 0))
    tl.store(column_max + offsets, tl.max(column_maximum, 0))
