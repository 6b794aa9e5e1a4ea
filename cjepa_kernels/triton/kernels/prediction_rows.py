"""The prediction loss: whole rows of both sides become errors, or gradients.

With u and v the normalised rows of the prediction p and the target t, and d = u - v,

    c = d slope, cut off at -limit and limit
    error = c (d - c half_width),    error = d^2 for SQUARE

    smoothl1:   slope = 1 / threshold,   limit = 1,           half_width = threshold / 2
    huber:      slope = 1,               limit = threshold,   half_width = 1 / 2

    L2:         u = p / max(|p|, eps),   v = t / max(|t|, eps)
    LAYER:      u = p,                   v = (t - mean(t)) / sqrt(var(t) + LAYER_EPS)
    otherwise:  u = p,                   v = t

The two statistics of a row are |p| and |t| (L2), or mean(t) and 1 / sqrt(var(t) + LAYER_EPS)
(LAYER). The forward saves them for the backward.
"""

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
    """Rows of both sides in fp32, which rows the mask includes, and which elements those have.

    A row that the mask drops is loaded as 0.
    """
    sample = (row // patches).to(tl.int64)
    patch = (row % patches).to(tl.int64)
    included = row < rows
    if MASKED:
        in_mask = tl.load(mask + sample * m_batch + patch * m_patch, mask=included, other=0)
        included = included & (in_mask != 0)
    inside = included[:, None] & (column < features)[None, :]
    feature = column.to(tl.int64)[None, :]
    p = prediction + (sample * p_batch + patch * p_patch)[:, None] + feature * p_feature
    t = target + (sample * t_batch + patch * t_patch)[:, None] + feature * t_feature
    return (
        tl.load(p, mask=inside, other=0.0).to(tl.float32),
        tl.load(t, mask=inside, other=0.0).to(tl.float32),
        included,
        inside,
    )


@triton.jit
def scale_of_rows(largest):
    """The power of two that ``reference.scale_of_rows`` gives for rows of these largest elements.

    It is taken from the exponent's bits.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(exponent >= 127 + 50, exponent, 127 + 40)
    return ((127 + 127 + 40 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def statistics_of(p, t, inside, features, NORMALIZATION: tl.constexpr, LAYER_EPS: tl.constexpr):
    """The two statistics of each row."""
    first = tl.zeros((p.shape[0],), tl.float32)
    second = tl.zeros((p.shape[0],), tl.float32)
    if NORMALIZATION == L2:
        first = tl.sqrt(tl.sum(p * p, 1))
        second = tl.sqrt(tl.sum(t * t, 1))
    elif NORMALIZATION == LAYER:
        scale = scale_of_rows(tl.max(tl.abs(t), 1))
        t = t * scale[:, None]
        first = tl.sum(t, 1) / features
        centered = tl.where(inside, t - first[:, None], 0.0)
        second = scale / tl.sqrt(tl.sum(centered * centered, 1) / features + LAYER_EPS)
        first = first / scale
    return first, second


@triton.jit
def normalize(p, t, first, second, inside, eps, NORMALIZATION: tl.constexpr):
    """u and v, and the factors of p and t in them; without the factor 1 / eps of a short row."""
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
    """d error / dd: c, or 2 d for SQUARE. A NaN stays a NaN."""
    if SQUARE:
        return d + d
    c = d * slope
    c = tl.where(c > limit, limit, c)
    return tl.where(c < -limit, -limit, c)


@triton.jit(do_not_specialize=["rows", "patches", "level"])
def prediction_loss_kernel(
    prediction, target, mask, errors, statistics, partial, included_rows, counter,
    loss, unweighted, levels, scales,
    rows, patches, features, p_batch, p_patch, p_feature, t_batch, t_patch, t_feature,
    m_batch, m_patch, slope, limit, half_width, eps, level, weight, level_share,
    MASKED: tl.constexpr, NORMALIZATION: tl.constexpr, SQUARE: tl.constexpr, NONE: tl.constexpr,
    MEAN: tl.constexpr, FIRST: tl.constexpr, LAYER_EPS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Errors of one level. The program that ends last adds the level to the losses.

        loss += weight * level,    unweighted += level_share * level

    The first level's launch writes both; the others add to what the launches before them wrote.
    """
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    p, t, included, inside = load_sides(
        prediction=prediction, target=target, mask=mask, row=row, column=column, rows=rows,
        patches=patches, features=features, p_batch=p_batch, p_patch=p_patch, p_feature=p_feature,
        t_batch=t_batch, t_patch=t_patch, t_feature=t_feature, m_batch=m_batch, m_patch=m_patch,
        MASKED=MASKED,
    )  # fmt: skip
    first, second = statistics_of(
        p=p, t=t, inside=inside, features=features,
        NORMALIZATION=NORMALIZATION, LAYER_EPS=LAYER_EPS,
    )  # fmt: skip
    statistic_offsets = row.to(tl.int64) * 2
    tl.store(statistics + statistic_offsets, tl.where(included, first, 0.0), mask=row < rows)
    tl.store(statistics + statistic_offsets + 1, tl.where(included, second, 0.0), mask=row < rows)
    u, v, _, _ = normalize(
        p=p, t=t, first=first, second=second, inside=inside, eps=eps, NORMALIZATION=NORMALIZATION
    )
    d = u - v
    if SQUARE:
        error = d * d
    else:
        c = slope_of(d, slope, limit, False)
        error = c * (d - c * half_width)
    error = tl.where(inside, error, 0.0)
    if NONE:
        error_offsets = row.to(tl.int64)[:, None] * features + column[None, :]
        valid = (row < rows)[:, None] & (column < features)[None, :]
        tl.store(errors + error_offsets, error, mask=valid)
    tl.store(partial + program, tl.sum(tl.sum(error, 1).to(tl.float64), 0))
    tl.store(included_rows + program, tl.sum(included.to(tl.int32), 0))
    tl.debug_barrier()
    programs = tl.num_programs(0)
    if tl.atomic_add(counter + level, 1) != programs - 1:
        return
    total = sum_in_order(partial, programs)
    scale = tl.full((), 1.0, tl.float64)
    if MEAN:
        scale = 1.0 / tl.maximum(sum_in_order(included_rows, programs) * features, 1.0)
    total *= scale
    tl.store(scales + level, scale.to(tl.float32))
    if not NONE:
        tl.store(levels + level, total.to(tl.float32))
    weighted_sum = total * weight
    mean = total * level_share
    if not FIRST:
        weighted_sum += tl.load(loss)
        mean += tl.load(unweighted)
    tl.store(loss, weighted_sum.to(tl.float32))
    tl.store(unweighted, mean.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "patches", "level"])
