"""MomentumQueue holds the last keys, and never changes a gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from overloads import DEVICE
from torch import Tensor, nn

from cjepa_kernels import InfoNCELoss, MomentumQueue, info_nce


def keys_of(numbers: list[int], features: int = 3) -> Tensor:
    """Rows that show their number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, features).contiguous()


def numbers_in(queue: MomentumQueue) -> list[int]:
    return sorted(int(number) for number in queue.negatives()[:, 0])


@pytest.mark.parametrize("size", [1, 4, 7, 10, 64])
@pytest.mark.parametrize("batches", [[3, 3, 3, 3], [1, 5, 2, 8], [7, 7], [25, 1, 13]], ids=str)
def test_the_last_keys_stay(size: int, batches: list[int]) -> None:
    """Whether a batch divides the size, fits at the end, or has more rows than the queue."""
    queue = MomentumQueue(size, 3)
    seen: list[int] = []
    for batch in batches:
        new = list(range(len(seen), len(seen) + batch))
        queue.enqueue(keys_of(new))
        seen += new
        assert numbers_in(queue) == seen[-size:]
        assert queue.filled == min(len(seen), size)


def test_it_begins_empty_and_only_its_keys_are_negatives() -> None:
    query, key = torch.randn(2, 5, 3)
    queue = MomentumQueue(16, 3)
    assert queue.negatives().shape == (0, 3)
    loss_fn = InfoNCELoss(in_batch_negatives=False)
    assert loss_fn(query, key, queue.negatives())["loss"] == 0
    first = torch.randn(6, 3)
    queue.enqueue(first)
    torch.testing.assert_close(
        loss_fn(query, key, queue.negatives()), loss_fn(query, key, first), rtol=0, atol=0
    )


def test_random_rows_at_the_start() -> None:
    queue = MomentumQueue(50, 8, random_start=True)
    assert queue.filled == 50
    torch.testing.assert_close(queue.negatives().norm(dim=1), torch.ones(50))
    before = queue.negatives()
    queue.enqueue(torch.full((2, 8), 9.0))
    assert (queue.negatives()[:2] == 9).all()
    assert torch.equal(queue.negatives()[2:], before[2:])
    queue.reset()
    assert queue.filled == 50
    assert not torch.isin(before, queue.negatives()).any()


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "queue"])
def test_a_backward_after_enqueue(backend: Any, in_batch: bool) -> None:
    """The gradient is that of the keys at the time of the forward."""
    gradients = []
    for enqueued in (False, True):
        torch.manual_seed(1)
        queue = MomentumQueue(12, 6, random_start=True)
        query, key = torch.randn(2, 8, 6)
        query.requires_grad_()
        loss = info_nce(
            query, key, queue.negatives(), in_batch_negatives=in_batch, backend=backend
        ).loss
        if enqueued:
            queue.enqueue(key)
            queue.enqueue(100 * torch.randn(20, 6))
        gradients.append(torch.autograd.grad(loss, query)[0])
    assert torch.equal(*gradients)


