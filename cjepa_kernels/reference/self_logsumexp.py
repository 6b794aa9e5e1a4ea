"""Log-sum-exp of each row against the other rows in plain PyTorch autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import EPS, TEMPERATURE, SelfLogSumExp
from cjepa_kernels.reference.rows import (
    embed_rows,
    logsumexp_without,
    mark_unknown,
    positive_temperature,
)


def self_logsumexp(
    z: Tensor,
    *,
    positives: Tensor | None = None,
    classes: Tensor | None = None,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
) -> SelfLogSumExp:
    """Log-sum-exp of every row of S / tau over the entries that count, S the similarities of z.

    An entry counts unless it is that of a row and itself, of a row and its positive, or of two
    rows of one class.

    Args:
        z: (M, D).
        positives: (M,) int64, the row that is each row's positive, or -1 for a row without one. Two
            rows are each other's positive or not at all. The similarity of another number is NaN.
        classes: (M,) int64, any numbers.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        SelfLogSumExp; ``largest`` is detached.

    Source: SimCLR, arXiv 2002.05709, equation 1; SupCon, arXiv 2004.11362, equation 2.
    """
    rows = embed_rows(z, use_cosine_similarity, eps)
    similarity = rows @ rows.T  # (M, M)
    number = torch.arange(len(z), device=z.device)
    excluded = number[:, None] == number
    of_positive = torch.zeros_like(excluded)
    if positives is not None:
        of_positive = positives[:, None] == number
        excluded = excluded | of_positive
    if classes is not None:
        excluded = excluded | (classes[:, None] == classes)
    positive = similarity.where(of_positive, 0.0).sum(dim=1)
    if positives is not None:
        positive = mark_unknown(positive, positives, columns=len(z))
    return SelfLogSumExp(
        lse=logsumexp_without(similarity / positive_temperature(temperature), excluded, dim=1),
        largest=similarity.detach().masked_fill(excluded, -torch.inf).amax(dim=1),
        positive=positive,
    )
