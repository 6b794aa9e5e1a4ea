"""The prediction loss of one level in plain PyTorch autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import (
    EPS,
    LAYER_EPS,
    SMOOTHL1_BETA,
    PredictionLossType,
    Reduction,
    TargetNorm,
    accumulation_dtype,
)
from cjepa_kernels.reference.rows import normalize_rows, reduce, scale_of_rows


def prediction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    loss_type: PredictionLossType = "smoothl1",
    normalize_embeddings: bool = True,
    target_norm: TargetNorm | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    threshold: float = SMOOTHL1_BETA,
    eps: float = EPS,
) -> Tensor:
    """Prediction term of one hierarchy level.

    Args:
        prediction: (..., D).
        target: Same shape; carries a gradient unless the caller detached it.
        loss_type: ``smoothl1`` (``threshold`` is its beta), ``mse`` or ``huber`` (its delta).
        normalize_embeddings: L2-normalise the rows of both sides first.
        target_norm: ``"layer"`` is I-JEPA's recipe: parameter-free LayerNorm of the targets,
            predictions as they are; it overrides ``normalize_embeddings``.
        mask: Shape of ``prediction`` without D, bool, True keeps the row. ``mean`` divides by
            the number of elements in these rows (rows x D), and is 0 if the mask keeps no row.
        reduction: ``mean``, ``sum`` or ``none``.
        threshold: Where ``smoothl1`` and ``huber`` turn linear.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        () for ``mean`` and ``sum``, the input's shape for ``none``; fp32 (fp64 for fp64).

    Source: I-JEPA, arXiv 2301.08243 (targets, section 3).
    """
    dtype = accumulation_dtype(prediction.dtype)
    prediction, target = prediction.to(dtype), target.to(dtype)
    if mask is not None:
        # This comes first, because a NaN in a row that the mask drops must reach neither the loss
        # nor the gradient. A row of zeros stays zero under both normalisations and adds nothing.
        included = mask[..., None]
        prediction, target = prediction.where(included, 0.0), target.where(included, 0.0)
    if target_norm == "layer":
        target = F.layer_norm(target * scale_of_rows(target), target.shape[-1:], eps=LAYER_EPS)
    elif normalize_embeddings:
        prediction, target = normalize_rows(prediction, eps), normalize_rows(target, eps)
    loss = _elementwise(
        prediction,
        target,
        loss_type=loss_type,
        reduction=reduction if mask is None else "none",
        threshold=threshold,
    )
    if mask is None:
        return loss
    if reduction == "mean":
        return loss.sum() / (mask.sum() * prediction.shape[-1]).clamp(min=1)
    return reduce(loss, reduction)


def _elementwise(
    prediction: Tensor,
    target: Tensor,
    *,
    loss_type: PredictionLossType,
    reduction: str,
    threshold: float,
) -> Tensor:
    """The penalty on the difference of each element, reduced."""
    if loss_type == "mse":
        return F.mse_loss(prediction, target, reduction=reduction)
    if loss_type == "huber":
        return F.huber_loss(prediction, target, reduction=reduction, delta=threshold)
    return F.smooth_l1_loss(prediction, target, reduction=reduction, beta=threshold)
