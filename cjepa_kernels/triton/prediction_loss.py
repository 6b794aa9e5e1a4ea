"""The prediction loss on the GPU, both directions.

The kernels of this file are in ``kernels/prediction_rows.py``. The forward reads each side once,
and so does the backward, which writes each gradient once. A program takes whole rows, so their
norms or moments need no second read, and few programs take all blocks of rows between them. There
is one launch for each level. The launches follow one another in the stream, and the last program of
each adds its level to the loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.definitions import LAYER_EPS, PredictionLossBackward, PredictionLossForward
from cjepa_kernels.triton import configs, launch
from cjepa_kernels.triton.configs import Config, Kernel
from cjepa_kernels.triton.kernels.prediction_rows import (
    L2,
    LAYER,
    prediction_gradient_kernel,
    prediction_loss_kernel,
)
from cjepa_kernels.triton.pack import cdiv, next_power_of_2
from cjepa_kernels.triton.recording import new_zeros, run_kernel

NORMALIZATIONS = {"none": 0, "l2": L2.value, "layer": LAYER.value}
SQUARE = {"mse": True, "smoothl1": False, "huber": False}


class Penalty(NamedTuple):
    """The numbers of the error c (d - c half_width) with c = d slope, cut off at the limit."""

    slope: float
    limit: float
    half_width: float


def _penalty(loss_type: str, threshold: float) -> Penalty:
    if loss_type == "huber":
        return Penalty(slope=1.0, limit=threshold, half_width=0.5)
    if loss_type == "smoothl1":
        return Penalty(slope=1 / threshold, limit=1.0, half_width=threshold / 2)
    return Penalty(slope=1.0, limit=math.inf, half_width=0.0)


class Parts(NamedTuple):
    """How a row is held: in ``parts`` pieces of ``width`` numbers, a power of two."""

    parts: int
    width: int

    @staticmethod
    def of(features: int, itemsize: int) -> Parts:
        """The pieces for rows of so many features.

        A warp loads 16 bytes for each of its 32 lanes, which is a part of 256 numbers in half
        precision and of 128 in fp32. With at most four and eight parts of them, a row of up to 1024
        features belongs to one warp, and a lane holds 32 numbers of it.
        """
        width = max(16, next_power_of_2(cdiv(features, 2 * itemsize)))
        return Parts(cdiv(features, width), width)

    def rows(self, elements: int) -> int:
        """Rows of a block with so many elements: a power of two."""
        return 1 << max(0, (elements // (self.parts * self.width)).bit_length() - 1)


class _Level:
    """One level's tensors as a kernel takes them.

    Attributes:
        row_block: Rows that a program takes at a time.
        programs: Programs of the launch. The table allows so few for a multiprocessor that, at the
            usual widths, all of them run at one time.
    """

    def __init__(
        self, kernel: Kernel, prediction: Tensor, target: Tensor, mask: Tensor | None
    ) -> None:
        self.prediction, self.target, self.mask = prediction, target, mask
        self.features = prediction.shape[-1]
        self.rows = prediction.numel() // self.features
        self.config: Config = configs.choose(
            kernel, configs.architecture(prediction.device), prediction.dtype, self.features
        )
        self.parts = Parts.of(self.features, prediction.dtype.itemsize)
        self.row_block = self.parts.rows(self.config.elements)
        resident = self.config.programs * launch.processors(prediction.device)
        self.programs = min(resident, cdiv(self.rows, self.row_block))

    def arguments(self, normalization: str, loss_type: str) -> dict[str, Any]:
        """The arguments that both kernels take."""
        prediction, target, mask = self.prediction, self.target, self.mask
        p_batch, p_patch, p_feature = _strides(prediction)
        t_batch, t_patch, t_feature = _strides(target)
        m_batch, m_patch = (0, 0) if mask is None else (*mask.stride(), 0)[:2]
        return {
            "prediction": prediction,
            "target": target,
            "mask": prediction if mask is None else mask.view(torch.uint8),
            "rows": self.rows,
            "patches": prediction.shape[1] if prediction.ndim == 3 else 1,
            "features": self.features,
            "p_batch": p_batch,
            "p_patch": p_patch,
            "p_feature": p_feature,
            "t_batch": t_batch,
            "t_patch": t_patch,
            "t_feature": t_feature,
            "m_batch": m_batch,
            "m_patch": m_patch,
            "MASKED": mask is not None,
            "NORMALIZATION": NORMALIZATIONS[normalization],
            "SQUARE": SQUARE[loss_type],
            "ROWS": self.row_block,
            "PARTS": self.parts.parts,
            "WIDTH": self.parts.width,
            "EXACT": self.parts.parts * self.parts.width == self.features,
            "STAGES": self.config.stages,
            "num_warps": self.config.warps,
        }


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, patch and feature of a (B, N, D) or (B, D) tensor."""
    if x.ndim == 3:
        return x.stride(0), x.stride(1), x.stride(2)
    return x.stride(0), 0, x.stride(1)


