"""How ranks share the blocks of S: by the ring or by the all-gather.

Both directions of both begin with the own rank's features and end with the results of its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cjepa_kernels.definitions import Strategy
from cjepa_kernels.distributed.blocks import Blocks, OwnBlock, merge_rows, rows_of
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.group import GlobalBatch
from cjepa_kernels.distributed.ring import Rectangle, Ring, circulate

# FLOPs in the time that one exchange takes, by type of device. "auto" takes the ring if the
# products that it saves take longer than its additional exchanges. The number for CPUs was measured
# with two gloo processes; the other one is an assumption.
FLOPS_PER_EXCHANGE = {"cpu": 2e8, "cuda": 1e10}
# "auto" also takes the ring if the features of all ranks would take more than this, because the
# all-gather holds about four copies of them at its peak.
GATHERED_BYTES = 2**28


def choose_strategy(strategy: Strategy, batch: GlobalBatch, z: Tensor) -> Strategy:
    """The ring or the all-gather: as asked for, or by size. The choice is the same on every rank.

    The all-gather takes 6 M_r M D FLOPs a rank and 2 exchanges, the ring 4 M_r M D and more
    exchanges, one after the other.
    """
    if strategy != "auto":
        return strategy
    ranks, features = batch.ranks, z.shape[1]
    if batch.rows * features * z.element_size() > GATHERED_BYTES:
        return "ring"
    saved = 2 * batch.rows**2 // ranks * features
    per_exchange = FLOPS_PER_EXCHANGE.get(z.device.type, FLOPS_PER_EXCHANGE["cuda"])
    return "ring" if saved > per_exchange * (exchanges_of_ring(ranks) - 2) else "all_gather"


def exchanges_of_ring(ranks: int) -> int:
    """Number of exchanges one after the other, in both directions together.

    There is one for each visitor, one for the results that the last of several visitors has
    collected, and one that sends the results back to their rank.
    """
    steps = ranks // 2
    return 2 * (steps + (steps > 1) + 1)


@dataclass
class Forward:
    """Results of a forward.

    Attributes:
        rows: (M_r, 3) as of ``rows_of``, over the negatives of all ranks.
        positive: (M_r,) similarity of each row and its positive.
        saved_for_backward: What the own block saves for the backward.
        others: Features for the backward: those of the first visitor, or of all other ranks.
    """

    rows: Tensor
    positive: Tensor
    saved_for_backward: Tensor
    others: Tensor


@dataclass
class Backward:
    """Arguments of a backward.

    Attributes:
        z_i, z_j: (B_r, D) features of this rank.
        upstream: (M_r,) gradients of the losses of the own rows.
        weights: (M_r, 3): g r, shift and log_sum of the own rows.
        positive, saved_for_backward, others: As the forward returned them.
    """

    z_i: Tensor
    z_j: Tensor
    upstream: Tensor
    weights: Tensor
    positive: Tensor
    saved_for_backward: Tensor
    others: Tensor

    def add_own_block(self, blocks: Blocks, grad: Tensor) -> Tensor:
        """Add the own block's gradient to ``grad`` (M_r, D); returns that of the temperature."""
        _, shift, log_sum = (weight.contiguous() for weight in self.weights.unbind(1))
        own = blocks.own_backward(
            self.upstream,
            self.z_i,
            self.z_j,
            shift=shift,
            log_sum=log_sum,
            positive=self.positive,
            saved_for_backward=self.saved_for_backward,
        )
        pairs = len(self.z_i)
        grad[:pairs] += own.grad_z_i
        grad[pairs:] += own.grad_z_j
        return own.grad_temperature


