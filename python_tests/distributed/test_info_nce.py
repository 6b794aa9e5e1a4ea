"""InfoNCE over ranks gives the results of one process with the queries and keys of all ranks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eager import textbook_info_nce
from overloads import BACKENDS
from ranks import Ranks, gradients_of
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cjepa_kernels import InfoNCELoss, InfoNCEOutput, MomentumQueue, info_nce
from cjepa_kernels.distributed.info_nce import GroupBatch, merge_columns

Pool = Callable[[int], Ranks]
FEATURES = 24
NOT_SLOW = [name for name in BACKENDS if name != "triton"]  # Triton's interpreter is slow.
STRATEGIES = ["all_gather", "ring"]
METRICS = ("accuracy", "positive_similarity", "negative_similarity")

# For each rank its numbers of queries, keys and negatives. Without negatives there is no tensor.
SHARES = {
    "two": [(5, 5, 0), (5, 5, 0)],
    "ragged": [(3, 3, 0), (8, 8, 0)],
    "three": [(2, 2, 0), (5, 5, 0), (1, 1, 0)],
    "negatives": [(4, 4, 7), (2, 2, 0), (5, 5, 2)],
    "positives": [(4, 9, 3), (6, 6, 1)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one_direction": {},
    "symmetric": {"symmetric": True},
    "sum_smoothed": {"reduction": "sum", "label_smoothing": 0.2},
    "none_clip_smoothed": {"reduction": "none", "label_smoothing": 0.3, "symmetric": True},
    "dot_product": {"use_cosine_similarity": False, "temperature": 4.0, "symmetric": True},
}


def shares(name: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The tensors of each rank."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for queries, keys, negatives in SHARES[name]:
        sizes = {"query": queries, "key": keys, "negatives": negatives}
        share: dict[str, Any] = {
            side: torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
            for side, rows in sizes.items()
            if rows
        }
        if name == "positives":
            share["positives"] = torch.randperm(keys, generator=generator)[:queries]
        result.append(share)
    return result


def whole(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The tensors of all ranks together, as one process has them."""
    parts = shares(name, dtype)
    result: dict[str, Any] = {
        side: torch.cat([part[side] for part in parts if side in part])
        for side in ("query", "key", "negatives")
        if any(side in part for part in parts)
    }
    if name == "positives":
        first, positives = 0, []
        for part in parts:
            positives.append(part["positives"] + first)
            first += len(part["key"])
        result["positives"] = torch.cat(positives)
    return result


def leaves_of(tensors: dict[str, Any], temperature: Tensor) -> dict[str, Tensor]:
    leaves = {side: z.requires_grad_() for side, z in tensors.items() if side != "positives"}
    return leaves | {"temperature": temperature.requires_grad_()}


def group_step(
    name: str, dtype: torch.dtype, backend: Any, strategy: Any, options: dict[str, Any]
) -> tuple[InfoNCEOutput, dict[str, Tensor]]:
    """Run on each rank: the result, and the gradients of this rank's tensors."""
    options = dict(options)
    tensors = shares(name, dtype)[dist.get_rank()]
    if name == "negatives" and "negatives" not in tensors:
        tensors["negatives"] = torch.empty(0, FEATURES, dtype=dtype)
    temperature = torch.tensor(options.pop("temperature", 0.07), dtype=torch.float64)
    leaves = leaves_of(tensors, temperature)
    arguments = tensors | {"temperature": temperature}
    options |= {"backend": backend, "strategy": strategy, "group": dist.group.WORLD}
    out = info_nce(**arguments, **options)
    gradients = torch.autograd.grad(out.loss.sum(), list(leaves.values()))
    detached = InfoNCEOutput(*(value.detach() for value in out))
    return detached, dict(zip(leaves, gradients, strict=True))


