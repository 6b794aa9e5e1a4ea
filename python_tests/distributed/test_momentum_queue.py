"""A queue over ranks holds the keys of all ranks, in the same order on each of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from cjepa_kernels import MomentumQueue

Pool = Callable[[int], Ranks]


def enqueued(size: int, steps: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Run on each rank: the queue after steps with its share of the rows 0, 1, 2, ..."""
    queue = copy.deepcopy(MomentumQueue(size, 2, distributed=True, dtype=dtype))
    start = 0
    for counts in steps:
        own = start + sum(counts[: dist.get_rank()])
        rows = torch.arange(own, own + counts[dist.get_rank()])
        queue.enqueue(rows[:, None].expand(-1, 2).float().requires_grad_())
        start += sum(counts)
    return queue.keys, queue.counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "steps"),
    [(64, [[3, 3], [2, 5]]), (7, [[1, 4, 2], [3, 3, 3], [1, 1, 6]]), (4, [[9, 1, 5], [1, 1, 1]])],
    ids=["two", "three", "more_keys_than_rows"],
)
def test_the_keys_of_all_ranks_in_order(
    ranks: Pool, size: int, steps: list[list[int]], dtype: torch.dtype
) -> None:
    whole = MomentumQueue(size, 2, dtype=dtype)
    start = 0
    for counts in steps:
        rows = torch.arange(start, start + sum(counts))[:, None].expand(-1, 2)
        whole.enqueue(rows.float())
        start += sum(counts)
    for keys, counters in ranks(len(steps[0])).run(enqueued, size, steps, dtype):
        assert torch.equal(keys, whole.keys)
        assert torch.equal(counters, whole.counters)


def message_of(changes: list[dict[str, Any]], shapes: list[tuple[int, int]]) -> str:
    rank = dist.get_rank()
    options = dict(changes[rank])
    earlier = options.pop("earlier", 0)
    queue = MomentumQueue(**{"size": 8, "features": 3} | options)
    if earlier:
        queue.enqueue(torch.zeros(earlier, 3))
    queue.distributed = True
    try:
        queue.enqueue(torch.zeros(shapes[rank]))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("change", "shape", "expected"),
    [
        ({}, (0, 3), "every rank must hold at least one key, rank 1 has none"),
        ({}, (2, 5), "the number of features must .* rank 0 has 3.* and rank 1 has 5"),
        ({"size": 9}, (2, 3), "the queue's size must be the same .* rank 1 has 9"),
        ({"features": 4}, (2, 3), "the queue's number of features must be the same"),
        ({"dtype": torch.bfloat16}, (2, 3), "the queue's dtype must .* rank 1 has torch.bfloat16"),
        ({"earlier": 3}, (2, 3), "the queue's position must be the same .* rank 1 has 3"),
        ({"earlier": 8}, (2, 3), "the number of keys in the queue must be the same"),
    ],
    ids=["empty", "shape", "size", "features", "dtype", "position", "filled"],
)
def test_ranks_that_differ_are_named_on_every_rank(
    ranks: Pool, change: dict[str, Any], shape: tuple[int, int], expected: str
) -> None:
    messages = ranks(2).run(message_of, [{}, change], [(2, 3), shape])
    assert len(set(messages)) == 1
    assert re.search(expected, messages[0]), messages[0]


def test_one_process_without_a_group() -> None:
    queue = MomentumQueue(4, 3, distributed=True)
    queue.enqueue(torch.ones(2, 3))
    assert queue.filled == 2
