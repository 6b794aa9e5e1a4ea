"""The prediction loss: whole rows of both sides become errors, or gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.reduction import sum_in_order

L2 = tl.constexpr(1)
LAYER = tl.constexpr(2)


@triton.jit
def load_sides(
    prediction, target, mask, row, column, rows, patches, features,
    p_batch, p_patch, p_feature, t_batch, t_patch, t_feature, m_batch, m_patch,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of both sides in fp32, 0 where the mask drops them, and which rows count."""
    sample = (row // patches).to(tl.int64)
    patch = (row % patches).to(tl.int64)
    kept = row < rows
    if MASKED:
        kept = kept & (tl.load(mask + sample * m_batch + patch * m_patch, mask=kept, other=0) != 0)
    inside = kept[:, None] & (column < features)[None, :]
    feature = column.to(tl.int64)[None, :]
    p = prediction + (sample * p_batch + patch * p_patch)[:, None] + feature * p_feature
    t = target + (sample * t_batch + patch * t_patch)[:, None] + feature * t_feature
    return (
        tl.load(p, mask=inside, other=0.0).to(tl.float32),
        tl.load(t, mask=inside, other=0.0).to(tl.float32),
        kept,
        inside,
    )


@triton.jit
def scale_of_rows(largest):
    """As ``reference.scale_of_rows``, from the exponent of each row's largest element."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(exponent >= 127 + 50, exponent, 127 + 40)
    return ((127 + 127 + 40 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def statistics_of(p, t, inside, features, NORMALIZATION: tl.constexpr, LAYER_EPS: tl.constexpr):
    """Norms of both sides, or mean and inverse deviation of the target."""
    first = tl.zeros((p.shape[0],), tl.float32)
    second = tl.zeros((p.shape[0],), tl.float32)
    if NORMALIZATION == L2:
        first = tl.sqrt(tl.sum(p * p, 1))
        second = tl.sqrt(tl.sum(t * t, 1))
    elif NORMALIZATION == LAYER:
        scale = scale_of_rows(tl.max(tl.abs(t), 1))
        t = t * scale[:, None]
        first = tl.sum(t, 1) / features
        apart = tl.where(inside, t - first[:, None], 0.0)
        second = scale / tl.sqrt(tl.sum(apart * apart, 1) / features + LAYER_EPS)
        first = first / scale
    return first, second


@triton.jit
def normalize(p, t, first, second, inside, eps, NORMALIZATION: tl.constexpr):
    """Both sides normalised, and what they were multiplied by, unless the row is a constant."""
    scale_p = tl.full((p.shape[0],), 1.0, tl.float32)
    scale_t = tl.full((p.shape[0],), 1.0, tl.float32)
    if NORMALIZATION == L2:
        regular_p = first > eps
        regular_t = second > eps
        p = p / tl.where(regular_p, first, eps)[:, None]
        t = t / tl.where(regular_t, second, eps)[:, None]
        scale_p = 1.0 / first
        scale_t = 1.0 / second
    elif NORMALIZATION == LAYER:
        t = tl.where(inside, (t - first[:, None]) * second[:, None], 0.0)
        scale_t = second
    return p, t, scale_p, scale_t


@triton.jit
def slope_of(d, slope, limit, SQUARE: tl.constexpr):
    """The derivative of the penalty; NaN stays NaN."""
    if SQUARE:
        return d + d
    c = d * slope
    c = tl.where(c > limit, limit, c)
    return tl.where(c < -limit, -limit, c)


@triton.jit(do_not_specialize=["rows", "patches", "level"])
def prediction_loss_kernel(
    prediction, target, mask, errors, statistics, partial, kept_rows, counter,
    loss, unweighted, levels, scales,
    rows, patches, features, p_batch, p_patch, p_feature, t_batch, t_patch, t_feature,
    m_batch, m_patch, slope, limit, half_width, eps, level, weight, share,
    MASKED: tl.constexpr, NORMALIZATION: tl.constexpr, SQUARE: tl.constexpr, NONE: tl.constexpr,
    MEAN: tl.constexpr, FIRST: tl.constexpr, LAYER_EPS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Errors of one level. The program that ends last adds the level to the loss."""
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    p, t, kept, inside = load_sides(
        prediction, target, mask, row, column, rows, patches, features,
        p_batch, p_patch, p_feature, t_batch, t_patch, t_feature, m_batch, m_patch, MASKED,
    )  # fmt: skip
    first, second = statistics_of(p, t, inside, features, NORMALIZATION, LAYER_EPS)
    at = row.to(tl.int64) * 2
    tl.store(statistics + at, tl.where(kept, first, 0.0), mask=row < rows)
    tl.store(statistics + at + 1, tl.where(kept, second, 0.0), mask=row < rows)
    u, v, _, _ = normalize(p, t, first, second, inside, eps, NORMALIZATION)
    d = u - v
    if SQUARE:
        error = d * d
    else:
        c = slope_of(d, slope, limit, False)
        error = c * (d - c * half_width)
    error = tl.where(inside, error, 0.0)
    if NONE:
        to = errors + row.to(tl.int64)[:, None] * features + column[None, :]
        tl.store(to, error, mask=(row < rows)[:, None] & (column < features)[None, :])
    tl.store(partial + program, tl.sum(tl.sum(error, 1).to(tl.float64), 0))
    tl.store(kept_rows + program, tl.sum(kept.to(tl.int32), 0))
    tl.debug_barrier()
    programs = tl.num_programs(0)
    if tl.atomic_add(counter + level, 1) != programs - 1:
        return
    total = sum_in_order(partial, programs, 1024)
    scale = tl.full((), 1.0, tl.float64)
    if MEAN:
        scale = 1.0 / tl.maximum(sum_in_order(kept_rows, programs, 1024) * features, 1.0)
    total *= scale
    tl.store(scales + level, scale.to(tl.float32))
    if not NONE:
        tl.store(levels + level, total.to(tl.float32))
    weighted = total * weight
    mean = total * share
    if not FIRST:  # what the launches before this one came to
        weighted += tl.load(loss)
        mean += tl.load(unweighted)
    tl.store(loss, weighted.to(tl.float32))
    tl.store(unweighted, mean.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "patches", "level"])
