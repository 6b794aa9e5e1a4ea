"""The reference of a group: every rank gathers all pairs and holds the whole matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.group import GlobalBatch


class GatheredPairs(NamedTuple):
    """The pairs of all ranks, in the order of the ranks."""

    z_i: Tensor  # (B, D), B pairs over all ranks
    z_j: Tensor  # (B, D)
    own: slice  # this rank's pairs among them


def gather_pairs(
    z_i: Tensor, z_j: Tensor, batch: GlobalBatch, group: dist.ProcessGroup
) -> GatheredPairs:
    """Collect the pairs of all ranks; the gradient of every rank's use of them flows back.

    Args:
        z_i: (B_r, D) pairs of this rank.
        z_j: Same shape.
        batch: The pairs of all ranks.
        group: The ranks.
    """
    padded = z_i.new_zeros(2, max(batch.batches), z_i.shape[1])
    padded[0, : len(z_i)], padded[1, : len(z_j)] = z_i, z_j
    # (R, 2, max B, D)
    gathered: Tensor = _AllGather.apply(padded, group)  # type: ignore[no-untyped-call]
    both = [
        torch.cat([gathered[rank, view, :count] for rank, count in enumerate(batch.batches)])
        for view in (0, 1)
    ]
    return GatheredPairs(both[0], both[1], batch.own)


class _AllGather(torch.autograd.Function):
    """All-gather whose gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return Exchange(group).all_gather(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        exchange = Exchange(ctx.group, backward=True)
        exchange.all_reduce(total)
        return total[exchange.rank], None
