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

Both kernels are limited by memory, and their instructions take nearly as long, so neither may be
wasted. A block of ROWS rows is held in PARTS tuples of (ROWS, WIDTH) numbers: WIDTH is a power of
two, and 768 features are three parts of 256 where one power of two would be 1024. A warp reads 256
bf16 numbers of a row at once, so up to 1024 features a row belongs to one warp, and its sums need
no barrier. EXACT says that the parts hold the features exactly, so that no column is masked.

A program takes every programs-th block of rows. The loads of its next blocks are in flight while it
computes (num_stages), and few programs leave few partial sums for the one that ends last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cjepa_kernels.triton.kernels.reduction import sum_in_order

L2 = tl.constexpr(1)
LAYER = tl.constexpr(2)


@triton.jit
def append(parts, x):
    """A tuple with one more part. Triton has no other way to write it."""
    return parts + (x,)  # noqa: RUF005


@triton.jit
def rows_of_block(
    row, mask, rows, patches, p_batch, p_patch, t_batch, t_patch, m_batch, m_patch,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Where each row begins on both sides, and whether it exists and the mask includes it."""
    sample = (row // patches).to(tl.int64)
    patch = (row % patches).to(tl.int64)
    included = row < rows
    if MASKED:
        in_mask = tl.load(mask + sample * m_batch + patch * m_patch, mask=included, other=0)
        included = included & (in_mask != 0)
    return sample * p_batch + patch * p_patch, sample * t_batch + patch * t_patch, included


@triton.jit
def inside_part(included, features, k: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Which elements of part k belong to included rows."""
    inside = included[:, None]
    if not EXACT:
        inside = inside & (k * WIDTH + tl.arange(0, WIDTH) < features)[None, :]
    return inside


@triton.jit
def load_parts(
    side, row_offsets, feature_stride, included, features,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The parts of rows in fp32. Rows that are not included are 0."""
    parts = ()
    for k in tl.static_range(PARTS):
        feature = (k * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
        x = tl.load(
            side + row_offsets[:, None] + feature * feature_stride,
            mask=inside_part(included, features, k, WIDTH, EXACT),
            other=0.0,
        )
        parts = append(parts, x.to(tl.float32))
    return parts


@triton.jit
def sum_of_parts(x, PARTS: tl.constexpr):
    """The sum of each row."""
    total = x[0]
    for k in tl.static_range(1, PARTS):
        total += x[k]
    return tl.sum(total, 1)


@triton.jit
def dot_of_parts(x, y, PARTS: tl.constexpr):
    """The dot product of each row of x and the same row of y."""
    total = x[0] * y[0]
    for k in tl.static_range(1, PARTS):
        total += x[k] * y[k]
    return tl.sum(total, 1)


@triton.jit
def scale_of_rows(largest):
    """The power of two that ``reference.scale_of_rows`` gives for rows of these largest elements.

    It is taken from the exponent's bits.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.where(exponent >= 127 + 50, exponent, 127 + 40)
    return ((127 + 127 + 40 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def layer_statistics(
    t, included, features, LAYER_EPS: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The mean of each row, and 1 / sqrt(var + LAYER_EPS)."""
    largest = tl.abs(t[0])
    for k in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, tl.abs(t[k]))
    scale = scale_of_rows(tl.max(largest, 1))
    total = t[0] * scale[:, None]
    for k in tl.static_range(1, PARTS):
        total += t[k] * scale[:, None]
    mean = tl.sum(total, 1) / features
    squares = tl.zeros(t[0].shape, tl.float32)
    for k in tl.static_range(PARTS):
        centered = t[k] * scale[:, None] - mean[:, None]
        if not EXACT:
            centered = tl.where(inside_part(included, features, k, WIDTH, EXACT), centered, 0.0)
        squares += centered * centered
    inverse = scale / tl.sqrt(tl.sum(squares, 1) / features + LAYER_EPS)
    return mean / scale, inverse


@triton.jit
def statistics_of(
    p, t, included, features, NORMALIZATION: tl.constexpr, LAYER_EPS: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The two statistics of each row."""
    first = tl.zeros((p[0].shape[0],), tl.float32)
    second = tl.zeros((p[0].shape[0],), tl.float32)
    if NORMALIZATION == L2:
        first = tl.sqrt(dot_of_parts(p, p, PARTS))
        second = tl.sqrt(dot_of_parts(t, t, PARTS))
    elif NORMALIZATION == LAYER:
        first, second = layer_statistics(
            t=t, included=included, features=features, LAYER_EPS=LAYER_EPS, PARTS=PARTS,
            WIDTH=WIDTH, EXACT=EXACT,
        )  # fmt: skip
    return first, second


@triton.jit
def normalize_parts(
    p, t, first, second, included, features, eps, NORMALIZATION: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The parts of u and of v."""
    u = p
    v = t
    if NORMALIZATION == L2:
        u = ()
        v = ()
        norm_p = tl.where(first > eps, first, eps)[:, None]
        norm_t = tl.where(second > eps, second, eps)[:, None]
        for k in tl.static_range(PARTS):
            u = append(u, p[k] / norm_p)
            v = append(v, t[k] / norm_t)
    elif NORMALIZATION == LAYER:
        v = ()
        for k in tl.static_range(PARTS):
            x = (t[k] - first[:, None]) * second[:, None]
            # Elements of a row that is not included are 0, and so is their mean.
            if not EXACT:
                x = tl.where(inside_part(included, features, k, WIDTH, EXACT), x, 0.0)
            v = append(v, x)
    return u, v


@triton.jit
def slope_of(d, slope, limit, SQUARE: tl.constexpr):
    """d error / dd: c, or 2 d for SQUARE. A NaN stays a NaN."""
    if SQUARE:
        return d + d
    c = tl.minimum(d * slope, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(c, -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows", "patches", "level"])
def prediction_loss_kernel(
    prediction, target, mask, errors, statistics, partial, included_rows, counter,
    loss, unweighted, levels, scales,
    rows, patches, features, p_batch, p_patch, p_feature, t_batch, t_patch, t_feature,
    m_batch, m_patch, slope, limit, half_width, eps, level, weight, level_share,
    MASKED: tl.constexpr, NORMALIZATION: tl.constexpr, SQUARE: tl.constexpr, NONE: tl.constexpr,
    MEAN: tl.constexpr, FIRST: tl.constexpr, LAYER_EPS: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Errors of one level. The program that ends last adds the level to the losses.

        loss += weight * level,    unweighted += level_share * level

    The first level's launch writes both; the others add to what the launches before them wrote.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    total = tl.zeros((ROWS,), tl.float64)
    count = tl.zeros((ROWS,), tl.int32)
    for block in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        p_rows, t_rows, included = rows_of_block(
            row=row, mask=mask, rows=rows, patches=patches, p_batch=p_batch, p_patch=p_patch,
            t_batch=t_batch, t_patch=t_patch, m_batch=m_batch, m_patch=m_patch, MASKED=MASKED,
        )  # fmt: skip
        p = load_parts(prediction, p_rows, p_feature, included, features, PARTS, WIDTH, EXACT)
        t = load_parts(target, t_rows, t_feature, included, features, PARTS, WIDTH, EXACT)
        first, second = statistics_of(
            p=p, t=t, included=included, features=features, NORMALIZATION=NORMALIZATION,
            LAYER_EPS=LAYER_EPS, PARTS=PARTS, WIDTH=WIDTH, EXACT=EXACT,
        )  # fmt: skip
        offsets = row.to(tl.int64) * 2
        tl.store(statistics + offsets, tl.where(included, first, 0.0), mask=row < rows)
        tl.store(statistics + offsets + 1, tl.where(included, second, 0.0), mask=row < rows)
        u, v = normalize_parts(
            p=p, t=t, first=first, second=second, included=included, features=features, eps=eps,
            NORMALIZATION=NORMALIZATION, PARTS=PARTS, WIDTH=WIDTH, EXACT=EXACT,
        )  # fmt: skip
        error_sum = tl.zeros((ROWS, WIDTH), tl.float32)
        for k in tl.static_range(PARTS):
            # Elements outside of the rows are 0 on both sides, and so is their error.
            d = u[k] - v[k]
            if SQUARE:
                error = d * d
            else:
                c = slope_of(d, slope, limit, False)
                error = c * (d - c * half_width)
            if NONE:
                column = k * WIDTH + tl.arange(0, WIDTH)
                error_offsets = row.to(tl.int64)[:, None] * features + column[None, :]
                valid = inside_part(row < rows, features, k, WIDTH, EXACT)
                tl.store(errors + error_offsets, error, mask=valid)
            error_sum += error
        total += tl.sum(error_sum, 1).to(tl.float64)
        if MASKED:
            count += included.to(tl.int32)
    tl.store(partial + program, tl.sum(total, 0))
    if MASKED:
        tl.store(included_rows + program, tl.sum(count, 0))
    tl.debug_barrier()
    if tl.atomic_add(counter + level, 1) != programs - 1:
        return
    level_loss = sum_in_order(partial, programs)
    scale = tl.full((), 1.0, tl.float64)
    if MEAN:
        elements = tl.cast(rows, tl.float64) * features
        if MASKED:
            elements = sum_in_order(included_rows, programs) * features
        scale = 1.0 / tl.maximum(elements, 1.0)
    level_loss *= scale
    tl.store(scales + level, scale.to(tl.float32))
    if not NONE:
        tl.store(levels + level, level_loss.to(tl.float32))
    weighted_sum = level_loss * weight
    mean = level_loss * level_share
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
    ROWS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one level. The upstream gradients stay on the device.

    EACH, LOSS, UNWEIGHTED and LEVELS say which of the upstream gradients there are.
    With g = dL/d(u - v), u and v as ``normalize_parts`` gives them, and 1 / |p| and 1 / |t| as
    scale_p and scale_t (the second statistic as scale_t for LAYER),

        L2:         dL/dp =  (g - (g . u) u) scale_p         0 where |p| <= eps
                    dL/dt = -(g - (g . v) v) scale_t         0 where |t| <= eps
        LAYER:      dL/dp =  g
                    dL/dt = -(g - mean(g) - mean(g v) v) scale_t
        otherwise:  dL/dp =  g,    dL/dt = -g
    """
    factor = tl.full((), 0.0, tl.float32)
    if LOSS:
        factor += tl.load(grad_loss) * weight
    if UNWEIGHTED:
        factor += tl.load(grad_unweighted) * level_share
    if LEVELS:
        factor += tl.load(grad_levels + level)
    factor *= tl.load(scales + level)
    program = tl.program_id(0)
    for block in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        p_rows, t_rows, included = rows_of_block(
            row=row, mask=mask, rows=rows, patches=patches, p_batch=p_batch, p_patch=p_patch,
            t_batch=t_batch, t_patch=t_patch, m_batch=m_batch, m_patch=m_patch, MASKED=MASKED,
        )  # fmt: skip
        p = load_parts(prediction, p_rows, p_feature, included, features, PARTS, WIDTH, EXACT)
        t = load_parts(target, t_rows, t_feature, included, features, PARTS, WIDTH, EXACT)
        first = tl.zeros((ROWS,), tl.float32)
        second = tl.zeros((ROWS,), tl.float32)
        if NORMALIZATION != 0:
            offsets = row.to(tl.int64) * 2
            first = tl.load(statistics + offsets, mask=row < rows, other=0.0)
            second = tl.load(statistics + offsets + 1, mask=row < rows, other=0.0)
        u, v = normalize_parts(
            p=p, t=t, first=first, second=second, included=included, features=features, eps=eps,
            NORMALIZATION=NORMALIZATION, PARTS=PARTS, WIDTH=WIDTH, EXACT=EXACT,
        )  # fmt: skip
        g = ()
        for k in tl.static_range(PARTS):
            slopes = slope_of(u[k] - v[k], slope, limit, SQUARE)
            if EACH:
                column = k * WIDTH + tl.arange(0, WIDTH)
                grad_offsets = row.to(tl.int64)[:, None] * features + column[None, :]
                valid = inside_part(row < rows, features, k, WIDTH, EXACT)
                slopes *= tl.load(grad_errors + grad_offsets, mask=valid, other=0.0) + factor
            else:
                slopes *= factor
            if MASKED or not EXACT:  # 0 times an upstream gradient that is not finite would be NaN.
                slopes = tl.where(inside_part(included, features, k, WIDTH, EXACT), slopes, 0.0)
            g = append(g, slopes)
        g_u = tl.zeros((ROWS,), tl.float32)
        g_v = tl.zeros((ROWS,), tl.float32)
        g_mean = tl.zeros((ROWS,), tl.float32)
        if NORMALIZATION == L2:
            g_u = dot_of_parts(g, u, PARTS)
        if TARGET and NORMALIZATION != 0:
            g_v = dot_of_parts(g, v, PARTS)
        if TARGET and NORMALIZATION == LAYER:
            g_v = g_v / features
            g_mean = sum_of_parts(g, PARTS) / features
        for k in tl.static_range(PARTS):
            column = k * WIDTH + tl.arange(0, WIDTH)
            grad_offsets = row.to(tl.int64)[:, None] * features + column[None, :]
            valid = inside_part(row < rows, features, k, WIDTH, EXACT)
            grad_p = g[k]  # type: ignore[var-annotated]
            if NORMALIZATION == L2:
                grad_p = (g[k] - g_u[:, None] * u[k]) * (1.0 / first)[:, None]
                # The comparison is false for a norm that is NaN, so its gradient stays NaN.
                grad_p = tl.where((first <= eps)[:, None], 0.0, grad_p)
            grad_p = grad_p.to(grad_prediction.dtype.element_ty)
            tl.store(grad_prediction + grad_offsets, grad_p, mask=valid)
            if TARGET:
                minus_grad_t = g[k]
                if NORMALIZATION == L2:
                    minus_grad_t = (g[k] - g_v[:, None] * v[k]) * (1.0 / second)[:, None]
                    minus_grad_t = tl.where((second <= eps)[:, None], 0.0, minus_grad_t)
                elif NORMALIZATION == LAYER:
                    minus_grad_t = g[k] - g_mean[:, None] - g_v[:, None] * v[k]
                    minus_grad_t = minus_grad_t * second[:, None]
                grad_t = (-minus_grad_t).to(grad_target.dtype.element_ty)
                tl.store(grad_target + grad_offsets, grad_t, mask=valid)
