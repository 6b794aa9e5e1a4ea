"""Losses that every rank computes for the rows of all ranks, where it needs those of its own rows.

    forward    the ranks gather the rows (n, D) of all ranks; each computes all n losses and returns
               its own
    backward   the ranks gather the upstream gradients (n,) of the losses; each computes the
               gradient of all rows and returns that of its own

Each rank does the work of the whole batch, and its memory grows with the rows of all ranks. No
gradient of a row travels, and the gradient of a rank's rows is the one that a single process
computes for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import reference
from cjepa_kernels.definitions import Reduction
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.gather import gather_rows
from cjepa_kernels.distributed.group import GlobalBatch


@dataclass(frozen=True)
class WholeBatch:
    """The exchanges around a loss of all rows.

    Attributes:
        ranks: The rows of all ranks; each holds at least one.
        group: The ranks.
        of: What the loss is, for an error.
    """

    ranks: GlobalBatch
    group: dist.ProcessGroup
    of: str

    def gather(self, own: Tensor) -> Tensor:
        """The rows (n, ...) of all ranks. A rank's rows get the gradient of its own copy alone.

        That is complete, because :meth:`own_losses` gives every rank the upstream gradients of all.
        """
        rows: Tensor = _GatherRows.apply(own, self)  # type: ignore[no-untyped-call]
        return rows

    def own_losses(self, losses: Tensor, *, views: int = 1) -> Tensor:
        """This rank's part of the losses of all rows.

        Args:
            losses: (views * n,), those of one view after the other.
            views: How many views each row stands for.
        """
        own: Tensor = _OwnLosses.apply(losses, self, views)  # type: ignore[no-untyped-call]
        return own

    def share(self, temperature: float | Tensor) -> float | Tensor:
        """The temperature, whose gradient is this rank's share of that of all losses.

        Each rank computes the same gradient of the temperature, and their sum must be that of all
        losses once.
        """
        if not isinstance(temperature, Tensor):
            return temperature
        value = temperature.detach()
        return value + (temperature - value) / self.ranks.ranks

    def own_rows(self, numbers: Tensor, *, views: int = 1) -> Tensor:
        """This rank's part of (views * n,) numbers, one view after the other, as a copy."""
        return numbers.view(views, -1)[:, self.ranks.own].flatten().clone()

    def reduce(self, losses: Tensor, reduction: Reduction, count: int | Tensor) -> Tensor:
        """The loss of this rank, whose mean over the ranks is the loss of the whole batch.

        Args:
            losses: Those of this rank.
            reduction: ``mean``, ``sum`` or ``none``.
            count: How many losses of all ranks the mean is over.
        """
        if reduction == "mean":
            return losses.sum() * self.ranks.ranks / count
        return reference.reduce(losses, reduction)


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks; the gradient is that of the own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: WholeBatch) -> Tensor:
        ctx.own = whole.ranks.own
        return gather_rows(own, whole.ranks.batches, Exchange(whole.group, of=whole.of))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own].clone(), None  # a view would hold the memory of all rows


class _OwnLosses(torch.autograd.Function):
    """The own losses; the gradient is the upstream gradient of the losses of all ranks."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, whole: WholeBatch, views: int) -> Tensor:
        ctx.whole, ctx.views = whole, views
        return whole.own_rows(losses, views=views)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        whole = ctx.whole
        exchange = Exchange(whole.group, backward=True, of=whole.of)
        of_rows = grad.reshape(ctx.views, -1).T  # (n_r, views)
        upstream = gather_rows(of_rows, whole.ranks.batches, exchange)
        return upstream.T.flatten(), None, None
