"""Inner tiles of S = X Y^T on Hopper GPUs, in Gluon: the sums and maxima of their rows and columns.

The kernels compute what ``strips_kernel`` in ``similarity.py`` computes, with the constant shift 1.
With a tile of 64 rows a and 128 columns b of block j, and scale = log2(e) / tau,

    e_ab = 2^(s_ab scale - scale)
    row_sum[j, a]    = sum of e_ab over b        row_max[j, a]    = largest s_ab over b
    column_sum[k, b] = sum of e_ab over a        column_max[k, b] = largest s_ab over a,

where the rows a of slot k are those that one warp takes of one segment. A segment is a run of row
blocks against columns that stay in shared memory. ``schedules.py`` cuts the tiles into segments,
and each program takes some of them from its table. Every number has one writer, and a program
adds in a fixed order, so the results have the same bits on every run.

A program has three parts that run at one time: a producer of one warp, which loads blocks by the
tensor memory accelerator, and two groups of four warps, which compute. Blocks of rows pass through
a ring of STAGES slots in shared memory. The barrier ``full[slot]`` opens when a block has arrived,
and ``empty[slot]`` when it has been read. ``stay_full`` and ``stay_empty`` do the same for the
columns. A barrier has a parity, which flips each time that it opens, and a wait names the parity
of the turn that it waits for.

``wide_kernel`` takes up to 256 features. 256 columns stay, 128 for each group, and each tile of
rows serves both groups. A group has two accumulators: it issues the product of the next tile, and
takes the exponentials of this one while the tensor cores multiply.

``pairs_kernel`` takes more features. 128 columns stay, and the groups take the tiles of rows in
turn, so that the exponentials of one group fall into the product of the other. A tile of rows
passes in steps of STEP features.

``num_warps`` is 4, the warps of the first group. The other parts bring their own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cjepa_kernels.triton.kernels.temperature import LOG2E

# Triton 3.9 gave the function another name.
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
ROWS = gl.constexpr(64)  # rows of a tile
COLUMNS = gl.constexpr(128)  # columns of a tile, which is a block
WARPS = gl.constexpr(4)  # of a group
ELEMENT = gl.constexpr(2)  # bytes of an operand's number
# A segment in the table: column block, number of the segment, first tile of rows, and the tiles of
# rows that each group takes.
FIELDS = gl.constexpr(5)
PRODUCER_REGISTERS = gl.constexpr(24)
GROUP_REGISTERS = gl.constexpr(240)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that open after a number of arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(COUNT):
        mbarrier.init(barriers.index(k), count=ARRIVALS)
    return barriers


@gluon.jit
def following(slot, parity, STAGES: gl.constexpr):
    """The slot after this one, and the parity of its turn."""
    wraps = slot + 1 == STAGES
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def advance(slot, parity, BY: gl.constexpr, STAGES: gl.constexpr):
    """The slot BY after this one, and the parity of its turn."""
    slot += BY % STAGES
    parity ^= (BY // STAGES) & 1
    wraps = slot >= STAGES
    return gl.where(wraps, slot - STAGES, slot), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def fold(x, OF_MAXIMA: gl.constexpr):
    """Combine rows r and r + 8 of every 16 rows: (64, 128) becomes (4 warps, 8, 128).

    One thread holds both rows, so this moves no data, and it halves the registers for the columns.
    """
    x = gl.reshape(x, (WARPS, 2, ROWS // WARPS // 2, COLUMNS))
    if OF_MAXIMA:
        x = gl.max(x, 1)
    else:
        x = gl.sum(x, 1)
    return x


@gluon.jit
def add_tile(s, column_total, column_maximum, row_sum, row_max, row_offsets, scale):
    """Store the sums and maxima of a tile's rows, and add its columns to those of the segment."""
    e = gl.exp2(s * scale - scale)
    gl.store(row_sum + row_offsets, gl.sum(e, 1))
    column_total += fold(e, OF_MAXIMA=False)
    gl.store(row_max + row_offsets, gl.max(s, 1))
    column_maximum = gl.maximum(column_maximum, fold(s, OF_MAXIMA=True))
    return column_total, column_maximum


