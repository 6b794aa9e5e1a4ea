"""Squares of G on Hopper GPUs, in Gluon: G to a workspace, and its products from there.

The kernels compute what ``coefficient_tiles_kernel`` and ``products_kernel`` in ``coefficients.py``
compute, with the constant shift 1. For a square of blocks of S = X Y^T from block ``first_row`` and
``first_column`` on, with scale = log2(e) / tau,

    G_ab = 2^(s_ab scale - scale) (w_a + w_b)        0 where a = b or b is the positive of a
    dX_a += sum of G_ab y_b    and    dY_b += sum of G_ab x_a.

``hopper_strips_kernel`` and ``hopper_tiles_kernel`` write G, ``hopper_products_kernel`` multiplies.

The workspace holds G in boxes of 64 x 64 numbers. A box lies in one piece, 8 KiB, and ``pitch``
boxes are a line. So one load brings a box of G or of G^T, whose transposition the tensor cores do.
Of a square on the diagonal of a symmetric S only the blocks on and above the diagonal are written.
The products take the others from their mirror images.

The right operand of S is Y with its rows in another order, ``y_reordered`` (see
``arrange.py``). Then the eight numbers of a row that one thread holds of every 32 columns are those
of consecutive columns of S, and a thread stores them as 16 bytes.

The rows behind the last one are 0. What they multiply is a number of G without a meaning, but a
finite one, and their own gradients are never read. So no block at the edge needs a mask.

Programs, groups of warps, the ring and its barriers are those of ``hopper.py``. Every number has
one writer in a launch, and a program adds in a fixed order, so the results have the same bits on
every run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cjepa_kernels.triton.kernels.hopper import (
    ELEMENT,
    GROUP_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    WARPS,
    advance,
    following,
    load_block,
    new_barriers,
)
from cjepa_kernels.triton.kernels.hopper_owned import BLOCK, finite, without_own
from cjepa_kernels.triton.kernels.temperature import LOG2E

BOX = gl.constexpr(64)  # rows and columns of a box; features of a step
BOX_NUMBERS = gl.constexpr(64 * 64)
WIDE = gl.constexpr(256)  # columns of a tile of G, and features of a tile of a product
# A strip in its table: block of columns, first block of rows and number of row blocks, all counted
# from the square's corner.
STRIP_FIELDS = gl.constexpr(3)
# A tile in its table: first row and first column in boxes, counted from the square's corner.
TILE_FIELDS = gl.constexpr(2)
# A job in its table, in boxes: 0 for dX or 1 for dY, first row and the row that is not part of the
# square any more, first feature; of G^T the first box, the number of boxes, and the row of the
# other operand that belongs to the first one; the same three of G; and the part, 0 or 1.
JOB_FIELDS = gl.constexpr(11)


@gluon.jit
def in_order(s, COLUMNS: gl.constexpr):
    """The columns of a product with reordered rows in their order; no number changes its thread."""
    s = gl.reshape(s, (ROWS, COLUMNS // 32, 4, 4, 2))
    s = gl.reshape(gl.permute(s, (0, 1, 3, 2, 4)), (ROWS, COLUMNS))
    REGISTERS: gl.constexpr = (
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]]
        if COLUMNS == 128
        else [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]]
    )
    EIGHTS: gl.constexpr = gl.DistributedLinearLayout(
        REGISTERS, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [ROWS, COLUMNS],
    )  # fmt: skip
    return gl.convert_layout(s, EIGHTS)


@gluon.jit
def strips_producer(
    stay_blocks, row_blocks, strips, corner, buffers, barriers,
    WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the columns of each strip, and its tiles of rows in steps of STEP features."""
    table, first, last = strips
    first_row, first_column = corner
    stay, ring = buffers
    stay_full, stay_empty, full, empty, _turns = barriers
    slot = 0
    parity = 0
    turn = 0
    for k in range(first, last):
        strip = table + k * STRIP_FIELDS
        column = (first_column + gl.load(strip)) * BLOCK
        row = (first_row + gl.load(strip + 1)) * BLOCK
        tiles = gl.load(strip + 2) * (BLOCK // ROWS)
        mbarrier.wait(stay_empty.index(0), turn ^ 1)
        turn ^= 1
        for t in range(tiles):
            for step in range(WIDTH // STEP):
                # The first tile's product begins with the first step of the columns.
                mbarrier.expect(stay_full.index(step), BLOCK * STEP * ELEMENT, pred=t == 0)
                load_block(
                    stay_blocks, [column, step * STEP], stay_full.index(step), stay.index(step),
                    pred=t == 0,
                )  # fmt: skip
                mbarrier.wait(empty.index(slot), parity ^ 1)
                mbarrier.expect(full.index(slot), ROWS * STEP * ELEMENT)
                load_block(
                    row_blocks, [row + t * ROWS, step * STEP], full.index(slot), ring.index(slot)
                )
                slot, parity = following(slot, parity, STAGES)


@gluon.jit
def strips_group(
    scale, row_weight, column_weight, g, pitch, strips, corner, buffers, barriers,
    GROUP: gl.constexpr, WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    SELF: gl.constexpr,
):  # fmt: skip
    """Every second tile of rows, beginning with tile GROUP, as ``pairs_group`` of ``hopper.py``."""
    table, first, last = strips
    first_row, first_column = corner
    stay, ring = buffers
    stay_full, stay_empty, full, empty, turns = barriers
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK, 16])
    STEPS: gl.constexpr = WIDTH // STEP
    TYPE: gl.constexpr = ring.dtype
    slot = 0
    parity = 0
    if GROUP == 1:
        slot, parity = advance(slot, parity, STEPS, STAGES)
    turn = 0
    my_turn = 1 - GROUP  # A wait for parity 1 of a new barrier passes, so group 0 begins.
    zero = gl.zeros((ROWS, BLOCK), gl.float32, ACCUMULATOR)
    LAYOUT: gl.constexpr = in_order(zero, BLOCK).type.layout
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    across = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
    for k in range(first, last):
        strip = table + k * STRIP_FIELDS
        block = first_column + gl.load(strip)
        line = gl.load(strip + 1) * (BLOCK // ROWS) + GROUP
        tile = first_row * (BLOCK // ROWS) + line
        b = block * BLOCK + across
        weight_b = gl.load(column_weight + b)
        box = line * pitch + gl.load(strip) * (BLOCK // BOX)
        to = g + box.to(gl.int64) * BOX_NUMBERS
        to += lane[:, None] * BOX + ((across // BOX) * BOX_NUMBERS + across % BOX)[None, :]
        s = zero
        for t in range(gl.load(strip + 2)):
            # See ``pairs_group`` for the turns.
            mbarrier.wait(turns.index(GROUP), my_turn)
            my_turn ^= 1
            mbarrier.wait(full.index(slot), parity)
            if STEPS == 1:
                mbarrier.arrive(turns.index(1 - GROUP), count=1)
            weight_a = gl.load(row_weight + tile * ROWS + lane)
            mbarrier.wait(stay_full.index(0), turn, pred=t == 0)
            y = stay.index(0).permute((1, 0))
            product = warpgroup_mma(ring.index(slot), y, s, use_acc=False, is_async=True)
            for step in gl.static_range(1, STEPS):
                before = slot
                slot, parity = following(slot, parity, STAGES)
                mbarrier.wait(full.index(slot), parity)
                if step == STEPS - 1:
                    mbarrier.arrive(turns.index(1 - GROUP), count=1)
                mbarrier.wait(stay_full.index(step), turn, pred=t == 0)
                y = stay.index(step).permute((1, 0))
                product = warpgroup_mma(ring.index(slot), y, product, is_async=True)
                product = warpgroup_mma_wait(1, deps=[product])
                mbarrier.arrive(empty.index(before), count=1)
            s = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(slot), count=1)
            slot, parity = advance(slot, parity, STEPS + 1, STAGES)
            x = in_order(s, BLOCK)
            if SELF:
                is_diagonal = tile // (BLOCK // ROWS) == block
                if is_diagonal:
                    x = without_own(x, tile * ROWS + lane, b)
            x = gl.exp2(x * scale - scale) * (weight_a[:, None] + weight_b[None, :])
            gl.store(to, finite(x, TYPE).to(TYPE))
            to += (BLOCK // ROWS) * BOX_NUMBERS * pitch
            tile += BLOCK // ROWS
        turn ^= 1
        mbarrier.arrive(stay_empty.index(0), count=1)


@gluon.jit(do_not_specialize=["first_row", "first_column", "pitch"])
def hopper_strips_kernel(
    stay_blocks, row_blocks, row_weight, column_weight, g, starts, table, temperature,
    first_row, first_column, pitch, WIDTH: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    SELF: gl.constexpr,
):  # fmt: skip
    """G by strips: 128 columns stay in shared memory, and tiles of 64 rows pass by."""
    scale = LOG2E / temperature
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    stay = gl.allocate_shared_memory(
        stay_blocks.dtype, [WIDTH // STEP, BLOCK, STEP], stay_blocks.layout
    )
    ring = gl.allocate_shared_memory(row_blocks.dtype, [STAGES, ROWS, STEP], row_blocks.layout)
    buffers = (stay, ring)
    barriers = (
        new_barriers(WIDTH // STEP, ARRIVALS=1),  # stay_full, of each step
        new_barriers(1, ARRIVALS=2),  # stay_empty
        new_barriers(STAGES, ARRIVALS=1),  # full
        new_barriers(STAGES, ARRIVALS=1),  # empty: one group reads each block
        new_barriers(2, ARRIVALS=1),  # turns
    )
    strips = (table, first, last)
    corner = (first_row, first_column)
    gl.warp_specialize(
        [
            (strips_group, (scale, row_weight, column_weight, g, pitch, strips, corner, buffers,
                            barriers, 0, WIDTH, STEP, STAGES, SELF)),
            (strips_group, (scale, row_weight, column_weight, g, pitch, strips, corner, buffers,
                            barriers, 1, WIDTH, STEP, STAGES, SELF)),
            (strips_producer, (stay_blocks, row_blocks, strips, corner, buffers, barriers,
                               WIDTH, STEP, STAGES)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def operand_rings(left_blocks, right_blocks, BLOCKS: gl.constexpr, STAGES: gl.constexpr):
    """The rings of both operands of a tile, with their barriers.

    A tile has BLOCKS times 64 rows and 256 columns. Of two blocks each group takes one. Of three,
    group g takes block g and half of the columns of the last block, so that a group has 192
    accumulators a thread. Such a tile loads a quarter less for each operation than one of 128 rows.
    """
    left = gl.allocate_shared_memory(
        left_blocks.dtype, [STAGES * BLOCKS, BOX, BOX], left_blocks.layout
    )
    right = gl.allocate_shared_memory(
        right_blocks.dtype,
        [STAGES, right_blocks.block_shape[0], right_blocks.block_shape[1]],
        right_blocks.layout,
    )
    full = new_barriers(STAGES, ARRIVALS=1)
    empty = new_barriers(STAGES, ARRIVALS=2)  # both groups read each step
    return left, right, full, empty


@gluon.jit
def tiles_producer(
    row_blocks, column_blocks, tiles, corner, rings,
    WIDTH: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load both operands of each tile in steps of 64 features."""
    table, first, last = tiles
    first_row, first_column = corner
    left, right, full, empty = rings
    slot = 0
    parity = 0
    for k in range(first, last):
        row = first_row * BLOCK + gl.load(table + k * TILE_FIELDS) * BOX
        column = first_column * BLOCK + gl.load(table + k * TILE_FIELDS + 1) * BOX
        for step in range(WIDTH // BOX):
            mbarrier.wait(empty.index(slot), parity ^ 1)
            mbarrier.expect(full.index(slot), (BLOCKS * BOX + WIDE) * BOX * ELEMENT)
            for i in gl.static_range(BLOCKS):
                load_block(
                    row_blocks, [row + i * BOX, step * BOX], full.index(slot),
                    left.index(slot * BLOCKS + i),
                )  # fmt: skip
            load_block(column_blocks, [column, step * BOX], full.index(slot), right.index(slot))
            slot, parity = following(slot, parity, STAGES)


@gluon.jit
def store_box(
    x, row, column, row_weight, column_weight, rows, columns, g, box, scale,
    TYPE: gl.constexpr, SELF: gl.constexpr,
):  # fmt: skip
    """Store G of 64 x 64 numbers of S. Behind the last row any weight serves: nothing reads it."""
    x = in_order(x, BOX)
    LAYOUT: gl.constexpr = x.type.layout
    lane = gl.arange(0, BOX, layout=gl.SliceLayout(1, LAYOUT))
    across = gl.arange(0, BOX, layout=gl.SliceLayout(0, LAYOUT))
    if SELF:
        is_diagonal = row == column
        if is_diagonal:
            x = without_own(x, row + lane, column + across)
    weight_a = gl.load(row_weight + gl.where(row < rows, row, 0) + lane)
    weight_b = gl.load(column_weight + gl.where(column < columns, column, 0) + across)
    x = gl.exp2(x * scale - scale) * (weight_a[:, None] + weight_b[None, :])
    to = g + box.to(gl.int64) * BOX_NUMBERS
    gl.store(to + (lane[:, None] * BOX + across[None, :]), finite(x, TYPE).to(TYPE))


@gluon.jit
def halves(x, COLUMNS: gl.constexpr):
    """The left and the right half of a tile."""
    return gl.split(gl.permute(gl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@gluon.jit
def tiles_group(
    scale, row_weight, column_weight, rows, columns, g, pitch, tiles, corner, rings, lead,
    GROUP: gl.constexpr, WIDTH: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
    SELF: gl.constexpr,
):  # fmt: skip
    """64 rows of each tile, and half of the third 64 rows if there are three.

    Group 1 begins three steps after group 0. The groups then stay apart, so that the exponentials
    of one fall into the products of the other.
    """
    ONE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE // 2, 16])
    LEAD: gl.constexpr = 3
    table, first, last = tiles
    first_row, first_column = corner
    left, right, full, empty = rings
    TYPE: gl.constexpr = left.dtype
    slot = 0
    parity = 0
    for k in range(first, last):
        if GROUP == 1:
            mbarrier.wait(lead.index(0), 0, pred=k == first)
        one = gl.zeros((ROWS, WIDE), gl.float32, ONE)
        half = gl.zeros((ROWS, WIDE // 2), gl.float32, HALF)
        before = slot
        for step in range(WIDTH // BOX):
            mbarrier.wait(full.index(slot), parity)
            y = right.index(slot)
            one = warpgroup_mma(
                left.index(slot * BLOCKS + GROUP), y.permute((1, 0)), one, use_acc=step > 0,
                is_async=True,
            )  # fmt: skip
            if BLOCKS == 3:
                half = warpgroup_mma(
                    left.index(slot * BLOCKS + 2),
                    y.slice(GROUP * (WIDE // 2), WIDE // 2).permute((1, 0)), half,
                    use_acc=step > 0, is_async=True,
                )  # fmt: skip
                one, half = warpgroup_mma_wait(2, deps=[one, half])
            else:
                one = warpgroup_mma_wait(1, deps=[one])
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
            if GROUP == 0:
                mbarrier.arrive(lead.index(0), count=1, pred=(k == first) & (step == LEAD - 1))
            before = slot
            slot, parity = following(slot, parity, STAGES)
        if BLOCKS == 3:
            one, half = warpgroup_mma_wait(0, deps=[one, half])
        else:
            one = warpgroup_mma_wait(0, deps=[one])
        mbarrier.arrive(empty.index(before), count=1)
        line = gl.load(table + k * TILE_FIELDS) + GROUP
        place = gl.load(table + k * TILE_FIELDS + 1)
        row = first_row * BLOCK + line * BOX
        column = first_column * BLOCK + place * BOX
        box = line * pitch + place
        two_0, two_1 = halves(one, WIDE)
        box_0, box_1 = halves(two_0, WIDE // 2)
        box_2, box_3 = halves(two_1, WIDE // 2)
        store_box(box_0, row, column, row_weight, column_weight, rows, columns, g, box, scale,
                  TYPE, SELF)  # fmt: skip
        store_box(box_1, row, column + BOX, row_weight, column_weight, rows, columns, g, box + 1,
                  scale, TYPE, SELF)  # fmt: skip
        store_box(box_2, row, column + 2 * BOX, row_weight, column_weight, rows, columns, g,
                  box + 2, scale, TYPE, SELF)  # fmt: skip
        store_box(box_3, row, column + 3 * BOX, row_weight, column_weight, rows, columns, g,
                  box + 3, scale, TYPE, SELF)  # fmt: skip
        if BLOCKS == 3:
            row += (2 - GROUP) * BOX
            column += GROUP * (WIDE // 2)
            box += (2 - GROUP) * pitch + 2 * GROUP
            box_0, box_1 = halves(half, WIDE // 2)
            store_box(box_0, row, column, row_weight, column_weight, rows, columns, g, box, scale,
                      TYPE, SELF)  # fmt: skip
            store_box(box_1, row, column + BOX, row_weight, column_weight, rows, columns, g,
                      box + 1, scale, TYPE, SELF)  # fmt: skip


@gluon.jit(do_not_specialize=["first_row", "first_column", "pitch", "rows", "columns"])
def hopper_tiles_kernel(
    row_blocks, column_blocks, row_weight, column_weight, g, starts, table, temperature,
    first_row, first_column, pitch, rows, columns,
    WIDTH: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, SELF: gl.constexpr,
):  # fmt: skip
    """G by tiles of 128 or 192 rows and 256 columns, of rows of any width."""
    scale = LOG2E / temperature
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    rings = operand_rings(row_blocks, column_blocks, BLOCKS, STAGES)
    lead = new_barriers(1, ARRIVALS=1)
    tiles = (table, first, last)
    corner = (first_row, first_column)
    gl.warp_specialize(
        [
            (tiles_group, (scale, row_weight, column_weight, rows, columns, g, pitch, tiles,
                           corner, rings, lead, 0, WIDTH, BLOCKS, STAGES, SELF)),
            (tiles_group, (scale, row_weight, column_weight, rows, columns, g, pitch, tiles,
                           corner, rings, lead, 1, WIDTH, BLOCKS, STAGES, SELF)),
            (tiles_producer, (row_blocks, column_blocks, tiles, corner, rings, WIDTH, BLOCKS,
                              STAGES)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def load_steps(
    g_blocks, z_blocks, box, steps, row, feature, slot, parity, rings, pitch,
    TRANSPOSED: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the boxes of G or G^T and the rows of the other operand for some steps of a job."""
    left, right, full, empty = rings
    for t in range(steps):
        mbarrier.wait(empty.index(slot), parity ^ 1)
        mbarrier.expect(full.index(slot), (BLOCKS * BOX + WIDE) * BOX * ELEMENT)
        for i in gl.static_range(BLOCKS):
            if TRANSPOSED:
                at = box + t * pitch + i
            else:
                at = box + t + i * pitch
            load_block(g_blocks, [at * BOX, 0], full.index(slot), left.index(slot * BLOCKS + i))
        load_block(z_blocks, [row + t * BOX, feature], full.index(slot), right.index(slot))
        slot, parity = following(slot, parity, STAGES)
    return slot, parity


@gluon.jit
def products_producer(
    g_blocks, z_blocks, jobs, corner, pitch, rings, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the steps of each job: those of G^T, then those of G."""
    table, first, last = jobs
    first_row, first_column = corner
    slot = 0
    parity = 0
    for k in range(first, last):
        job = table + k * JOB_FIELDS
        feature = gl.load(job + 3) * BOX
        row = first_row * BLOCK + gl.load(job + 6) * BOX
        slot, parity = load_steps(
            g_blocks, z_blocks, gl.load(job + 4), gl.load(job + 5), row, feature, slot, parity,
            rings, pitch, True, BLOCKS, STAGES,
        )  # fmt: skip
        row = first_column * BLOCK + gl.load(job + 9) * BOX
        slot, parity = load_steps(
            g_blocks, z_blocks, gl.load(job + 7), gl.load(job + 8), row, feature, slot, parity,
            rings, pitch, False, BLOCKS, STAGES,
        )  # fmt: skip


@gluon.jit
def multiply_steps(
    one, half, steps, slot, parity, rings,
    TRANSPOSED: gl.constexpr, GROUP: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The accumulators after some steps; no product is in flight then."""
    left, right, full, empty = rings
    before = slot
    for t in range(steps):
        mbarrier.wait(full.index(slot), parity)
        z = right.index(slot)
        g = left.index(slot * BLOCKS + GROUP)
        if TRANSPOSED:
            g = g.permute((1, 0))
        one = warpgroup_mma(g, z, one, is_async=True)
        if BLOCKS == 3:
            g = left.index(slot * BLOCKS + 2)
            if TRANSPOSED:
                g = g.permute((1, 0))
            half = warpgroup_mma(
                g, z.slice(GROUP * (WIDE // 2), WIDE // 2, dim=1), half, is_async=True
            )
            one, half = warpgroup_mma_wait(2, deps=[one, half])
        else:
            one = warpgroup_mma_wait(1, deps=[one])
        mbarrier.arrive(empty.index(before), count=1, pred=t > 0)
        before = slot
        slot, parity = following(slot, parity, STAGES)
    if BLOCKS == 3:
        one, half = warpgroup_mma_wait(0, deps=[one, half])
    else:
        one = warpgroup_mma_wait(0, deps=[one])
    mbarrier.arrive(empty.index(before), count=1, pred=steps > 0)
    return one, half, slot, parity


@gluon.jit
def place_of_block(
    out, out_rows, job, corner, block, first_feature,
    WIDTH: gl.constexpr, FEATURES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where a block of 64 rows of a job lies in ``out``, and whether it belongs to the square."""
    first_row, first_column = corner
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    across = gl.arange(0, FEATURES, layout=gl.SliceLayout(0, LAYOUT))
    row = gl.load(job + 1) + block
    first = gl.where(gl.load(job) == 0, first_row, first_column) * BLOCK
    line = gl.load(job + 10).to(gl.int64) * out_rows + first + row * BOX
    to = out + line * WIDTH + (gl.load(job + 3) * BOX + first_feature)
    return to + (lane[:, None] * WIDTH + across[None, :]), row < gl.load(job + 2)


@gluon.jit
def products_group(
    out, out_rows, jobs, corner, adds, rings,
    GROUP: gl.constexpr, WIDTH: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows of each job, and half of the features of the third 64 rows if there are three."""
    ONE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE // 2, 16])
    ASIDE: gl.constexpr = GROUP * (WIDE // 2)
    table, first, last = jobs
    rows_add, columns_add = adds
    slot = 0
    parity = 0
    for k in range(first, last):
        job = table + k * JOB_FIELDS
        # The second part has a buffer of its own, which is cleared.
        adds_here = gl.where(gl.load(job) == 0, rows_add, columns_add) + gl.load(job + 10) > 0
        to, valid = place_of_block(out, out_rows, job, corner, GROUP, 0, WIDTH, WIDE, ONE)
        one = gl.load(to, mask=valid & adds_here, other=0.0)
        if BLOCKS == 3:
            to, valid = place_of_block(out, out_rows, job, corner, 2, ASIDE, WIDTH, WIDE // 2, HALF)
            half = gl.load(to, mask=valid & adds_here, other=0.0)
        else:
            half = 0
        one, half, slot, parity = multiply_steps(
            one, half, gl.load(job + 5), slot, parity, rings, True, GROUP, BLOCKS, STAGES
        )
        one, half, slot, parity = multiply_steps(
            one, half, gl.load(job + 8), slot, parity, rings, False, GROUP, BLOCKS, STAGES
        )
        # Addresses are computed again, because keeping them would take registers of the loop.
        to, valid = place_of_block(out, out_rows, job, corner, GROUP, 0, WIDTH, WIDE, ONE)
        gl.store(to, one, mask=valid)
        if BLOCKS == 3:
            to, valid = place_of_block(out, out_rows, job, corner, 2, ASIDE, WIDTH, WIDE // 2, HALF)
            gl.store(to, half, mask=valid)


@gluon.jit(
    do_not_specialize=[
        "first_row", "first_column", "pitch", "out_rows", "rows_add", "columns_add",
    ]
)  # fmt: skip
def hopper_products_kernel(
    g_blocks, z_blocks, out, starts, table, first_row, first_column, pitch, out_rows,
    rows_add, columns_add, WIDTH: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """G Z and G^T Z of a square by tiles of 128 or 192 rows and 256 features.

    ``rows_add`` and ``columns_add`` say whether the products of dX and of dY are added to what is
    there. Where X = Y, one launch takes both. ``out``: (2, out_rows, WIDTH).
    """
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    rings = operand_rings(g_blocks, z_blocks, BLOCKS, STAGES)
    jobs = (table, first, last)
    corner = (first_row, first_column)
    adds = (rows_add, columns_add)
    gl.warp_specialize(
        [
            (products_group, (out, out_rows, jobs, corner, adds, rings, 0, WIDTH, BLOCKS, STAGES)),
            (products_group, (out, out_rows, jobs, corner, adds, rings, 1, WIDTH, BLOCKS, STAGES)),
            (products_producer, (g_blocks, z_blocks, jobs, corner, pitch, rings, BLOCKS, STAGES)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
