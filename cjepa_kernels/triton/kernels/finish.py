"""After the products: gradients of the raw embeddings and of the temperature."""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.pack import load_rows, unit_rows
from cjepa_kernels.triton.kernels.reduction import sum_in_order
from cjepa_kernels.triton.kernels.temperature import LN2, read_scale


@triton.jit(do_not_specialize=["rows", "padded_rows", "splits", "product_count"])
def finish_kernel(
    view_0, view_1, z, sums, pulls, grad_0, grad_1, largest, partial, products,
    counter,
    grad_temperature, temperature, rows, features, padded_rows, stride_0, feature_stride_0,
    stride_1, feature_stride_1, eps, splits, sums_factor, factor, temperature_factor,
    product_count,
    PAIRS: tl.constexpr, PLANES: tl.constexpr, COSINE: tl.constexpr, TAU_TENSOR: tl.constexpr,
    VIEWS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of products to gradients of the views, and the gradient of the temperature.

        dL/dz_a = (sums_factor sum_a - (pull_a + pull_pos) z_pos) largest factor / tau
        dL/dx_a = (dL/dz_a - (dL/dz_a . u) u) / |x_a|,  u = x_a / |x_a|;  0 where |x_a| <= eps
        dL/dtau = temperature_factor / tau  sum_a z_a . dL/dz_a  (0 unless tau is a tensor)

    (sums: (splits, padded_rows, PADDED); an upstream gradient that is one number is ``largest``.)
    The sum over a cancels, so it is taken from ``products``, which are parts of sum_ab G_ab s_ab
    from before G was rounded, times sums_factor, and from the pulls.
    """
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    valid = row < rows
    inside = valid[:, None] & (column < features)[None, :]
    inverse_tau = read_scale(temperature, TAU_TENSOR) * LN2
    at = row.to(tl.int64)[:, None] * PADDED + column[None, :]
    plane = tl.cast(padded_rows, tl.int64) * PADDED
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in range(0, splits):
        total += tl.load(sums + split * plane + at, mask=inside, other=0.0)
    total *= sums_factor
    along = tl.zeros((ROWS,), tl.float32)
    if PAIRS:
        pair = tl.zeros((ROWS, WIDTH), tl.float32)
        beside = (row ^ 1).to(tl.int64)[:, None] * PADDED + column[None, :]
        for p in tl.static_range(PLANES):
            pair += tl.load(z + p * plane + beside, mask=inside, other=0.0).to(tl.float32)
        pull = tl.load(pulls + row, mask=valid, other=0.0)
        pull += tl.load(pulls + (row ^ 1), mask=valid, other=0.0)
        total -= pull[:, None] * pair
        if TAU_TENSOR:
            own = tl.zeros((ROWS, WIDTH), tl.float32)
            for p in tl.static_range(PLANES):
                own += tl.load(z + p * plane + at, mask=inside, other=0.0).to(tl.float32)
            along -= pull * tl.sum(own * pair, 1)
    common = tl.load(largest).to(tl.float32) * inverse_tau * factor
    total *= common
    if COSINE:
        x = load_rows(
            view_0, view_1, row, column, valid, column < features,
            stride_0, feature_stride_0, stride_1, feature_stride_1, VIEWS,
        )  # fmt: skip
        unit, norm = unit_rows(x, eps, True)
        total -= tl.sum(total * unit, 1)[:, None] * unit
        total = tl.where((norm <= eps)[:, None], 0.0, total / norm[:, None])  # NaN stays NaN
    to = (row // VIEWS).to(tl.int64)[:, None] * features + column[None, :]
    total = total.to(grad_0.dtype.element_ty)
    if VIEWS == 1:
        tl.store(grad_0 + to, total, mask=inside)
    else:
        tl.store(grad_0 + to, total, mask=inside & (row % 2 == 0)[:, None])
        tl.store(grad_1 + to, total, mask=inside & (row % 2 == 1)[:, None])
    if TAU_TENSOR:
        tl.store(partial + program, tl.sum(along.to(tl.float64), 0))
        tl.debug_barrier()
        if tl.atomic_add(counter, 1) == tl.num_programs(0) - 1:
            result = sum_in_order(partial, tl.num_programs(0), 1024)
            result += sums_factor * sum_in_order(products, product_count, 1024)
            result *= (temperature_factor * common).to(tl.float64) * inverse_tau
            tl.store(grad_temperature, result.to(grad_temperature.dtype.element_ty))
    elif program == 0:
        tl.store(grad_temperature, 0.0)
