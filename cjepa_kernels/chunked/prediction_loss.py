"""The prediction loss in pure PyTorch, without autograd, with temporaries of a bounded size.

It serves devices without a kernel of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import (
    LAYER_EPS,
    PredictionLossBackward,
    PredictionLossForward,
    accumulation_dtype,
)
from cjepa_kernels.reference.rows import scale_of_rows

CHUNK_ELEMENTS = 2**22  # of one side, taken at a time


def forward(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    weights: Sequence[float],
    loss_type: str,
    normalization: str,
    threshold: float,
    eps: float,
    reduction: str,
) -> PredictionLossForward:
    """Losses of the levels and the numbers that the backward needs, of ``prediction_loss``."""
    levels, scales, statistics, errors = [], [], [], []
    for prediction, target, mask in _levels(predictions, targets, masks):
        dtype = accumulation_dtype(prediction.dtype)
        total = prediction.new_zeros((), dtype=dtype)
        for p, t, included in _chunks(prediction, target, mask):
            of_rows = _statistics(p, t, normalization, included)
            sides = _normalize(p, t, statistics=of_rows, normalization=normalization, eps=eps)
            error = _penalty(sides.prediction - sides.target, loss_type, threshold)
            if included is not None:
                error = error.where(included, 0.0)
            total = total + error.sum()
            statistics.append(of_rows)
            if reduction == "none":
                errors.append(error.flatten())
        if reduction == "sum":
            scale = torch.ones_like(total)
        elif mask is None:
            scale = torch.full_like(total, 1 / prediction.numel())
        else:
            scale = 1 / (mask.sum() * prediction.shape[-1]).clamp(min=1).to(dtype)
        scales.append(scale)
        levels.append(total * scale)
    stacked = torch.stack(levels)
    loss = torch.stack([w * level for w, level in zip(weights, levels, strict=True)]).sum()
    of_levels = torch.cat(errors) if reduction == "none" else stacked
    return PredictionLossForward(
        loss=loss,
        unweighted=stacked.mean(),
        levels=of_levels,
        statistics=torch.cat(statistics),
        scales=torch.stack(scales),
    )


def backward(
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    grad_levels: Tensor | None,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor],
    statistics: Tensor,
    scales: Tensor,
    weights: Sequence[float],
    loss_type: str,
    normalization: str,
    threshold: float,
    eps: float,
    reduction: str,
    targets_too: bool,
) -> PredictionLossBackward:
    """Gradients of both sides, of the operator ``prediction_loss_backward``."""
    of_predictions, of_targets = [], []
    first_row = first_element = 0
    for level, (prediction, target, mask) in enumerate(_levels(predictions, targets, masks)):
        features = prediction.shape[-1]
        factor = statistics.new_zeros(())
        if grad_loss is not None:
            factor = factor + weights[level] * grad_loss
        if grad_unweighted is not None:
            factor = factor + grad_unweighted / len(predictions)
        if grad_levels is not None and reduction != "none":
            factor = factor + grad_levels[level]
        factor = factor * scales[level]
        of_prediction = prediction.new_empty((prediction.numel() // features, features))
        of_target = target.new_empty(of_prediction.shape) if targets_too else None
        row = 0
        for p, t, included in _chunks(prediction, target, mask):
            rows = slice(row, row + len(p))
            of_rows = statistics[first_row + row : first_row + row + len(p)]
            sides = _normalize(p, t, statistics=of_rows, normalization=normalization, eps=eps)
            u, v = sides.prediction, sides.target
            g = _slope(u - v, loss_type, threshold)
            if grad_levels is not None and reduction == "none":
                elements = grad_levels[first_element + row * features :][: g.numel()]
                g = g * (elements.view(g.shape) + factor)
            else:
                g = g * factor
            grads = [_through_normalization(g, u, sides.prediction_scale, normalization == "l2")]
            if of_target is not None:
                inner = g
                if normalization == "layer":
                    inner = g - g.mean(1, keepdim=True) - v * (g * v).mean(1, keepdim=True)
                grads.append(
                    -_through_normalization(inner, v, sides.target_scale, normalization == "l2")
                )
            for to, grad in zip((of_prediction, of_target), grads, strict=False):
                if to is not None:
                    to[rows] = (grad if included is None else grad.where(included, 0.0)).to(
                        to.dtype
                    )
            row += len(p)
        of_predictions.append(of_prediction.view(prediction.shape))
        if of_target is not None:
            of_targets.append(of_target.view(target.shape))
        first_row += row
        first_element += prediction.numel()
    return PredictionLossBackward(grad_predictions=of_predictions, grad_targets=of_targets)


def _levels(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Both sides of each level, and its mask, None for a level without one."""
    for level, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        mask = masks[level] if masks else None
        yield prediction, target, mask if mask is not None and mask.numel() else None


