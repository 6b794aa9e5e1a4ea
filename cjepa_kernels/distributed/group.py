"""Pairs of every rank on every rank: the all-gather that negatives across ranks need."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Strategy = Literal["auto", "all_gather"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class GatheredPairs(NamedTuple):
    """The pairs of all ranks, in the order of the ranks."""

    z_i: Tensor  # (B, D), B pairs over all ranks
    z_j: Tensor  # (B, D)
    own: slice  # this rank's pairs among them
    ranks: int


def resolve_group(distributed: bool | dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The process group of ``distributed=True`` (all ranks), of a group (itself), or None.

    Raises:
        TypeError: Neither a bool nor a process group.
        RuntimeError: ``True`` without an initialised ``torch.distributed``.
    """
    if isinstance(distributed, bool):
        if not distributed:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "distributed=True needs torch.distributed: call init_process_group first, or "
                "start the program with torchrun"
            )
        return dist.group.WORLD
    if not (dist.is_available() and isinstance(distributed, dist.ProcessGroup)):
        raise TypeError(
            f"distributed must be a bool or a process group, got {type(distributed).__name__}"
        )
    return distributed


def gather_pairs(z_i: Tensor, z_j: Tensor, group: dist.ProcessGroup) -> GatheredPairs:
    """Collect the pairs of all ranks; the gradient of every rank's use of them flows back.

    Every rank must call this, and every rank must run backward.

    Args:
        z_i: (B_r, D) pairs of this rank; ranks may hold different numbers of them.
        z_j: Same shape.
        group: The ranks.

    Returns:
        GatheredPairs.

    Raises:
        ValueError: On all ranks alike, if one of them has no pair, or if features or dtypes
            differ; the message names the rank.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    own = torch.tensor([*z_i.shape, _DTYPES.index(z_i.dtype)], device=z_i.device)
    described = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(described, own, group=group)
    batches, features, dtypes = torch.stack(described).T.tolist()
    for other in range(ranks):
        if batches[other] == 0:
            raise ValueError(f"every rank must hold at least one pair, rank {other} has none")
        if (features[other], dtypes[other]) != (features[0], dtypes[0]):
            raise ValueError(
                f"z_i and z_j must have the same D and dtype on every rank, rank 0 has "
                f"{features[0]} and {_DTYPES[dtypes[0]]}, rank {other} has {features[other]} and "
                f"{_DTYPES[dtypes[other]]}"
            )
    padded = z_i.new_zeros(2, max(batches), z_i.shape[1])
    padded[0, : len(z_i)], padded[1, : len(z_j)] = z_i, z_j
    # (R, 2, max B, D)
    gathered: Tensor = _AllGather.apply(padded, group)  # type: ignore[no-untyped-call]
    both = [
        torch.cat([gathered[other, view, : batches[other]] for other in range(ranks)])
        for view in (0, 1)
    ]
    start = sum(batches[:rank])
    return GatheredPairs(both[0], both[1], slice(start, start + batches[rank]), ranks)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None
