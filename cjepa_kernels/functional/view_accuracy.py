"""The accuracy of pairs of views with labels, for losses that do not look for the nearest rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.backends import Backend
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.gather import gather_rows
from cjepa_kernels.distributed.group import GlobalBatch
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.operands import operand_rows
from cjepa_kernels.reference.rows import with_rounding

# The standard error of the share is at most 3.1 %, that of so many independent samples. The two
# anchors of a sample are not independent.
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
    group: dist.ProcessGroup | None = None,
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
        group: The ranks, whose samples are one batch. Every rank has to take part. They exchange
            the anchors, and each compares these with its own rows.

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
    if group is not None:
        of_group_eagerly = _of_group
        # Without the condition disable() would import the compiler, which takes as long as torch.
        if torch.compiler.is_compiling():
            of_group_eagerly = torch.compiler.disable(_of_group)  # type: ignore[no-untyped-call]
        return of_group_eagerly(rows, labels.to(torch.int64), group)
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


def _of_group(rows: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same of the samples of all ranks; rows (2 B_r, D) are operands of the product."""
    exchange, batch, device = Exchange(group, of="SupCon"), len(rows) // 2, rows.device
    counts = exchange.numbers([batch], device)
    ranks = GlobalBatch(exchange.rank, tuple(count for (count,) in counts))
    total = sum(ranks.batches)
    anchors = min(total, SAMPLES)
    # Of the samples of all ranks, in the order of the ranks.
    chosen = [k * total // anchors for k in range(anchors)]
    ends = [sum(ranks.batches[: rank + 1]) for rank in range(ranks.ranks)]
    shares = [
        sum(end - size <= sample < end for sample in chosen)
        for end, size in zip(ends, ranks.batches, strict=True)
    ]
    own = [sample - ranks.own.start for sample in chosen if sample in range(total)[ranks.own]]
    sample = torch.tensor(own, dtype=torch.int64, device=device)
    z_i, z_j, classes = (
        gather_rows(part, shares, exchange)
        for part in (rows[sample], rows[sample + batch], labels[sample])
    )
    with torch.autocast(device.type, enabled=False):
        similarity = torch.cat([z_i, z_j]) @ rows.T  # (A, 2 B_r)
        same = classes.repeat(2)[:, None] == labels  # (A, B_r)
        of_views = similarity.view(-1, 2, batch)
        largest = of_views.masked_fill_(same[:, None], -torch.inf).amax(dim=(1, 2))
        largest = largest.where(rows.isfinite().all(), torch.inf)
        largest = exchange.all_gather(largest).amax(dim=0)
        positive = (z_i * z_j).sum(dim=1).repeat(2)
        hits = positive > with_rounding(largest, rows.shape[1])
        return hits.to(rows.dtype).mean()