def _chunks(
    prediction: Tensor, target: Tensor, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows of both sides in the accumulation dtype, 0 where the mask drops them, and the mask."""
    dtype = accumulation_dtype(prediction.dtype)
    features = prediction.shape[-1]
    for part in _parts(prediction):
        p, t = (x[part].reshape(-1, features).to(dtype) for x in (prediction, target))
        if mask is None:
            yield p, t, None
            continue
        included = mask[part].reshape(-1, 1)
        # A NaN in a row that the mask drops must reach neither the loss nor a gradient.
        yield p.where(included, 0.0), t.where(included, 0.0), included


def _parts(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Slices of (B, N, D) or (B, D) in order: samples, or patches where a sample is too large."""
    samples = CHUNK_ELEMENTS // x[0].numel()
    if samples > 0 or x.ndim == 2:
        for first in range(0, len(x), max(1, samples)):
            yield (slice(first, first + max(1, samples)),)
        return
    patches = max(1, CHUNK_ELEMENTS // x.shape[-1])
    for sample in range(len(x)):
        for first in range(0, x.shape[1], patches):
            yield slice(sample, sample + 1), slice(first, first + patches)


def _statistics(p: Tensor, t: Tensor, normalization: str, included: Tensor | None) -> Tensor:
    """(rows, 2): norms of both sides, or mean and inverse deviation of the target."""
    if normalization == "l2":
        columns = [torch.linalg.vector_norm(x, dim=1) for x in (p, t)]
    elif normalization == "layer":
        scale = scale_of_rows(t)
        variance, mean = torch.var_mean(t * scale, dim=1, correction=0)
        scale = scale[:, 0]
        columns = [mean / scale, (variance + LAYER_EPS).rsqrt() * scale]
    else:
        columns = [p.new_zeros(len(p))] * 2
    statistics = torch.stack(columns, 1)
    return statistics if included is None else statistics.where(included, 0.0)


class _Normalized(NamedTuple):
    """Both sides normalised, and the factor of each row.

    The factor of a row with a norm <= eps is 0. That of a row with an infinite norm is 0 as well,
    but the row is NaN.
    """

    prediction: Tensor
    target: Tensor
    prediction_scale: Tensor
    target_scale: Tensor


def _normalize(
    p: Tensor, t: Tensor, *, statistics: Tensor, normalization: str, eps: float
) -> _Normalized:
    first, second = statistics[:, :1], statistics[:, 1:]
    one = torch.ones_like(first)
    if normalization == "layer":
        return _Normalized(p, (t - first) * second, prediction_scale=one, target_scale=second)
    if normalization == "none":
        return _Normalized(p, t, prediction_scale=one, target_scale=one)
    sides, scales = [], []
    for x, norm in ((p, first), (t, second)):
        regular = norm > eps
        sides.append(x / norm.where(regular, eps))
        scales.append((1 / norm).where(~(norm <= eps), 0.0))
    return _Normalized(*sides, *scales)


def _through_normalization(g: Tensor, unit: Tensor, scale: Tensor, project: bool) -> Tensor:
    """The gradient of a row whose normalised form has the gradient g."""
    if project:
        g = g - (g * unit).sum(1, keepdim=True) * unit
        return (g * scale).where((scale != 0) | unit.isnan().any(1, keepdim=True), 0.0)
    return g * scale


def _penalty(difference: Tensor, loss_type: str, threshold: float) -> Tensor:
    """The loss of each element."""
    zero = torch.zeros_like(difference)
    if loss_type == "mse":
        return difference * difference
    if loss_type == "huber":
        return F.huber_loss(difference, zero, reduction="none", delta=threshold)
    return F.smooth_l1_loss(difference, zero, reduction="none", beta=threshold)


def _slope(difference: Tensor, loss_type: str, threshold: float) -> Tensor:
    """The derivative of the loss of each element by its difference."""
    if loss_type == "mse":
        return 2 * difference
    if loss_type == "huber":
        return difference.clamp(-threshold, threshold)
    return (difference / threshold).clamp(-1.0, 1.0)
