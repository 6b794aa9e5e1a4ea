"""Ground truth: every formula of the package in plain PyTorch autograd.

Written to be read and compared with, not to be fast: NT-Xent here holds several M x M matrices.
Every back end is tested against these functions in float64. They support double backward.

Letters: B pairs, M = 2B rows, D features, a an anchor (one row), pos(a) its positive; in a
rectangle of similarities M rows and N columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import (
    EPS,
    FLOATING,
    LARGEST,
    LAYER_EPS,
    REDUCTIONS,
    SMALLEST,
    TEMPERATURE,
    CrossLogSumExp,
    NTXentTerms,
    PredictionLossType,
    Reduction,
    TargetNorm,
    accumulation_dtype,
)

__all__ = [
    "FLOATING",
    "LARGEST",
    "LAYER_EPS",
    "REDUCTIONS",
    "SMALLEST",
    "CrossLogSumExp",
    "NTXentTerms",
    "PredictionLossType",
    "Reduction",
    "accumulation_dtype",
    "cross_logsumexp",
    "embed_rows",
    "normalize_rows",
    "nt_xent",
    "nt_xent_logits",
    "positive_temperature",
    "prediction_loss",
    "reduce",
    "scale_of_rows",
]


def normalize_rows(z: Tensor, eps: float) -> Tensor:
    """Divide rows by max(norm, eps); a row with norm <= eps is a constant (zero gradient).

    Args:
        z: (..., D) floating point.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        (..., D) in fp32 (fp64 for fp64): unit rows, so their products are cosines.
    """
    z = z.to(accumulation_dtype(z.dtype))
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    regular = norm > eps
    # The inner where keeps 0 / 0 out of the branch that is not taken: its gradient would be NaN.
    return torch.where(regular, z / torch.where(regular, norm, 1.0), z.detach() / eps)


def scale_of_rows(z: Tensor) -> Tensor:
    """A power of two for each row, by which it may be multiplied before its elements are squared.

    1 up to 2^50. Larger rows become of size 2^40: far enough from the squares' overflow, and so
    large that the epsilon of a LayerNorm adds as little as without the scale.

    Args:
        z: (..., D) in fp32 or fp64.

    Returns:
        (..., 1) like z, detached.
    """
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    large = (largest > 2.0**50) & largest.isfinite()
    exponent = torch.frexp(largest.where(large, 2.0**39)).exponent
    return torch.ldexp(torch.ones_like(largest), (40 - exponent).to(z.dtype))


def embed_rows(z: Tensor, use_cosine_similarity: bool, eps: float) -> Tensor:
    """The M rows whose inner products are the similarities s.

    In dot-product mode an infinity becomes NaN, as dividing by the norm makes it in cosine mode.

    Returns:
        (M, D) in fp32 (fp64 for fp64).
    """
    if use_cosine_similarity:
        return normalize_rows(z, eps)
    z = z.to(accumulation_dtype(z.dtype))
    return z + (z - z).detach()


def positive_temperature(temperature: float | Tensor) -> float | Tensor:
    """NaN in place of a tensor temperature out of range, without reading it on the host."""
    if isinstance(temperature, Tensor):
        valid = (temperature >= SMALLEST) & (temperature <= LARGEST)
        return torch.where(valid, temperature, float("nan"))
    return temperature


def excluded_pairs(batch: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(M, M) bool: the pairs that are not negatives (self, positive, masked pairs of samples)."""
    sample = torch.arange(2 * batch, device=device) % batch
    excluded = sample[:, None] == sample[None, :]  # self and positive: the same sample
    if mask is not None:
        excluded = excluded | (mask | mask.T).repeat(2, 2)
    return excluded


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    mask: Tensor | None = None,
) -> NTXentTerms:
    """NT-Xent per anchor, with the positive kept out of the sum.

    loss_a = LSE_a - l_pos = softplus(LSE-_a - l_pos), where LSE- runs over the negatives only.
    The textbook form subtracts two nearly equal numbers once the positive dominates; this one
    has nothing to cancel, in the loss or in the gradient (docs/definitions.md).

    Args:
        z_i: (B, D) embeddings of the first view.
        z_j: (B, D) embeddings of the second view, row k being the positive of ``z_i[k]``.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.
        mask: (B, B) bool, True takes the pair of samples out of the negatives, both ways.

    Returns:
        NTXentTerms; ``lse`` includes the positive and is detached, like the metrics. An embedding
        that holds a NaN or an infinity makes the accuracy 0.

    Source: SimCLR, arXiv 2002.05709, equation 1; decoupled sum as in DCL, arXiv 2110.06848.
    """
    batch, rows = z_i.shape[0], 2 * z_i.shape[0]
    z = embed_rows(torch.cat([z_i, z_j]), use_cosine_similarity, eps)  # (M, D)
    tau = positive_temperature(temperature)
    similarity = z @ z.T  # (M, M)
    anchor = torch.arange(rows, device=z.device)
    positive = similarity[anchor, (anchor + batch) % rows]  # (M,)
    excluded = excluded_pairs(batch, mask, z.device)
    has_negatives = ~excluded.all(dim=1)  # (M,)

    # A row without negatives would be a log-sum-exp over nothing: finite filler, replaced below.
    ignored = excluded & has_negatives[:, None]
    lse_neg = torch.logsumexp((similarity / tau).masked_fill(ignored, -torch.inf), dim=1)
    lse_neg = torch.where(has_negatives, lse_neg, -torch.inf)
    positive_logit = positive / tau
    loss = -F.logsigmoid(positive_logit - lse_neg)

    with torch.no_grad():
        hardest = similarity.masked_fill(excluded, -torch.inf).amax(dim=1)
        kept = (~excluded).sum()
        return NTXentTerms(
            loss=loss,
            accuracy=((positive > hardest) & z.isfinite().all()).to(z.dtype).mean(),
            positive_similarity=positive.mean(),
            negative_similarity=similarity.masked_fill(excluded, 0.0).sum() / kept,
            lse=torch.logaddexp(lse_neg, positive_logit),
        )