def one_process(
    function: Any, name: str, dtype: torch.dtype, options: dict[str, Any], *, exact: bool
) -> tuple[Any, dict[str, Tensor]]:
    """The result and the gradients of the whole batch; ``exact`` computes in float64."""
    options = dict(options)
    tensors = whole(name, dtype)
    if exact:
        tensors = {s: z.double() if z.is_floating_point() else z for s, z in tensors.items()}
    value = torch.tensor(options.pop("temperature", 0.07), dtype=torch.float64)
    leaves = leaves_of(tensors, value)
    out = function(**tensors, temperature=value, **options)
    loss = out if isinstance(out, Tensor) else out.loss
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return out, dict(zip(leaves, gradients, strict=True))


CASES = [
    *((name, "one_direction", torch.float32, "auto") for name in SHARES),
    *((name, "symmetric", torch.float32, "auto") for name in SHARES),
    *(("negatives", option, torch.float32, "auto") for option in list(OPTIONS)[2:]),
    *(("positives", option, torch.float64, "reference") for option in OPTIONS),
    *(("three", "symmetric", dtype, "auto") for dtype in (torch.bfloat16, torch.float16)),
    *(("negatives", "none_clip_smoothed", torch.bfloat16, name) for name in NOT_SLOW),
    *(("two", "symmetric", torch.float32, name) for name in BACKENDS),
]


@pytest.mark.parametrize(
    ("name", "option", "dtype", "backend", "strategy"),
    [
        *((*case, "all_gather") for case in CASES),
        *((*case, "ring") for case in CASES if case[-1] != "reference"),
    ],
    ids=str,
)
def test_ranks_equal_one_process(
    ranks: Pool, name: str, option: str, dtype: torch.dtype, backend: Any, strategy: str
) -> None:
    options = OPTIONS[option]
    results = ranks(len(SHARES[name])).run(group_step, name, dtype, backend, strategy, options)
    reference = {**options, "backend": "reference"}
    truth, exact = one_process(info_nce, name, dtype, reference, exact=True)
    eager_loss, eager = one_process(textbook_info_nce, name, dtype, options, exact=False)
    reduction = options.get("reduction", "mean")
    scale = len(results) if reduction == "mean" else 1

    losses = [out.loss for out, _ in results]
    loss = torch.cat(losses) if reduction == "none" else torch.stack(losses).sum() / scale
    assert (loss >= 0).all()
    allowed = 2 * relative_error(eager_loss, truth.loss) + FLOOR_VALUE[dtype]
    assert relative_error(loss, truth.loss) <= allowed
    lse = torch.cat([out.lse for out, _ in results])
    assert relative_error(lse, truth.lse) <= 4 * METRIC[dtype]
    for side, expected in exact.items():
        parts = [gradients[side] for _, gradients in results if side in gradients]
        if side == "temperature":
            actual, floor = torch.stack(parts).sum() / scale, 10 * FLOOR_GRADIENT[dtype]
        else:
            actual, floor = torch.cat(parts).double() / scale, FLOOR_GRADIENT[dtype]
        assert relative_error(actual, expected) <= 2 * relative_error(eager[side], expected) + floor
    for out, _ in results:
        for metric in METRICS:
            assert torch.equal(getattr(out, metric), getattr(results[0][0], metric))
            error = (getattr(out, metric) - getattr(truth, metric)).abs()
            bound = 4 * METRIC[dtype] * max(1.0, getattr(truth, metric).abs().item())
            assert error <= (0.2 if metric == "accuracy" and dtype.itemsize == 2 else bound)


def aligned_step(symmetric: bool, strategy: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key = aligned(dist.get_rank())
    out = info_nce(
        query,
        key,
        temperature=0.005,
        symmetric=symmetric,
        reduction="none",
        group=dist.group.WORLD,
        strategy=strategy,
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), query)
    return out.loss.detach(), gradient, out.accuracy


