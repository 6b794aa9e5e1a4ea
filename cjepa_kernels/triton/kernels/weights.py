"""Weights of rows for a backward.

The weights of a row follow from what the forward saved of it and from its upstream gradient g_a.
In NT-Xent (PAIRS), L_a = softplus(LSE-_a - s_a / tau), so that

    r_a   = sigmoid(LSE-_a - s_a / tau)
    w_a   = g_a r_a / sum_a            the factor of the row's exponentials in dL/ds_ab
    w+_a  = g_a r_a                    the same for the positive: dL/ds_a = -w+_a / tau

and elsewhere L_a = LSE_a and w_a = g_a / sum_a. There the similarities of positives have an
upstream gradient u_a of their own. In a rectangle w+_a = tau u_a, and the products add it. For rows
against themselves w+_a = -tau u_a, and ``finish_kernel`` subtracts it as it does for NT-Xent.

Gradients of rows are divided by the largest of them, and a gradient that is one number is left out:
the kernel that finishes the backward multiplies by it. The weights thus stay in the range of their
dtype whatever the loss is scaled by. For one number they do not depend on it, not even on its sign,
and the forward can compute them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.temperature import LN2, read_scale


@triton.jit
def place_of(row, rows, VIEWS: tl.constexpr):
    """Where packed rows stand in the caller's order: all of one view, then the other."""
    place = row
    if VIEWS == 2:
        place = (row % 2) * (rows // 2) + row // 2
    return place


@triton.jit
def store_weights(
    row, valid, g, shift, log_sum, s, inverse_tau, weight_out, shift_out, positive_weight_out,
    weight_scale, PAIRS: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Store the weight, the shift and the positive's weight of padded rows; all 0 if not ``valid``.

    g, log_sum and inverse_tau are in fp64, and s is read with PAIRS only. log_sum has been rounded
    to fp32, as the forward returns it.
    """
    empty = log_sum == float("-inf")  # A row without negatives has r = 0 and no gradient.
    if PAIRS:
        difference = (shift.to(tl.float64) - s) * inverse_tau + log_sum
        g = g / (1.0 + tl.exp(-difference))
        tl.store(positive_weight_out + row, tl.where(valid, g, 0.0).to(tl.float32))
    exponent = -log_sum
    if CONSTANT:  # The backward's exponentials are relative to 1, whatever the saved shift is.
        exponent += (1.0 - shift.to(tl.float64)) * inverse_tau
    w = tl.where(valid & ~empty, g * tl.exp(tl.where(empty, 0.0, exponent)), 0.0)
    tl.store(weight_out + row, (w * weight_scale).to(tl.float32))
    tl.store(shift_out + row, tl.where(valid, shift, 0.0))


@triton.jit
def weigh(
    row, weight_out, shift_out, positive_weight_out, saved_shift, saved_log_sum, saved_positive,
    grad, largest_grad, temperature, rows, grad_stride, weight_scale,
    VIEWS: tl.constexpr, PAIRS: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr,
    TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """Weights of padded rows from what the forward saved, with gradients of rows if PER_ROW."""
    valid = row < rows
    offsets = place_of(row, rows, VIEWS)
    inverse_tau = (read_scale(temperature, TAU_TENSOR) * LN2).to(tl.float64)
    shift = tl.load(saved_shift + offsets, mask=valid, other=0.0)
    log_sum = tl.load(saved_log_sum + offsets, mask=valid, other=0.0).to(tl.float64)
    g = tl.full(row.shape, 1.0, tl.float64)
    if PER_ROW:
        g = tl.load(grad + offsets.to(tl.int64) * grad_stride, mask=valid, other=0.0).to(tl.float64)
        largest = tl.load(largest_grad).to(tl.float64)
        g = tl.where(largest > 0, g / largest, g)
    s = shift
    if PAIRS:
        s = tl.load(saved_positive + offsets, mask=valid, other=0.0)
    store_weights(
        row=row, valid=valid, g=g, shift=shift, log_sum=log_sum, s=s, inverse_tau=inverse_tau,
        weight_out=weight_out, shift_out=shift_out, positive_weight_out=positive_weight_out,
        weight_scale=weight_scale, PAIRS=PAIRS, CONSTANT=CONSTANT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def weights_kernel(
    counter, weight_out, shift_out, positive_weight_out, saved_shift, saved_log_sum, saved_positive,
    grad, largest_grad, temperature, rows, grad_stride, weight_scale,
    VIEWS: tl.constexpr, PAIRS: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr,
    TAU_TENSOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weights of ROWS padded rows that a forward packed; ``counter`` becomes 0."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(counter, 0)
    weigh(
        row=program * ROWS + tl.arange(0, ROWS), weight_out=weight_out, shift_out=shift_out,
        positive_weight_out=positive_weight_out, saved_shift=saved_shift,
        saved_log_sum=saved_log_sum, saved_positive=saved_positive, grad=grad,
        largest_grad=largest_grad, temperature=temperature, rows=rows, grad_stride=grad_stride,
        weight_scale=weight_scale, VIEWS=VIEWS, PAIRS=PAIRS, PER_ROW=PER_ROW, CONSTANT=CONSTANT,
        TAU_TENSOR=TAU_TENSOR,
    )  # fmt: skip


@triton.jit
def positive_weights_kernel(
    grad, stride, largest_grad, temperature, rows, weight_scale, weight_out,
    VIEWS: tl.constexpr, TAU_TENSOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weights of positives, from the upstream gradients of their similarities.

    ``weight_scale`` has their sign.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    place = place_of(row, rows, VIEWS).to(tl.int64)
    u = tl.load(grad + place * stride, mask=valid, other=0.0).to(tl.float64)
    largest = tl.load(largest_grad).to(tl.float64)
    u = tl.where(largest > 0, u / largest, u)
    inverse_tau = (read_scale(temperature, TAU_TENSOR) * LN2).to(tl.float64)
    tl.store(weight_out + row, (u / inverse_tau * weight_scale).to(tl.float32), mask=valid)


@triton.jit
def attraction_kernel(
    grad, stride, largest_grad, class_weights, rows, weight_scale, weight_out, ROWS: tl.constexpr,
):  # fmt: skip
    """What padded rows of one view subtract from the coefficients of their classes: g_a / n_a."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    g = tl.load(grad + row.to(tl.int64) * stride, mask=valid, other=0.0).to(tl.float64)
    largest = tl.load(largest_grad).to(tl.float64)
    g = tl.where(largest > 0, g / largest, g)
    share = tl.load(class_weights + row, mask=valid, other=0.0)
    tl.store(weight_out + row, (g * share * weight_scale).to(tl.float32))
