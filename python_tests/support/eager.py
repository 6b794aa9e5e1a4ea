"""Plain PyTorch for comparison: textbook NT-Xent in the input's dtype, and metrics by loops."""

from __future__ import annotations

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
) -> Tensor:
    """The (2B,) losses: normalise, multiply, mask the diagonal and take the cross-entropy."""
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
