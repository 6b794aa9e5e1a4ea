"""InfoNCE of a group of ranks: what the ranks exchange.

Rank r holds M_r queries and C_r columns, which are its keys and then its negatives. It gathers the
columns of all ranks and multiplies its own queries with them, so that no product is computed twice:

    row LSE-_a      of a query, over all columns: the own rectangle has all of them
    column LSE-_b   of a key, over the queries of all ranks: log sum_r exp(column LSE- of rank r)

The backward of the second line gives rank r the share exp(column LSE- of rank r - column LSE-) of
the upstream gradient. A key is the positive of queries of its own rank only, so only this rank has
an upstream gradient for it. The gradient of the columns is the sum over the ranks.

``info_nce_ring`` holds the other strategy, in which the columns visit one rank after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.definitions import FLOATING, REDUCTIONS, STRATEGIES, Reduction, Strategy
from cjepa_kernels.distributed import group as ranks_of_group
from cjepa_kernels.distributed.blocks import merge_rows, rows_of
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.gather import gather_rows
from cjepa_kernels.distributed.group import Setting, check_refusals, check_settings
from cjepa_kernels.reference.rows import positive_temperature, with_rounding

OF = "InfoNCE"  # for errors
SETTINGS = 15  # the number of settings that the ranks compare


@dataclass(frozen=True)
class GroupBatch:
    """The rows of all ranks, in the order of the ranks.

    Attributes:
        group: The ranks.
        rank: This rank.
        queries: M_r of each rank.
        columns: C_r of each rank.
    """

    group: dist.ProcessGroup
    rank: int
    queries: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """R, the number of ranks."""
        return len(self.queries)

    @property
    def own_columns(self) -> slice:
        """Where the columns of this rank are among those of all ranks."""
        first = sum(self.columns[: self.rank])
        return slice(first, first + self.columns[self.rank])

    @property
    def own_queries(self) -> slice:
        """Where the queries of this rank are among those of all ranks."""
        first = sum(self.queries[: self.rank])
        return slice(first, first + self.queries[self.rank])


def agree(
    query: Tensor, columns: int, settings: Sequence[Setting], group: dist.ProcessGroup
) -> GroupBatch:
    """Exchange the numbers of rows, and check that all ranks have the same options.

    Args:
        query: (M_r, D) queries of this rank.
        columns: C_r.
        settings: ``SETTINGS`` options, with the same names on every rank.
        group: The ranks.

    Raises:
        ValueError: On all ranks alike, if a rank refused its arguments or has another option.
    """
    if len(settings) != SETTINGS:
        raise RuntimeError(f"expected {SETTINGS} settings, got {len(settings)}")
    own = [len(query), columns, *(setting.encode() for setting in settings)]
    exchange = Exchange(group, of=OF)
    described = exchange.numbers(own, query.device)
    check_refusals([rows for rows, *_ in described])
    check_settings(settings, [codes for _, _, *codes in described])
    return GroupBatch(
        group=group,
        rank=exchange.rank,
        queries=tuple(rows for rows, *_ in described),
        columns=tuple(columns for _, columns, *_ in described),
    )


def settings(
    query: Tensor,
    *,
    temperature: float | Tensor,
    needs_gradient: Sequence[bool],
    product_dtype: torch.dtype | None,
    is_reference: bool,
    symmetric: bool,
    label_smoothing: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    strategy: Strategy,
) -> list[Setting]:
    """The arguments that must be the same on every rank.

    Args:
        query: (M_r, D) queries of this rank.
        temperature: A number, or a 0-dim tensor.
        needs_gradient: Whether query, key and temperature need a gradient.
        product_dtype: The dtype to which autocast rounds the operands of the product.
        is_reference: Whether the back end is the reference.
        symmetric: Both directions.
        label_smoothing: Share of the target that is spread.
        use_cosine_similarity: Cosine similarity, else the dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean``, ``sum`` or ``none``.
        strategy: ``auto``, ``all_gather`` or ``ring``.
    """
    yes_or_no = (False, True)
    number = 0.0  # on a device other than the CPU the host would wait for it
    if not isinstance(temperature, Tensor):
        number = temperature
    elif temperature.device.type == "cpu":
        number = temperature.item()
    of_query, of_key, of_temperature = needs_gradient
    return [
        Setting("the number of features", query.shape[1]),
        Setting("the dtype of query and key", query.dtype, FLOATING),
        Setting("autocast's dtype", product_dtype, (None, *FLOATING)),
        Setting("whether backend is the reference", is_reference, yes_or_no),
        Setting("requires_grad of query", of_query, yes_or_no),
        Setting("requires_grad of key or negatives", of_key, yes_or_no),
        Setting("requires_grad of temperature", of_temperature, yes_or_no),
        Setting("whether temperature is a tensor", isinstance(temperature, Tensor), yes_or_no),
        Setting("temperature", number),
        Setting("symmetric", symmetric, yes_or_no),
        Setting("label_smoothing", label_smoothing),
        Setting("use_cosine_similarity", use_cosine_similarity, yes_or_no),
        Setting("eps", eps),
        Setting("reduction", reduction, REDUCTIONS),
        Setting("strategy", strategy, STRATEGIES),
    ]


def refuse(device: torch.device, group: dist.ProcessGroup) -> None:
    """Tell the other ranks, which are in :func:`agree`, that this rank refuses its arguments."""
    ranks_of_group.refuse(device, group, settings=SETTINGS, of=OF)


class OwnColumns(NamedTuple):
    """Numbers of this rank's columns over the queries of all ranks, each (C_r,) fp32."""

    lse: Tensor  # with a gradient
    shift: Tensor
    log_sum: Tensor
    largest: Tensor  # largest similarity of a negative


