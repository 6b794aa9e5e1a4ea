"""Rows are normalised, rounded, interleaved and padded; for a backward they also get weights.

    z_a = x_a / max(|x_a|, eps)        (z_a = x_a without COSINE), rounded to the operands' dtype

``weights.py`` derives the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.operands import round_to_tf32
from cjepa_kernels.triton.kernels.weights import weigh


@triton.jit
def load_rows(
    view_0, view_1, rows, columns, row_valid, column_valid,
    stride_0, feature_stride_0, stride_1, feature_stride_1, VIEWS: tl.constexpr,
):  # fmt: skip
    """Rows of the interleaved batch in fp32: row r is row r // VIEWS of view r % VIEWS."""
    sample = (rows // VIEWS).to(tl.int64)[:, None]
    feature = columns.to(tl.int64)[None, :]
    valid = row_valid[:, None] & column_valid[None, :]
    first = valid
    if VIEWS == 2:
        first = valid & (rows % 2 == 0)[:, None]
    x = tl.load(view_0 + sample * stride_0 + feature * feature_stride_0, mask=first, other=0.0)
    x = x.to(tl.float32)
    if VIEWS == 2:
        second = valid & (rows % 2 == 1)[:, None]
        y = tl.load(view_1 + sample * stride_1 + feature * feature_stride_1, mask=second, other=0.0)
        x += y.to(tl.float32)
    return x


@triton.jit
def unit_rows(x, eps, COSINE: tl.constexpr):
    """x / max(|x|, eps) and |x|; without COSINE the rows themselves.

    The division is rounded correctly. The error of Triton's own division, 2 units in the last
    place, would be magnified where a gradient that is nearly parallel to its row is projected.
    """
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    if COSINE:
        x = tl.div_rn(x, tl.broadcast_to(tl.maximum(norm, eps)[:, None], x.shape))
    else:
        # An infinity becomes NaN, and the loss with it. Its dot products alone might all be -inf.
        x += x - x
    return x, norm


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def pack_kernel(
    view_0, view_1, z, feature_sums, squared_norms, counter, rows, features, padded_rows,
    stride_0, feature_stride_0, stride_1, feature_stride_1, eps,
    weight_out, shift_out, positive_weight_out, saved_shift, saved_log_sum, saved_positive,
    grad, largest_grad, temperature, grad_stride, weight_scale,
    VIEWS: tl.constexpr, PLANES: tl.constexpr, COSINE: tl.constexpr, ROUND: tl.constexpr,
    TF32: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WEIGH: tl.constexpr, PAIRS: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr,
    TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """Write z: (PLANES * padded_rows, PADDED), the operands of the matrix products.

    Each program takes every programs-th block of rows. It leaves the sum of its rounded rows in
    ``feature_sums``: (programs, WIDTH), and the sum of their squared norms in ``squared_norms``:
    (programs,). The mean similarity of all pairs follows from both. With WEIGH it also writes the
    weights of its rows.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(counter, 0)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for block in range(program, padded_rows // ROWS, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        x = load_rows(
            view_0=view_0, view_1=view_1, rows=row, columns=column, row_valid=row < rows,
            column_valid=column < features, stride_0=stride_0, feature_stride_0=feature_stride_0,
            stride_1=stride_1, feature_stride_1=feature_stride_1, VIEWS=VIEWS,
        )  # fmt: skip
        unit, _ = unit_rows(x, eps, COSINE)
        unit = unit.to(ROUND).to(tl.float32)
        if TF32:
            unit = round_to_tf32(unit)
        total += tl.sum(unit, 0)
        square += tl.sum(unit * unit, 1)
        offsets = row.to(tl.int64)[:, None] * PADDED + column[None, :]
        plane = tl.cast(padded_rows, tl.int64) * PADDED
        if WEIGH:
            weigh(
                row=row, weight_out=weight_out, shift_out=shift_out,
                positive_weight_out=positive_weight_out, saved_shift=saved_shift,
                saved_log_sum=saved_log_sum, saved_positive=saved_positive, grad=grad,
                largest_grad=largest_grad, temperature=temperature, rows=rows,
                grad_stride=grad_stride, weight_scale=weight_scale,
                VIEWS=VIEWS, PAIRS=PAIRS, PER_ROW=PER_ROW, CONSTANT=CONSTANT,
                TAU_TENSOR=TAU_TENSOR,
            )  # fmt: skip
        for p in tl.static_range(PLANES):  # Each plane holds what the planes before it leave.
            part = unit.to(z.dtype.element_ty)
            tl.store(z + p * plane + offsets, part, mask=(column < PADDED)[None, :])
            unit -= part.to(tl.float32)
    tl.store(feature_sums + program * WIDTH + column, total)
    tl.store(squared_norms + program, tl.sum(square, 0))
