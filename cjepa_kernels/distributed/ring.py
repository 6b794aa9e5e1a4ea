"""The ring: shards travel from rank to rank, and each pair of shards is multiplied once.

In step k = 1 ... floor(R / 2) the shard of rank r - k visits rank r, which multiplies it with its
own shard. The tiles of that rectangle serve the rows of both shards. The results for the visitor's
rows follow the visitor on its way, one step behind, and are sent back at the end. If R is even,
rank r and rank r + R / 2 visit each other in the last step, and each computes a half of their
rectangle.

That is the schedule of NT-Xent, whose matrix of similarities is symmetric. ``circulate`` takes
other schedules too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cjepa_kernels.distributed.exchange import Exchange, StepMessages
from cjepa_kernels.distributed.group import GlobalBatch


@dataclass(frozen=True)
class Rectangle:
    """Rows of a rank's own shard against rows of the visiting one."""

    own: slice
    visiting: slice


class Ranks(Protocol):
    """What :func:`circulate` has to know of the ranks."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def ranks(self) -> int:
        """R, the number of ranks."""


class Schedule(Protocol):
    """Which shard visits which rank in each step; in step k that of rank r - k visits rank r."""

    @property
    def batch(self) -> Ranks:
        """The ranks."""

    @property
    def steps(self) -> int:
        """Number of visitors that each rank receives."""

    def visitor(self, rank: int, step: int) -> int:
        """The rank whose shard visits ``rank`` in a step."""

    def rectangle(self, rank: int, step: int) -> Rectangle:
        """The rectangle that ``rank`` computes in a step."""

    def collected(self, rank: int) -> slice:
        """Rows of a rank's shard for which other ranks compute results on its way."""


@dataclass(frozen=True)
class Ring:
    """The schedule: which shard visits which rank in each step.

    Attributes:
        batch: The pairs of all ranks.
    """

    batch: GlobalBatch

    @property
    def steps(self) -> int:
        """Number of visitors that each rank receives."""
        return self.batch.ranks // 2

    def visitor(self, rank: int, step: int) -> int:
        """The rank whose shard visits ``rank`` in a step."""
        return (rank - step) % self.batch.ranks

    def rectangle(self, rank: int, step: int) -> Rectangle:
        """The rectangle that ``rank`` computes in a step."""
        other = self.visitor(rank, step)
        own_rows, rows = self.batch.rows_of(rank), self.batch.rows_of(other)
        if 2 * step != self.batch.ranks:
            return Rectangle(slice(0, own_rows), slice(0, rows))
        # Both ranks visit each other. One computes all rows of the lower rank with the first half
        # of the upper rank's rows, the other one computes them with the second half.
        if rank < other:
            return Rectangle(slice(0, own_rows), slice(0, rows // 2))
        return Rectangle(slice(own_rows // 2, own_rows), slice(0, rows))

    def collected(self, rank: int) -> slice:
        """Rows of a rank's shard for which other ranks compute results on its way."""
        return self.rectangle((rank + 1) % self.batch.ranks, 1).visiting


def circulate(
    ring: Schedule,
    exchange: Exchange,
    own: Sequence[Tensor],
    visit: Callable[[Rectangle, Sequence[Tensor]], Tensor],
    merge: Callable[[Tensor, Tensor], object],
    *,
    first: Callable[[], None] = lambda: None,
    last: Callable[[], None] = lambda: None,
    first_visitor: Sequence[Tensor] = (),
    collects: bool = True,
) -> Tensor | None:
    """Send the own shard round the ring, work on its visitors, and collect results for its rows.

    Exchange and computation overlap. During the work on a visitor, the next visitor arrives, and so
    do the results that earlier ranks have computed for the current one.

    Args:
        ring: The schedule.
        exchange: Exchanges with the other ranks.
        own: Tensors with a row for each row of the own shard, contiguous.
        visit: Called with a rectangle and the rows of the visitor's tensors that belong to it;
            returns the results for these rows, (rows, C).
        merge: Called with the earlier results for some rows, and with those of a visit, which it
            adds to the first argument.
        first: Work that needs no visitor, done while the first one is on its way.
        last: Work that needs no visitor, done while the collected results return to their rank.
        first_visitor: The tensors of the first visitor that are here already.
        collects: Whether ``visit`` has results for the visitor's rows. Otherwise what it returns
            does not travel.

    Returns:
        The results for the rows ``ring.collected(rank)`` of the own shard; None in a group of one
        rank, and if nothing is collected.
    """
    rank, ranks = ring.batch.rank, ring.batch.ranks
    right, left = (rank + 1) % ranks, (rank - 1) % ranks
    present, collected = own, own[0].new_empty(0)
    for step in range(ring.steps + 1):
        messages = StepMessages(exchange)
        arriving = list(first_visitor) if step == 0 else []
        if step < ring.steps:
            wanted = ring.rectangle(right, step + 1).visiting
            coming = ring.rectangle(rank, step + 1).visiting
            arriving += [
                messages.pass_on(tensor, sent=wanted, to=right, received=coming, source=left)
                for tensor in present[len(arriving) :]
            ]
        before = collected
        if step >= 2 and collects:
            messages.send(collected, right)
            before = messages.receive(collected, ring.collected(ring.visitor(rank, step)), left)
        messages.start()
        if step == 0:
            first()
            messages.finish()
        else:
            rectangle = ring.rectangle(rank, step)
            of_visitor = visit(rectangle, present)
            messages.finish()
            if step == 1 or not collects:
                collected = of_visitor
            else:
                merge(before[rectangle.visiting], of_visitor)
                collected = before
            del of_visitor, before
        present = arriving
    if ring.steps == 0 or not collects:
        last()
        return None
    messages = StepMessages(exchange)
    messages.send(collected, ring.visitor(rank, ring.steps))
    of_own_rows = messages.receive(collected, ring.collected(rank), (rank + ring.steps) % ranks)
    messages.start()
    last()
    messages.finish()
    return of_own_rows
