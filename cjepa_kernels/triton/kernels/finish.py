"""The end of the backward: gradients of the raw embeddings and of the temperature."""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.coefficients import load_positives
from cjepa_kernels.triton.kernels.pack import load_rows, unit_rows
from cjepa_kernels.triton.kernels.reduction import sum_in_order
from cjepa_kernels.triton.kernels.temperature import LN2, read_scale


@triton.jit(do_not_specialize=["rows", "padded_rows", "splits", "dot_count"])
def finish_kernel(
    view_0, view_1, z, products, positives, positive_weight, grad_0, grad_1, largest_grad, partial,
    dots, counter,
    grad_temperature, temperature, rows, features, padded_rows, stride_0, feature_stride_0,
    stride_1, feature_stride_1, eps, splits, product_factor, grad_factor, temperature_factor,
    dot_count,
    POSITIVES: tl.constexpr, PLANES: tl.constexpr, COSINE: tl.constexpr, TAU_TENSOR: tl.constexpr,
    VIEWS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the views from the products of G, and the gradient of the temperature.

    With p_a the row a of ``products``: (splits, padded_rows, PADDED) summed over its splits, with
    pos(a) the positive of a, and with u_a = x_a / |x_a|,

        dL/dz_a = (product_factor p_a - (w+_a + w+_pos(a)) z_pos(a)) largest_grad grad_factor / tau
        dL/dx_a = (dL/dz_a - (dL/dz_a . u_a) u_a) / |x_a|        0 where |x_a| <= eps
        dL/dtau = (temperature_factor / tau) sum over a of z_a . dL/dz_a

    The gradient of a temperature that is a number is 0. An upstream gradient that is one number
    is ``largest_grad`` itself.

    POSITIVES says what L contains of the positives that the products do not add: nothing (""), the
    "logits" s_a / tau of NT-Xent, or the "similarities" s_a, whose part of L does not depend on tau
    and is left out of the sum over a. The positive of a is its other view or, of one view, the row
    that ``positives`` has for it.

    The terms of the sum over a nearly cancel, so the sum must not contain the rounding of G. It is
    taken from ``dots``, which are the parts of the sum of G_ab s_ab from before G was rounded, and
    from the weights of the positives.
    """
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    valid = row < rows
    inside = valid[:, None] & (column < features)[None, :]
    inverse_tau = read_scale(temperature, TAU_TENSOR) * LN2
    offsets = row.to(tl.int64)[:, None] * PADDED + column[None, :]
    plane = tl.cast(padded_rows, tl.int64) * PADDED
    grad_z = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in range(0, splits):
        grad_z += tl.load(products + split * plane + offsets, mask=inside, other=0.0)
    grad_z *= product_factor
    positive_dot = tl.zeros((ROWS,), tl.float32)
    if POSITIVES != "":
        if VIEWS == 2:
            pos = row ^ 1
            has_positive = valid
        else:
            pos = load_positives(positives=positives, row=row, rows=rows, others=rows)
            has_positive = pos >= 0
        with_positive = inside & has_positive[:, None]
        positive_z = tl.zeros((ROWS, WIDTH), tl.float32)
        positive_offsets = pos.to(tl.int64)[:, None] * PADDED + column[None, :]
        for p in tl.static_range(PLANES):
            positive_z += tl.load(
                z + p * plane + positive_offsets, mask=with_positive, other=0.0
            ).to(tl.float32)
        weight = tl.load(positive_weight + row, mask=has_positive, other=0.0)
        weight += tl.load(positive_weight + pos, mask=has_positive, other=0.0)
        grad_z -= weight[:, None] * positive_z
        if TAU_TENSOR and POSITIVES == "logits":
            own_z = tl.zeros((ROWS, WIDTH), tl.float32)
            for p in tl.static_range(PLANES):
                own_z += tl.load(z + p * plane + offsets, mask=inside, other=0.0).to(tl.float32)
            positive_dot -= weight * tl.sum(own_z * positive_z, 1)
    factor = tl.load(largest_grad).to(tl.float32) * inverse_tau * grad_factor
    grad_z *= factor
    if COSINE:
        x = load_rows(
            view_0=view_0, view_1=view_1, rows=row, columns=column, row_valid=valid,
            column_valid=column < features, stride_0=stride_0, feature_stride_0=feature_stride_0,
            stride_1=stride_1, feature_stride_1=feature_stride_1, VIEWS=VIEWS,
        )  # fmt: skip
        unit, norm = unit_rows(x, eps, True)
        grad_z -= tl.sum(grad_z * unit, 1)[:, None] * unit
        # The comparison is false for a norm that is NaN, so its gradient stays NaN.
        grad_z = tl.where((norm <= eps)[:, None], 0.0, grad_z / norm[:, None])
    out_offsets = (row // VIEWS).to(tl.int64)[:, None] * features + column[None, :]
    grad_x = grad_z.to(grad_0.dtype.element_ty)
    if VIEWS == 1:
        tl.store(grad_0 + out_offsets, grad_x, mask=inside)
    else:
        tl.store(grad_0 + out_offsets, grad_x, mask=inside & (row % 2 == 0)[:, None])
        tl.store(grad_1 + out_offsets, grad_x, mask=inside & (row % 2 == 1)[:, None])
    if TAU_TENSOR:
        tl.store(partial + program, tl.sum(positive_dot.to(tl.float64), 0))
        tl.debug_barrier()
        if tl.atomic_add(counter, 1) == tl.num_programs(0) - 1:
            result = sum_in_order(partial, tl.num_programs(0))
            result += product_factor * sum_in_order(dots, dot_count)
            result *= (temperature_factor * factor).to(tl.float64) * inverse_tau
            tl.store(grad_temperature, result.to(grad_temperature.dtype.element_ty))
    elif program == 0:
        tl.store(grad_temperature, 0.0)
