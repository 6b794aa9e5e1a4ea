"""Backward kernels: the matrix G, and its products with the rows of the other side.

    G_ab = tau dL/ds_ab = exp((s_ab - c_a) / tau) w_a + exp((s_ab - c_b) / tau) w_b
    dX   = G Y,    dY = G^T X

up to factors that ``finish_kernel`` applies. The weights w and the shifts c of both sides come from
``pack_kernel``. With a constant shift c = 1 both exponentials are the same. Where X = Y, G is
symmetric. G carries the scale of the weights, which is not 1 where the numbers of the operands'
dtype have too few exponents.

With positives p(a) (PAIRED), G_a,p(a) holds tau dL/ds_a,p(a) from the upstream gradient of the
positives' similarities in place of exponentials. The products then add the positives on both sides.
Where X = Y it holds 0, and ``finish_kernel`` adds the positives.

Where X = Y and the rows of a class attract each other (ATTRACTED), G_ab of two different rows of a
class is smaller by g_a / n_a + g_b / n_b: with n_a other rows in the class, that is the gradient of
the mean of the row's logits with them. ``attraction`` holds g_a / n_a. In a tight class both terms
are nearly equal, and so they are subtracted before G is rounded.

There are two schedules. *Squares* writes a square of blocks of G to a workspace and multiplies it
from there, by rows and by columns. Where X = Y it computes G above the diagonal only, and takes
3 M^2 D operations in all. It serves every case. *Owned rows* is row-stationary: a program keeps a
block of rows and their gradient on the chip, computes the tiles of G in these rows, and multiplies
each tile at once. It writes nothing of G, but it computes all of S, which takes 4 M^2 D operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.operands import load_block, round_to_tf32
from cjepa_kernels.triton.kernels.similarity import negatives, product
from cjepa_kernels.triton.kernels.temperature import read_scale
from cjepa_kernels.triton.kernels.tile_order import triangle


@triton.jit
def coefficients(
    s, row_weight, row_shift, column_weight, column_shift, scale, CONSTANT: tl.constexpr,
):  # fmt: skip
    """G of a tile of S."""
    if CONSTANT:
        g = tl.exp2(s * scale - scale) * (row_weight[:, None] + column_weight[None, :])
    else:
        g = tl.exp2((s - row_shift[:, None]) * scale) * row_weight[:, None]
        g += tl.exp2((s - column_shift[None, :]) * scale) * column_weight[None, :]
    return g


@triton.jit
def load_positives(positives, row, rows, others):
    """The positive of each row among ``others`` rows of the other side; -1 for a row without one.

    A number out of range counts as -1: the similarity of such a positive is NaN already.
    """
    p = tl.load(positives + row, mask=row < rows, other=-1)
    return tl.where((p >= 0) & (p < others), p, -1).to(tl.int32)


@triton.jit
def put_positives(g, p, weight, other):
    """G with ``weight`` at the positives ``p`` of its rows; ``other`` are the tile's columns."""
    return tl.where(p[:, None] == other[None, :], weight[:, None], g)


@triton.jit
def attraction_of_classes(is_other, classes, attraction, a, b, rows):
    """What is subtracted from G of a tile: 0 unless ``is_other`` and both rows are of one class."""
    class_of_row = tl.load(classes + a, mask=a < rows, other=0)
    class_of_column = tl.load(classes + b, mask=b < rows, other=0)
    attracts = is_other & (class_of_row[:, None] == class_of_column[None, :])
    both = tl.load(attraction + a)[:, None] + tl.load(attraction + b)[None, :]
    return tl.where(attracts, both, 0.0)


@triton.jit
def times_similarity(g, s):
    """G_ab s_ab; 0 where G_ab is 0, because s_ab may be a NaN of the padding there."""
    return tl.where(g == 0.0, 0.0, g * s)


