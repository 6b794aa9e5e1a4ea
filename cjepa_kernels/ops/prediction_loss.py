"""The operator ``prediction_loss``, which takes all levels of a hierarchy at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cjepa_kernels.definitions import (
    PredictionLossBackward,
    PredictionLossForward,
    accumulation_dtype,
)
from cjepa_kernels.ops.definition import Definition

# predictions, targets: for each level one (B, N, D) or (B, D), any strides.
# masks: an empty list, or for each level one (B, N) or (B,) of bool, of which True keeps the row; a
# mask without elements keeps all rows of its level.
# normalization: "none", "l2" (both sides) or "layer" (the target).
# threshold: where smoothl1 (its beta) and huber (its delta) turn linear.
# loss: () sum of weight x level. unweighted: () mean of the levels. levels: (L,) or, for reduction
# "none", the errors of all elements of all levels; loss and unweighted are then taken from means.
# statistics: (rows of all levels, 2), the numbers that normalise each row.
# scales: (L,), the factor of each level's sum of errors.
SCHEMA = (
    "(Tensor[] predictions, Tensor[] targets, Tensor[] masks, float[] weights, str loss_type, "
    "str normalization, float threshold, float eps, str reduction) -> "
    "(Tensor loss, Tensor unweighted, Tensor levels, Tensor statistics, Tensor scales)"
)
SCHEMA_BACKWARD = (
    "(Tensor? grad_loss, Tensor? grad_unweighted, Tensor? grad_levels, Tensor[] predictions, "
    "Tensor[] targets, Tensor[] masks, Tensor statistics, Tensor scales, float[] weights, "
    "str loss_type, str normalization, float threshold, float eps, str reduction, "
    "bool targets_too) -> (Tensor[] grad_predictions, Tensor[] grad_targets)"
)


def _fake(arguments: Any) -> PredictionLossForward:
    predictions = arguments.predictions
    first, levels = predictions[0], len(predictions)
    dtype = accumulation_dtype(first.dtype)
    elements = sum(p.numel() for p in predictions)
    rows = sum(p.numel() // p.shape[-1] for p in predictions)

    def empty(*shape: int) -> Any:
        return first.new_empty(shape, dtype=dtype)

    return PredictionLossForward(
        loss=empty(),
        unweighted=empty(),
        levels=empty(levels if arguments.reduction != "none" else elements),
        statistics=empty(rows, 2),
        scales=empty(levels),
    )


def _fake_backward(arguments: Any) -> PredictionLossBackward:
    targets = arguments.targets if arguments.targets_too else []
    return PredictionLossBackward(
        grad_predictions=[p.new_empty(p.shape) for p in arguments.predictions],
        grad_targets=[t.new_empty(t.shape) for t in targets],
    )


def _complete(
    saved: Any,
    grad_loss: Tensor | None,
    grad_unweighted: Tensor | None,
    grad_levels: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of the levels are read element by element, so they must be contiguous."""
    levels = None if grad_levels is None else grad_levels.contiguous()
    return grad_loss, grad_unweighted, levels


DEFINITION = Definition(
    name="prediction_loss",
    schema=SCHEMA,
    schema_backward=SCHEMA_BACKWARD,
    results=PredictionLossForward,
    results_backward=PredictionLossBackward,
    fake=_fake,
    fake_backward=_fake_backward,
    complete=_complete,
    flags={"targets_too": "targets"},
)
