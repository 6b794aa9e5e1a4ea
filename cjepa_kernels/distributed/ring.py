"""The ring: shards travel from rank to rank, and each pair of shards meets once.

In step k = 1 ... floor(R / 2) the shard of rank r - k visits rank r, which multiplies it with its
own: the tiles of that rectangle serve the rows of both. What it adds to the visitor's rows follows
the visitor on its way, one step behind, and at the end goes home. With R even, the last step has
rank r and rank r + R / 2 each visit the other: each takes a half of their rectangle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cjepa_kernels.distributed.exchange import Exchange, Mail
from cjepa_kernels.distributed.group import GlobalBatch


@dataclass(frozen=True)
class Rectangle:
    """Rows of a rank's own shard against rows of the visiting one."""

    own: slice
    visiting: slice


@dataclass(frozen=True)
class Ring:
    """Who meets whom.

    Attributes:
        batch: The pairs of all ranks.
    """

    batch: GlobalBatch

    @property
    def steps(self) -> int:
        """Visitors that each rank receives."""
        return self.batch.ranks // 2

    def visitor(self, rank: int, step: int) -> int:
        """The rank whose shard visits ``rank`` in a step."""
        return (rank - step) % self.batch.ranks

    def rectangle(self, rank: int, step: int) -> Rectangle:
        """What ``rank`` multiplies in a step."""
        other = self.visitor(rank, step)
        own_rows, rows = self.batch.rows_of(rank), self.batch.rows_of(other)
        if 2 * step != self.batch.ranks:
            return Rectangle(slice(0, own_rows), slice(0, rows))
        # Both meet: all rows of the lower rank with the first half of the upper one's, and with
        # the second half.
        if rank < other:
            return Rectangle(slice(0, own_rows), slice(0, rows // 2))
        return Rectangle(slice(own_rows // 2, own_rows), slice(0, rows))

    def collected(self, rank: int) -> slice:
        """Rows of a rank's shard that other ranks collect something for, on its way."""
        return self.rectangle((rank + 1) % self.batch.ranks, 1).visiting


def circulate(
    ring: Ring,
    exchange: Exchange,
    own: Sequence[Tensor],
    visit: Callable[[Rectangle, Sequence[Tensor]], Tensor],
    merge: Callable[[Tensor, Tensor], object],
    *,
    first: Callable[[], None] = lambda: None,
    last: Callable[[], None] = lambda: None,
    first_visitor: Sequence[Tensor] = (),
) -> Tensor | None:
    """Send the own shard round, receive the others', and collect what they find for its rows.

    Exchange and compute overlap: while a visitor is worked on, the next one arrives, as does what
    the current one has collected so far.

    Args:
        ring: Who meets whom.
        exchange: The ranks.
        own: Tensors with a row for each row of the own shard, contiguous.
        visit: Called with a rectangle and the visitor's tensors, the rows of the rectangle alone;
            returns what it adds to these rows, (rows, C).
        merge: Called with what was collected before for some rows, to which it adds what a visit
            returned, its second argument.
        first: Work that needs no visitor, while the first one is on its way.
        last: The same, while what was collected goes home.
        first_visitor: As many of the first visitor's tensors as are here already.

    Returns:
        What was collected for the rows ``ring.collected(rank)`` of the own shard; None of a group
        of one.
    """
    rank, ranks = ring.batch.rank, ring.batch.ranks
    right, left = (rank + 1) % ranks, (rank - 1) % ranks
    present, collected = own, own[0].new_empty(0)
    for step in range(ring.steps + 1):
        mail = Mail(exchange)
        arriving = list(first_visitor) if step == 0 else []
        if step < ring.steps:
            wanted = ring.rectangle(right, step + 1).visiting
            coming = ring.rectangle(rank, step + 1).visiting
            arriving += [
                mail.pass_on(tensor, wanted, right, coming, left)
                for tensor in present[len(arriving) :]
            ]
        before = collected
        if step >= 2:
            mail.send(collected, right)
            before = mail.receive(collected, ring.collected(ring.visitor(rank, step)), left)
        mail.start()
        if step == 0:
            first()
            mail.finish()
        else:
            rectangle = ring.rectangle(rank, step)
            found = visit(rectangle, present)
            mail.finish()
            if step == 1:
                collected = found
            else:
                merge(before[rectangle.visiting], found)
                collected = before
            del found, before
        present = arriving
    if ring.steps == 0:
        last()
        return None
    mail = Mail(exchange)
    mail.send(collected, ring.visitor(rank, ring.steps))
    home = mail.receive(collected, ring.collected(rank), (rank + ring.steps) % ranks)
    mail.start()
    last()
    mail.finish()
    return home