# ``rows`` and ``columns`` are specialised: to know that they are multiples of 16 saves registers
# on sm_100.
@triton.jit(
    do_not_specialize=["first_row", "first_column", "row_blocks", "multiplicity", "filled_slots"]
)  # fmt: skip
def coefficient_tiles_kernel(
    x, y, g_out, row_weight, row_shift, column_weight, column_shift, positives, positive_weight,
    temperature, mask, classes, attraction, rows, columns, x_plane, y_plane,
    first_row, first_column, row_blocks, g_stride, dots, filled_slots, multiplicity,
    SELF: tl.constexpr, VIEWS: tl.constexpr, PAIRED: tl.constexpr, SQUARE: tl.constexpr,
    MASKED: tl.constexpr, CLASSED: tl.constexpr, ATTRACTED: tl.constexpr, CONSTANT: tl.constexpr,
    TAU_TENSOR: tl.constexpr, DEPTH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """G of a square of blocks from (first_row, first_column), one tile for each program.

    SQUARE says that the square lies on the diagonal of S, with SELF. Only the upper half of it is
    computed, and stored twice.

    For a temperature that is a tensor, each program adds its part of the sum of G_ab s_ab, without
    the positives, to its slot of ``dots``. Squares follow one another, and the first
    ``filled_slots`` slots already hold the parts of an earlier square. ``multiplicity`` is 2 if a
    tile stands for two tiles of S.
    """
    program = tl.program_id(0)
    if SQUARE:
        i, j = triangle(program.to(tl.int64))
    else:
        i = program % row_blocks
        j = program // row_blocks
    a = (first_row + i) * BM + tl.arange(0, BM)
    b = (first_column + j) * BM + tl.arange(0, BM)
    scale = read_scale(temperature, TAU_TENSOR)
    s = product(
        x=x, y=y, row=(first_row + i) * BM, column=(first_column + j) * BM,
        x_plane=x_plane, y_plane=y_plane,
        DEPTH=DEPTH, PLANES=PLANES, BM=BM, BN=BM, BK=BK, PRECISION=PRECISION, TMA=TMA,
    )  # fmt: skip
    g = coefficients(
        s=s, row_weight=tl.load(row_weight + a), row_shift=tl.load(row_shift + a),
        column_weight=tl.load(column_weight + b), column_shift=tl.load(column_shift + b),
        scale=scale, CONSTANT=CONSTANT,
    )  # fmt: skip
    edge = (tl.max(a, 0) >= rows) | (tl.max(b, 0) >= columns)
    if SQUARE:
        edge = edge | (i == j)
    # With three planes every tile is masked, as that costs nothing beside their six products.
    if MASKED or CLASSED or ATTRACTED or PLANES > 1 or edge:
        is_negative = negatives(
            a=a, b=b, rows=rows, columns=columns, mask=mask, classes=classes,
            SELF=SELF, VIEWS=VIEWS, MASKED=MASKED, CLASSED=CLASSED,
        )  # fmt: skip
        g = tl.where(is_negative, g, 0.0)
        if ATTRACTED:
            g -= attraction_of_classes(
                is_other=is_negative, classes=classes, attraction=attraction, a=a, b=b, rows=rows
            )
    if PAIRED:
        p = load_positives(positives=positives, row=a, rows=rows, others=columns)
        g = put_positives(g=g, p=p, weight=tl.zeros((BM,), tl.float32), other=b)
    if TAU_TENSOR:
        if SQUARE:
            multiplicity = tl.where(i == j, 1, 2)
        # One sum over both axes: for two sums the compiler of Triton 3.6 fails on sm_100.
        dot = tl.sum(times_similarity(g, s))
        before = tl.load(dots + program, mask=program < filled_slots, other=0.0)
        tl.store(dots + program, before + dot.to(tl.float64) * multiplicity)
    if PAIRED and not SELF:
        g = put_positives(g=g, p=p, weight=tl.load(positive_weight + a), other=b)
    if PRECISION == "tf32":
        g = round_to_tf32(g)
    g = g.to(g_out.dtype.element_ty)
    line = tl.arange(0, BM)
    # The offset of a tile's corner may exceed 31 bits, those within the tile do not.
    corner = g_out + tl.cast(i, tl.int64) * BM * g_stride + j * BM
    tl.store(corner + line[:, None] * g_stride + line[None, :], g)
    if SQUARE and i != j:
        corner = g_out + tl.cast(j, tl.int64) * BM * g_stride + i * BM
        tl.store(corner + line[:, None] * g_stride + line[None, :], tl.trans(g))


@triton.jit
def multiply_split(
    a, z, row, column, plane, features, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """a z, of fp32 ``a`` and of z in three planes. The caller adds it in fp32 (see ``product``).

    The result is the last of several products, and the compiler cannot merge the caller's sum into
    that one.
    """
    z_0 = load_block(
        source=z, row=row, column=column, stride=features, ROWS=BK, COLUMNS=BN, TMA=TMA
    )
    z_1 = load_block(
        source=z, row=plane + row, column=column, stride=features, ROWS=BK, COLUMNS=BN, TMA=TMA
    )
    z_2 = load_block(
        source=z, row=2 * plane + row, column=column, stride=features, ROWS=BK, COLUMNS=BN, TMA=TMA
    )
    a_0 = a.to(tl.bfloat16)
    rest = a - a_0.to(tl.float32)
    a_1 = rest.to(tl.bfloat16)
    a_2 = (rest - a_1.to(tl.float32)).to(tl.bfloat16)
    part = tl.dot(a_2, z_0)
    part = tl.dot(a_0, z_2, part)
    part = tl.dot(a_1, z_1, part)
    part = tl.dot(a_1, z_0, part)
    part = tl.dot(a_0, z_1, part)
    return tl.dot(a_0, z_0, part)


@triton.jit(do_not_specialize=["first_out", "first_z", "depth"])
def products_kernel(
    g, z, out, first_out, first_z, depth, plane, features, g_stride,
    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[first_out + r] = sum over k of g[r, k] z[first_z + k]; of g[k, r] if TRANSPOSED.

    With ACCUMULATE the sum is added to what is there.
    """
    column_blocks = tl.cdiv(features, BN)
    i = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * BN
    row = first_out + i * BM + tl.arange(0, BM)
    feature = column + tl.arange(0, BN)
    offsets = out + row.to(tl.int64)[:, None] * features + feature[None, :]
    valid = (feature < features)[None, :]
    if ACCUMULATE:  # The sum begins with it: adding it at the end would take twice the registers.
        acc = tl.load(offsets, mask=valid, other=0.0)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        if TRANSPOSED:
            a = load_block(
                source=g, row=k, column=i * BM, stride=g_stride, ROWS=BK, COLUMNS=BM, TMA=TMA
            ).T
        else:
            a = load_block(
                source=g, row=i * BM, column=k, stride=g_stride, ROWS=BM, COLUMNS=BK, TMA=TMA
            )
        if PLANES == 1:
            b = load_block(
                source=z, row=first_z + k, column=column, stride=features,
                ROWS=BK, COLUMNS=BN, TMA=TMA,
            )  # fmt: skip
            acc = tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
        else:
            acc += multiply_split(
                a=a, z=z, row=first_z + k, column=column, plane=plane, features=features,
                BN=BN, BK=BK, TMA=TMA,
            )  # fmt: skip
    tl.store(offsets, acc, mask=valid)


@triton.jit
def add_owned_tile(
    acc, own_rows, y, a, j, row_weight, column_weight, positives, positive_weight, own_positives,
    scale, rows, columns,
    SELF: tl.constexpr, VIEWS: tl.constexpr, PAIRED: tl.constexpr, EDGE: tl.constexpr,
    WIDTH: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """acc + G Y of the rows ``a`` and the j-th block of columns; EDGE masks G."""
    b = j * BN + tl.arange(0, BN)
    block = load_block(
        source=y, row=j * BN, column=0, stride=WIDTH, ROWS=BN, COLUMNS=WIDTH, TMA=TMA
    )
    s = tl.dot(own_rows, block.T, input_precision=PRECISION)
    g = coefficients(
        s=s, row_weight=row_weight, row_shift=None, column_weight=tl.load(column_weight + b),
        column_shift=None, scale=scale, CONSTANT=True,
    )  # fmt: skip
    if EDGE:
        is_negative = negatives(
            a=a, b=b, rows=rows, columns=columns, mask=None, classes=None,
            SELF=SELF, VIEWS=VIEWS, MASKED=False, CLASSED=False,
        )  # fmt: skip
        g = tl.where(is_negative, g, 0.0)
    if PAIRED == "rows":
        if SELF:
            weight = tl.zeros(a.shape, tl.float32)
        else:
            weight = tl.load(positive_weight + a)
        g = put_positives(g=g, p=own_positives, weight=weight, other=b)
    if PAIRED == "columns":
        p = load_positives(positives=positives, row=b, rows=columns, others=rows)
        weight = tl.load(positive_weight + b)
        g = tl.where(a[:, None] == p[None, :], weight[None, :], g)
    if PRECISION == "tf32":
        g = round_to_tf32(g)
    return tl.dot(g.to(block.dtype), block, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "columns", "column_blocks", "splits"])
def owned_rows_kernel(
    x, y, out, row_weight, column_weight, positives, positive_weight, temperature,
    rows, columns, padded_rows, column_blocks, splits,
    SELF: tl.constexpr, VIEWS: tl.constexpr, PAIRED: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[split, a] = sum of G_ab y_b over the columns b of a split; out: (splits, M, D).

    The kernel serves a constant shift without a user's mask or classes. PAIRED says whose
    ``positives`` there are: those of the "rows", or of the "columns"; "" without positives.

    The tiles that need a mask come first: with SELF the ``diagonal_count`` tiles on the diagonal,
    which begin at column block ``diagonal``, and the last tile if the columns do not fill it.
    """
    i = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    first = split * column_blocks // splits
    last = (split + 1) * column_blocks // splits
    a = i * BM + tl.arange(0, BM)
    scale = read_scale(temperature, False)
    own_rows = load_block(
        source=x, row=i * BM, column=0, stride=WIDTH, ROWS=BM, COLUMNS=WIDTH, TMA=TMA
    )
    weights = tl.load(row_weight + a)
    own_positives = a
    if PAIRED == "rows":
        own_positives = load_positives(positives=positives, row=a, rows=rows, others=columns)
    acc = tl.zeros((BM, WIDTH), tl.float32)
    diagonal = last
    diagonal_count = 0
    if SELF:
        diagonal = tl.minimum(tl.maximum(i * BM // BN, first), last)
        diagonal_count = tl.minimum(tl.maximum((i * BM + BM - 1) // BN + 1, first), last) - diagonal
    last_on_diagonal = (diagonal_count > 0) & (diagonal + diagonal_count == last)
    ragged = (last == column_blocks) & (columns % BN != 0) & (last_on_diagonal == 0)
    for t in range(0, diagonal_count + ragged.to(tl.int32)):
        acc = add_owned_tile(
            acc=acc, own_rows=own_rows, y=y, a=a,
            j=tl.where(t < diagonal_count, diagonal + t, last - 1), row_weight=weights,
            column_weight=column_weight, positives=positives, positive_weight=positive_weight,
            own_positives=own_positives, scale=scale, rows=rows, columns=columns,
            SELF=SELF, VIEWS=VIEWS, PAIRED=PAIRED, EDGE=True, WIDTH=WIDTH, BN=BN,
            PRECISION=PRECISION, TMA=TMA,
        )  # fmt: skip
    for t in range(0, last - first - diagonal_count - ragged.to(tl.int32)):
        j = first + t
        j = tl.where(j >= diagonal, j + diagonal_count, j)
        acc = add_owned_tile(
            acc=acc, own_rows=own_rows, y=y, a=a, j=j, row_weight=weights,
            column_weight=column_weight, positives=positives, positive_weight=positive_weight,
            own_positives=own_positives, scale=scale, rows=rows, columns=columns,
            SELF=SELF, VIEWS=VIEWS, PAIRED=PAIRED, EDGE=False, WIDTH=WIDTH, BN=BN,
            PRECISION=PRECISION, TMA=TMA,
        )  # fmt: skip
    feature = tl.arange(0, WIDTH)
    row = split.to(tl.int64) * padded_rows + a
    tl.store(out + row[:, None] * WIDTH + feature[None, :], acc)
