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
from torch import Tensor

from cjepa_kernels.definitions import LAYER_EPS
from cjepa_kernels.triton.kernels.prediction_rows import (
    prediction_gradient_kernel,
    prediction_loss_kernel,
)

BLOCK_ELEMENTS = 4096
NORMALIZATIONS = {"none": 0, "l2": 1, "layer": 2}
SQUARE = {"mse": True, "smoothl1": False, "huber": False}


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


def forward(
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


def backward(
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
