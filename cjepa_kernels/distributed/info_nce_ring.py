"""InfoNCE of a group of ranks by the ring: the columns of a rank visit the queries of all others.

Rank r holds M_r queries and C_r columns. In step k = 1 ... R - 1 the columns of rank r - k visit
rank r, which multiplies its queries with them. Only the own columns hold positives of its queries.

    row LSE-_a      of a query: merged over the own columns and those of all visitors
    column LSE-_b   of a key: its parts follow it, one step behind, are merged and return at the end

In the backward the columns travel again, now with the upstream gradient and the LSE- of each
column, and their gradient follows them and returns. Rank r computes for its queries and a visitor

    dL/ds_ab = (1/tau) [ u_a exp(l_ab - LSE-_a) + v_b exp(l_ab - LSE-_b) ]

with u and v the upstream gradients of the rows' and of the columns' LSE-, both over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.definitions import CrossLogSumExpForward, Strategy
from cjepa_kernels.distributed.blocks import Blocks, Options, merge_rows, rows_of
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.info_nce import OF, GroupBatch
from cjepa_kernels.distributed.ring import Rectangle, circulate
from cjepa_kernels.distributed.strategies import GATHERED_BYTES
from cjepa_kernels.reference.rows import with_rounding


def choose_strategy(strategy: Strategy, batch: GroupBatch, key: Tensor) -> Strategy:
    """The ring or the all-gather: as asked for, or by size. The choice is the same on every rank.

    Both compute every product once, and the ring has more exchanges. So "auto" takes it only if
    the columns of all ranks would take too much memory.
    """
    if strategy != "auto":
        return strategy
    gathered = sum(batch.columns) * key.shape[1] * key.element_size()
    return "ring" if gathered > GATHERED_BYTES else "all_gather"


@dataclass(frozen=True)
class ColumnRing:
    """The schedule: the columns of every rank visit every other rank.

    Attributes:
        batch: The rows of all ranks.
    """

    batch: GroupBatch

    @property
    def steps(self) -> int:
        """Number of visitors that each rank receives."""
        return self.batch.ranks - 1

    def visitor(self, rank: int, step: int) -> int:
        """The rank whose columns visit ``rank`` in a step."""
        return (rank - step) % self.batch.ranks

    def rectangle(self, rank: int, step: int) -> Rectangle:
        """All queries of ``rank`` and all columns of its visitor."""
        return Rectangle(
            own=slice(0, self.batch.queries[rank]),
            visiting=self.collected(self.visitor(rank, step)),
        )

    def collected(self, rank: int) -> slice:
        """All columns of a rank."""
        return slice(0, self.batch.columns[rank])


def ring_logsumexp(
    query: Tensor,
    columns: Tensor,
    *,
    positives: Tensor,
    temperature: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    batch: GroupBatch,
) -> CrossLogSumExpForward:
    """Numbers of the own queries over all columns, and of the own columns over all queries.

    Args:
        query: (M_r, D) queries of this rank, in the accumulation dtype.
        columns: (C_r, D) columns of this rank, in the accumulation dtype.
        positives: (M_r,) int64, the own column that is the positive of each query.
        temperature: () in place of the options' number.
        options: The same on every rank.
        dtype: The dtype in which the columns travel; it holds them without rounding.
        batch: The rows of all ranks.

    Returns:
        As the operator ``cross_logsumexp`` with positives, without anything saved. ``row_lse``,
        ``column_lse`` and ``positive`` have a gradient. Every rank has to take part in the
        backward.
    """
    function: Any = _RingLogSumExp.apply
    return CrossLogSumExpForward(
        *function(query, columns, temperature, positives, options, dtype, batch)
    )


class Saved(NamedTuple):
    """Tensors that the forward saves for the backward."""

    query: Tensor  # (M_r, D)
    columns: Tensor  # (C_r, D), as they travel
    temperature: Tensor | None  # ()
    positives: Tensor  # (M_r,)
    of_rows: Tensor  # (M_r, 2): shift and log_sum of LSE- over the columns of all ranks
    of_columns: Tensor  # (C_r, 2): the same over the queries of all ranks


class _RingLogSumExp(torch.autograd.Function):
    """The operator ``cross_logsumexp`` on the queries and the columns of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        columns: Tensor,
        temperature: Tensor | None,
        positives: Tensor,
        options: Options,
        dtype: torch.dtype,
        batch: GroupBatch,
    ) -> tuple[Tensor, ...]:
        travelling = columns.to(dtype).contiguous()
        with torch.autocast(query.device.type, enabled=False):
            blocks = Blocks(options, temperature, query.dtype)
            out = _forward(query, travelling, positives, blocks, batch)
        saved = Saved(
            query=query,
            columns=travelling,
            temperature=temperature,
            positives=positives,
            of_rows=torch.stack([out.row_shift, out.row_log_sum], dim=1),
            of_columns=torch.stack([out.column_shift, out.column_log_sum], dim=1),
        )
        ctx.save_for_backward(*saved)
        ctx.options, ctx.batch = options, batch
        ctx.mark_non_differentiable(
            *(out.row_max, out.column_max, out.mean_similarity, out.saved_for_backward),
            *(out.row_shift, out.row_log_sum, out.column_shift, out.column_log_sum),
        )
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        saved, upstream = Saved(*ctx.saved_tensors), CrossLogSumExpForward(*upstreams)
        of_query, of_columns, of_temperature, *_ = ctx.needs_input_grad
        with torch.autocast(saved.query.device.type, enabled=False):
            gradients = _backward(
                saved,
                of_rows=torch.cat([upstream.row_lse[:, None], saved.of_rows], dim=1),
                of_columns=torch.cat([upstream.column_lse[:, None], saved.of_columns], dim=1),
                grad_positive=upstream.positive,
                of_query=of_query,
                of_own_columns=of_columns,
                blocks=Blocks(ctx.options, saved.temperature, saved.query.dtype),
                batch=ctx.batch,
            )
        grad_temperature: Tensor | None = None
        if of_temperature and saved.temperature is not None:
            grad_temperature = gradients.temperature.to(saved.temperature.dtype)
        return (
            gradients.query if of_query else None,
            gradients.columns if of_columns else None,
            grad_temperature,
            *(None, None, None, None),
        )


