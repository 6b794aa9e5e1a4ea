"""What ranks send each other, point to point and collectively, counted; errors say why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(eq=False)  # told apart by identity
class Counts:
    """What this rank sent and multiplied.

    Attributes:
        forward_bytes: Sent in forwards. A collective counts what a ring algorithm sends: R - 1
            parts for an all-gather, 2 (R - 1) / R of the tensor for an all-reduce.
        backward_bytes: The same in backwards.
        flops: Of the products that the loss needs, 2 for a multiply-add: what the compiled kernel
            does. The chunked path multiplies the own block twice over, Triton's kernels for narrow
            rows compute the similarities of a backward once for each side.
    """

    forward_bytes: int = 0
    backward_bytes: int = 0
    flops: int = 0


_counting: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what this rank sends and multiplies for ``nt_xent`` of a group, until the end."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def count_flops(flops: int) -> None:
    """Add to whoever is counting."""
    for counts in _counting:
        counts.flops += flops


@dataclass(frozen=True)
class Message:
    """A tensor for a rank of the group, or room for one from it."""

    tensor: Tensor  # contiguous
    rank: int


class Exchange:
    """The ranks of a group as one of them sees them.

    Args:
        group: The ranks.
        backward: Whether a backward is what this exchange is part of.
    """

    def __init__(self, group: dist.ProcessGroup, *, backward: bool = False) -> None:
        self.group = group
        self.backward = backward
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def start(self, sent: Sequence[Message], received: Sequence[Message]) -> list[dist.Work]:
        """Begin to send and to receive; to be ended by :meth:`finish`."""
        if not sent and not received:
            return []
        operations = [
            # A tag of its own for each message between two ranks.
            dist.P2POp(function, m.tensor, group=self.group, tag=tag, group_peer=m.rank)
            for function, messages in ((dist.isend, sent), (dist.irecv, received))
            for tag, m in enumerate(messages)
        ]
        self._count(sum(m.tensor.nbytes for m in sent))
        with self._blame():
            return dist.batch_isend_irecv(operations)

    def finish(self, works: Sequence[dist.Work]) -> None:
        """Wait until all of it is there; on a GPU, have the current stream wait."""
        with self._blame():
            for work in works:
                work.wait()

    def start_all_gather(self, own: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Room for (n, ...) of every rank, as large everywhere, as (R, n, ...); to be finished."""
        own = own.contiguous()
        everything = own.new_empty(self.ranks, *own.shape)
        self._count((self.ranks - 1) * own.nbytes)
        with self._blame():
            parts = list(everything.unbind())
            return everything, [dist.all_gather(parts, own, group=self.group, async_op=True)]

    def all_gather(self, own: Tensor) -> Tensor:
        """(n, ...) of every rank, as large everywhere, as (R, n, ...)."""
        everything, works = self.start_all_gather(own)
        self.finish(works)
        return everything

    def all_reduce(self, own: Tensor) -> None:
        """Add up in place, to the same bits on every rank."""
        self._count(2 * (self.ranks - 1) * own.nbytes // self.ranks)
        with self._blame():
            dist.all_reduce(own, group=self.group)

    def numbers(self, own: Sequence[int], device: torch.device) -> list[list[int]]:
        """Whole numbers of every rank, as many on each, on the host.

        A group that can exchange nothing but tensors of the GPU does it there, on a stream of its
        own: the host waits for this exchange and for earlier ones of the group, but not for other
        work that was queued before it.
        """
        if "cpu:" in dist.get_backend_config(self.group):
            device = torch.device("cpu")
        aside = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with aside or nullcontext():
            gathered = self.all_gather(torch.tensor(own, device=device))
            numbers: list[list[int]] = gathered.tolist()
        return numbers

    def _count(self, sent: int) -> None:
        for counts in _counting:
            if self.backward:
                counts.backward_bytes += sent
            else:
                counts.forward_bytes += sent

    @contextmanager
    def _blame(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            direction = "backward" if self.backward else "forward"
            raise RuntimeError(
                f"rank {self.rank} of {self.ranks} cannot reach the others in the {direction} of "
                f"NT-Xent: {error}. Most often one of them has ended, or did not take part within "
                "the process group's timeout: every rank must run every forward and backward"
            ) from error


class Mail:
    """Messages of one step; all ranks send each other as many as the others expect, in order."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._sent: list[Message] = []
        self._received: list[Message] = []
        self._works: list[dist.Work] = []

    def send(self, tensor: Tensor, rank: int) -> None:
        """Have a contiguous tensor, which must not change before the end, sent."""
        self._sent.append(Message(tensor, rank))

    def receive(self, like: Tensor, rows: slice, rank: int) -> Tensor:
        """What will hold those rows of a tensor like that one."""
        tensor = like.new_empty(rows.stop - rows.start, *like.shape[1:])
        self._received.append(Message(tensor, rank))
        return tensor

    def pass_on(self, tensor: Tensor, sent: slice, to: int, received: slice, source: int) -> Tensor:
        """Send some rows of a tensor and receive some of another rank's."""
        self.send(tensor[sent], to)
        return self.receive(tensor, received, source)

    def start(self) -> None:
        """Begin with all of it."""
        self._works = self.exchange.start(self._sent, self._received)

    def finish(self) -> None:
        """Wait for all of it, and let go of the tensors."""
        self.exchange.finish(self._works)
        self._sent, self._received, self._works = [], [], []