def prediction_gradient_kernel(
    prediction, target, mask, statistics, grad_errors, grad_loss, grad_unweighted, grad_levels,
    scales, grad_prediction, grad_target,
    rows, patches, features, p_batch, p_patch, p_feature, t_batch, t_patch, t_feature,
    m_batch, m_patch, slope, limit, eps, level, weight, level_share,
    MASKED: tl.constexpr, NORMALIZATION: tl.constexpr, SQUARE: tl.constexpr, EACH: tl.constexpr,
    LOSS: tl.constexpr, UNWEIGHTED: tl.constexpr, LEVELS: tl.constexpr, TARGET: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of one level. The upstream gradients stay on the device.

    EACH, LOSS, UNWEIGHTED and LEVELS say which of the upstream gradients there are.
    With g = dL/d(u - v), and u, v, scale_p and scale_t as ``normalize`` gives them,

        L2:         dL/dp =  (g - (g . u) u) scale_p
                    dL/dt = -(g - (g . v) v) scale_t
        LAYER:      dL/dp =  g
                    dL/dt = -(g - mean(g) - mean(g v) v) scale_t
        otherwise:  dL/dp =  g,    dL/dt = -g
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    p, t, _, inside = load_sides(
        prediction=prediction, target=target, mask=mask, row=row, column=column, rows=rows,
        patches=patches, features=features, p_batch=p_batch, p_patch=p_patch, p_feature=p_feature,
        t_batch=t_batch, t_patch=t_patch, t_feature=t_feature, m_batch=m_batch, m_patch=m_patch,
        MASKED=MASKED,
    )  # fmt: skip
    statistic_offsets = row.to(tl.int64) * 2
    first = tl.load(statistics + statistic_offsets, mask=row < rows, other=0.0)
    second = tl.load(statistics + statistic_offsets + 1, mask=row < rows, other=0.0)
    u, v, scale_p, scale_t = normalize(
        p=p, t=t, first=first, second=second, inside=inside, eps=eps, NORMALIZATION=NORMALIZATION
    )
    factor = tl.full((), 0.0, tl.float32)
    if LOSS:
        factor += tl.load(grad_loss) * weight
    if UNWEIGHTED:
        factor += tl.load(grad_unweighted) * level_share
    if LEVELS:
        factor += tl.load(grad_levels + level)
    factor *= tl.load(scales + level)
    offsets = row.to(tl.int64)[:, None] * features + column[None, :]
    valid = (row < rows)[:, None] & (column < features)[None, :]
    g = slope_of(u - v, slope, limit, SQUARE)
    if EACH:
        g *= tl.load(grad_errors + offsets, mask=valid, other=0.0) + factor
    else:
        g *= factor
    g = tl.where(inside, g, 0.0)
    grad_p = g
    if NORMALIZATION == L2:
        grad_p = (g - tl.sum(g * u, 1)[:, None] * u) * scale_p[:, None]
        # The comparison is false for a norm that is NaN, so its gradient stays NaN.
        grad_p = tl.where((first <= eps)[:, None], 0.0, grad_p)
    tl.store(grad_prediction + offsets, grad_p.to(grad_prediction.dtype.element_ty), mask=valid)
    if TARGET:
        minus_grad_t = g
        if NORMALIZATION == L2:
            minus_grad_t = (g - tl.sum(g * v, 1)[:, None] * v) * scale_t[:, None]
            minus_grad_t = tl.where((second <= eps)[:, None], 0.0, minus_grad_t)
        elif NORMALIZATION == LAYER:
            mean_gv = tl.sum(g * v, 1) / features
            minus_grad_t = g - (tl.sum(g, 1) / features)[:, None] - mean_gv[:, None] * v
            minus_grad_t = minus_grad_t * scale_t[:, None]
        tl.store(
            grad_target + offsets, (-minus_grad_t).to(grad_target.dtype.element_ty), mask=valid
        )
