"""Rows are normalised, rounded, interleaved and padded; for a backward they also get weights.

    z_a = x_a / max(|x_a|, eps)        (z_a = x_a without COSINE), rounded to the operands' dtype

The weights of a row follow from what the forward saved of it and from its upstream gradient g_a.
With pairs, L_a = softplus(LSE-_a - s_a / tau), so that

    r_a   = sigmoid(LSE-_a - s_a / tau)
    w_a   = g_a r_a / sum_a            the factor of the row's exponentials in dL/ds_ab
    w+_a  = g_a r_a                    the same for the positive: dL/ds_a = -w+_a / tau

and without pairs, L_a = LSE_a and w_a = g_a / sum_a.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.operands import round_to_tf32
from cjepa_kernels.triton.kernels.temperature import LN2, read_scale


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


@triton.jit
def weigh(
    row, weight_out, shift_out, positive_weight_out, saved_shift, saved_log_sum, saved_positive,
    grad, largest_grad, temperature, rows, grad_stride, weight_scale,
    PAIRS: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """Store the weight, the shift and the positive's weight of padded rows, 0 beyond the last row.

    Gradients of rows (PER_ROW) are divided by the largest of them, and a gradient that is one
    number is left out: the kernel that finishes the backward multiplies by it. The weights thus
    stay in the range of their dtype whatever the loss is scaled by.
    """
    valid = row < rows
    offsets = row
    if PAIRS:
        offsets = (row % 2) * (rows // 2) + row // 2
    inverse_tau = (read_scale(temperature, TAU_TENSOR) * LN2).to(tl.float64)
    shift = tl.load(saved_shift + offsets, mask=valid, other=0.0)
    log_sum = tl.load(saved_log_sum + offsets, mask=valid, other=0.0).to(tl.float64)
    g = tl.full(row.shape, 1.0, tl.float64)
    if PER_ROW:
        g = tl.load(grad + offsets.to(tl.int64) * grad_stride, mask=valid, other=0.0).to(tl.float64)
        largest = tl.load(largest_grad).to(tl.float64)
        g = tl.where(largest > 0, g / largest, g)
    empty = log_sum == float("-inf")  # A row without negatives has r = 0 and no gradient.
    if PAIRS:
        s = tl.load(saved_positive + offsets, mask=valid, other=0.0)
        difference = (shift.to(tl.float64) - s) * inverse_tau + log_sum
        g = g / (1.0 + tl.exp(-difference))
        tl.store(positive_weight_out + row, tl.where(valid, g, 0.0).to(tl.float32))
    exponent = -log_sum
    if CONSTANT:  # The backward's exponentials are relative to 1, whatever the saved shift is.
        exponent += (1.0 - shift.to(tl.float64)) * inverse_tau
    w = tl.where(valid & ~empty, g * tl.exp(tl.where(empty, 0.0, exponent)), 0.0)
    tl.store(weight_out + row, (w * weight_scale).to(tl.float32))
    tl.store(shift_out + row, shift)


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def pack_kernel(
    view_0, view_1, z, feature_sums, squared_norms, counter, rows, features, padded_rows,
    stride_0, feature_stride_0, stride_1, feature_stride_1, eps,
    weight_out, shift_out, positive_weight_out, saved_shift, saved_log_sum, saved_positive,
    grad, largest_grad, temperature, grad_stride, weight_scale,
    VIEWS: tl.constexpr, PLANES: tl.constexpr, COSINE: tl.constexpr, ROUND: tl.constexpr,
    TF32: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WEIGH: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
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
                PAIRS=VIEWS == 2, PER_ROW=PER_ROW, CONSTANT=CONSTANT, TAU_TENSOR=TAU_TENSOR,
            )  # fmt: skip
        for p in tl.static_range(PLANES):  # Each plane holds what the planes before it leave.
            part = unit.to(z.dtype.element_ty)
            tl.store(z + p * plane + offsets, part, mask=(column < PADDED)[None, :])
            unit -= part.to(tl.float32)
    tl.store(feature_sums + program * WIDTH + column, total)
    tl.store(squared_norms + program, tl.sum(square, 0))
