"""The prediction loss of all levels of a hierarchy at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import (
    LOSS_TYPES,
    HierarchicalLoss,
    PredictionLossForward,
    PredictionLossType,
    Reduction,
    TargetNorm,
)
from cjepa_kernels.functional import checks, dispatch


class PredictionOptions(NamedTuple):
    """Options of :func:`prediction_loss`."""

    loss_type: PredictionLossType
    normalize_embeddings: bool
    target_norm: TargetNorm | None
    reduction: Reduction
    smoothl1_beta: float
    huber_delta: float
    eps: float
    backend: Backend

    @property
    def threshold(self) -> float:
        """Where the penalty turns linear."""
        return checks.as_float(
            self.huber_delta if self.loss_type == "huber" else self.smoothl1_beta
        )

    def check(self) -> PredictionOptions:
        """Raise unless every option is one that the prediction loss knows."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {list(LOSS_TYPES)}, got {self.loss_type!r}")
        if self.target_norm not in ("layer", None):
            raise ValueError(f"target_norm must be 'layer' or None, got {self.target_norm!r}")
        checks.check_bool("normalize_embeddings", self.normalize_embeddings)
        checks.check_reduction(self.reduction)
        for name in ("smoothl1_beta", "huber_delta", "eps"):
            checks.check_in_range(name, getattr(self, name))
        check_backend(self.backend)
        return self


def hierarchical_prediction_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    weights: Sequence[float],
    options: PredictionOptions,
) -> HierarchicalLoss:
    """All levels in one call of the operator; :func:`check_levels` has checked the arguments."""
    device = predictions[0].device
    weights = tuple(checks.as_float(weight) for weight in weights)
    if options.backend == "reference":
        with dispatch.without_autocast(device):
            predictions, targets, masks = (
                ops.saveable(list(tensors)) for tensors in (predictions, targets, masks)
            )
            return _reference(
                predictions=predictions,
                targets=targets,
                masks=masks,
                weights=weights,
                options=options,
            )
    reduction = options.reduction
    out: PredictionLossForward = ops.call(
        "prediction_loss",
        dispatch.choose_overload(options.backend, device),
        predictions=list(predictions),
        targets=list(targets),
        masks=_as_tensors(masks),
        weights=weights,
        loss_type=options.loss_type,
        normalization=options.target_norm or ("l2" if options.normalize_embeddings else "none"),
        threshold=options.threshold,
        eps=checks.as_float(options.eps),
        reduction=reduction,
    )
    levels = out.levels
    # Each level is a view of its own, because results of unbind() and split() cannot be changed in
    # place.
    if reduction != "none":
        of_levels = tuple(levels[k] for k in range(len(predictions)))
        return HierarchicalLoss(loss=out.loss, unweighted=out.unweighted, levels=of_levels)
    shaped = []
    first = 0
    for p in predictions:
        shaped.append(levels[first : first + p.numel()].view(p.shape))
        first += p.numel()
    return HierarchicalLoss(loss=out.loss, unweighted=out.unweighted, levels=tuple(shaped))


def _as_tensors(masks: Sequence[Tensor | None]) -> list[Tensor]:
    """The operator's masks: no list element at all, or an empty mask for a level without one."""
    given = [mask for mask in masks if mask is not None]
    return [given[0].new_empty(0) if mask is None else mask for mask in masks] if given else []


def _reference(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    weights: Sequence[float],
    options: PredictionOptions,
) -> HierarchicalLoss:
    """All levels by the formula in plain autograd, one after the other."""
    levels, means = [], []
    for prediction, target, mask in zip(predictions, targets, masks, strict=True):
        level = reference.prediction_loss(
            prediction,
            target,
            loss_type=options.loss_type,
            normalize_embeddings=options.normalize_embeddings,
            target_norm=options.target_norm,
            mask=mask,
            reduction=options.reduction,
            threshold=options.threshold,
            eps=checks.as_float(options.eps),
        )
        levels.append(level)
        if options.reduction != "none":
            means.append(level)
        elif mask is None:
            means.append(level.mean())
        else:
            means.append(level.sum() / (mask.sum() * level.shape[-1]).clamp(min=1))
    weighted = [weight * mean for weight, mean in zip(weights, means, strict=True)]
    return HierarchicalLoss(
        loss=torch.stack(weighted).sum(),
        unweighted=torch.stack(means).mean(),
        levels=tuple(levels),
    )


def check_levels(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    """Raise unless each level's prediction, target and mask match in shape, dtype and device.

    The three sequences are equally long.
    """
    for index, (prediction, target, mask) in enumerate(
        zip(predictions, targets, masks, strict=True)
    ):
        name = f"predictions[{index}]"
        checks.check_embeddings(name, prediction)
        checks.check_target((name, f"targets[{index}]"), prediction, target)
        if mask is not None:
            checks.check_rows_mask(f"masks[{index}]", mask, prediction)
        first = predictions[0]
        if prediction.device != first.device:
            raise ValueError(
                f"{name} must be on the device of predictions[0], {first.device}, got "
                f"{prediction.device}"
            )
        if (prediction.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                "predictions must be of fp64 at every level or at none, got "
                f"{first.dtype} at level 0 and {prediction.dtype} at level {index}"
            )
