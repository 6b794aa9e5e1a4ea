"""Plain PyTorch for comparison: textbook NT-Xent in the input's dtype, and metrics by loops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def textbook_nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    use_cosine_similarity: bool = True,
    mask: Tensor | None = None,
    decoupled: bool = False,
) -> Tensor:
    """The (2B,) losses: normalise, multiply, mask the diagonal and take the cross-entropy.

    The decoupled loss takes the positive out of the sum as well.
    """
    z = torch.cat([z_i, z_j])
    batch = len(z_i)
    if use_cosine_similarity:
        z = F.normalize(z, dim=1, eps=1e-8)
    logits = z @ z.T / temperature
    logits = logits.masked_fill(torch.eye(2 * batch, dtype=torch.bool), -torch.inf)
    if mask is not None:
        off_diagonal = (mask | mask.T) & ~torch.eye(batch, dtype=torch.bool)
        logits = logits.masked_fill(off_diagonal.repeat(2, 2), -torch.inf)
    labels = torch.arange(2 * batch).roll(batch)
    if decoupled:
        positive = logits.gather(1, labels[:, None])  # (2B, 1)
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return torch.logsumexp(others, dim=1) - positive.squeeze(1)
    return F.cross_entropy(logits, labels, reduction="none")


def brute_force_metrics(
    z_i: Tensor, z_j: Tensor, *, cosine: bool = True, mask: Tensor | None = None
) -> tuple[float, float, float]:
    """Accuracy, positive and negative similarity by plain loops over pairs, in float64."""
    z = torch.cat([z_i, z_j]).double()
    if cosine:
        z = z / z.norm(dim=1, keepdim=True).clamp(min=1e-8)
    batch, rows = len(z_i), 2 * len(z_i)
    hits, positives, negatives = 0, [], []
    for a in range(rows):
        positive = float(z[a] @ z[(a + batch) % rows])
        positives.append(positive)
        similarities = []
        for b in range(rows):
            m, n = a % batch, b % batch
            if m == n or (mask is not None and bool(mask[m, n] | mask[n, m])):
                continue
            similarities.append(float(z[a] @ z[b]))
        hits += all(positive > other for other in similarities)
        negatives += similarities
    negative = sum(negatives) / len(negatives) if negatives else float("nan")
    return hits / rows, sum(positives) / rows, negative


def textbook_info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    in_batch_negatives: bool = True,
    use_cosine_similarity: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The usual formula in the dtype of the inputs, with the whole matrix in memory."""
    keys = key if negatives is None else torch.cat([key, negatives])
    if use_cosine_similarity:
        query, keys = F.normalize(query, dim=1), F.normalize(keys, dim=1)
    labels = torch.arange(len(query)) if positives is None else positives
    if in_batch_negatives:
        logits = query @ keys.T / temperature
    else:  # as MoCo writes it
        positive = torch.einsum("nc,nc->n", query, keys[labels])
        of_queue = torch.einsum("nc,kc->nk", query, keys[len(key) :])
        logits = torch.cat([positive[:, None], of_queue], dim=1) / temperature
        labels = torch.zeros(len(query), dtype=torch.int64)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, labels, **options)
    if symmetric:
        back = logits.T[labels]  # (M, M): each positive against all queries
        losses = (losses + F.cross_entropy(back, torch.arange(len(query)), **options)) / 2
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
