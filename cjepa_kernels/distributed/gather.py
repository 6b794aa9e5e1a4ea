"""The rows of all ranks in the order of the ranks, where ranks may hold different numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.definitions import FLOATING, accumulation_dtype
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.group import Setting, agree


def gather_rows(own: Tensor, counts: Sequence[int], exchange: Exchange) -> Tensor:
    """Gather (n_r, ...) of every rank as (n, ...), without a gradient.

    Args:
        own: Rows of this rank, of the same dtype and the same further dimensions on all ranks.
        counts: n_r of each rank.
        exchange: Exchanges with the other ranks.
    """
    longest = max(counts)
    padded = own.detach()
    if len(own) < longest:
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own.detach()
    everything = exchange.all_gather(padded)  # (R, max n, ...)
    return torch.cat([everything[rank, :count] for rank, count in enumerate(counts)])


def gather_trained_rows(
    own: Tensor, counts: Sequence[int], group: dist.ProcessGroup, *, of: str
) -> Tensor:
    """Gather (n_r, D) of every rank as (n, D), in the accumulation dtype, with a gradient.

    The gradient of a rank's rows is the sum over the ranks of what each of them has for these rows.
    It is added up in the accumulation dtype. Every rank has to take part in the backward, if the
    rows require a gradient, which has to be so on all ranks or on none.

    Args:
        own: Rows of this rank.
        counts: n_r of each rank.
        group: The ranks.
        of: What the rows are for, for an error.
    """
    gathered: Tensor = _GatherTrainedRows.apply(own, tuple(counts), group, of)  # type: ignore[no-untyped-call]
    return gathered


class _GatherTrainedRows(torch.autograd.Function):
    """The rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, counts: tuple[int, ...], group: dist.ProcessGroup, of: str
    ) -> Tensor:
        ctx.counts, ctx.group, ctx.of, ctx.dtype = counts, group, of, own.dtype
        rows = gather_rows(own, counts, Exchange(group, of=of))
        return rows.to(accumulation_dtype(own.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        exchange = Exchange(ctx.group, backward=True, of=ctx.of)
        total = grad.clone(memory_format=torch.contiguous_format)
        exchange.all_reduce(total)
        first = sum(ctx.counts[: exchange.rank])
        own = total[first : first + ctx.counts[exchange.rank]]
        return own.to(ctx.dtype, copy=True), None, None, None


def gather_keys(own: Tensor, settings: Mapping[str, int], group: dist.ProcessGroup) -> Tensor:
    """Gather the keys of all ranks for their queues, without a gradient.

    Args:
        own: (N_r, D) keys of this rank in the queue's dtype.
        settings: Numbers that must be the same on every rank, by the names that an error shows.
        group: The ranks.

    Returns:
        (N, D) in the order of the ranks.

    Raises:
        ValueError: On all ranks alike, if a rank has no key, or another value of a setting.
        RuntimeError: A rank ended, or did not take part before the timeout.
    """
    everything = [Setting("the queue's dtype", own.dtype, FLOATING)]
    everything += [Setting(name, value) for name, value in settings.items()]
    of = "a queue"
    batch = agree(own, everything, group, row="key", of=of)
    return gather_rows(own, batch.batches, Exchange(group, of=of))
