"""The accuracy of pairs of views with labels, for losses that do not look for the nearest rows."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.backends import Backend
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.operands import operand_rows
from cjepa_kernels.reference.rows import with_rounding

# The standard error of the share of 512 anchors, two for each sample, is at most 2.2 %.
SAMPLES = 256


@torch.no_grad()
def view_accuracy(
    z_i: Tensor,
    z_j: Tensor,
    labels: Tensor,
    *,
    use_cosine_similarity: bool,
    eps: float,
    backend: Backend,
) -> Tensor:
    """Share of anchors whose other view is nearer than every row of another label.

    The anchors are both views of at most ``SAMPLES`` samples, which are spread evenly over the
    batch. They are compared with all rows, in time and memory that grow with the batch. A negative
    that differs from the positive by the rounding of a product is a tie, and a tie is a miss. A
    row with a NaN or an infinity makes the accuracy 0.

    Args:
        z_i: (B, D) checked embeddings of the first view.
        z_j: (B, D) checked embeddings of the second view.
        labels: (B,) integers on the same device.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation.
        backend: A checked name.

    Returns:
        () fp32 (fp64 for fp64 inputs).
    """
    batch = len(z_i)
    rows = operand_rows(
        torch.cat(checks.promote(z_i, z_j)),
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        backend=backend,
    )  # (2B, D)
    chosen = torch.arange(min(batch, SAMPLES), device=rows.device)
    sample = chosen * batch // len(chosen)
    anchor = torch.cat([sample, sample + batch])  # (A,)
    other = torch.cat([sample + batch, sample])
    with dispatch.without_autocast(rows.device):
        similarity = rows[anchor] @ rows.T  # (A, 2B)
        positive = similarity.gather(1, other[:, None]).squeeze(1)
        same = labels[anchor % batch][:, None] == labels  # (A, B)
        of_views = similarity.view(-1, 2, batch)
        largest = of_views.masked_fill_(same[:, None], -torch.inf).amax(dim=(1, 2))
        hits = (positive > with_rounding(largest, rows.shape[1])) & rows.isfinite().all()
        return hits.to(rows.dtype).mean()