def _forward(
    query: Tensor, columns: Tensor, positives: Tensor, blocks: Blocks, batch: GroupBatch
) -> CrossLogSumExpForward:
    """The results of the operator. Nothing is saved."""
    exchange = Exchange(batch.group, of=OF)
    features = query.shape[1]
    none = torch.full_like(positives, -1)  # with positives the operator gives the mean similarity
    rows = of_columns = total = query.new_empty(0)
    own: CrossLogSumExpForward | None = None

    def first() -> None:
        nonlocal own, rows, of_columns, total
        own = blocks.paired_rectangle(query, columns, positives)
        rows = rows_of(own.row_shift, own.row_log_sum, own.row_max)
        of_columns = rows_of(own.column_shift, own.column_log_sum, own.column_max)
        total = own.mean_similarity.double() * (len(query) * len(columns))

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        nonlocal total
        out = blocks.paired_rectangle(query, visitor[0], none)
        # Ties with columns and queries of other ranks come from products of another shape.
        row_max, column_max = (with_rounding(x, features) for x in (out.row_max, out.column_max))
        merge(rows, rows_of(out.row_shift, out.row_log_sum, row_max))
        total = total + out.mean_similarity.double() * (len(query) * len(visitor[0]))
        return rows_of(out.column_shift, out.column_log_sum, column_max)

    def merge(before: Tensor, new: Tensor) -> None:
        before.copy_(merge_rows(before, new, blocks.tau))

    collected = circulate(
        ring=ColumnRing(batch),
        exchange=exchange,
        own=[columns],
        visit=visit,
        merge=merge,
        first=first,
    )
    if collected is not None:
        merge(of_columns, collected)
    assert own is not None  # circulate() calls first()
    (row_shift, row_log_sum, row_max), (column_shift, column_log_sum, column_max) = (
        numbers.unbind(dim=1) for numbers in (rows, of_columns)
    )
    out = CrossLogSumExpForward(
        row_lse=row_shift / blocks.tau + row_log_sum,
        column_lse=column_shift / blocks.tau + column_log_sum,
        row_max=row_max,
        column_max=column_max,
        row_shift=row_shift,
        row_log_sum=row_log_sum,
        column_shift=column_shift,
        column_log_sum=column_log_sum,
        positive=own.positive,
        mean_similarity=total / (len(query) * sum(batch.columns)),
        saved_for_backward=own.saved_for_backward,
    )
    return CrossLogSumExpForward(*(x.to(blocks.wide) for x in out))


class _Gradients(NamedTuple):
    """Gradients of the own rows, and this rank's part of that of the temperature."""

    query: Tensor  # (M_r, D)
    columns: Tensor  # (C_r, D)
    temperature: Tensor  # ()


def _backward(
    saved: Saved,
    *,
    of_rows: Tensor,
    of_columns: Tensor,
    grad_positive: Tensor,
    of_query: bool,
    of_own_columns: bool,
    blocks: Blocks,
    batch: GroupBatch,
) -> _Gradients:
    """The gradients of both sides that are asked for.

    Args:
        saved: What the forward saved.
        of_rows: (M_r, 3): the upstream gradient, shift and log_sum of each query's LSE-.
        of_columns: (C_r, 3): the same of each own column.
        grad_positive: (M_r,) upstream gradient of the similarities of the positives.
        of_query: Whether to compute the gradient of the queries.
        of_own_columns: Whether to compute the gradients of columns, which travel.
        blocks: The operators.
        batch: The rows of all ranks.
    """
    exchange = Exchange(batch.group, backward=True, of=OF)
    grad_query = torch.zeros_like(saved.query)
    grad_columns = saved.query.new_zeros(saved.columns.shape)
    of_temperature: list[Tensor] = []

    def gradients_of(columns: Tensor, numbers: Tensor, **of_positives: Tensor) -> Tensor:
        out = blocks.rectangle_backward(
            x=saved.query,
            y=columns,
            of_rows=of_rows,
            of_columns=numbers,
            of_x=of_query,
            of_y=of_own_columns,
            **of_positives,
        )
        if of_query:
            grad_query.add_(out.grad_x)
        of_temperature.append(out.grad_temperature)
        return out.grad_y

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        columns, numbers = visitor
        return gradients_of(columns, numbers)

    def last() -> None:
        # The own rectangle hides the exchange that returns gradients to their rank.
        own = gradients_of(
            saved.columns, of_columns, positives=saved.positives, grad_positive=grad_positive
        )
        if of_own_columns:
            grad_columns.add_(own)

    collected = circulate(
        ring=ColumnRing(batch),
        exchange=exchange,
        own=[saved.columns, of_columns],
        visit=visit,
        merge=Tensor.add_,
        last=last,
        collects=of_own_columns,
    )
    if collected is not None:
        grad_columns += collected
    return _Gradients(grad_query, grad_columns, torch.stack(of_temperature).sum(dim=0))
