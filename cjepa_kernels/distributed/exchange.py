"""Messages between ranks. It counts their bytes, and its errors name a likely cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(eq=False)  # compared by identity
class Counts:
    """Bytes that this rank sent, and FLOPs of its products.

    Attributes:
        forward_bytes: Sent in forwards. A collective counts what a ring algorithm sends: R - 1
            parts for an all-gather, 2 (R - 1) / R of the tensor for an all-reduce.
        backward_bytes: The same in backwards.
        flops: FLOPs of the products that the loss needs, 2 for a multiply-add. The compiled kernel
            does exactly these. The chunked back end computes both halves of the own block. The
            Triton kernels for narrow rows compute the similarities of a backward twice, once for
            each side.
    """

    forward_bytes: int = 0
    backward_bytes: int = 0
    flops: int = 0


_counting: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Count the bytes and FLOPs of this rank for ``nt_xent`` of a group, inside the ``with``."""
    counts = Counts()
    _counting.append(counts)
    try:
        yield counts
    finally:
        _counting.remove(counts)


def count_flops(flops: int) -> None:
    """Add FLOPs to every open count."""
    for counts in _counting:
        counts.flops += flops


@dataclass(frozen=True)
class Message:
    """A tensor to send to a rank of the group, or a buffer for one from it."""

    tensor: Tensor  # contiguous
    rank: int


class Exchange:
    """The exchanges of one rank with the other ranks of a group.

    Args:
        group: The ranks.
        backward: Whether this exchange is part of a backward.
        of: What it is for, for an error.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, backward: bool = False, of: str = "NT-Xent"
    ) -> None:
        self.group = group
        self.backward = backward
        self.of = of
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def start(self, sent: Sequence[Message], received: Sequence[Message]) -> list[dist.Work]:
        """Begin to send and to receive. :meth:`finish` ends it."""
        if not sent and not received:
            return []
        operations = [
            # Each message between two ranks has a tag of its own.
            dist.P2POp(function, m.tensor, group=self.group, tag=tag, group_peer=m.rank)
            for function, messages in ((dist.isend, sent), (dist.irecv, received))
            for tag, m in enumerate(messages)
        ]
        self._count(sum(m.tensor.nbytes for m in sent))
        with self._explain_failures():
            return dist.batch_isend_irecv(operations)

    def finish(self, works: Sequence[dist.Work]) -> None:
        """Wait until all messages are here; on a GPU the current stream waits."""
        with self._explain_failures():
            for work in works:
                work.wait()

    def start_all_gather(self, own: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """Begin to gather (n, ...) of every rank, with the same n, as (R, n, ...).

        The result is complete after :meth:`finish`.
        """
        own = own.contiguous()
        everything = own.new_empty(self.ranks, *own.shape)
        self._count((self.ranks - 1) * own.nbytes)
        with self._explain_failures():
            parts = list(everything.unbind())
            return everything, [dist.all_gather(parts, own, group=self.group, async_op=True)]

    def all_gather(self, own: Tensor) -> Tensor:
        """Gather (n, ...) of every rank, with the same n, as (R, n, ...)."""
        everything, works = self.start_all_gather(own)
        self.finish(works)
        return everything

    def all_reduce(self, own: Tensor) -> None:
        """Sum over the ranks, in place, with the same bits on every rank."""
        self._count(2 * (self.ranks - 1) * own.nbytes // self.ranks)
        with self._explain_failures():
            dist.all_reduce(own, group=self.group)

    def numbers(self, own: Sequence[int], device: torch.device) -> list[list[int]]:
        """Gather integers of every rank on the host; every rank gives equally many.

        A group that can only exchange tensors of the GPU does so there, on a separate stream. The
        host waits for this exchange and for earlier ones of the group, but not for other work that
        was queued before it.
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
    def _explain_failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            direction = "backward" if self.backward else "forward"
            raise RuntimeError(
                f"rank {self.rank} of {self.ranks} cannot reach the others in the {direction} of "
                f"{self.of}: {error}. Most often one of them has ended, or did not take part "
                "within the process group's timeout: every rank must run every forward and backward"
            ) from error


class StepMessages:
    """The messages of one step. Every rank sends what the others expect, in the same order."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._sent: list[Message] = []
        self._received: list[Message] = []
        self._works: list[dist.Work] = []

    def send(self, tensor: Tensor, rank: int) -> None:
        """Add a contiguous tensor to send, which must not change before :meth:`finish`."""
        self._sent.append(Message(tensor, rank))

    def receive(self, like: Tensor, rows: slice, rank: int) -> Tensor:
        """The buffer that will hold these rows of another rank's tensor like this one."""
        tensor = like.new_empty(rows.stop - rows.start, *like.shape[1:])
        self._received.append(Message(tensor, rank))
        return tensor

    def pass_on(self, tensor: Tensor, sent: slice, to: int, received: slice, source: int) -> Tensor:
        """Send some rows of a tensor, and receive rows of another rank's tensor."""
        self.send(tensor[sent], to)
        return self.receive(tensor, received, source)

    def start(self) -> None:
        """Begin to send and to receive all messages."""
        self._works = self.exchange.start(self._sent, self._received)

    def finish(self) -> None:
        """Wait for all messages, and release the tensors."""
        self.exchange.finish(self._works)
        self._sent, self._received, self._works = [], [], []
