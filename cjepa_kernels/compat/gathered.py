"""Rows of all ranks of the default process group, for losses that need the rows themselves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.distributed.exchange import Exchange


def world_size() -> int:
    """Number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor, *, with_gradient: bool) -> Tensor:
    """The rows of all ranks, in the order of the ranks.

    Args:
        rows: (B, D), as many on every rank. The ranks compare their numbers first.
        with_gradient: Each rank's rows get the sum of the gradients that all ranks have for them.
            Every rank then has to take part in the backward pass.

    Returns:
        (R * B, D) with R ranks.

    Raises:
        ValueError: On all ranks alike, if they hold different numbers of rows.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("rows of all ranks need a default process group, got none")
    batches = Exchange(group, of="the loss").numbers([len(rows)], rows.device)
    if len(set(map(tuple, batches))) > 1:
        raise ValueError(
            "every rank must hold as many rows as the others, got "
            f"{[batch for (batch,) in batches]} rows of ranks 0 to {len(batches) - 1}"
        )
    rows = rows.contiguous()
    if with_gradient:
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(rows))  # type: ignore[no-untyped-call]
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.detach())
    return torch.cat(gathered)


def own_rows(rows: Tensor) -> Tensor:
    """(B,) int64, where the rows of this rank are among those that ``gather_rows`` returns."""
    first = dist.get_rank() * len(rows)
    return torch.arange(first, first + len(rows), device=rows.device)
