"""NT-Xent in plain PyTorch autograd, with several M x M matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import EPS, TEMPERATURE, NTXentTerms
from cjepa_kernels.reference.rows import embed_rows, positive_temperature


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
    decoupled: bool = False,
) -> NTXentTerms:
    """NT-Xent per anchor, with the positive left out of the sum.

    loss_a = LSE_a - l_pos = softplus(LSE-_a - l_pos), where LSE- runs over the negatives only.
    The textbook form subtracts two nearly equal numbers once the positive dominates; this one
    has nothing to cancel, in the loss or in the gradient (docs/definitions.md).

    Args:
        z_i: (B, D) embeddings of the first view.
        z_j: (B, D) embeddings of the second view, row k being the positive of ``z_i[k]``.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.
        mask: (B, B) bool, True takes the pair of samples out of the negatives in both directions.
        decoupled: Leave the positive out of the sum altogether: loss_a = LSE-_a - l_pos.

    Returns:
        NTXentTerms; ``lse`` includes the positive and is detached, like the metrics. An embedding
        that holds a NaN or an infinity makes the accuracy 0.

    Source: SimCLR, arXiv 2002.05709, equation 1; decoupled sum as in DCL, arXiv 2110.06848,
    equation 6.
    """
    batch, rows = z_i.shape[0], 2 * z_i.shape[0]
    z = embed_rows(torch.cat([z_i, z_j]), use_cosine_similarity, eps)  # (M, D)
    tau = positive_temperature(temperature)
    similarity = z @ z.T  # (M, M)
    anchor = torch.arange(rows, device=z.device)
    positive = similarity[anchor, (anchor + batch) % rows]  # (M,)
    excluded = excluded_pairs(batch, mask, z.device)
    has_negatives = ~excluded.all(dim=1)  # (M,)

    # A row without negatives would be a log-sum-exp over nothing. Its entries stay finite here, and
    # the result is replaced below.
    ignored = excluded & has_negatives[:, None]
    lse_neg = torch.logsumexp((similarity / tau).masked_fill(ignored, -torch.inf), dim=1)
    lse_neg = torch.where(has_negatives, lse_neg, -torch.inf)
    positive_logit = positive / tau
    loss = lse_neg - positive_logit if decoupled else -F.logsigmoid(positive_logit - lse_neg)

    with torch.no_grad():
        largest_negative = similarity.masked_fill(excluded, -torch.inf).amax(dim=1)
        negatives = (~excluded).sum()
        return NTXentTerms(
            loss=loss,
            accuracy=((positive > largest_negative) & z.isfinite().all()).to(z.dtype).mean(),
            positive_similarity=positive.mean(),
            negative_similarity=similarity.masked_fill(excluded, 0.0).sum() / negatives,
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

    Columns 1 to B hold the anchor's own view and columns B+1 to 2B the other view. An entry that is
    not a negative is -inf.

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