@gluon.jit
def store_columns(x, buffer, first_slot, column, pitch, OF_MAXIMA: gl.constexpr):
    """Store a segment's columns, in one slot for each warp: no warp waits for another."""
    if OF_MAXIMA:
        x = gl.max(x, 1)
    else:
        x = gl.sum(x, 1)
    layout: gl.constexpr = x.type.layout
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, layout))
    b = column * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    gl.store(buffer + (first_slot + warp).to(gl.int64)[:, None] * pitch + b[None, :], x)


@gluon.jit
def wide_producer(
    stay_blocks, row_blocks, segments, first_column, buffers, barriers,
    WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the columns of each segment, and the tiles of rows that its groups need."""
    table, first, last = segments
    stay, ring = buffers
    stay_full, stay_empty, full, empty = barriers
    slot = 0
    parity = 0
    turn = 0
    for k in range(first, last):
        segment = table + k * FIELDS
        column = (first_column + gl.load(segment)) * COLUMNS
        row = gl.load(segment + 2)
        tiles = gl.maximum(gl.load(segment + 3), gl.load(segment + 4))
        mbarrier.wait(stay_empty.index(0), turn ^ 1)
        turn ^= 1
        mbarrier.expect(stay_full.index(0), 2 * COLUMNS * WIDTH * ELEMENT)
        for half in gl.static_range(2):
            load_block(
                stay_blocks, [column + half * COLUMNS, 0], stay_full.index(0), stay.index(half)
            )
        for t in range(tiles):
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(full.index(slot), ROWS * WIDTH * ELEMENT)
            load_block(row_blocks, [(row + t) * ROWS, 0], full.index(slot), ring.index(slot))
            slot, parity = following(slot, parity, STAGES)


@gluon.jit
def wide_group(
    scale, results, segments, pitches, buffers, barriers,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The tiles of 128 of the 256 columns that stay.

    No product is in flight where the loop jumps back. If one were, the assembler would wait after
    each instruction of the product. The loop therefore takes two tiles, which are always even in
    number, and the accumulator of a product is the one whose tile is done.
    """
    row_sum, row_max, column_sum, column_max = results
    row_pitch, column_pitch = pitches
    table, first, last = segments
    stay, ring = buffers
    stay_full, stay_empty, full, empty = barriers
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator))
    y = stay.index(GROUP).permute((1, 0))
    slot = 0
    parity = 0
    turn = 0
    for k in range(first, last):
        segment = table + k * FIELDS
        row = gl.load(segment + 2)
        tiles = gl.load(segment + 3 + GROUP)
        row_offsets = (gl.load(segment) + GROUP).to(gl.int64) * row_pitch + row * ROWS + lane
        zero = gl.zeros((ROWS, COLUMNS), gl.float32, accumulator)
        column_total = fold(zero, OF_MAXIMA=False)
        column_maximum = fold(zero - float("inf"), OF_MAXIMA=True)
        mbarrier.wait(stay_full.index(0), turn)
        turn ^= 1
        if tiles > 0:
            mbarrier.wait(full.index(slot), parity)
            s0 = warpgroup_mma(ring.index(slot), y, zero, use_acc=False, is_async=True)
            s0 = warpgroup_mma_wait(0, deps=[s0])
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = following(slot, parity, STAGES)
            s1 = zero
            for _ in range(0, tiles - 2, 2):
                mbarrier.wait(full.index(slot), parity)
                product = warpgroup_mma(ring.index(slot), y, s1, use_acc=False, is_async=True)
                column_total, column_maximum = add_tile(
                    s0, column_total, column_maximum, row_sum, row_max, row_offsets, scale
                )
                s1 = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(empty.index(slot), count=1)
                slot, parity = following(slot, parity, STAGES)
                mbarrier.wait(full.index(slot), parity)
                product = warpgroup_mma(ring.index(slot), y, s0, use_acc=False, is_async=True)
                column_total, column_maximum = add_tile(
                    s1, column_total, column_maximum, row_sum, row_max, row_offsets + ROWS, scale
                )
                s0 = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(empty.index(slot), count=1)
                slot, parity = following(slot, parity, STAGES)
                row_offsets += 2 * ROWS
            mbarrier.wait(full.index(slot), parity)
            product = warpgroup_mma(ring.index(slot), y, s1, use_acc=False, is_async=True)
            column_total, column_maximum = add_tile(
                s0, column_total, column_maximum, row_sum, row_max, row_offsets, scale
            )
            s1 = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = following(slot, parity, STAGES)
            column_total, column_maximum = add_tile(
                s1, column_total, column_maximum, row_sum, row_max, row_offsets + ROWS, scale
            )
        mbarrier.arrive(stay_empty.index(0), count=1)
        # The other group may need more rows. Their blocks pass this one.
        for _ in range(tiles, gl.load(segment + (4 - GROUP))):
            mbarrier.wait(full.index(slot), parity)
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = following(slot, parity, STAGES)
        if tiles > 0:
            column = gl.load(segment) + GROUP
            first_slot = gl.load(segment + 1) * WARPS
            store_columns(
                column_total, column_sum, first_slot, column, column_pitch, OF_MAXIMA=False
            )
            store_columns(
                column_maximum, column_max, first_slot, column, column_pitch, OF_MAXIMA=True
            )


