"""The hierarchical prediction term of JEPA."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import (
    EPS,
    HUBER_DELTA,
    SMOOTHL1_BETA,
    PredictionLossType,
    Reduction,
    TargetNorm,
)
from cjepa_kernels.functional.checks import as_float, check_bool, is_number
from cjepa_kernels.functional.hierarchy import (
    PredictionOptions,
    check_levels,
    hierarchical_prediction_loss,
)
from cjepa_kernels.modules.float_attribute import float_attribute
from cjepa_kernels.modules.loss_module import LossModule, LossResult

Levels = Tensor | Sequence[Tensor]


class HJEPALoss(LossModule):
    """Weighted sum over hierarchy levels of the loss between predictions and targets.

    Args:
        loss_type: ``smoothl1``, ``mse`` or ``huber``.
        hierarchy_weights: One weight for all levels, or one per level (finite, not negative).
        num_hierarchies: Number of levels.
        reduction: ``mean``, ``sum`` or ``none``, per level.
        normalize_embeddings: L2-normalise predictions and targets along D first.
        huber_delta: Where ``huber`` turns linear. Default 1.0.
        eps: Lower bound on the norm used for normalisation. Default 1e-8.
        detach_targets: Stop the gradient at the targets.
        target_norm: ``"layer"`` is I-JEPA's recipe, parameter-free LayerNorm of the targets with
            predictions as they are; it overrides ``normalize_embeddings``.
        smoothl1_beta: Where ``smoothl1`` turns linear. Default 1.0.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.
        return_dict: Return a dict. With False a call returns the loss alone, as most losses do, and
            the metrics of the last call are the attribute ``last_metrics``.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: I-JEPA, arXiv 2301.08243; hierarchy as in H-JEPA (github.com/jonwiggins/H-JEPA).

    Example:
        >>> import torch
        >>> loss_fn = HJEPALoss(hierarchy_weights=[1.0, 0.5], num_hierarchies=2)
        >>> levels = [torch.ones(2, 4, 8), torch.ones(2, 2, 8)]
        >>> loss_fn(levels, levels)["loss"].item()
        0.0
    """

    smoothl1_beta: float = float_attribute("smoothl1_beta")
    huber_delta: float = float_attribute("huber_delta")
    eps: float = float_attribute("eps")

    def __init__(
        self,
        loss_type: PredictionLossType = "smoothl1",
        hierarchy_weights: float | Sequence[float] = 1.0,
        num_hierarchies: int = 3,
        reduction: Reduction = "mean",
        normalize_embeddings: bool = True,
        huber_delta: float = HUBER_DELTA,
        eps: float = EPS,
        detach_targets: bool = True,
        *,
        target_norm: TargetNorm | None = None,
        smoothl1_beta: float = SMOOTHL1_BETA,
        backend: Backend = "auto",
        return_dict: bool = True,
    ) -> None:
        super().__init__(return_dict=return_dict)
        if isinstance(num_hierarchies, bool) or not isinstance(num_hierarchies, int):
            raise TypeError(f"num_hierarchies must be an int, got {num_hierarchies!r}")
        if num_hierarchies < 1:
            raise ValueError(f"num_hierarchies must be at least 1, got {num_hierarchies}")
        check_bool("detach_targets", detach_targets)
        self.loss_type: PredictionLossType = loss_type
        self.num_hierarchies = num_hierarchies
        self.hierarchy_weights = _per_level(hierarchy_weights, num_hierarchies)
        self.reduction = reduction
        self.normalize_embeddings = normalize_embeddings
        self.smoothl1_beta = smoothl1_beta
        self.huber_delta = huber_delta
        self.eps = eps
        self.detach_targets = detach_targets
        self.target_norm = target_norm
        self.backend = backend
        self._options().check()

    def _options(self) -> PredictionOptions:
        return PredictionOptions(
            loss_type=self.loss_type,
            normalize_embeddings=self.normalize_embeddings,
            target_norm=self.target_norm,
            reduction=self.reduction,
            smoothl1_beta=self.smoothl1_beta,
            huber_delta=self.huber_delta,
            eps=self.eps,
            backend=self.backend,
        )

    def forward(
        self,
        predictions: Levels,
        targets: Levels,
        masks: Levels | None = None,
        context_features: Tensor | None = None,
    ) -> LossResult:
        """Loss of every level and their weighted sum.

        Args:
            predictions: One (B, N_l, D) or (B, D) tensor per level; a single tensor counts as
                one level.
            targets: Same shapes.
            masks: Optional, one (B, N_l) or (B, N_l, 1) tensor per level; True, or 1, keeps the
                patch. Numbers other than 0 and 1 are refused. That check waits for the device, so
                bool masks are better on a GPU; a compiled graph asserts it on the device instead.
            context_features: Ignored; H-JEPA's trainer passes it to every loss.

        Returns:
            ``loss`` = sum of weight x level, ``loss_h0``, ``loss_h1``…, and ``loss_unweighted``,
            the mean of the levels. With ``reduction="none"`` the levels keep their shapes, and
            ``loss`` and ``loss_unweighted`` are taken from the levels' means. With
            ``return_dict=False`` the loss alone.
        """
        levels = _as_levels("predictions", predictions)
        target_levels = _as_levels("targets", targets)
        given_masks = [None] * len(levels) if masks is None else _as_levels("masks", masks)
        self._check_counts(levels, target_levels, given_masks)
        mask_levels = [
            _as_bool(f"masks[{level}]", mask, prediction)
            for level, (mask, prediction) in enumerate(zip(given_masks, levels, strict=True))
        ]
        check_levels(levels, target_levels, mask_levels)

        if self.detach_targets:
            target_levels = [target.detach() for target in target_levels]
        out = hierarchical_prediction_loss(
            predictions=levels,
            targets=target_levels,
            masks=mask_levels,
            weights=self.hierarchy_weights,
            options=self._options(),
        )
        parts = {f"loss_h{index}": level for index, level in enumerate(out.levels)}
        return self._result({**parts, "loss": out.loss, "loss_unweighted": out.unweighted})

    def _check_counts(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> None:
        for name, levels in (("predictions", predictions), ("targets", targets), ("masks", masks)):
            if len(levels) != self.num_hierarchies:
                raise ValueError(
                    f"{name} must have one tensor per level, num_hierarchies="
                    f"{self.num_hierarchies}, got {len(levels)}"
                )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(prefix + "_hierarchy_weights", None)  # a buffer in H-JEPA's checkpoints
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        normalization = (
            f"target_norm={self.target_norm}"
            if self.target_norm
            else f"normalize_embeddings={self.normalize_embeddings}"
        )
        return (
            f"loss_type={self.loss_type}, num_hierarchies={self.num_hierarchies}, "
            f"hierarchy_weights={self.hierarchy_weights}, {normalization}, "
            f"reduction={self.reduction}"
        )


def _as_levels(name: str, levels: Levels) -> list[Any]:
    if isinstance(levels, Tensor):
        return [levels]
    if not isinstance(levels, Sequence) or isinstance(levels, str):
        raise TypeError(
            f"{name} must be a tensor or a sequence of tensors, got {type(levels).__name__}"
        )
    return list(levels)


def _as_bool(name: str, mask: Any, prediction: Any) -> Any:
    """A (B, N_l) bool mask of one as H-JEPA takes them: of numbers, or with a last axis of 1."""
    if not isinstance(mask, Tensor):
        return mask  # None, or an error of check_levels for every other type
    if isinstance(prediction, Tensor) and mask.ndim == prediction.ndim and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    if mask.dtype == torch.bool or mask.is_meta:
        return mask.bool()
    fits = ((mask == 0) | (mask == 1)).all()
    message = f"{name} must hold 0 and 1 alone: it chooses patches and does not weigh them"
    if torch.compiler.is_compiling():
        torch._assert_async(fits, message)
    elif not fits:
        wrong = mask[(mask != 0) & (mask != 1)]
        raise ValueError(f"{message}, got {wrong[0].item()}")
    return mask != 0


def _per_level(weights: float | Sequence[float], levels: int) -> list[float]:
    if not isinstance(weights, (Real, Sequence)) or isinstance(weights, str):
        raise TypeError(f"hierarchy_weights must be a number or a sequence, got {weights!r}")
    values = [weights] * levels if isinstance(weights, Real) else list(weights)
    if len(values) != levels:
        raise ValueError(
            f"hierarchy_weights must have one weight per level, num_hierarchies={levels}, "
            f"got {len(values)}: {values}"
        )
    for value in values:
        if not is_number(value):
            raise TypeError(f"hierarchy_weights must be numbers, got {value!r}")
        if not 0 <= as_float(value) < float("inf"):
            raise ValueError(f"hierarchy_weights must be finite and not negative, got {values}")
    return [as_float(value) for value in values]
