"""DCL over ranks, by the ring and by the all-gather, against one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eager import textbook_nt_xent
from overloads import BACKENDS
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import NTXentOutput, nt_xent, triton

Pool = Callable[[int], Ranks]
FEATURES = 24
KERNELS = [name for name in BACKENDS if name != "reference"]
TEMPERATURE = 0.2
STRATEGIES = ["all_gather", "ring"]

# The pairs of each rank. A rank with one pair has no negative of its own.
BATCHES = [[5, 5], [3, 8], [2, 5, 1], [70, 150, 97]]
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none_low_temperature": {"reduction": "none", "temperature": 0.01},
    "dot_product": {"use_cosine_similarity": False, "temperature": 30.0, "reduction": "none"},
}


def shards(batches: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Both views of each rank as one tensor (2, B_r, D)."""
    generator = torch.Generator().manual_seed(sum(batches))
    return [
        torch.randn(2, batch, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        for batch in batches
    ]


def upstream_of(loss: Tensor) -> Tensor:
    """Gradients that differ from loss to loss; 1 for a reduced loss."""
    if loss.ndim == 0:
        return torch.ones_like(loss)
    return torch.linspace(0.5, 1.5, len(loss)).to(loss)


def rank_step(
    batches: list[int], dtype: torch.dtype, options: dict[str, Any]
) -> tuple[NTXentOutput, Tensor, Tensor, int]:
    """Run on each rank: the result, gradients of views and temperature, number of Triton calls."""
    launches: list[str] = []
    launch = triton._call

    def counted(module: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        launches.append(name)
        return launch(module, name, args)

    options = dict(options)
    z = shards(batches, dtype)[dist.get_rank()].requires_grad_()
    temperature = temperature_of(options, dtype)
    triton._call = counted  # type: ignore[assignment]
    try:
        out = nt_xent(
            *z, temperature=temperature, decoupled=True, group=dist.group.WORLD, **options
        )
        gradients = torch.autograd.grad(out.loss, (z, temperature), upstream_of(out.loss))
    finally:
        triton._call = launch
    return NTXentOutput(*(value.detach() for value in out)), *gradients, len(launches)


def temperature_of(options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The temperature, which is taken out of the options, in fp32 or fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor(options.pop("temperature", TEMPERATURE), dtype=wide).requires_grad_()


def in_order(parts: list[Tensor]) -> Tensor:
    """The ranks' numbers of rows in the order of the whole batch."""
    return torch.cat([part.view(2, -1) for part in parts], dim=1).flatten()


def check(
    results: list[Any], batches: list[int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Compare with the float64 reference, by the error of the usual formula in the same dtype."""
    options = {name: options[name] for name in options.keys() - {"strategy", "backend"}}
    reduction = options.pop("reduction", "mean")
    rounded = torch.cat(shards(batches, dtype), dim=1)
    ones = [torch.ones(2 * batch) for batch in batches]
    upstream = in_order([upstream_of(x) for x in ones] if reduction == "none" else ones)
    # The loss, the gradients of views and temperature: exact, and by the usual formula.
    one_process = []
    for of_dtype in (torch.float64, dtype):
        z = rounded.detach().to(of_dtype, copy=True).requires_grad_()
        arguments = dict(options)
        temperature = temperature_of(arguments, of_dtype)
        losses = textbook_nt_xent(*z, temperature=temperature, decoupled=True, **arguments)
        gradients = torch.autograd.grad(losses, (z, temperature), upstream.to(losses))
        one_process.append((losses, *gradients))
    options.setdefault("temperature", TEMPERATURE)
    truth = nt_xent(*rounded.double(), decoupled=True, backend="reference", **options)
    exact, eager = one_process
    rows = len(exact[0])
    # What the ranks' results are divided by, and those of one process without a reduction.
    own, whole = {"mean": (len(batches), rows), "sum": (1, 1), "none": (1, 1)}[reduction]

    def reduced(losses: Tensor) -> Tensor:
        return losses if reduction == "none" else losses.sum() / whole

    parts = [out.loss for out, *_ in results]
    loss = in_order(parts) if reduction == "none" else torch.stack(parts).sum() / own
    of_views = torch.cat([gradient for _, gradient, *_ in results], dim=1).double() / own
    of_temperature = torch.stack([result[2] for result in results]).sum() / own
    for actual, plain, expected, floor in (
        (loss, reduced(eager[0]), reduced(exact[0]), FLOOR_VALUE),
        (of_views, eager[1] / whole, exact[1] / whole, FLOOR_GRADIENT),
        (of_temperature, eager[2] / whole, exact[2] / whole, FLOOR_GRADIENT),
    ):
        error = relative_error(actual, expected)
        assert error <= 2 * relative_error(plain, expected) + floor[dtype]
    lse = in_order([out.lse for out, *_ in results])
    assert relative_error(lse, truth.lse) <= FLOOR_VALUE[dtype]
    for out, *_ in results:
        for metric in ("accuracy", "positive_similarity", "negative_similarity"):
            value, expected = getattr(out, metric), getattr(truth, metric)
            assert torch.equal(value, getattr(results[0][0], metric))
            assert (value - expected).abs() <= METRIC[dtype] * max(1.0, expected.abs().item())


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ranks_equal_one_process(
    ranks: Pool, batches: list[int], strategy: str, option: str, dtype: torch.dtype
) -> None:
    options = {**OPTIONS[option], "strategy": strategy}
    results = ranks(len(batches)).run(rank_step, batches, dtype, options)
    check(results, batches, dtype, options)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_back_end(ranks: Pool, strategy: str, backend: str) -> None:
    options = {"strategy": strategy, "backend": backend}
    results = ranks(2).run(rank_step, [3, 8], torch.float32, options)
    check(results, [3, 8], torch.float32, options)
    assert all((launches > 0) == (backend == "triton") for *_, launches in results)


def test_the_reference_of_a_group(ranks: Pool) -> None:
    options = {"backend": "reference", "reduction": "none"}
    results = ranks(3).run(rank_step, [2, 5, 1], torch.float64, options)
    check(results, [2, 5, 1], torch.float64, options)


def message_of_no_negatives(backend: str) -> str:
    z = torch.randn(2, 1, 4)
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    try:
        nt_xent(*z, decoupled=True, group=groups[dist.get_rank()], backend=backend)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_one_pair_in_all_ranks_is_an_error(ranks: Pool, backend: str) -> None:
    for message in ranks(2).run(message_of_no_negatives, backend):
        assert 'decoupled must be False (and contrastive_type not "dcl") without' in message
        assert "got one pair in all ranks together" in message