def nt_xent_logits(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits with the positive in column 0, for inspection.

    Columns 1..B are the anchor's own view, B+1..2B the other view; -inf marks what is no negative.

    Returns:
        (2B, 2B + 1), divided by the temperature, detached.
    """
    with torch.no_grad():
        batch = z_i.shape[0]
        z = embed_rows(torch.cat([z_i, z_j]), use_cosine_similarity, eps)
        logits = (z @ z.T) / positive_temperature(temperature)
        anchor = torch.arange(2 * batch, device=z.device)
        positive = logits[anchor, (anchor + batch) % (2 * batch)]
        negatives = logits.masked_fill(excluded_pairs(batch, mask, z.device), -torch.inf)
        own_view_first = torch.cat([negatives[:batch], negatives[batch:].roll(batch, dims=1)])
        return torch.cat([positive[:, None], own_view_first], dim=1)


def cross_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
) -> CrossLogSumExp:
    """Log-sum-exp of every row and of every column of S / tau, S the similarities of x and y.

    Args:
        x: (M, D), one row of S each.
        y: (N, D), one column of S each.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        CrossLogSumExp; the maxima are detached.

    Source: InfoNCE, arXiv 1807.03748, equation 4 (the denominator).
    """
    rows, columns = (embed_rows(z, use_cosine_similarity, eps) for z in (x, y))
    similarity = rows @ columns.T  # (M, N)
    logits = similarity / positive_temperature(temperature)
    return CrossLogSumExp(
        row_lse=torch.logsumexp(logits, dim=1),
        column_lse=torch.logsumexp(logits, dim=0),
        row_max=similarity.detach().amax(dim=1),
        column_max=similarity.detach().amax(dim=0),
    )


def reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    """Apply ``mean``, ``sum`` or ``none`` to per-element losses."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def prediction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    loss_type: PredictionLossType = "smoothl1",
    normalize_embeddings: bool = True,
    target_norm: TargetNorm | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    threshold: float = 1.0,
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
        mask: Shape of ``prediction`` without D, bool, True keeps the row; ``mean`` divides by
            the number of kept elements (rows x D), and is 0 when nothing is kept.
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
        # First of all: a NaN in a dropped row must reach neither the loss nor the gradient. A row
        # of zeros stays one under both normalisations, so its elements add nothing.
        kept = mask[..., None]
        prediction, target = prediction.where(kept, 0.0), target.where(kept, 0.0)
    if target_norm == "layer":
        target = F.layer_norm(target * scale_of_rows(target), target.shape[-1:], eps=LAYER_EPS)
    elif normalize_embeddings:
        prediction, target = normalize_rows(prediction, eps), normalize_rows(target, eps)
    if mask is None:
        return _elementwise(prediction, target, loss_type, reduction, threshold)
    loss = _elementwise(prediction, target, loss_type, "none", threshold)
    if reduction == "mean":
        return loss.sum() / (mask.sum() * prediction.shape[-1]).clamp(min=1)
    return reduce(loss, reduction)


def _elementwise(
    prediction: Tensor,
    target: Tensor,
    loss_type: PredictionLossType,
    reduction: str,
    threshold: float,
) -> Tensor:
    if loss_type == "mse":
        return F.mse_loss(prediction, target, reduction=reduction)
    if loss_type == "huber":
        return F.huber_loss(prediction, target, reduction=reduction, delta=threshold)
    return F.smooth_l1_loss(prediction, target, reduction=reduction, beta=threshold)