def aligned(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    query = torch.randn(9, 64, generator=generator)
    return query.requires_grad_(), query.detach() + 0.01 * torch.randn(9, 64, generator=generator)


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_aligned_pairs_at_low_temperature(ranks: Pool, symmetric: bool, strategy: str) -> None:
    """Columns of several ranks are merged without rounding, so tiny losses keep their digits."""
    pairs = [aligned(rank) for rank in range(3)]
    query = torch.cat([query for query, _ in pairs]).detach().double().requires_grad_()
    truth = info_nce(
        query,
        torch.cat([key for _, key in pairs]).double(),
        temperature=0.005,
        symmetric=symmetric,
        reduction="none",
        backend="reference",
    )
    (expected,) = torch.autograd.grad(truth.loss.sum(), query)
    results = ranks(3).run(aligned_step, symmetric, strategy)
    loss = torch.cat([loss for loss, *_ in results])
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-3, atol=1e-38)
    gradient = torch.cat([gradient for _, gradient, _ in results])
    difference = (gradient.double() - expected).abs().max()
    assert difference <= 1e-3 * expected.abs().max() + 1e-37
    assert all(accuracy == 1 for *_, accuracy in results)


def collapsed_step(
    symmetric: bool, features: int, backend: Any, strategy: Any
) -> tuple[Tensor, Tensor]:
    row = torch.randn(features, generator=torch.Generator().manual_seed(3))
    z = row.expand(1 + 4 * dist.get_rank(), features)
    options: dict[str, Any] = {"symmetric": symmetric, "backend": backend, "strategy": strategy}
    out = info_nce(z, z, group=dist.group.WORLD, **options)
    return out.accuracy, out.loss


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
@pytest.mark.parametrize(
    ("backend", "strategy"),
    [
        *((name, "all_gather") for name in NOT_SLOW),
        *((name, "ring") for name in NOT_SLOW if name != "reference"),
    ],
)
def test_a_collapsed_encoder_reports_no_hit(
    ranks: Pool, symmetric: bool, backend: Any, strategy: str
) -> None:
    """A tie with a row of another rank is a miss too."""
    results = ranks(3).run(collapsed_step, symmetric, 131, backend, strategy)
    assert all(accuracy == 0 for accuracy, _ in results)
    mean = torch.stack([loss for _, loss in results]).mean()
    torch.testing.assert_close(mean, torch.tensor(15.0).log())  # 1 + 5 + 9 pairs


def largest_after_merging() -> float:
    """Run on each rank, which has one column: its largest negative comes from rank 1."""
    rank = dist.get_rank()
    slightly_below = 1 - torch.finfo(torch.float32).eps / 2
    largest = torch.full((2,), slightly_below if rank == 1 else -torch.inf)
    merged = merge_columns(
        torch.zeros(2),
        shift=torch.zeros(2),
        log_sum=torch.zeros(2),
        largest=largest,
        features=16,
        tau=0.1,
        batch=GroupBatch(dist.group.WORLD, rank, queries=(1, 1), columns=(1, 1)),
    )
    return merged.largest.item()


def test_a_negative_of_another_rank_within_rounding_is_a_tie(ranks: Pool) -> None:
    of_other_rank, of_own_rank = ranks(2).run(largest_after_merging)
    assert of_other_rank >= 1  # a positive of similarity 1 is no hit
    assert of_own_rank < 1  # it comes from the same product as the positive


class Encoder(nn.Module):
    """Two encoders and their loss in one module, so that DDP averages all gradients."""

    def __init__(self, distributed: bool, dtype: torch.dtype, strategy: Any = "auto") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = (nn.Linear(FEATURES, FEATURES) for _ in range(2))
        options: dict[str, Any] = {"symmetric": True, "learnable_temperature": True}
        self.loss_fn = copy.deepcopy(
            InfoNCELoss(0.2, **options, distributed=distributed, strategy=strategy)
        )
        self.to(dtype)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self.loss_fn(self.image(image), self.text(text))
        return result