def ring_forward(
    z_i: Tensor, z_j: Tensor, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> Forward:
    """The forward by the ring: each rectangle serves the visitor's rows and the own ones."""
    ring, shard = Ring(batch), torch.cat([z_i, z_j])
    rows = shard.new_empty(0)
    own: OwnBlock | None = None
    visitors: list[Tensor] = []

    def first() -> None:
        nonlocal rows, own
        own = blocks.own(z_i, z_j)
        rows = rows_of(own.shift, own.log_sum, own.largest_negative)

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        of_own, of_visitor = blocks.rectangle(shard[rectangle.own], visitor[0])
        merge(rows[rectangle.own], of_own)
        visitors.append(visitor[0])
        del visitors[1:]
        return of_visitor

    def merge(before: Tensor, new: Tensor) -> None:
        before.copy_(merge_rows(before, new, blocks.tau))

    collected = circulate(
        ring=ring, exchange=exchange, own=[shard], visit=visit, merge=merge, first=first
    )
    if collected is not None:
        merge(rows[ring.collected(batch.rank)], collected)
    assert own is not None  # circulate() calls first()
    return Forward(
        rows=rows,
        positive=own.positive,
        saved_for_backward=own.saved_for_backward,
        others=visitors[0] if visitors else shard[:0],
    )


def ring_backward(
    state: Backward, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """(M_r, D) gradient of the own rows, and this rank's part of that of the temperature."""
    ring, shard = Ring(batch), torch.cat([state.z_i, state.z_j])
    grad = shard.new_zeros(shard.shape, dtype=blocks.wide)
    of_temperature: list[Tensor] = []

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        features, weights = visitor
        gradients = blocks.rectangle_backward(
            x=shard[rectangle.own],
            y=features,
            of_rows=state.weights[rectangle.own],
            of_columns=weights,
            of_y=True,
        )
        grad[rectangle.own] += gradients.grad_x
        of_temperature.append(gradients.grad_temperature)
        return gradients.grad_y

    def last() -> None:
        # The own block hides the longest exchange, the one that returns gradients to their rank.
        # The first visitor's features are here since the forward, so the first exchange is short.
        of_temperature.append(state.add_own_block(blocks, grad))

    collected = circulate(
        ring=ring,
        exchange=exchange,
        own=[shard, state.weights],
        visit=visit,
        merge=Tensor.add_,
        last=last,
        first_visitor=[state.others],
    )
    if collected is not None:
        grad[ring.collected(batch.rank)] += collected
    return grad, torch.stack(of_temperature).sum(dim=0)


def gather_forward(
    z_i: Tensor, z_j: Tensor, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> Forward:
    """The forward by the all-gather: the own rows against all others."""
    shard = torch.cat([z_i, z_j])
    gathering = _GatherOthers(shard, batch, exchange)
    own = blocks.own(z_i, z_j)
    rows, others = rows_of(own.shift, own.log_sum, own.largest_negative), gathering.finish()
    if len(others) > 0:
        rows = merge_rows(rows, blocks.rectangle(shard, others)[0], blocks.tau)
    return Forward(
        rows=rows,
        positive=own.positive,
        saved_for_backward=own.saved_for_backward,
        others=others,
    )


def gather_backward(
    state: Backward, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """Gradients of the own rows. With (g r, LSE-) of all rows here, no gradient has to travel."""
    shard = torch.cat([state.z_i, state.z_j])
    grad = shard.new_zeros(shard.shape, dtype=blocks.wide)
    gathering = _GatherOthers(state.weights, batch, exchange)
    of_temperature = state.add_own_block(blocks, grad)
    weights = gathering.finish()
    if len(weights) > 0:
        gradients = blocks.rectangle_backward(
            x=shard, y=state.others, of_rows=state.weights, of_columns=weights, of_y=False
        )
        grad += gradients.grad_x
        # The other half of this rectangle's part is added by the other ranks.
        of_temperature = of_temperature + gradients.grad_temperature / 2
    return grad, of_temperature


class _GatherOthers:
    """An all-gather that is under way, of tensors with a row for each row of a shard."""

    def __init__(self, own: Tensor, batch: GlobalBatch, exchange: Exchange) -> None:
        self.batch, self.exchange = batch, exchange
        longest = 2 * max(batch.batches)
        padded = own
        if len(own) < longest:
            padded = own.new_zeros(longest, *own.shape[1:])
            padded[: len(own)] = own
        self.everything, self.works = exchange.start_all_gather(padded)

    def finish(self) -> Tensor:
        """Rows of all other ranks, in the order of the ranks after this one."""
        self.exchange.finish(self.works)
        everything, self.everything, self.works = self.everything, self.everything[:0], []
        rank, ranks = self.batch.rank, self.batch.ranks
        others = [(rank + step) % ranks for step in range(1, ranks)]
        parts = [everything[other, : self.batch.rows_of(other)] for other in others]
        return torch.cat(parts) if parts else everything[0, :0]
