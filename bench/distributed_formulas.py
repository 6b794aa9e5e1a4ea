"""Lightly's NT-Xent of a group of ranks, in eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.bench.formulas import TEMPERATURE


class _GatherWithGrad(torch.autograd.Function):
    """Lightly's gather: the gradients of all ranks for all rows are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = torch.stack(grads)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def lightly_of_group(z_i: Tensor, z_j: Tensor) -> Tensor:
    """Lightly's ``NTXentLoss`` with ``gather_distributed=True``: the mean over the own anchors.

    Own rows against the gathered rows of all ranks, in four blocks of views; every rank holds as
    many pairs.
    """
    batch, rank = len(z_i), dist.get_rank()
    own = [F.normalize(z, dim=1) for z in (z_i, z_j)]
    everything = [torch.cat(_GatherWithGrad.apply(z)) for z in own]
    off_diagonal = torch.ones(batch, len(everything[0]), dtype=torch.bool)
    off_diagonal[:, rank * batch : (rank + 1) * batch].fill_diagonal_(False)
    logits = []
    for view in (0, 1):
        across = torch.einsum("bd,cd->bc", own[view], everything[1 - view]) / TEMPERATURE
        within = torch.einsum("bd,cd->bc", own[view], everything[view]) / TEMPERATURE
        logits.append(torch.cat([across, within[off_diagonal].view(batch, -1)], dim=1))
    labels = (torch.arange(batch) + rank * batch).repeat(2)
    return F.cross_entropy(torch.cat(logits), labels)
