"""The ring of InfoNCE: its schedule, the shards that a rank holds, and what "auto" chooses."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from cjepa_kernels import InfoNCELoss, info_nce
from cjepa_kernels.distributed import counting
from cjepa_kernels.distributed.blocks import Blocks
from cjepa_kernels.distributed.exchange import Exchange, StepMessages
from cjepa_kernels.distributed.info_nce import GroupBatch
from cjepa_kernels.distributed.info_nce_ring import ColumnRing, choose_strategy
from cjepa_kernels.distributed.strategies import GATHERED_BYTES

Pool = Callable[[int], Ranks]
FEATURES = 8
NO_GROUP: Any = None  # the schedule and the choice exchange nothing


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_each_query_meets_each_column_once(sizes: list[tuple[int, int]]) -> None:
    queries, columns = (tuple(numbers) for numbers in zip(*sizes, strict=True))
    batches = [GroupBatch(NO_GROUP, rank, queries, columns) for rank in range(len(sizes))]
    products = torch.zeros(sum(queries), sum(columns), dtype=torch.int64)
    for rank, batch in enumerate(batches):
        ring = ColumnRing(batch)
        products[batch.own_queries, batch.own_columns] += 1
        for step in range(1, ring.steps + 1):
            visitor = ring.visitor(rank, step)
            rectangle = ring.rectangle(rank, step)
            assert rectangle.visiting == ring.collected(visitor)
            of_rank = products[batch.own_queries, batches[visitor].own_columns]
            of_rank[rectangle.own, rectangle.visiting] += 1
    assert torch.equal(products, torch.ones_like(products))


def test_auto_takes_the_ring_where_the_columns_are_many() -> None:
    key = torch.empty(1, 256, device="meta")
    rows = GATHERED_BYTES // (4 * 256 * 4)  # of each of 4 ranks, in fp32
    for columns, expected in ((rows, "all_gather"), (rows + 1, "ring")):
        batch = GroupBatch(NO_GROUP, 0, queries=(8,) * 4, columns=(columns,) * 4)
        assert choose_strategy("auto", batch, key) == expected
        assert choose_strategy("ring", batch, key) == "ring"
        assert choose_strategy("all_gather", batch, key) == "all_gather"


def recorded_step(of_key: bool) -> dict[str, Any]:
    """Run on each rank: what it did, and the received shards that were alive at each rectangle.

    A received tensor with D columns is a shard of keys, or the gradient of one.
    """
    events: list[str] = []
    received: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    largest = 0

    def watch(owner: Any, name: str) -> Callable[[], None]:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            nonlocal largest
            if "rectangle" in name:
                held = [tensor for reference in received if (tensor := reference()) is not None]
                alive.append(sum(tensor.shape[1:] == (FEATURES,) for tensor in held))
            if name == "start":
                largest = max([largest, *(m.tensor.nbytes for part in args[1:] for m in part)])
            if name != "receive" and not (name == "start" and not any(args[1:])):
                events.append(name)
            result = original(*args, **options)
            if name == "receive":
                received.append(weakref.ref(result))
            return result

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, original)

    undo = [watch(Blocks, name) for name in ("paired_rectangle", "rectangle_backward")]
    undo += [watch(Exchange, name) for name in ("start", "start_all_gather", "finish")]
    undo.append(watch(StepMessages, "receive"))
    query, key = torch.randn(2, 3, FEATURES)
    query.requires_grad_()
    key.requires_grad_(of_key)
    try:
        with counting() as counts:
            loss_fn = InfoNCELoss(symmetric=True, distributed=True, strategy="ring")
            loss = loss_fn(query, key)["loss"]
            between = len(alive), len(events)
            received.clear()
            loss.backward()
    finally:
        for restore in undo:
            restore()
    return {
        "forward": events[: between[1]],
        "backward": events[between[1] :],
        "alive in the forward": alive[: between[0]],
        "alive in the backward": alive[between[0] :],
        "largest": largest,
        "flops": counts.flops,
    }


@pytest.mark.parametrize("of_key", [True, False], ids=["", "frozen"])
def test_a_rank_holds_few_shards_and_works_while_they_travel(ranks: Pool, of_key: bool) -> None:
    count = 6
    visits = count - 1
    step = ["start", "paired_rectangle", "finish"]
    step_back = ["start", "rectangle_backward", "finish"]
    for result in ranks(count).run(recorded_step, of_key):
        agree = ["start_all_gather", "finish"]
        # The columns' numbers go home at the end.
        assert result["forward"] == agree + step * (visits + 1) + ["start", "finish"]
        # The visiting keys and the next ones. At the own rectangle the first visitor is coming.
        assert result["alive in the forward"] == [1] + [2] * (visits - 1) + [1]
        if of_key:
            # At the end the own rectangle is computed while the own gradient comes home.
            assert result["backward"] == ["start", "finish"] + step_back * (visits + 1)
            # From the second visit on, the visitor's gradient is here too, and from the third on
            # the gradient that is being sent.
            assert result["alive in the backward"] == [2, 3, 4, 4, 3, 2]
        else:
            # No gradient travels, so the last visitor and the own rectangle need no exchange.
            assert result["backward"] == [
                *["start", "finish"],
                *step_back * (visits - 1),
                *["rectangle_backward", "finish", "rectangle_backward"],
            ]
            assert result["alive in the backward"] == [2] * (visits - 1) + [1, 0]
        # No message grows with the number of ranks.
        assert result["largest"] == 3 * FEATURES * 4
        product = 2 * 3 * (count * 3) * FEATURES
        assert result["flops"] == product * (4 if of_key else 3)


def hits_beside_near_ties(symmetric: bool) -> Tensor:
    """Run on each rank: the accuracy beside negatives that are a rounding below the positive."""
    slightly_below = 1 - torch.finfo(torch.float32).eps / 2
    original = Blocks.paired_rectangle

    def rounded(self: Blocks, x: Tensor, y: Tensor, positives: Tensor) -> Any:
        out = original(self, x, y, positives)
        if (positives >= 0).any():
            return out
        largest = torch.full_like(out.row_max, slightly_below)
        return out._replace(row_max=largest, column_max=largest)

    Blocks.paired_rectangle = rounded  # type: ignore[method-assign]
    try:
        z = torch.eye(1, FEATURES)
        options: dict[str, Any] = {"symmetric": symmetric, "strategy": "ring"}
        return info_nce(z, z, group=dist.group.WORLD, **options).accuracy
    finally:
        Blocks.paired_rectangle = original  # type: ignore[method-assign]


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_a_negative_of_another_rank_within_rounding_is_a_tie(ranks: Pool, symmetric: bool) -> None:
    assert all(accuracy == 0 for accuracy in ranks(2).run(hits_beside_near_ties, symmetric))


def of_one_rank() -> list[Tensor]:
    results = []
    for options in ({}, {"group": dist.group.WORLD, "strategy": "ring"}):
        generator = torch.Generator().manual_seed(7)
        z = torch.randn(2, 5, FEATURES, generator=generator, dtype=torch.float64).requires_grad_()
        tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        smoothed: dict[str, Any] = {"symmetric": True, "label_smoothing": 0.1, **options}
        out = info_nce(z[0], z[1], temperature=tau, **smoothed)
        gradients = torch.autograd.grad(out.loss, (z, tau))
        results.append(torch.cat([out.loss[None], *(g.flatten() for g in gradients)]).detach())
    return results


def test_a_group_of_one_rank(ranks: Pool) -> None:
    ((expected, actual),) = ranks(1).run(of_one_rank)
    torch.testing.assert_close(actual, expected)


def of_the_temperature_alone(strategy: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    query, key = torch.randn(2, 4, FEATURES, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"symmetric": True, "strategy": strategy}
    loss = info_nce(query, key, temperature=temperature, group=dist.group.WORLD, **options).loss
    (gradient,) = torch.autograd.grad(loss, temperature)
    return loss.detach(), gradient


def test_the_temperature_alone_has_a_gradient(ranks: Pool) -> None:
    by_gathering = ranks(2).run(of_the_temperature_alone, "all_gather")
    for expected, actual in zip(
        by_gathering, ranks(2).run(of_the_temperature_alone, "ring"), strict=True
    ):
        torch.testing.assert_close(actual, expected)