def ddp_step(
    name: str, autocast: bool, compiled: bool, strategy: str
) -> tuple[Tensor, dict[str, Tensor]]:
    dtype = torch.float32 if autocast else torch.float64
    model: Any = DistributedDataParallel(Encoder(True, dtype, strategy))
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    tensors = shares(name, dtype)[dist.get_rank()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(tensors["query"], tensors["key"])
    out["loss"].backward()
    gradients = gradients_of(model)
    return out["loss"].detach(), {name.split("module.")[-1]: g for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("name", "autocast", "compiled", "strategy"),
    [
        ("ragged", False, False, "auto"),
        ("three", False, False, "auto"),
        ("ragged", True, False, "auto"),
        ("ragged", False, True, "auto"),
        ("three", False, False, "ring"),
        ("ragged", True, False, "ring"),
    ],
    ids=["two", "three", "autocast", "compiled", "three-ring", "autocast-ring"],
)
def test_ddp_averages_to_one_process(
    ranks: Pool, name: str, autocast: bool, compiled: bool, strategy: str
) -> None:
    model = Encoder(False, torch.float32 if autocast else torch.float64)
    tensors = whole(name, torch.float32 if autocast else torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tensors["query"], tensors["key"])["loss"]
    loss.backward()
    expected = gradients_of(model)
    results = ranks(len(SHARES[name])).run(ddp_step, name, autocast, compiled, strategy)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if autocast else {"rtol": 1e-9, "atol": 1e-12}
    mean = torch.stack([loss for loss, _ in results]).mean()
    torch.testing.assert_close(mean, loss.detach(), **tolerance)
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[parameter], **tolerance)


def frozen_step(frozen: str, strategy: Any) -> dict[str, Any]:
    tensors = shares("ragged", torch.float64)[dist.get_rank()]
    for side in ("query", "key"):
        tensors[side].requires_grad_(side != frozen)
    options: dict[str, Any] = {"symmetric": True, "strategy": strategy}
    loss = info_nce(**tensors, group=dist.group.WORLD, **options).loss
    loss.backward()
    return {side: tensors[side].grad for side in ("query", "key")}


