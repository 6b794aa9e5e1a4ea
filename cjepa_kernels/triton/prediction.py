"""The prediction loss: each side read once forward and once backward, each gradient written once.

A program takes whole rows, so that their norms or moments need no second read. One launch a level:
the levels' launches follow each other in the stream, and the last program of each adds its level
to the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cjepa_kernels.definitions import LAYER_EPS
from cjepa_kernels.triton.reduction import sum_in_order

BLOCK_ELEMENTS = 4096
NORMALIZATIONS = {"none": 0, "l2": 1, "layer": 2}
L2 = tl.constexpr(1)
LAYER = tl.constexpr(2)
SQUARE = {"mse": True, "smoothl1": False, "huber": False}


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


def _row_strides(x: Tensor) -> tuple[int, ...]:
    """Of a (B, N, D) or (B, D) tensor: batch, patch and feature."""
    strides = x.stride()
    return strides if x.ndim == 3 else (strides[0], 0, strides[1])


class _Level:
    """One level's tensors as the kernels take them."""

    def __init__(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
        self.tensors = prediction, target, prediction if mask is None else mask.view(torch.uint8)
        self.masked = mask is not None
        self.features = prediction.shape[-1]
        self.rows = prediction.numel() // self.features
        patches = prediction.shape[1] if prediction.ndim == 3 else 1
        self.width = triton.next_power_of_2(self.features)
        self.row_block = max(1, BLOCK_ELEMENTS // self.width)
        self.programs = triton.cdiv(self.rows, self.row_block)
        of_mask = (0, 0) if mask is None else (*mask.stride(), 0)[:2]
        self.numbers = (
            self.rows, patches, self.features, *_row_strides(prediction), *_row_strides(target),
            *of_mask,
        )  # fmt: skip

    def constants(self, normalization: str, loss_type: str) -> dict[str, Any]:
        """Compile-time arguments of both kernels."""
        return {
            "MASKED": self.masked,
            "NORMALIZATION": NORMALIZATIONS[normalization],
            "SQUARE": SQUARE[loss_type],
            "ROWS": self.row_block,
            "WIDTH": self.width,
            "num_warps": 8 if self.width >= 2 * BLOCK_ELEMENTS else 4,
        }


def _levels(predictions: list[Tensor], targets: list[Tensor], masks: list[Tensor]) -> list[_Level]:
    found = []
    for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        mask = masks[index] if masks and masks[index].numel() else None
        found.append(_Level(prediction, target, mask))
    return found


def _penalty(loss_type: str, threshold: float) -> tuple[float, float, float]:
    """Slope, limit and half width: the error is c (d - c half_width), c = d slope within limits."""
    if loss_type == "huber":
        return 1.0, threshold, 0.5
    if loss_type == "smoothl1":
        return 1 / threshold, 1.0, threshold / 2
    return 1.0, math.inf, 0.0


def prediction_loss(
    predictions: list[Tensor],
    targets: list[Tensor],
    masks: list[Tensor],
    weights: list[float],
    loss_type: str,
    normalization: str,
    threshold: float,
    eps: float,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Loss and what the backward needs; arguments and results as in ``ops.PREDICTION_LOSS``."""
    levels = _levels(predictions, targets, masks)
    like = predictions[0]
    none = reduction == "none"

    def floats(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    loss, unweighted, scales = floats(), floats(), floats(len(levels))
    elements = sum(level.rows * level.features for level in levels)
    of_levels = floats(elements if none else len(levels))
    statistics = floats(sum(level.rows for level in levels), 2)
    most = max(level.programs for level in levels)
    partial = like.new_empty(most, dtype=torch.float64)
    kept_rows = like.new_empty(most, dtype=torch.int32)
    counter = like.new_zeros(len(levels), dtype=torch.int32)
    row = element = 0
    for index, level in enumerate(levels):
        prediction_loss_kernel[(level.programs,)](
            *level.tensors, of_levels[element:] if none else of_levels, statistics[row:], partial,
            kept_rows, counter, loss, unweighted, of_levels, scales, *level.numbers,
            *_penalty(loss_type, threshold), eps, index, weights[index], 1 / len(levels),
            NONE=none, MEAN=reduction != "sum", FIRST=index == 0, LAYER_EPS=LAYER_EPS,
            **level.constants(normalization, loss_type),
        )  # fmt: skip
        row += level.rows
        element += level.rows * level.features
    return loss, unweighted, of_levels, statistics, scales


def prediction_loss_backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    grad_levels: Tensor | None,
    predictions: list[Tensor],
    targets: list[Tensor],
    masks: list[Tensor],
    statistics: Tensor,
    scales: Tensor,
    weights: list[float],
    loss_type: str,
    normalization: str,
    threshold: float,
    eps: float,
    reduction: str,
    targets_too: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the predictions and, if wanted, of the targets."""
    of_predictions = [p.new_empty(p.shape) for p in predictions]
    of_targets = [t.new_empty(t.shape) for t in targets] if targets_too else []
    none = reduction == "none"
    slope, limit, _ = _penalty(loss_type, threshold)
    row = element = 0
    for index, level in enumerate(_levels(predictions, targets, masks)):
        each = none and grad_levels is not None
        upstream = grad_levels[element:] if grad_levels is not None and each else scales
        gradients = of_predictions[index], (of_targets or of_predictions)[index]
        given = [scales if grad is None else grad for grad in (grad_loss, grad_unweighted)]
        prediction_gradient_kernel[(level.programs,)](
            *level.tensors, statistics[row:], upstream, *given,
            scales if grad_levels is None else grad_levels, scales, *gradients, *level.numbers,
            slope, limit, eps, index, weights[index], 1 / len(predictions),
            EACH=each, LOSS=grad_loss is not None, UNWEIGHTED=grad_unweighted is not None,
            LEVELS=grad_levels is not None and not none, TARGET=targets_too,
            **level.constants(normalization, loss_type),
        )  # fmt: skip
        row += level.rows
        element += level.rows * level.features
    return of_predictions, of_targets
