"""Owned rows on Hopper GPUs, in Gluon: G Y, where no number of G leaves the chip.

The kernel computes what ``owned_rows_kernel`` in ``coefficients.py`` computes, with the constant
shift 1: with scale = log2(e) / tau,

    G_ab = 2^(s_ab scale - scale) (w_a + w_b)        0 where a = b or b is the positive of a
    out_a = sum of G_ab y_b over the columns b.

A program takes segments from its table: one block of 128 rows against a run of column blocks. A
block of rows that two programs share has two parts. The first goes to out[0] and the second to
out[1], and ``finish_kernel`` adds them. Every number has one writer, and a program adds in a fixed
order, so the results have the same bits on every run.

A program has a producer and two groups of warps, with barriers as in ``hopper.py``. Each group owns
64 of the rows, and their gradient stays in its registers. Tiles of COLUMNS columns pass through the
ring and serve both products of both groups: S = X Y^T, then G Y with G as the left operand, which
the tensor cores read from registers. There are two orders:

    PIPELINED        S of the next tile is issued together with G Y of this one, and the
                     exponentials of the next tile are taken while G Y of this one runs
    not PIPELINED    one after the other; the products of the other group hide the exponentials

The second order needs fewer registers, so at 256 features it has tiles of 128 columns.

The rows behind the last one are 0, and so are their weights. So are those of the columns. What a
tile adds for such a column is therefore a finite number times 0, and no tile at the edge needs a
mask. Only the tiles in which a row meets itself do, with SELF. Each segment begins with them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import PropagateNan

from cjepa_kernels.triton.kernels.hopper import (
    ELEMENT,
    GROUP_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    WARPS,
    following,
    load_block,
    new_barriers,
)
from cjepa_kernels.triton.kernels.temperature import LOG2E

BLOCK = gl.constexpr(128)  # rows and columns of a block
# A segment in the table: block of rows, first block of columns, number of column blocks, part, and
# the block of columns that comes first: the block of rows itself where it is among the columns.
FIELDS = gl.constexpr(5)
LARGEST_FP16 = gl.constexpr(65504.0)
KEEP_NAN = gl.constexpr(PropagateNan.ALL)


@gluon.jit
def finite(g, TYPE: gl.constexpr):
    """G as it is, but no number beyond those of its dtype.

    No number of a row and a column inside is: weights are below 2^13 with fp16, and each of the two
    exponentials is at most the sum that its weight divides by. A row behind the last one may give
    any number. Infinity times the 0 of such a row would be NaN. A NaN stays as it is.
    """
    if TYPE == gl.float16:  # noqa: SIM300
        g = gl.minimum(g, LARGEST_FP16, propagate_nan=KEEP_NAN)
        g = gl.maximum(g, -LARGEST_FP16, propagate_nan=KEEP_NAN)
    return g


@gluon.jit
def without_own(s, row, column):
    """-inf where a row meets itself or its positive."""
    own = (row[:, None] == column[None, :]) | (row[:, None] == (column ^ 1)[None, :])
    return gl.where(own, float("-inf"), s)


@gluon.jit
def next_tile(tile, first_tile, end):
    """The tile after this one; the first one follows the last."""
    return gl.where(tile + 1 == end, first_tile, tile + 1)


@gluon.jit
def owned_producer(
    own_blocks, tile_blocks, segments, buffers, barriers,
    WIDTH: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the rows of each segment, and its tiles of columns."""
    TILES: gl.constexpr = BLOCK // COLUMNS
    table, first, last = segments
    own, ring = buffers
    own_full, own_empty, full, empty, _lead = barriers
    slot = 0
    parity = 0
    turn = 0
    for k in range(first, last):
        segment = table + k * FIELDS
        row = gl.load(segment) * BLOCK
        first_tile = gl.load(segment + 1) * TILES
        tiles = gl.load(segment + 2) * TILES
        tile = gl.load(segment + 4) * TILES
        mbarrier.wait(own_empty.index(0), turn ^ 1)
        turn ^= 1
        mbarrier.expect(own_full.index(0), BLOCK * WIDTH * ELEMENT)
        for group in gl.static_range(2):
            load_block(own_blocks, [row + group * ROWS, 0], own_full.index(0), own.index(group))
        for _ in range(tiles):
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(full.index(slot), COLUMNS * WIDTH * ELEMENT)
            load_block(tile_blocks, [tile * COLUMNS, 0], full.index(slot), ring.index(slot))
            tile = next_tile(tile, first_tile, first_tile + tiles)
            slot, parity = following(slot, parity, STAGES)


