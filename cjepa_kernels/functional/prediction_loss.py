"""The prediction loss of a JEPA as a function, for one level."""

from __future__ import annotations

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
from cjepa_kernels.functional import checks
from cjepa_kernels.functional.hierarchy import PredictionOptions, hierarchical_prediction_loss


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
    """Loss between predicted and target embeddings, whose rows it normalises.

    Each direction reads both sides once and allocates nothing of their size but the gradients.

    Args:
        prediction: (B, N, D) or (B, D), fp64, fp32, bf16 or fp16, any strides.
        target: Same shape and device, any of these dtypes; it gets a gradient if it asks for one
            (detach it where the target encoder must not learn).
        loss_type: ``smoothl1``, ``mse`` or ``huber``.
        normalize_embeddings: L2-normalise the rows of both sides first.
        target_norm: ``"layer"`` is I-JEPA's recipe: parameter-free LayerNorm of the targets,
            predictions as they are; it overrides ``normalize_embeddings``.
        mask: (B, N) or (B,) bool, True keeps the row. ``mean`` divides by the number of
            elements in these rows (rows x D), and is 0 if the mask keeps no row.
        reduction: ``mean``, ``sum`` or ``none``.
        smoothl1_beta: Where ``smoothl1`` turns linear. Default 1.0.
        huber_delta: Where ``huber`` turns linear. Default 1.0.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
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
        loss_type=loss_type,
        normalize_embeddings=normalize_embeddings,
        target_norm=target_norm,
        reduction=reduction,
        smoothl1_beta=smoothl1_beta,
        huber_delta=huber_delta,
        eps=eps,
        backend=backend,
    ).check()
    checks.check_embeddings("prediction", prediction)
    checks.check_target(("prediction", "target"), prediction, target)
    if mask is not None:
        checks.check_rows_mask("mask", mask, prediction)
    hierarchy = hierarchical_prediction_loss(
        predictions=[prediction], targets=[target], masks=[mask], weights=[1.0], options=options
    )
    return hierarchy.levels[0]