@pytest.mark.parametrize("frozen", ["query", "key"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_frozen_side(ranks: Pool, frozen: str, strategy: str) -> None:
    tensors = whole("ragged", torch.float64)
    other = "key" if frozen == "query" else "query"
    tensors[other].requires_grad_()
    info_nce(**tensors, symmetric=True).loss.backward()
    results = ranks(2).run(frozen_step, frozen, strategy)
    assert all(result[frozen] is None for result in results)
    gradient = torch.cat([result[other] for result in results]) / 2
    torch.testing.assert_close(gradient, tensors[other].grad)


def step_with_a_nan(strategy: Any) -> tuple[Tensor, Tensor]:
    tensors = shares("ragged", torch.float32)[dist.get_rank()]
    if dist.get_rank() == 1:
        tensors["key"][2, 1] = float("nan")
    out = info_nce(**tensors, group=dist.group.WORLD, strategy=strategy)
    return out.loss, out.accuracy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_nan_reaches_the_loss_of_every_rank(ranks: Pool, strategy: str) -> None:
    for loss, accuracy in ranks(2).run(step_with_a_nan, strategy):
        assert loss.isnan()
        assert accuracy == 0


def queue_step(distributed: bool) -> Tensor:
    """A loop as in MoCo; the loss needs no exchange, because all ranks hold the same queue."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    queue = MomentumQueue(32, FEATURES, distributed=distributed)
    loss_fn = InfoNCELoss(in_batch_negatives=False)
    losses = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        query, key = torch.randn(2, 6, FEATURES, generator=generator)
        own = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks) if distributed else slice(None)
        losses.append(loss_fn(query[own], key[own], queue.negatives())["loss"])
        queue.enqueue(key[own])
    return torch.stack(losses)


def test_a_queue_over_ranks_is_that_of_one_process(ranks: Pool) -> None:
    expected = ranks(2).run(queue_step, False)[0]
    over_ranks = torch.stack(ranks(2).run(queue_step, True)).mean(dim=0)
    torch.testing.assert_close(over_ranks, expected)


def message_of(changes: list[dict[str, Any]]) -> str:
    """Run on each rank: the error of info_nce when each rank has its own arguments."""
    change = dict(changes[dist.get_rank()])
    shape, dtype = change.pop("shape", (3, 4)), change.pop("dtype", torch.float32)
    gradient = change.pop("requires_grad", "")
    tensors = {side: torch.ones(shape, dtype=dtype) for side in ("query", "key")}
    if gradient:
        tensors[gradient].requires_grad_()
    try:
        info_nce(**tensors, group=dist.group.WORLD, **change)
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": (3, 5)}, "the number of features must .* rank 0 has 4.* rank 1 has 5"),
        ({"dtype": torch.float64}, "the dtype of query and key must be the same"),
        ({"temperature": 0.3}, r"temperature must be .* rank 0 has 0\.07 and rank 1 has 0\.3"),
        ({"temperature": torch.tensor(0.07)}, "whether temperature is a tensor must be the same"),
        ({"symmetric": True}, "symmetric must be the same on every rank"),
        ({"label_smoothing": 0.1}, "label_smoothing must be the same on every rank"),
        ({"use_cosine_similarity": False}, "use_cosine_similarity must be the same"),
        ({"eps": 1e-6}, "eps must be the same on every rank"),
        ({"reduction": "sum"}, "reduction must be .* has mean and rank 1 has sum"),
        ({"strategy": "ring"}, "strategy must be .* rank 0 has auto and rank 1 has ring"),
        ({"backend": "reference"}, "whether backend is the reference must be the same"),
        ({"requires_grad": "query"}, "requires_grad of query must be the same"),
        ({"requires_grad": "key"}, "requires_grad of key or negatives must be the same"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranks_that_differ_are_named_on_every_rank(
    ranks: Pool, change: dict[str, Any], expected: str
) -> None:
    messages = ranks(3).run(message_of, [{}, change, {}])
    assert len(set(messages)) == 1
    assert re.search(expected, messages[0]), messages[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": (0, 4)}, "query must hold at least one row"),
        ({"positives": torch.tensor([0, 1, 3])}, "positives must be numbers from 0 to 2"),
        ({"temperature": -1.0}, "Temperature must be positive"),
        ({"negatives": torch.ones(2, 5)}, "query and negatives must have the same D"),
        (
            {"in_batch_negatives": False, "negatives": torch.ones(2, 4)},
            "group must be None with in_batch_negatives=False, got a group of 3 ranks",
        ),
        ({"strategy": "tree"}, "strategy must be one of .*'tree'"),
        (
            {"strategy": "ring", "backend": "reference"},
            'strategy must be "auto" or "all_gather" with backend="reference", got "ring"',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_rank_that_refuses_its_arguments_stops_the_others(
    ranks: Pool, change: dict[str, Any], expected: str
) -> None:
    messages = ranks(3).run(message_of, [{}, change, {}])
    assert re.search(expected, messages[1]), messages[1]
    for message in (messages[0], messages[2]):
        assert "rank 1 raised an error for its own" in message


def test_mistakes_in_one_process() -> None:
    query, key = torch.randn(2, 4, 6)
    with pytest.raises(TypeError, match="group must be a process group or None, got str"):
        info_nce(query, key, group="all")  # type: ignore[arg-type]
    expected = "distributed must be False with in_batch_negatives=False, got True"
    with pytest.raises(ValueError, match=expected):
        InfoNCELoss(in_batch_negatives=False, distributed=True)
    expected = 'strategy must be "auto" or "all_gather" with in_batch_negatives=False, got "ring"'
    queue: dict[str, Any] = {"in_batch_negatives": False, "strategy": "ring"}
    with pytest.raises(ValueError, match=expected):
        InfoNCELoss(**queue)
    with pytest.raises(ValueError, match=expected):
        info_nce(query, key, key, **queue)
    with pytest.raises(ValueError, match=r"strategy must be one of .*'tree'"):
        InfoNCELoss(strategy="tree")  # type: ignore[arg-type]
    loss_fn = InfoNCELoss(distributed=True)  # one process without a group
    assert torch.equal(loss_fn(query, key)["loss"], InfoNCELoss()(query, key)["loss"])
