"""Log-sum-exp of both sides of a rectangle in plain PyTorch autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import EPS, TEMPERATURE, CrossLogSumExp, PairedLogSumExp
from cjepa_kernels.reference.rows import (
    embed_rows,
    logsumexp_without,
    mark_unknown,
    positive_temperature,
)


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


def paired_logsumexp(
    x: Tensor,
    y: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
) -> PairedLogSumExp:
    """Log-sum-exp of every row and of every column of S / tau, without the rows' positives.

    Args:
        x: (M, D), one row of S each.
        y: (N, D), one column of S each.
        positives: (M,) int64, the column of each row's positive, or -1 for a row without one. The
            similarity of another number is NaN.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        PairedLogSumExp; the maxima and the mean are detached. ``positive`` is 0 without one.

    Source: InfoNCE, arXiv 1807.03748, equation 4; decoupled sum as in DCL, arXiv 2110.06848.
    """
    rows, columns = (embed_rows(z, use_cosine_similarity, eps) for z in (x, y))
    similarity = rows @ columns.T  # (M, N)
    logits = similarity / positive_temperature(temperature)
    of_positive = positives[:, None] == torch.arange(len(y), device=y.device)  # (M, N)
    detached = similarity.detach()
    largest = detached.masked_fill(of_positive, -torch.inf)
    return PairedLogSumExp(
        row_lse=logsumexp_without(logits, of_positive, dim=1),
        column_lse=logsumexp_without(logits, of_positive, dim=0),
        row_max=largest.amax(dim=1),
        column_max=largest.amax(dim=0),
        positive=mark_unknown(
            similarity.where(of_positive, 0.0).sum(dim=1), positives, columns=len(y)
        ),
        mean_similarity=detached.mean(),
    )