def _levels(
    kernel: Kernel, predictions: list[Tensor], targets: list[Tensor], masks: list[Tensor]
) -> list[_Level]:
    levels = []
    for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        mask = masks[index] if masks and masks[index].numel() else None
        levels.append(_Level(kernel, prediction, target, mask))
    return levels


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
) -> PredictionLossForward:
    """The operator ``prediction_loss``."""
    levels = _levels("prediction_loss", predictions, targets, masks)
    like = predictions[0]
    none = reduction == "none"
    penalty = _penalty(loss_type, threshold)

    def floats(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    elements = sum(level.rows * level.features for level in levels)
    out = PredictionLossForward(
        loss=floats(),
        unweighted=floats(),
        levels=floats(elements if none else len(levels)),
        statistics=floats(sum(level.rows for level in levels), 2),
        scales=floats(len(levels)),
    )
    most_programs = max(level.programs for level in levels)
    partial = like.new_empty(most_programs, dtype=torch.float64)
    included_rows = like.new_empty(most_programs, dtype=torch.int32)
    counter = new_zeros(like, len(levels), dtype=torch.int32)
    row = element = 0
    for index, level in enumerate(levels):
        run_kernel(
            prediction_loss_kernel, level.programs,
            **level.arguments(normalization, loss_type),
            errors=out.levels[element:] if none else out.levels, statistics=out.statistics[row:],
            partial=partial, included_rows=included_rows, counter=counter, loss=out.loss,
            unweighted=out.unweighted, levels=out.levels, scales=out.scales,
            slope=penalty.slope, limit=penalty.limit, half_width=penalty.half_width, eps=eps,
            level=index,
            weight=weights[index], level_share=1 / len(levels),
            NONE=none, MEAN=reduction != "sum", FIRST=index == 0, LAYER_EPS=LAYER_EPS,
        )  # fmt: skip
        row += level.rows
        element += level.rows * level.features
    return out


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
) -> PredictionLossBackward:
    """The operator ``prediction_loss_backward``."""
    grad_predictions = [p.new_empty(p.shape) for p in predictions]
    grad_targets = [t.new_empty(t.shape) for t in targets] if targets_too else []
    penalty = _penalty(loss_type, threshold)
    # The gradient of ``levels`` has one number for each element, or one for each level.
    grad_errors = grad_levels if reduction == "none" else None
    grad_scalars = None if reduction == "none" else grad_levels
    unused = scales
    row = element = 0
    levels = _levels("prediction_gradient", predictions, targets, masks)
    for index, level in enumerate(levels):
        run_kernel(
            prediction_gradient_kernel, level.programs,
            **level.arguments(normalization, loss_type), statistics=statistics[row:],
            grad_errors=unused if grad_errors is None else grad_errors[element:],
            grad_loss=unused if grad_loss is None else grad_loss,
            grad_unweighted=unused if grad_unweighted is None else grad_unweighted,
            grad_levels=unused if grad_scalars is None else grad_scalars, scales=scales,
            grad_prediction=grad_predictions[index],
            grad_target=(grad_targets if targets_too else grad_predictions)[index],
            slope=penalty.slope, limit=penalty.limit, eps=eps, level=index, weight=weights[index],
            level_share=1 / len(predictions),
            EACH=grad_errors is not None, LOSS=grad_loss is not None,
            UNWEIGHTED=grad_unweighted is not None, LEVELS=grad_scalars is not None,
            TARGET=targets_too,
        )  # fmt: skip
        row += level.rows
        element += level.rows * level.features
    return PredictionLossBackward(grad_predictions, grad_targets)
