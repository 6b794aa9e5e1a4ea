"""How ranks share the blocks of S: the ring, and the all-gather.

Both directions of both begin with the own rank's features and end with its own rows' results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cjepa_kernels.distributed.blocks import Blocks, Strategy, merge_rows, rows_of
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.group import GlobalBatch
from cjepa_kernels.distributed.ring import Rectangle, Ring, circulate

# "auto" takes the ring where the products that it saves take longer than the exchanges that it has
# more of: FLOPs in the time that one exchange takes, by type of device. On CPUs by measurement
# (two gloo processes), elsewhere by assumption.
FLOPS_PER_EXCHANGE = {"cpu": 2e8, "cuda": 1e10}
# And wherever the features of all ranks would take more than that; at its peak the all-gather holds
# about four copies of them.
GATHERED_BYTES = 2**28


def choose_strategy(strategy: Strategy, batch: GlobalBatch, z: Tensor) -> Strategy:
    """The ring or the all-gather, by size unless one is asked for; the same on every rank.

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
    """Exchanges one after the other, in both directions.

    One for each visitor, one more for what the last of several has collected, the way home.
    """
    steps = ranks // 2
    return 2 * (steps + (steps > 1) + 1)


@dataclass
class Forward:
    """What a forward leaves.

    Attributes:
        rows: (M_r, 3) as of ``rows_of``, over the negatives of all ranks.
        positive: (M_r,) similarity of each row and its positive.
        kept: What the own block keeps for the backward.
        others: Features for the backward: of the first visitor, or of all other ranks.
    """

    rows: Tensor
    positive: Tensor
    kept: Tensor
    others: Tensor


@dataclass
class Backward:
    """What a backward begins with.

    Attributes:
        z_i, z_j: (B_r, D) features of this rank.
        upstream: (M_r,) gradients of the losses of the own rows.
        weights: (M_r, 3): g r, shift and log_sum of the own rows.
        positive, kept, others: As the forward left them.
    """

    z_i: Tensor
    z_j: Tensor
    upstream: Tensor
    weights: Tensor
    positive: Tensor
    kept: Tensor
    others: Tensor

    def add_own_block(self, blocks: Blocks, grad: Tensor) -> Tensor:
        """Add what the own block gives to ``grad`` (M_r, D); its part of the temperature's."""
        shift, log_sum = (self.weights[:, column].contiguous() for column in (1, 2))
        of_i, of_j, of_temperature = blocks.own_backward(
            self.upstream, self.z_i, self.z_j, (shift, log_sum, self.positive, self.kept)
        )
        grad[: len(of_i)] += of_i
        grad[len(of_i) :] += of_j
        return of_temperature


def ring_forward(
    z_i: Tensor, z_j: Tensor, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> Forward:
    """Each visitor's rectangle serves its rows and the own ones."""
    ring, shard = Ring(batch), torch.cat([z_i, z_j])
    rows = positive = kept = shard.new_empty(0)
    visitors: list[Tensor] = []

    def first() -> None:
        nonlocal rows, positive, kept
        *_, hardest, shift, log_sum, positive, kept = blocks.own(z_i, z_j)
        rows = rows_of(shift, log_sum, hardest)

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        of_own, of_visitor = blocks.rectangle(shard[rectangle.own], visitor[0])
        merge(rows[rectangle.own], of_own)
        visitors.append(visitor[0])
        del visitors[1:]
        return of_visitor

    def merge(before: Tensor, new: Tensor) -> None:
        before.copy_(merge_rows(before, new, blocks.tau))

    home = circulate(ring, exchange, [shard], visit, merge, first=first)
    if home is not None:
        merge(rows[ring.collected(batch.rank)], home)
    return Forward(rows, positive, kept, visitors[0] if visitors else shard[:0])


def ring_backward(
    state: Backward, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """(M_r, D) gradient of the own rows, and this rank's part of that of the temperature."""
    ring, shard = Ring(batch), torch.cat([state.z_i, state.z_j])
    grad = shard.new_zeros(shard.shape, dtype=blocks.wide)
    of_temperature: list[Tensor] = []

    def visit(rectangle: Rectangle, visitor: Sequence[Tensor]) -> Tensor:
        features, weights = visitor
        of_own, of_visitor, along = blocks.rectangle_backward(
            shard[rectangle.own], features, state.weights[rectangle.own], weights, of_y=True
        )
        grad[rectangle.own] += of_own
        of_temperature.append(along)
        return of_visitor

    def last() -> None:
        # The longest exchange, of gradients going home, hides behind the own block; the first
        # visitor's features are here since the forward, so that the first one is short.
        of_temperature.append(state.add_own_block(blocks, grad))

    home = circulate(
        ring,
        exchange,
        [shard, state.weights],
        visit,
        Tensor.add_,
        last=last,
        first_visitor=[state.others],
    )
    if home is not None:
        grad[ring.collected(batch.rank)] += home
    return grad, torch.stack(of_temperature).sum(dim=0)


def gather_forward(
    z_i: Tensor, z_j: Tensor, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> Forward:
    """The own rows against all others."""
    shard = torch.cat([z_i, z_j])
    gathering = _GatherOthers(shard, batch, exchange)
    *_, hardest, shift, log_sum, positive, kept = blocks.own(z_i, z_j)
    rows, others = rows_of(shift, log_sum, hardest), gathering.finish()
    if len(others) > 0:
        rows = merge_rows(rows, blocks.rectangle(shard, others)[0], blocks.tau)
    return Forward(rows, positive, kept, others)


def gather_backward(
    state: Backward, blocks: Blocks, batch: GlobalBatch, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """Own rows' gradients alone: with (g r, LSE-) of all rows, no gradient has to travel."""
    shard = torch.cat([state.z_i, state.z_j])
    grad = shard.new_zeros(shard.shape, dtype=blocks.wide)
    gathering = _GatherOthers(state.weights, batch, exchange)
    of_temperature = state.add_own_block(blocks, grad)
    weights = gathering.finish()
    if len(weights) > 0:
        of_own, _, along = blocks.rectangle_backward(
            shard, state.others, state.weights, weights, of_y=False
        )
        grad += of_own
        of_temperature = of_temperature + along / 2  # the other half is the other ranks'
    return grad, of_temperature


class _GatherOthers:
    """An all-gather under way, of tensors with a row for each row of a shard."""

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
