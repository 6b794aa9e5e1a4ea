"""The prediction loss of a JEPA as functions: one level, or a hierarchy of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import (
    EPS,
    HUBER_DELTA,
    LOSS_TYPES,
    SMOOTHL1_BETA,
    HierarchicalLoss,
    PredictionLossType,
    Reduction,
    TargetNorm,
)
from cjepa_kernels.functional import (
    as_float,
    check_bool,
    check_floating_tensor,
    check_in_range,
    check_reduction,
    choose_overload,
    without_autocast,
)


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
        return as_float(self.huber_delta if self.loss_type == "huber" else self.smoothl1_beta)

    def check(self) -> PredictionOptions:
        """Raise unless every option is one that the prediction loss knows."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {list(LOSS_TYPES)}, got {self.loss_type!r}")
        if self.target_norm not in ("layer", None):
            raise ValueError(f"target_norm must be 'layer' or None, got {self.target_norm!r}")
        check_bool("normalize_embeddings", self.normalize_embeddings)
        check_reduction(self.reduction)
        for name in ("smoothl1_beta", "huber_delta", "eps"):
            check_in_range(name, getattr(self, name))
        check_backend(self.backend)
        return self


def prediction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    loss_type: PredictionLossType = "smoothl1",
    normalize_embeddings: bool = True,
    target_norm: TargetNorm | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    smoothl1_beta: float = SMOOTHL1_BETA,
    huber_delta: float = HUBER_DELTA,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """Loss between predicted and target embeddings, rows normalised on the way.

    One pass over both forward and one backward; nothing of their size is kept but the gradient.

    Args:
        prediction: (B, N, D) or (B, D), fp64, fp32, bf16 or fp16, any strides.
        target: Same shape and device, any of these dtypes; it gets a gradient if it asks for one
            (detach it where the target encoder must not learn).
        loss_type: ``smoothl1``, ``mse`` or ``huber``.
        normalize_embeddings: L2-normalise the rows of both sides first.
        target_norm: ``"layer"`` is I-JEPA's recipe: parameter-free LayerNorm of the targets,
            predictions as they are; it overrides ``normalize_embeddings``.
        mask: (B, N) or (B,) bool, True keeps the row; ``mean`` divides by the number of kept
            elements (rows x D), and is 0 when nothing is kept.
        reduction: ``mean``, ``sum`` or ``none``.
        smoothl1_beta: Where ``smoothl1`` turns linear.
        huber_delta: Where ``huber`` turns linear.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        () for ``mean`` and ``sum``, the input's shape for ``none``; fp32 (fp64 for fp64).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: I-JEPA, arXiv 2301.08243, section 3.

    Example:
        >>> prediction, target = torch.ones(2, 4, 8), torch.zeros(2, 4, 8)
        >>> prediction_loss(prediction, target, normalize_embeddings=False).item()
        0.5
    """
    options = PredictionOptions(
        loss_type,
        normalize_embeddings,
        target_norm,
        reduction,
        smoothl1_beta,
        huber_delta,
        eps,
        backend,
    ).check()
    _check_side("prediction", prediction)
    _check_pair(("prediction", "target"), prediction, target)
    if mask is not None:
        _check_mask("mask", mask, prediction)
    return hierarchical_prediction_loss([prediction], [target], [mask], [1.0], options).levels[0]


def hierarchical_prediction_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    weights: Sequence[float],
    options: PredictionOptions,
) -> HierarchicalLoss:
    """All levels in one call of the operator; arguments are checked (:func:`check_levels`)."""
    device = predictions[0].device
    weights = tuple(as_float(weight) for weight in weights)
    if options.backend == "reference":
        with without_autocast(device):
            predictions, targets, masks = (
                ops.saveable(list(tensors)) for tensors in (predictions, targets, masks)
            )
            return _reference(predictions, targets, masks, weights, options)
    reduction = options.reduction
    loss, unweighted, levels, _, _ = ops.call(
        "prediction_loss",
        choose_overload(options.backend, device),
        list(predictions),
        list(targets),
        _as_tensors(masks),
        weights,
        options.loss_type,
        options.target_norm or ("l2" if options.normalize_embeddings else "none"),
        options.threshold,
        as_float(options.eps),
        reduction,
    )
    # Single views: results of unbind() and split() cannot be changed in place.
    if reduction != "none":
        return HierarchicalLoss(loss, unweighted, tuple(levels[k] for k in range(len(predictions))))
    shaped = []
    first = 0
    for p in predictions:
        shaped.append(levels[first : first + p.numel()].view(p.shape))
        first += p.numel()
    return HierarchicalLoss(loss, unweighted, tuple(shaped))


def _as_tensors(masks: Sequence[Tensor | None]) -> list[Tensor]:
    """As the operator takes them: none at all, or an empty one where a level has none."""
    given = [mask for mask in masks if mask is not None]
    return [given[0].new_empty(0) if mask is None else mask for mask in masks] if given else []


def _reference(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    weights: Sequence[float],
    options: PredictionOptions,
) -> HierarchicalLoss:
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
            eps=as_float(options.eps),
        )
        levels.append(level)
        if options.reduction != "none":
            means.append(level)
        elif mask is None:
            means.append(level.mean())
        else:
            means.append(level.sum() / (mask.sum() * level.shape[-1]).clamp(min=1))
    weighted = [weight * mean for weight, mean in zip(weights, means, strict=True)]
    return HierarchicalLoss(torch.stack(weighted).sum(), torch.stack(means).mean(), tuple(levels))


def check_levels(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    """Raise unless all levels are of matching shapes, dtypes and devices; they are as many."""
    for index, (prediction, target, mask) in enumerate(
        zip(predictions, targets, masks, strict=True)
    ):
        name = f"predictions[{index}]"
        _check_side(name, prediction)
        _check_pair((name, f"targets[{index}]"), prediction, target)
        if mask is not None:
            _check_mask(f"masks[{index}]", mask, prediction)
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


def _check_side(name: str, x: object) -> None:
    check_floating_tensor(name, x)
    if isinstance(x, Tensor) and (x.ndim not in (2, 3) or 0 in x.shape):
        raise ValueError(f"{name} must be (B, N, D) or (B, D) and not empty, got {tuple(x.shape)}")


def _check_pair(names: tuple[str, str], prediction: Tensor, target: Tensor) -> None:
    check_floating_tensor(names[1], target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {tuple(prediction.shape)} "
            f"and {tuple(target.shape)}"
        )
    if prediction.device != target.device:
        raise ValueError(
            f"{names[0]} and {names[1]} must be on the same device, got {prediction.device} and "
            f"{target.device}"
        )


def _check_mask(name: str, mask: Tensor, prediction: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    if mask.device != prediction.device:
        raise ValueError(
            f"{name} must be on the device of the predictions, {prediction.device}, got "
            f"{mask.device}"
        )
    if mask.shape != prediction.shape[:-1]:
        raise ValueError(
            f"{name} must be {tuple(prediction.shape[:-1])}, one entry a patch, got "
            f"{tuple(mask.shape)}"
        )