@gluon.jit(do_not_specialize=["row_pitch", "column_pitch", "first_column"])
def wide_kernel(
    stay_blocks, row_blocks, row_sum, row_max, column_sum, column_max, starts, table, temperature,
    row_pitch, column_pitch, first_column, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Segments of 256 columns; program p takes those from starts[p] to starts[p + 1]."""
    scale = LOG2E / temperature
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    stay = gl.allocate_shared_memory(stay_blocks.dtype, [2, COLUMNS, WIDTH], stay_blocks.layout)
    ring = gl.allocate_shared_memory(row_blocks.dtype, [STAGES, ROWS, WIDTH], row_blocks.layout)
    buffers = (stay, ring)
    barriers = (
        new_barriers(1, ARRIVALS=1),  # stay_full
        new_barriers(1, ARRIVALS=2),  # stay_empty
        new_barriers(STAGES, ARRIVALS=1),  # full
        new_barriers(STAGES, ARRIVALS=2),  # empty: both groups read each block
    )
    results = (row_sum, row_max, column_sum, column_max)
    segments = (table, first, last)
    pitches = (row_pitch, column_pitch)
    gl.warp_specialize(
        [
            (wide_group, (scale, results, segments, pitches, buffers, barriers, 0, STAGES)),
            (wide_group, (scale, results, segments, pitches, buffers, barriers, 1, STAGES)),
            (wide_producer, (stay_blocks, row_blocks, segments, first_column, buffers, barriers,
                             WIDTH, STAGES)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def pairs_producer(
    stay_blocks, row_blocks, segments, first_column, buffers, barriers,
    WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the columns of each segment, and its tiles of rows in steps of STEP features."""
    table, first, last = segments
    stay, ring = buffers
    stay_full, stay_empty, full, empty, _ = barriers
    slot = 0
    parity = 0
    turn = 0
    for k in range(first, last):
        segment = table + k * FIELDS
        column = (first_column + gl.load(segment)) * COLUMNS
        row = gl.load(segment + 2)
        tiles = gl.load(segment + 3) + gl.load(segment + 4)
        mbarrier.wait(stay_empty.index(0), turn ^ 1)
        turn ^= 1
        mbarrier.expect(stay_full.index(0), COLUMNS * WIDTH * ELEMENT)
        for part in gl.static_range(WIDTH // STEP):
            load_block(stay_blocks, [column, part * STEP], stay_full.index(0), stay.index(part))
        for t in range(tiles):
            for step in range(WIDTH // STEP):
                mbarrier.wait(empty.index(slot), parity ^ 1)
                mbarrier.expect(full.index(slot), ROWS * STEP * ELEMENT)
                load_block(
                    row_blocks, [(row + t) * ROWS, step * STEP], full.index(slot), ring.index(slot)
                )
                slot, parity = following(slot, parity, STAGES)


@gluon.jit
def pairs_group(
    scale, results, segments, pitches, buffers, barriers,
    GROUP: gl.constexpr, WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every second tile of rows, beginning with tile GROUP."""
    row_sum, row_max, column_sum, column_max = results
    row_pitch, column_pitch = pitches
    table, first, last = segments
    stay, ring = buffers
    stay_full, stay_empty, full, empty, turns = barriers
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, accumulator))
    STEPS: gl.constexpr = WIDTH // STEP
    slot = 0
    parity = 0
    if GROUP == 1:
        slot, parity = advance(slot, parity, STEPS, STAGES)
    turn = 0
    my_turn = 1 - GROUP  # A wait for parity 1 of a new barrier passes, so group 0 begins.
    for k in range(first, last):
        segment = table + k * FIELDS
        row = gl.load(segment + 2) + GROUP
        row_offsets = gl.load(segment).to(gl.int64) * row_pitch + row * ROWS + lane
        s = gl.zeros((ROWS, COLUMNS), gl.float32, accumulator)
        column_total = fold(s, OF_MAXIMA=False)
        column_maximum = fold(s - float("inf"), OF_MAXIMA=True)
        mbarrier.wait(stay_full.index(0), turn)
        turn ^= 1
        for _ in range(gl.load(segment + 3 + GROUP)):
            # Until the other group has seen all of its blocks arrive, a slot may be two turns
            # behind. Its parity would then be that of a block that has arrived.
            mbarrier.wait(turns.index(GROUP), my_turn)
            my_turn ^= 1
            mbarrier.wait(full.index(slot), parity)
            if STEPS == 1:
                mbarrier.arrive(turns.index(1 - GROUP), count=1)
            y = stay.index(0).permute((1, 0))
            product = warpgroup_mma(ring.index(slot), y, s, use_acc=False, is_async=True)
            for step in gl.static_range(1, STEPS):
                before = slot
                slot, parity = following(slot, parity, STAGES)
                mbarrier.wait(full.index(slot), parity)
                if step == STEPS - 1:
                    mbarrier.arrive(turns.index(1 - GROUP), count=1)
                y = stay.index(step).permute((1, 0))
                product = warpgroup_mma(ring.index(slot), y, product, is_async=True)
                product = warpgroup_mma_wait(1, deps=[product])
                mbarrier.arrive(empty.index(before), count=1)
            s = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = advance(slot, parity, STEPS + 1, STAGES)
            column_total, column_maximum = add_tile(
                s, column_total, column_maximum, row_sum, row_max, row_offsets, scale
            )
            row_offsets += 2 * ROWS
        mbarrier.arrive(stay_empty.index(0), count=1)
        column = gl.load(segment)
        first_slot = (2 * gl.load(segment + 1) + GROUP) * WARPS
        store_columns(column_total, column_sum, first_slot, column, column_pitch, OF_MAXIMA=False)
        store_columns(column_maximum, column_max, first_slot, column, column_pitch, OF_MAXIMA=True)


@gluon.jit(do_not_specialize=["row_pitch", "column_pitch", "first_column"])
def pairs_kernel(
    stay_blocks, row_blocks, row_sum, row_max, column_sum, column_max, starts, table, temperature,
    row_pitch, column_pitch, first_column, WIDTH: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Segments of 128 columns; program p takes those from starts[p] to starts[p + 1]."""
    scale = LOG2E / temperature
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    stay = gl.allocate_shared_memory(
        stay_blocks.dtype, [WIDTH // STEP, COLUMNS, STEP], stay_blocks.layout
    )
    ring = gl.allocate_shared_memory(row_blocks.dtype, [STAGES, ROWS, STEP], row_blocks.layout)
    buffers = (stay, ring)
    barriers = (
        new_barriers(1, ARRIVALS=1),  # stay_full
        new_barriers(1, ARRIVALS=2),  # stay_empty
        new_barriers(STAGES, ARRIVALS=1),  # full
        new_barriers(STAGES, ARRIVALS=1),  # empty: one group reads each block
        new_barriers(2, ARRIVALS=1),  # turns
    )
    results = (row_sum, row_max, column_sum, column_max)
    segments = (table, first, last)
    pitches = (row_pitch, column_pitch)
    gl.warp_specialize(
        [
            (pairs_group, (scale, results, segments, pitches, buffers, barriers,
                           0, WIDTH, STEP, STAGES)),
            (pairs_group, (scale, results, segments, pitches, buffers, barriers,
                           1, WIDTH, STEP, STAGES)),
            (pairs_producer, (stay_blocks, row_blocks, segments, first_column, buffers, barriers,
                              WIDTH, STEP, STAGES)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