def test_keys_with_a_gradient_are_not_remembered_with_it() -> None:
    queue = MomentumQueue(4, 3)
    weight = torch.ones(3, requires_grad=True)
    queue.enqueue(weight * torch.ones(2, 3))
    assert not queue.negatives().requires_grad
    assert not queue.keys.requires_grad
    weight.detach().fill_(5.0)
    assert (queue.negatives() == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_keys", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, of_keys: torch.dtype) -> None:
    queue = MomentumQueue(4, 6, dtype=dtype)
    keys = torch.randn(6, 6).to(of_keys)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        queue.enqueue(keys)
        assert queue.negatives().dtype == dtype
    assert torch.equal(queue.negatives().sort(dim=0).values, keys[2:].to(dtype).sort(dim=0).values)
    out = InfoNCELoss(in_batch_negatives=False)(keys, keys, queue.negatives())
    assert out["loss"].isfinite()


def test_keys_made_under_inference_mode() -> None:
    queue = MomentumQueue(4, 3)
    with torch.inference_mode():
        keys = keys_of([1, 2, 3])
        queue.enqueue(keys)
    queue.enqueue(keys)
    assert numbers_in(queue) == [1, 2, 3, 3]
    query = torch.randn(3, 3, requires_grad=True)
    with torch.inference_mode():
        negatives = queue.negatives()
    InfoNCELoss()(query, keys, negatives)["loss"].backward()


def test_state_moves_and_copies() -> None:
    queue = MomentumQueue(5, 3)
    queue.enqueue(keys_of(list(range(7))))
    assert set(queue.state_dict()) == {"keys", "counters"}
    assert list(queue.parameters()) == []
    loaded = MomentumQueue(5, 3)
    loaded.load_state_dict(queue.state_dict())
    assigned = nn.Sequential(MomentumQueue(5, 3))
    assigned.load_state_dict({f"0.{k}": v for k, v in queue.state_dict().items()}, assign=True)
    others = [
        loaded,
        copy.deepcopy(assigned)[0],
        copy.deepcopy(queue),
        pickle.loads(pickle.dumps(queue)),
    ]
    queue.enqueue(keys_of([7, 8, 9]))
    for other in others:
        assert isinstance(other, MomentumQueue)
        assert numbers_in(other) == [2, 3, 4, 5, 6]
        other.enqueue(keys_of([7, 8, 9]))
        assert torch.equal(other.keys, queue.keys)
        assert torch.equal(other.counters, queue.counters)
        assert repr(other) == repr(queue)
    moved = queue.to(torch.float64)
    assert moved.keys.dtype == torch.float64
    assert moved.counters.dtype == torch.int64
    larger = MomentumQueue(6, 3)
    with pytest.raises(RuntimeError, match="size mismatch for keys"):
        larger.load_state_dict(queue.state_dict())
    assert larger.filled == 0
    assert larger.counters.tolist() == [0, 0]


@pytest.mark.parametrize("counters", [[5, 5], [-1, 2], [0, 6], [2, 1], [99, 99]], ids=str)
def test_wrong_counters_are_refused(counters: list[int]) -> None:
    queue = MomentumQueue(5, 3)
    queue.enqueue(keys_of([1, 2]))
    state = MomentumQueue(5, 3).state_dict() | {"counters": torch.tensor(counters)}
    with pytest.raises(RuntimeError, match=r"counters must .* or 5, both from 0, got"):
        queue.load_state_dict(state)
    assert numbers_in(queue) == [1, 2]


def test_the_meta_device() -> None:
    queue = MomentumQueue(5, 3, device="meta")
    assert "5, 3, filled=0" in repr(queue)
    queue = queue.to_empty(device=DEVICE)
    queue.reset_parameters()
    assert queue.negatives().shape == (0, 3)
    assert torch.equal(queue.counters.cpu(), torch.zeros(2, dtype=torch.int64, device="cpu"))


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled on the CPU")
def test_a_compiled_step() -> None:
    """The graph breaks at the queue, and no number of keys is compiled in."""
    queue = MomentumQueue(20, 6, random_start=True)
    plain = copy.deepcopy(queue)
    loss_fn = InfoNCELoss(in_batch_negatives=False)
    compilations: list[None] = []

    def compiler(graph: Any, _: Any) -> Any:
        compilations.append(None)
        return graph.forward

    def step(queue: MomentumQueue, query: Tensor, key: Tensor) -> Tensor:
        scaled = 2 * query
        negatives = queue.negatives()
        queue.enqueue(key)
        return loss_fn(scaled, key, negatives)["loss"] + scaled.sum()

    compiled = torch.compile(step, backend=compiler)
    counts = []
    for _ in range(5):
        query, key = torch.randn(2, 5, 6)
        torch.testing.assert_close(compiled(queue, query, key), step(plain, query, key))
        counts.append(len(compilations))
    assert counts == [2] * 5  # a graph before the queue and one after it


def test_a_loop_as_in_moco() -> None:
    """Twenty steps: the loss is cross entropy over the positive and the last 32 keys."""
    queue, loss_fn = MomentumQueue(32, 6), InfoNCELoss(0.2, in_batch_negatives=False)
    past = torch.empty(0, 6)
    for _ in range(20):
        query, key = nn.functional.normalize(torch.randn(2, 7, 6), dim=2)
        loss = loss_fn(query, key, queue.negatives())["loss"]
        logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ past.T], dim=1) / 0.2
        expected = nn.functional.cross_entropy(logits, torch.zeros(7, dtype=torch.int64))
        torch.testing.assert_close(loss, expected)
        queue.enqueue(key)
        past = torch.cat([past, key])[-32:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 2.5}, TypeError, "size must be an int, got 2.5"),
        ({"features": True}, TypeError, "features must be an int, got True"),
        ({"random_start": 1}, TypeError, "random_start must be True or False, got 1"),
        ({"dtype": torch.int64}, ValueError, "dtype must be .* got torch.int64"),
        ({"distributed": 1}, TypeError, "distributed must be a bool or a process group, got int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MomentumQueue(**{"size": 4, "features": 3} | arguments)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([1.0], TypeError, "keys must be a tensor, got list"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "keys must be of fp64"),
        (torch.zeros(3), ValueError, r"keys must be \(N, 3\), got \(3,\)"),
        (torch.zeros(2, 4), ValueError, r"keys must be \(N, 3\) .* got \(2, 4\)"),
        (torch.zeros(0, 3), ValueError, r"keys must be \(N, 3\) with at least one row"),
        (torch.zeros(2, 3, device="meta"), ValueError, "keys must be on the device of the queue"),
    ],
    ids=["list", "dtype", "ndim", "features", "empty", "device"],
)
def test_mistakes_in_the_keys_are_named(keys: Any, error: type[Exception], message: str) -> None:
    queue = MomentumQueue(4, 3)
    with pytest.raises(error, match=message):
        queue.enqueue(keys)
    assert queue.filled == 0