def merge_columns(
    lse: Tensor,
    *,
    shift: Tensor,
    log_sum: Tensor,
    largest: Tensor,
    features: int,
    tau: float | Tensor,
    batch: GroupBatch,
) -> OwnColumns:
    """Log-sum-exps of the own columns over the queries of all ranks.

    Args:
        lse: (C,) of the columns of all ranks over the own queries, with a gradient.
        shift: (C,) with ``log_sum`` the parts of ``lse``.
        log_sum: (C,)
        largest: (C,) largest similarity of a negative.
        features: D.
        tau: Temperature.
        batch: The rows of all ranks.
    """
    if isinstance(tau, Tensor):
        tau = positive_temperature(tau.detach().double())
    parts = rows_of(shift, log_sum, largest)  # (C, 3)
    merged: tuple[Tensor, ...] = _MergeColumns.apply(lse, parts, features, tau, batch)  # type: ignore[no-untyped-call]
    return OwnColumns(*merged)


class _MergeColumns(torch.autograd.Function):
    """Numbers of the own columns, from those of all columns over the queries of each rank."""

    @staticmethod
    def forward(
        ctx: Any,
        lse: Tensor,
        parts: Tensor,
        features: int,
        tau: float | Tensor,
        batch: GroupBatch,
    ) -> tuple[Tensor, ...]:
        gathered = Exchange(batch.group, of=OF).all_gather(parts)  # (R, C, 3)
        # Ties with queries of other ranks come from products of another shape.
        gathered[..., 2] = with_rounding(gathered[..., 2].to(lse.dtype), features)
        gathered[batch.rank, :, 2] = parts[:, 2]
        merged = gathered[0]
        for part in gathered[1:]:
            merged = merge_rows(merged, part, tau)
        # A rank without negatives of a column has no share in it.
        share = ((parts[:, 0] - merged[:, 0]) / tau + parts[:, 1] - merged[:, 1]).exp()
        share = share.masked_fill(parts[:, 1] == -torch.inf, 0.0)
        ctx.save_for_backward(share.to(lse.dtype))
        ctx.batch = batch
        shift, log_sum, largest = (x.to(lse.dtype) for x in merged[batch.own_columns].unbind(1))
        ctx.mark_non_differentiable(shift, log_sum, largest)
        total = (merged[:, 0] / tau + merged[:, 1])[batch.own_columns].to(lse.dtype)
        return total, shift, log_sum, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (share,) = ctx.saved_tensors
        exchange = Exchange(ctx.batch.group, backward=True, of=OF)
        upstream = gather_rows(grad, ctx.batch.columns, exchange)  # (C,)
        return upstream * share, None, None, None, None


def sum_over_ranks(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the ranks, with a gradient: the sum of the ranks' upstreams."""
    total: Tensor = _SumOverRanks.apply(own, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone(memory_format=torch.contiguous_format)
        Exchange(group, of=OF).all_reduce(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        Exchange(ctx.group, backward=True, of=OF).all_reduce(total)
        return total, None
