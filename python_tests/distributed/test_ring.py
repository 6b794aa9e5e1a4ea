"""The ring's schedule, its messages and products, and the merging of log-sum-exps of parts."""

from __future__ import annotations

import importlib
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from repository import ROOT
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

from cjepa_kernels import NTXentLoss, backends, nt_xent
from cjepa_kernels.bench import formulas
from cjepa_kernels.distributed import counting
from cjepa_kernels.distributed.blocks import Blocks, merge_rows
from cjepa_kernels.distributed.exchange import Exchange, StepMessages
from cjepa_kernels.distributed.group import GlobalBatch, Setting
from cjepa_kernels.distributed.ring import Ring
from cjepa_kernels.distributed.strategies import GATHERED_BYTES, choose_strategy

BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
# Its type is Any because the scripts of bench/ are not part of the package.
distributed_cost: Any = importlib.import_module("distributed_cost")

Pool = Callable[[int], Ranks]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_each_pair_of_rows_meets_once(batches: list[int]) -> None:
    ranks = len(batches)
    starts = [2 * sum(batches[:rank]) for rank in range(ranks + 1)]
    products = torch.zeros(starts[-1], starts[-1], dtype=torch.int64)
    for rank in range(ranks):
        ring = Ring(GlobalBatch(rank, tuple(batches)))
        for step in range(1, ring.steps + 1):
            rectangle, visitor = ring.rectangle(rank, step), ring.visitor(rank, step)
            assert visitor != rank
            rows = torch.arange(starts[rank], starts[rank + 1])[rectangle.own]
            columns = torch.arange(starts[visitor], starts[visitor + 1])[rectangle.visiting]
            assert len(rows) > 0
            assert len(columns) > 0
            products[rows[:, None], columns] += 1
            products[columns[:, None], rows] += 1
        own = slice(starts[rank], starts[rank + 1])
        products[own, own] += 1
        # A shard collects results for a part of its rows. The part must cover the shard's rows in
        # every rectangle that it visits.
        collected = ring.collected(rank) if ranks > 1 else None
        for step in range(1, ring.steps + 1):
            host = (rank + step) % ranks
            visiting = ring.rectangle(host, step).visiting
            assert collected is not None
            assert collected.start <= visiting.start
            assert visiting.stop <= collected.stop
    assert torch.equal(products, torch.ones_like(products))


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=6),
    st.sampled_from([1e-3, 0.02, 0.1, 3.0]),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_a_sum_come_together(sizes: list[int], tau: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        2 * torch.rand(1, size, generator=generator, dtype=torch.float64) - 1 for size in sizes
    ]

    def part(s: Tensor, constant: bool) -> Tensor:
        minus_infinity = torch.tensor([-torch.inf], dtype=torch.float64)
        largest = s.amax(dim=1) if s.numel() else minus_infinity
        shift = torch.ones_like(largest) if constant and s.numel() else largest.clamp(min=-1)
        shift = shift if s.numel() else torch.zeros_like(shift)
        log_sum = (
            torch.logsumexp((s - shift[:, None]) / tau, dim=1) if s.numel() else minus_infinity
        )
        return torch.stack([shift, log_sum, largest], dim=1)

    total = part(parts[0], constant=False)
    for number, s in enumerate(parts[1:]):
        total = merge_rows(total, part(s, constant=tau >= 0.1 and number % 2 == 0), tau)
    whole = torch.cat(parts, dim=1)
    shift, log_sum, largest = total.unbind(dim=1)
    if whole.numel() == 0:
        assert log_sum == -torch.inf
        assert largest == -torch.inf
        return
    torch.testing.assert_close(shift / tau + log_sum, torch.logsumexp(whole / tau, dim=1))
    assert largest == whole.max()


def test_a_nan_stays_in_a_sum() -> None:
    nan = torch.tensor([[1.0, torch.nan, torch.nan]], dtype=torch.float64)
    number = torch.tensor([[1.0, 0.5, 0.2]], dtype=torch.float64)
    for a, b in ((nan, number), (number, nan)):
        assert merge_rows(a, b, 0.1)[:, 1:].isnan().all()