@gluon.jit
def left_operand(
    s, rows, column, column_weight, scale,
    TYPE: gl.constexpr, LAYOUT: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """G of a tile, in the registers from which the second product reads it."""
    row, row_weight = rows
    if MASK:
        s = without_own(s, row, column)
    g = gl.exp2(s * scale - scale) * (row_weight[:, None] + column_weight[None, :])
    g = finite(g, TYPE).to(TYPE)
    return gl.convert_layout(g, gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def pipelined_tile(
    g, acc, slot, parity, tile, more, rows, across, column_weights, scale, zero, own, ring, full,
    empty, COLUMNS: gl.constexpr, STAGES: gl.constexpr, TYPE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """acc + G Y of the tile in ``slot``, whose G is given, and G of the next tile ``tile``.

    ``more`` says whether a tile comes after that.
    """
    LAYOUT: gl.constexpr = acc.type.layout
    column = tile * COLUMNS + across
    column_weight = gl.load(column_weights + column)
    before = slot
    slot, parity = following(slot, parity, STAGES)
    mbarrier.wait(full.index(slot), parity)
    y = ring.index(slot).permute((1, 0))
    s = warpgroup_mma(own, y, zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(g, ring.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    next_g = left_operand(s, rows, column, column_weight, scale, TYPE, LAYOUT, MASK)
    # The assembler would take exponentials after the wait below. It does not move them past this
    # wait for the tile after the next, which has to come anyway, because it is a branch.
    ahead, ahead_parity = following(slot, parity, STAGES)
    mbarrier.wait(full.index(ahead), ahead_parity, pred=more)
    # The product reads G from its registers until here.
    acc, g, next_g = warpgroup_mma_wait(0, deps=[acc, g, next_g])
    mbarrier.arrive(empty.index(before), count=1)
    return next_g, acc, slot, parity


@gluon.jit
def whole_tile(
    acc, slot, parity, tile, rows, across, column_weights, scale, zero, own, ring, full, empty,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, TYPE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """acc + G Y of the tile in ``slot``, with one product after the other."""
    LAYOUT: gl.constexpr = acc.type.layout
    column = tile * COLUMNS + across
    mbarrier.wait(full.index(slot), parity)
    y = ring.index(slot).permute((1, 0))
    s = warpgroup_mma(own, y, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    column_weight = gl.load(column_weights + column)
    g = left_operand(s, rows, column, column_weight, scale, TYPE, LAYOUT, MASK)
    acc = warpgroup_mma(g, ring.index(slot), acc, is_async=True)
    acc, g = warpgroup_mma_wait(0, deps=[acc, g])
    mbarrier.arrive(empty.index(slot), count=1)
    slot, parity = following(slot, parity, STAGES)
    return acc, slot, parity


@gluon.jit
def owned_group(
    scale, row_weights, column_weights, out, out_rows, segments, buffers, barriers,
    GROUP: gl.constexpr, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    SELF: gl.constexpr, PIPELINED: gl.constexpr,
):  # fmt: skip
    """64 rows of each segment against its tiles."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
    TILES: gl.constexpr = BLOCK // COLUMNS
    table, first, last = segments
    own, ring = buffers
    own_full, own_empty, full, empty, lead = barriers
    TYPE: gl.constexpr = own.dtype
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    across = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, S))
    line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    feature = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT))
    zero = gl.zeros((ROWS, COLUMNS), gl.float32, S)
    x = own.index(GROUP)
    slot = 0
    parity = 0
    turn = 0
    for k in range(first, last):
        segment = table + k * FIELDS
        first_tile = gl.load(segment + 1) * TILES
        tiles = gl.load(segment + 2) * TILES
        tile = gl.load(segment + 4) * TILES
        row = gl.load(segment) * BLOCK + GROUP * ROWS + lane
        rows = (row, gl.load(row_weights + row))
        acc = gl.zeros((ROWS, WIDTH), gl.float32, OUT)
        mbarrier.wait(own_full.index(0), turn)
        turn ^= 1
        # Once, at the beginning, group 1 falls behind the other group by half a tile.
        if GROUP == 1:
            mbarrier.wait(lead.index(0), 0, pred=k == first)
        if PIPELINED:
            column = tile * COLUMNS + across
            column_weight = gl.load(column_weights + column)
            mbarrier.wait(full.index(slot), parity)
            y = ring.index(slot).permute((1, 0))
            s = warpgroup_mma(x, y, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            g = left_operand(s, rows, column, column_weight, scale, TYPE, OUT, SELF)
            if GROUP == 0:
                mbarrier.arrive(lead.index(0), count=1, pred=k == first)
            for _ in gl.static_range(1, TILES):
                tile = next_tile(tile, first_tile, first_tile + tiles)
                g, acc, slot, parity = pipelined_tile(
                    g, acc, slot, parity, tile, tiles > TILES, rows, across, column_weights, scale,
                    zero, x, ring, full, empty, COLUMNS, STAGES, TYPE, SELF,
                )  # fmt: skip
            for t in range(TILES, tiles):
                tile = next_tile(tile, first_tile, first_tile + tiles)
                g, acc, slot, parity = pipelined_tile(
                    g, acc, slot, parity, tile, t + 1 < tiles, rows, across, column_weights, scale,
                    zero, x, ring, full, empty, COLUMNS, STAGES, TYPE, False,
                )  # fmt: skip
            acc = warpgroup_mma(g, ring.index(slot), acc, is_async=True)
            acc, g = warpgroup_mma_wait(0, deps=[acc, g])
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = following(slot, parity, STAGES)
        else:
            for t in gl.static_range(TILES):
                acc, slot, parity = whole_tile(
                    acc, slot, parity, tile, rows, across, column_weights, scale, zero, x, ring,
                    full, empty, COLUMNS, STAGES, TYPE, SELF,
                )  # fmt: skip
                tile = next_tile(tile, first_tile, first_tile + tiles)
                if GROUP == 0:
                    mbarrier.arrive(lead.index(0), count=1, pred=(k == first) & (t == 0))
            for _ in range(TILES, tiles):
                acc, slot, parity = whole_tile(
                    acc, slot, parity, tile, rows, across, column_weights, scale, zero, x, ring,
                    full, empty, COLUMNS, STAGES, TYPE, False,
                )  # fmt: skip
                tile = next_tile(tile, first_tile, first_tile + tiles)
        mbarrier.arrive(own_empty.index(0), count=1)
        first_row = gl.load(segment + 3) * out_rows + gl.load(segment) * BLOCK + GROUP * ROWS
        to = out + first_row.to(gl.int64) * WIDTH
        gl.store(to + line[:, None] * WIDTH + feature[None, :], acc)


@gluon.jit(do_not_specialize=["out_rows"])
def hopper_owned_kernel(
    own_blocks, tile_blocks, row_weight, column_weight, out, starts, table, temperature, out_rows,
    WIDTH: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, SELF: gl.constexpr,
    PIPELINED: gl.constexpr,
):  # fmt: skip
    """Program p takes the segments from starts[p] to starts[p + 1]; out: (2, out_rows, WIDTH)."""
    scale = LOG2E / temperature
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    own = gl.allocate_shared_memory(own_blocks.dtype, [2, ROWS, WIDTH], own_blocks.layout)
    ring = gl.allocate_shared_memory(
        tile_blocks.dtype, [STAGES, COLUMNS, WIDTH], tile_blocks.layout
    )
    buffers = (own, ring)
    barriers = (
        new_barriers(1, ARRIVALS=1),  # own_full
        new_barriers(1, ARRIVALS=2),  # own_empty
        new_barriers(STAGES, ARRIVALS=1),  # full
        new_barriers(STAGES, ARRIVALS=2),  # empty: both groups read each tile
        new_barriers(1, ARRIVALS=1),  # lead
    )
    segments = (table, first, last)
    gl.warp_specialize(
        [
            (owned_group, (scale, row_weight, column_weight, out, out_rows, segments, buffers,
                           barriers, 0, WIDTH, COLUMNS, STAGES, SELF, PIPELINED)),
            (owned_group, (scale, row_weight, column_weight, out, out_rows, segments, buffers,
                           barriers, 1, WIDTH, COLUMNS, STAGES, SELF, PIPELINED)),
            (owned_producer, (own_blocks, tile_blocks, segments, buffers, barriers, WIDTH, COLUMNS,
                              STAGES)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
