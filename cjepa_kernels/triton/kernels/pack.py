"""Rows normalised, rounded, interleaved and padded, and their weights for a backward."""

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
    """Rows of the interleaved batch, in fp32: row r is row r // VIEWS of view r % VIEWS."""
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
    """x / max(|x|, eps), and |x|; the rows themselves without COSINE.

    Rounded correctly: the projection of a gradient that is nearly parallel to its row magnifies the
    error of a division of 2 units in the last place, which is Triton's own.
    """
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    if COSINE:
        x = tl.div_rn(x, tl.broadcast_to(tl.maximum(norm, eps)[:, None], x.shape))
    else:
        x += x - x  # inf becomes NaN, as the loss has to: its dot products may be -inf alone
    return x, norm


@triton.jit
def weigh(
    row, weights, shifts, pulls, saved_shift, log_sums, positive, grad, largest, temperature,
    rows, grad_stride, weight_scale,
    PAIRS: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """Per padded row, 0 beyond the rows: what multiplies its exponentials, their shift, its pull.

    PAIRS: w = g r / sum with r = sigmoid(LSE- - l_pos), pull = g r, rows interleaved; else
    w = g / sum. The largest |g| is left to the end (a gradient that is not PER_ROW altogether): no
    weight leaves its range because of a loss scale.
    """
    valid = row < rows
    at = row
    if PAIRS:
        at = (row % 2) * (rows // 2) + row // 2
    inverse_tau = (read_scale(temperature, TAU_TENSOR) * LN2).to(tl.float64)
    shift = tl.load(saved_shift + at, mask=valid, other=0.0)
    log_sum = tl.load(log_sums + at, mask=valid, other=0.0).to(tl.float64)
    g = tl.full(row.shape, 1.0, tl.float64)
    if PER_ROW:
        g = tl.load(grad + at.to(tl.int64) * grad_stride, mask=valid, other=0.0).to(tl.float64)
        top = tl.load(largest).to(tl.float64)
        g = tl.where(top > 0, g / top, g)
    none = log_sum == float("-inf")  # no negatives: r is 0, and nothing pulls
    if PAIRS:
        s = tl.load(positive + at, mask=valid, other=0.0)
        gap = (shift.to(tl.float64) - s) * inverse_tau + log_sum
        g = g / (1.0 + tl.exp(-gap))
        tl.store(pulls + row, tl.where(valid, g, 0.0).to(tl.float32))
    exponent = -log_sum
    if CONSTANT:  # the tiles' exponentials are relative to 1, whatever the saved ones are
        exponent += (1.0 - shift.to(tl.float64)) * inverse_tau
    w = tl.where(valid & ~none, g * tl.exp(tl.where(none, 0.0, exponent)), 0.0)
    tl.store(weights + row, (w * weight_scale).to(tl.float32))
    tl.store(shifts + row, shift)


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def pack_kernel(
    view_0, view_1, z, sums, squares, counter, rows, features, padded_rows,
    stride_0, feature_stride_0, stride_1, feature_stride_1, eps,
    weights, shifts, pulls, saved_shift, log_sums, positive, grad, largest, temperature,
    grad_stride, weight_scale,
    VIEWS: tl.constexpr, PLANES: tl.constexpr, COSINE: tl.constexpr, ROUND: tl.constexpr,
    TF32: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WEIGH: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """z: (PLANES * padded_rows, PADDED); sums: (programs, WIDTH), squares: (programs,).

    Each program takes every programs-th block of rows and leaves the sum of its rounded rows and of
    their squared norms, from which the mean similarity of all pairs follows. With WEIGH, for a
    backward, it leaves the weights of its rows.
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
            view_0, view_1, row, column, row < rows, column < features,
            stride_0, feature_stride_0, stride_1, feature_stride_1, VIEWS,
        )  # fmt: skip
        unit, _ = unit_rows(x, eps, COSINE)
        unit = unit.to(ROUND).to(tl.float32)
        if TF32:
            unit = round_to_tf32(unit)
        total += tl.sum(unit, 0)
        square += tl.sum(unit * unit, 1)
        to = row.to(tl.int64)[:, None] * PADDED + column[None, :]
        plane = tl.cast(padded_rows, tl.int64) * PADDED
        if WEIGH:
            weigh(
                row, weights, shifts, pulls, saved_shift, log_sums, positive, grad, largest,
                temperature, rows, grad_stride, weight_scale, VIEWS == 2, PER_ROW, CONSTANT,
                TAU_TENSOR,
            )  # fmt: skip
        for p in tl.static_range(PLANES):  # each holds what the planes before it leave
            part = unit.to(z.dtype.element_ty)
            tl.store(z + p * plane + to, part, mask=(column < PADDED)[None, :])
            unit -= part.to(tl.float32)
    tl.store(sums + program * WIDTH + column, total)
    tl.store(squares + program, tl.sum(square, 0))
