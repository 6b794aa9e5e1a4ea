"""Backward kernels: G with G_ab = dL/ds_ab, and its products with the rows of the other side.

    G_ab  = e_ab (w_a + w_b)       dX = G Y,  dY = G^T X       (X = Y: G is symmetric)

(scaled, as the weights are, where its numbers have too few exponents).
Two schedules. *Squares*: G of a square of blocks goes to a workspace, computed above the diagonal
only, and is multiplied from there by rows and by columns (3 M^2 D operations). Serves every case.
*Owned rows*: a program computes the tiles of its rows and multiplies them on the spot; nothing of G
is written, S is computed in full (4 M^2 D operations).
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
def times(w, s):
    """G_ab s_ab, 0 where G is: s may be NaN of padding."""
    return tl.where(w == 0.0, 0.0, w * s)


# Specialised for rows and columns: their multiples of 16 spare registers on sm_100.
@triton.jit(
    do_not_specialize=["first_row", "first_column", "row_blocks", "orders", "filled"]
)  # fmt: skip
def coefficient_tiles_kernel(
    x, y, g, row_weight, row_shift, column_weight, column_shift, temperature,
    mask, rows, columns, x_plane, y_plane,
    first_row, first_column, row_blocks, g_stride, products, filled, orders,
    SELF: tl.constexpr, SQUARE: tl.constexpr, MASKED: tl.constexpr, CONSTANT: tl.constexpr,
    TAU_TENSOR: tl.constexpr, DEPTH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """G of a square of blocks from (first_row, first_column), to (rows, g_stride) numbers.

    SQUARE: on the diagonal of S with SELF: G is symmetric, and its upper half is computed. For a
    temperature that is a tensor each program adds its part of sum_ab G_ab s_ab, ``orders`` times,
    to ``products``, of which ``filled`` hold something.
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
        x, y, (first_row + i) * BM, (first_column + j) * BM, x_plane, y_plane,
        DEPTH, PLANES, BM, BM, BK, PRECISION, TMA,
    )  # fmt: skip
    w = coefficients(
        s, tl.load(row_weight + a), tl.load(row_shift + a),
        tl.load(column_weight + b), tl.load(column_shift + b), scale, CONSTANT,
    )  # fmt: skip
    edge = (tl.max(a, 0) >= rows) | (tl.max(b, 0) >= columns)
    if SQUARE:
        edge = edge | (i == j)
    if MASKED or PLANES > 1 or edge:  # a mask is nothing beside six products
        keep = negatives(a, b, rows, columns, mask, SELF, MASKED)
        w = tl.where(keep, w, 0.0)
    if TAU_TENSOR:
        if SQUARE:
            orders = tl.where(i == j, 1, 2)
        dot = tl.sum(times(w, s))  # by axes the compiler (3.6) fails for sm_100
        # Squares come one after another: a slot that an earlier one has filled is added to.
        before = tl.load(products + program, mask=program < filled, other=0.0)
        tl.store(products + program, before + dot.to(tl.float64) * orders)
    if PRECISION == "tf32":
        w = round_to_tf32(w)
    w = w.to(g.dtype.element_ty)
    line = tl.arange(0, BM)
    # The corner's offset may exceed 31 bits, those within a tile do not.
    corner = g + tl.cast(i, tl.int64) * BM * g_stride + j * BM
    tl.store(corner + line[:, None] * g_stride + line[None, :], w)
    if SQUARE and i != j:
        corner = g + tl.cast(j, tl.int64) * BM * g_stride + i * BM
        tl.store(corner + line[:, None] * g_stride + line[None, :], tl.trans(w))


