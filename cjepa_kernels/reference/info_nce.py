"""InfoNCE in plain PyTorch autograd, with the M x N matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import EPS, INFO_NCE_TEMPERATURE, InfoNCEOutput, Reduction
from cjepa_kernels.reference.cross_logsumexp import paired_logsumexp
from cjepa_kernels.reference.rows import (
    embed_rows,
    positive_temperature,
    reduce,
    with_rounding,
)


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    positives: Tensor,
    temperature: float | Tensor = INFO_NCE_TEMPERATURE,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
) -> InfoNCEOutput:
    """InfoNCE with the positive left out of the sum.

    loss_a = LSE_a - l_p(a) = softplus(LSE-_a - l_p(a)), where LSE- runs over the other keys.

    Args:
        query: (M, D).
        key: (N, D).
        positives: (M,) int64, the key of each query. With ``symmetric`` no key is named twice.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        symmetric: The mean of this loss and of that of the named keys against all queries.
        label_smoothing: Share of the target that is spread over all keys (over all queries in the
            second direction).
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        InfoNCEOutput.

    Source: InfoNCE, arXiv 1807.03748, equation 4; both directions as in CLIP, arXiv 2103.00020;
    label smoothing, arXiv 1512.00567, section 7.
    """
    out = paired_logsumexp(
        query,
        key,
        positives,
        temperature=temperature,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
    )
    tau = positive_temperature(temperature)
    queries, keys = (embed_rows(z, use_cosine_similarity, eps) for z in (query, key))
    logit = out.positive / tau  # (M,)
    negatives = [out.row_lse]  # LSE- of each direction, (M,)
    hits = [out.positive > out.row_max]
    smooth = [queries @ keys.mean(dim=0)]  # (M,) mean similarity of each query
    if symmetric:
        column = positives.clamp(0, len(key) - 1)  # a number out of range has the similarity NaN
        negatives.append(out.column_lse[column])
        hits.append(out.positive > out.column_max[column])
        smooth.append(keys[column] @ queries.mean(dim=0))
    losses = [-F.logsigmoid(logit - lse) for lse in negatives]
    if label_smoothing > 0:
        # Without negatives the mean is the positive itself.
        above = [
            (out.positive - mean).masked_fill(lse == -torch.inf, 0.0)
            for mean, lse in zip(smooth, negatives, strict=True)
        ]
        losses = [loss + label_smoothing * x / tau for loss, x in zip(losses, above, strict=True)]
    loss = reduce(torch.stack(losses).mean(dim=0), reduction)
    with torch.no_grad():
        rows, columns = len(query), len(key)
        total = out.mean_similarity * rows * columns - out.positive.sum()
        finite = queries.isfinite().all() & keys.isfinite().all()
        return InfoNCEOutput(
            loss=loss,
            accuracy=(torch.stack(hits) & finite).to(logit.dtype).mean(),
            positive_similarity=out.positive.mean(),
            negative_similarity=total / (rows * columns - rows),
            lse=torch.logaddexp(out.row_lse, logit),
        )


def queue_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = INFO_NCE_TEMPERATURE,
    label_smoothing: float = 0.0,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
) -> InfoNCEOutput:
    """InfoNCE whose negatives come from a queue alone: no key is a negative of another query.

    Args:
        query: (M, D).
        key: (M, D), each query's positive.
        negatives: (K, D), K >= 0.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        label_smoothing: Share of the target that is spread over a query's K + 1 candidates.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        InfoNCEOutput.

    Source: MoCo, arXiv 1911.05722, equation 1.
    """
    tau = positive_temperature(temperature)
    queries, keys, others = (
        embed_rows(z, use_cosine_similarity, eps) for z in (query, key, negatives)
    )
    positive = (queries * keys).sum(dim=1)  # (M,)
    similarity = queries @ others.T  # (M, K)
    logit = positive / tau
    losses, lse = 0 * (logit + others.sum()), logit
    hits = torch.ones_like(positive, dtype=torch.bool)
    if len(negatives) > 0:
        lse_of_negatives = torch.logsumexp(similarity / tau, dim=1)
        losses = -F.logsigmoid(logit - lse_of_negatives)
        lse = torch.logaddexp(lse_of_negatives, logit)
        hits = positive > with_rounding(similarity.amax(dim=1), query.shape[1])
    if label_smoothing > 0:
        mean = torch.cat([positive[:, None], similarity], dim=1).mean(dim=1)
        losses = losses + label_smoothing * (positive - mean) / tau
    loss = reduce(losses, reduction)
    with torch.no_grad():
        finite = queries.isfinite().all() & keys.isfinite().all() & others.isfinite().all()
        return InfoNCEOutput(
            loss=loss,
            accuracy=(hits & finite).to(logit.dtype).mean(),
            positive_similarity=positive.mean(),
            negative_similarity=similarity.mean(),
            lse=lse.detach(),
        )