def prediction_gradient_kernel(
    prediction, target, mask, statistics, upstream, of_loss, of_unweighted, of_levels, scales,
    grad_prediction, grad_target,
    rows, patches, features, p_batch, p_patch, p_feature, t_batch, t_patch, t_feature,
    m_batch, m_patch, slope, limit, eps, level, weight, share,
    MASKED: tl.constexpr, NORMALIZATION: tl.constexpr, SQUARE: tl.constexpr, EACH: tl.constexpr,
    LOSS: tl.constexpr, UNWEIGHTED: tl.constexpr, LEVELS: tl.constexpr, TARGET: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of one level; what reaches it from upstream stays on the device.

    With g = dL/d(u - v):  dL/dp = (g - (g . u) u) scale_p                       L2, else g
      dL/dt = -(g - (g . v) v) scale_t                                           L2
      dL/dt = -(g - mean(g) - mean(g . v) v) scale_t                             LayerNorm, else -g
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    p, t, _, inside = load_sides(
        prediction, target, mask, row, column, rows, patches, features,
        p_batch, p_patch, p_feature, t_batch, t_patch, t_feature, m_batch, m_patch, MASKED,
    )  # fmt: skip
    at = row.to(tl.int64) * 2
    first = tl.load(statistics + at, mask=row < rows, other=0.0)
    second = tl.load(statistics + at + 1, mask=row < rows, other=0.0)
    u, v, scale_p, scale_t = normalize(p, t, first, second, inside, eps, NORMALIZATION)
    factor = tl.full((), 0.0, tl.float32)
    if LOSS:
        factor += tl.load(of_loss) * weight
    if UNWEIGHTED:
        factor += tl.load(of_unweighted) * share
    if LEVELS:
        factor += tl.load(of_levels + level)
    factor *= tl.load(scales + level)
    place = row.to(tl.int64)[:, None] * features + column[None, :]
    valid = (row < rows)[:, None] & (column < features)[None, :]
    g = slope_of(u - v, slope, limit, SQUARE)
    if EACH:
        g *= tl.load(upstream + place, mask=valid, other=0.0) + factor
    else:
        g *= factor
    g = tl.where(inside, g, 0.0)
    of_prediction = g
    if NORMALIZATION == L2:
        of_prediction = (g - tl.sum(g * u, 1)[:, None] * u) * scale_p[:, None]
        of_prediction = tl.where((first <= eps)[:, None], 0.0, of_prediction)  # NaN stays NaN
    tl.store(
        grad_prediction + place, of_prediction.to(grad_prediction.dtype.element_ty), mask=valid
    )
    if TARGET:
        of_target = g
        if NORMALIZATION == L2:
            of_target = (g - tl.sum(g * v, 1)[:, None] * v) * scale_t[:, None]
            of_target = tl.where((second <= eps)[:, None], 0.0, of_target)
        elif NORMALIZATION == LAYER:
            along = tl.sum(g * v, 1) / features
            of_target = g - (tl.sum(g, 1) / features)[:, None] - along[:, None] * v
            of_target = of_target * scale_t[:, None]
        tl.store(grad_target + place, (-of_target).to(grad_target.dtype.element_ty), mask=valid)