@triton.jit
def multiply_split(
    a, z, row, column, plane, features, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """a z of fp32 ``a`` and three planes z, to be added in fp32 (see ``product``).

    The compiler cannot merge that sum into the last of several products.
    """
    z_0 = load_block(z, row, column, features, BK, BN, TMA)
    z_1 = load_block(z, plane + row, column, features, BK, BN, TMA)
    z_2 = load_block(z, 2 * plane + row, column, features, BK, BN, TMA)
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
    """out[first_out + r] (+)= sum_k g[r, k] z[first_z + k], or of g[k, r]."""
    across = tl.cdiv(features, BN)
    i = tl.program_id(0) // across
    column = tl.program_id(0) % across * BN
    row = first_out + i * BM + tl.arange(0, BM)
    feature = column + tl.arange(0, BN)
    to = out + row.to(tl.int64)[:, None] * features + feature[None, :]
    valid = (feature < features)[None, :]
    if ACCUMULATE:  # from the start: at the end it would need twice the registers
        acc = tl.load(to, mask=valid, other=0.0)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        if TRANSPOSED:
            a = load_block(g, k, i * BM, g_stride, BK, BM, TMA).T
        else:
            a = load_block(g, i * BM, k, g_stride, BM, BK, TMA)
        if PLANES == 1:
            b = load_block(z, first_z + k, column, features, BK, BN, TMA)
            acc = tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
        else:
            acc += multiply_split(a, z, first_z + k, column, plane, features, BN, BK, TMA)
    tl.store(to, acc, mask=valid)


@triton.jit
def owned_tile(
    acc, own, y, a, j, row_weight, column_weights, scale, rows, columns,
    SELF: tl.constexpr, EDGE: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """acc + G Y of the rows ``a`` and the j-th block of columns."""
    b = j * BN + tl.arange(0, BN)
    other = load_block(y, j * BN, 0, WIDTH, BN, WIDTH, TMA)
    s = tl.dot(own, other.T, input_precision=PRECISION)
    w = coefficients(s, row_weight, None, tl.load(column_weights + b), None, scale, True)
    if EDGE:
        w = tl.where(negatives(a, b, rows, columns, None, SELF, False), w, 0.0)
    if PRECISION == "tf32":
        w = round_to_tf32(w)
    return tl.dot(w.to(other.dtype), other, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "columns", "column_blocks", "splits"])
def owned_rows_kernel(
    x, y, out, row_weights, column_weights, temperature,
    rows, columns, padded_rows, column_blocks, splits,
    SELF: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[split, a] = sum over the split's columns of G_ab y_b; out: (splits, rows, D).

    For a constant shift and no user's mask. Tiles that need a mask come first: the ``own`` ones
    on the diagonal, from ``diagonal`` on, and the one with ragged columns.
    """
    i = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    first = split * column_blocks // splits
    last = (split + 1) * column_blocks // splits
    a = i * BM + tl.arange(0, BM)
    scale = read_scale(temperature, False)
    own_rows = load_block(x, i * BM, 0, WIDTH, BM, WIDTH, TMA)
    row_weight = tl.load(row_weights + a)
    acc = tl.zeros((BM, WIDTH), tl.float32)
    diagonal = last
    own = 0
    if SELF:
        diagonal = tl.minimum(tl.maximum(i * BM // BN, first), last)
        own = tl.minimum(tl.maximum((i * BM + BM - 1) // BN + 1, first), last) - diagonal
    among_own = (own > 0) & (diagonal + own == last)
    ragged = (last == column_blocks) & (columns % BN != 0) & (among_own == 0)
    for t in range(0, own + ragged.to(tl.int32)):
        acc = owned_tile(
            acc, own_rows, y, a, tl.where(t < own, diagonal + t, last - 1), row_weight,
            column_weights, scale, rows, columns, SELF, True, WIDTH, BN, PRECISION, TMA,
        )  # fmt: skip
    for t in range(0, last - first - own - ragged.to(tl.int32)):
        j = first + t
        j = tl.where(j >= diagonal, j + own, j)
        acc = owned_tile(
            acc, own_rows, y, a, j, row_weight, column_weights, scale, rows, columns,
            SELF, False, WIDTH, BN, PRECISION, TMA,
        )  # fmt: skip
    feature = tl.arange(0, WIDTH)
    row = split.to(tl.int64) * padded_rows + a
    tl.store(out + row[:, None] * WIDTH + feature[None, :], acc)