def test_the_strategy_follows_the_size() -> None:
    small, large = (GlobalBatch(0, (batch,) * 4) for batch in (8, 65536))
    z = torch.empty(1, 256, device="meta")
    assert choose_strategy("auto", small, z) == "all_gather"
    assert choose_strategy("auto", large, z) == "ring"
    assert choose_strategy("ring", small, z) == "ring"
    assert choose_strategy("all_gather", large, z) == "all_gather"
    # Features beyond the budget are never gathered, even if the ring saves few products.
    many = GlobalBatch(0, (1,) * 2048)
    wide = torch.empty(1, GATHERED_BYTES // (many.rows * 4) + 1, device="meta")
    assert choose_strategy("auto", many, wide) == "ring"


def test_settings_survive_the_exchange() -> None:
    for setting in (
        Setting("temperature", 0.07),
        Setting("temperature", 1e-300),
        Setting("reduction", "sum", ("mean", "sum")),
        Setting("dtype", None, (None, torch.bfloat16)),
    ):
        assert setting.decode(setting.encode()) == setting.value


def counted_step(
    pairs: int, features: int, strategy: Any, backend: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """Run on each rank: the bytes and products it counted, and its largest message in bytes."""
    largest = 0
    start = Exchange.start

    def recording_start(self: Exchange, sent: Any, received: Any) -> Any:
        nonlocal largest
        largest = max([largest, *(message.tensor.nbytes for message in (*sent, *received))])
        return start(self, sent, received)

    z = torch.randn(2, pairs, features).to(dtype).requires_grad_()
    Exchange.start = recording_start  # type: ignore[method-assign]
    try:
        with counting() as counts:
            out = nt_xent(z[0], z[1], group=dist.group.WORLD, strategy=strategy, backend=backend)
            out.loss.backward()
    finally:
        Exchange.start = start  # type: ignore[method-assign]
    nt_xent(z[0], z[1], group=dist.group.WORLD)  # This call is not counted.
    return {**vars(counts), "largest": largest}


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counted_costs_follow_the_formulas(
    ranks: Pool, strategy: str, count: int, backend: str, dtype: torch.dtype
) -> None:
    if not backends()[backend].available:
        pytest.skip(backends()[backend].reason)
    pairs, features = 6, 10
    counted = ranks(count).run(
        counted_step, pairs, features=features, strategy=strategy, backend=backend, dtype=dtype
    )
    problem = distributed_cost.Problem(count, 2 * pairs, features, dtype.itemsize)
    expected = distributed_cost.cost(strategy, problem, saved=backend == "native")
    for name in ("forward_bytes", "backward_bytes", "flops"):
        assert sum(rank[name] for rank in counted) / count == getattr(expected, name), name
    # The size of a message does not grow with the number of ranks.
    assert all(rank["largest"] <= problem.gradient for rank in counted)


def recorded_step(strategy: str) -> tuple[list[str], list[int], list[int]]:
    """Run on each rank: its actions in order, and the number of received tensors at each visit.

    Only tensors that are still alive count. The first list of numbers is that of the forward, the
    second that of the backward.
    """
    events: list[str] = []
    received: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(owner: Any, name: str) -> Callable[[], None]:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            if name.startswith("rectangle"):
                alive.append(sum(tensor() is not None for tensor in received))
            if name != "receive" and not (name == "start" and not any(args[1:])):
                events.append(name)
            result = original(*args, **options)
            if name == "receive":
                received.append(weakref.ref(result))
            return result

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, original)

    blocks = ("own", "rectangle", "own_backward", "rectangle_backward")
    undo = [watch(Blocks, name) for name in blocks]
    undo += [watch(Exchange, name) for name in ("start", "start_all_gather", "finish")]
    undo.append(watch(StepMessages, "receive"))
    try:
        z = torch.randn(2, 3, 8, requires_grad=True)
        loss = NTXentLoss(distributed=True, strategy=strategy)(z[0], z[1])["loss"]  # type: ignore
        forward = len(alive)
        received.clear()
        loss.backward()
    finally:
        for restore in undo:
            restore()
    return events, alive[:forward], alive[forward:]


def test_the_ring_overlaps_and_holds_few_shards(ranks: Pool) -> None:
    agree = ["start_all_gather", "finish"]
    forward = ["start", "own", "finish", *["start", "rectangle", "finish"] * 3, "start", "finish"]
    backward = ["start", "finish", *["start", "rectangle_backward", "finish"] * 3]
    backward += ["start", "own_backward", "finish"]
    for events, in_forward, in_backward in ranks(6).run(recorded_step, "ring"):
        assert events == agree + forward + backward
        # The visiting shard, the next one and their collected results are alive. The features of
        # the first visiting shard stay alive for the backward.
        assert in_forward == [2, 4, 4]
        # The features and weights of two visiting shards and the collected gradients are alive.
        # The features of the first visiting shard are those of the forward.
        assert in_backward == [3, 5, 4]


def test_the_all_gather_overlaps(ranks: Pool) -> None:
    expected = ["start_all_gather", "finish", "start_all_gather", "own", "finish", "rectangle"]
    expected += ["start_all_gather", "own_backward", "finish", "rectangle_backward"]
    for events, *_ in ranks(3).run(recorded_step, "all_gather"):
        assert events == expected


@pytest.mark.parametrize("pairs", [8, 2500])
def test_auto_is_one_of_both(ranks: Pool, pairs: int) -> None:
    counted = [
        ranks(2).run(
            counted_step, pairs, features=8, strategy=strategy, backend="auto", dtype=torch.float32
        )[0]
        for strategy in ("auto", "all_gather", "ring")
    ]
    z = torch.empty(1, 8)
    chosen = choose_strategy("auto", GlobalBatch(0, (pairs, pairs)), z)
    assert chosen == ("all_gather" if pairs == 8 else "ring")
    assert counted[0] == counted[("all_gather", "ring").index(chosen) + 1]


def test_costs_of_the_schemes_compare_as_they_should() -> None:
    for ranks in distributed_cost.RANKS:
        problem = distributed_cost.Problem(ranks, 1 << 14, 256, 2)
        costs = {name: distributed_cost.cost(name, problem) for name in distributed_cost.SCHEMES}
        rows = problem.ranks * problem.rows
        assert costs["ring"].flops == 4 * problem.rows * rows * problem.features
        assert costs["ring"].flops < costs["all_gather"].flops < costs["lightly"].flops
        assert costs["inf_cl"].flops == 2 * costs["ring"].flops
        sent = {name: cost.forward_bytes + cost.backward_bytes for name, cost in costs.items()}
        assert sent["all_gather"] < sent["ring"] < sent["lightly"] < sent["inf_cl"]


@pytest.mark.parametrize("ranks", [2, 3, 8, 9])
def test_the_simulation_adds_up(ranks: int) -> None:
    problem = distributed_cost.Problem(ranks, 4096, 256, 2)
    flops = distributed_cost.cost("ring", problem).flops
    free = distributed_cost.Link("free", float("inf"), 0.0)
    ideal = distributed_cost.simulate(problem, free, rate=1e12)
    assert ideal["products"] == pytest.approx(flops / 1e12)
    assert ideal["exposed"] == pytest.approx(0)
    slow = distributed_cost.Link("slow", 1e6, 0.0)
    simulated = distributed_cost.simulate(problem, slow, rate=1e18)
    sent = distributed_cost.cost("ring", problem)
    # This bound leaves out the exchanges of settings and of metrics. It also assumes that the last
    # visit is as long as the others, although it may be half as long.
    least = (sent.forward_bytes + sent.backward_bytes) / 1e6
    assert simulated["total"] == pytest.approx(least, rel=0.34 if ranks == 2 else 0.08)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (["distributed.py", "--quick", "--seconds", "0.1"], "work of the ring / strips"),
        (["distributed_cost.py"], "whole batch"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_benchmarks_run(script: list[str], expected: str) -> None:
    result = subprocess.run(
        [sys.executable, str(BENCH / script[0]), *script[1:], "--no-save"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def lightly_step(pairs: int, features: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Run on each rank: loss and gradient by lightly's formula and by both strategies."""
    results = {}
    for name in ("lightly", "all_gather", "ring"):
        generator = torch.Generator().manual_seed(dist.get_rank())
        z = torch.randn(2, pairs, features, generator=generator, dtype=torch.float64)
        z.requires_grad_()
        if name == "lightly":
            loss = formulas.lightly_of_group(z[0], z[1])
        else:
            loss = nt_xent(
                z[0],
                z[1],
                temperature=formulas.TEMPERATURE,
                group=dist.group.WORLD,
                strategy=name,  # type: ignore[arg-type]
            ).loss
        loss.backward()
        results[name] = (loss.detach(), z.grad)
    return results


@pytest.mark.parametrize("pairs", [3, 33])
def test_the_same_gradients_as_lightly(ranks: Pool, pairs: int) -> None:
    """The losses and gradients are those of lightly with ``gather_distributed=True``."""
    for results in ranks(2).run(lightly_step, pairs, 12):
        loss, gradient = results.pop("lightly")
        for own_loss, own_gradient in results.values():
            assert relative_error(own_loss, loss) <= FLOOR_VALUE[torch.float64]
            assert relative_error(own_gradient, gradient) <= FLOOR_GRADIENT[torch.float64]
