"""Ranks that exchange by NCCL get the results of one process without a group.

Pytest alone is one rank. A machine with several GPUs has a rank on each of them:

    torchrun --nproc-per-node=2 -m pytest python_tests/distributed/test_nccl.py

Without a GPU the same tests use gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eager import textbook_info_nce, textbook_nt_xent
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import MomentumQueue, NTXentLoss, info_nce, nt_xent, sup_con

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
FEATURES = 72
BATCHES = [300 + 40 * rank for rank in range(RANKS)]
METRICS = ("accuracy", "positive_similarity", "negative_similarity")
STRATEGIES = pytest.mark.parametrize("strategy", ["all_gather", "ring"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@dataclass(frozen=True)
class Member:
    """This process as a member of a group."""

    group: Any
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over the ranks."""
        total = value.detach().double().clone()
        dist.all_reduce(total, group=self.group)
        return total / RANKS


@pytest.fixture(scope="module", params=["nccl", "gloo"])
def member(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Member]:
    """A group of all ranks."""
    device = torch.device("cpu")
    if request.param == "nccl":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        if not dist.is_nccl_available():
            pytest.skip("this PyTorch is built without NCCL")
        if torch.cuda.device_count() < RANKS:
            pytest.skip(f"{RANKS} ranks need as many GPUs, found {torch.cuda.device_count()}")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    elif torch.cuda.is_available():
        pytest.skip("with a GPU the tests use NCCL")
    alone = f"file://{tmp_path_factory.mktemp('group')}/store"
    dist.init_process_group(
        request.param,
        init_method=alone if RANKS == 1 else "env://",
        rank=RANK,
        world_size=RANKS,
        timeout=timedelta(seconds=30),
    )
    yield Member(dist.group.WORLD, device)
    dist.destroy_process_group()


def whole_batch(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Both views of all ranks (2, B, D), the same numbers on every rank."""
    generator = torch.Generator().manual_seed(7)
    shape = (2, sum(BATCHES), FEATURES)
    z_i, noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.stack([z_i, z_i + noise]).to(device, dtype)


def own(whole: Tensor) -> Tensor:
    """The part of this rank."""
    return whole.split(BATCHES, dim=1)[RANK].clone()


@STRATEGIES
@DTYPES
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_ranks_get_the_result_of_the_whole_batch(
    member: Member, strategy: Any, dtype: torch.dtype, temperature: float
) -> None:
    whole = whole_batch(member.device, dtype)
    z = own(whole).requires_grad_()
    out = nt_xent(z[0], z[1], temperature=temperature, group=member.group, strategy=strategy)
    out.loss.backward()
    assert z.grad is not None

    exact = whole.double().requires_grad_()
    truth = nt_xent(exact[0], exact[1], temperature=temperature, backend="reference")
    truth.loss.backward()
    plain = whole.clone().requires_grad_()
    eager = textbook_nt_xent(plain[0], plain[1], temperature=temperature).mean()
    eager.backward()

    error = relative_error(member.mean(out.loss), truth.loss)
    assert error <= 2 * relative_error(eager, truth.loss) + FLOOR_VALUE[dtype]
    for name in METRICS:
        value = getattr(out, name)
        assert torch.equal(member.mean(value), value.double()), "the ranks differ"
        assert (value - getattr(truth, name)).abs() <= METRIC[dtype]
    # Each rank has the gradient of the sum of the ranks' losses, of which there are RANKS.
    assert exact.grad is not None
    assert plain.grad is not None
    error = relative_error(z.grad / RANKS, own(exact.grad))
    allowed = 2 * relative_error(own(plain.grad), own(exact.grad)) + FLOOR_GRADIENT[dtype]
    assert error <= allowed


@STRATEGIES
@DTYPES
@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_info_nce_of_the_whole_batch(
    member: Member, strategy: Any, dtype: torch.dtype, symmetric: bool
) -> None:
    whole = whole_batch(member.device, dtype)
    z = own(whole).requires_grad_()
    options: dict[str, Any] = {"temperature": 0.05, "symmetric": symmetric}
    out = info_nce(z[0], z[1], group=member.group, strategy=strategy, **options)
    (gradient,) = torch.autograd.grad(out.loss, z)
    exact = whole.double().requires_grad_()
    truth = info_nce(exact[0], exact[1], backend="reference", **options)
    (expected,) = torch.autograd.grad(truth.loss, exact)
    plain = whole.clone().requires_grad_()
    eager = textbook_info_nce(plain[0], plain[1], **options)
    (of_eager,) = torch.autograd.grad(eager, plain)

    error = relative_error(member.mean(out.loss), truth.loss)
    assert error <= 2 * relative_error(eager, truth.loss) + FLOOR_VALUE[dtype]
    for name in METRICS:
        value = getattr(out, name)
        assert torch.equal(member.mean(value), value.double()), "the ranks differ"
        assert (value - getattr(truth, name)).abs() <= 4 * METRIC[dtype]
    allowed = 2 * relative_error(own(of_eager), own(expected)) + FLOOR_GRADIENT[dtype]
    assert relative_error(gradient / RANKS, own(expected)) <= allowed


@STRATEGIES
def test_dcl_of_the_whole_batch(member: Member, strategy: Any) -> None:
    whole = whole_batch(member.device, torch.float32)
    z = own(whole).requires_grad_()
    options: dict[str, Any] = {"temperature": 0.05, "decoupled": True}
    out = nt_xent(z[0], z[1], group=member.group, strategy=strategy, **options)
    (gradient,) = torch.autograd.grad(out.loss, z)
    exact = whole.double().requires_grad_()
    truth = nt_xent(exact[0], exact[1], backend="reference", **options)
    (expected,) = torch.autograd.grad(truth.loss, exact)
    plain = whole.clone().requires_grad_()
    eager = textbook_nt_xent(plain[0], plain[1], **options).mean()
    (of_eager,) = torch.autograd.grad(eager, plain)
    error = relative_error(member.mean(out.loss), truth.loss)
    assert error <= 2 * relative_error(eager, truth.loss) + FLOOR_VALUE[z.dtype]
    allowed = 2 * relative_error(own(of_eager), own(expected)) + FLOOR_GRADIENT[z.dtype]
    assert relative_error(gradient / RANKS, own(expected)) <= allowed


@DTYPES
def test_sup_con_has_the_bits_of_one_process(member: Member, dtype: torch.dtype) -> None:
    rows = whole_batch(member.device, dtype).transpose(0, 1)  # (B, 2, D)
    labels = torch.arange(len(rows), device=member.device) % 7
    z = own(rows.transpose(0, 1)).transpose(0, 1).requires_grad_()
    own_labels = own(labels.expand(2, -1))[0]
    out = sup_con(z, own_labels, reduction="none", group=member.group)
    (gradient,) = torch.autograd.grad(out.loss.sum(), z)
    whole = rows.clone().requires_grad_()
    expected = sup_con(whole, labels, reduction="none")
    (of_whole,) = torch.autograd.grad(expected.loss.sum(), whole)

    def part(values: Tensor) -> Tensor:
        """This rank's part of (B, ...) samples."""
        return own(values.expand(2, *values.shape))[0]

    assert torch.equal(out.loss, part(expected.loss.view(-1, 2)).flatten())
    assert torch.equal(gradient, part(of_whole))
    assert torch.equal(out.num_anchors, expected.num_anchors)


def test_a_queue_holds_the_keys_of_all_ranks(member: Member) -> None:
    keys = whole_batch(member.device, torch.float32)[:1]
    queue = MomentumQueue(500, FEATURES, distributed=member.group, device=member.device)
    alone = MomentumQueue(500, FEATURES, device=member.device)
    for scale in (1.0, 2.0):
        queue.enqueue(scale * own(keys)[0])
        alone.enqueue(scale * keys[0])
    assert torch.equal(queue.negatives(), alone.negatives())


@STRATEGIES
def test_a_learnable_temperature_has_its_gradient(member: Member, strategy: Any) -> None:
    whole = whole_batch(member.device, torch.float32)
    gradients = []
    for views, options in (
        (own(whole), {"distributed": member.group, "strategy": strategy}),
        (whole.double(), {"backend": "reference"}),
    ):
        loss_fn = NTXentLoss(0.2, learnable_temperature=True, **options)  # type: ignore[arg-type]
        loss_fn.to(member.device, views.dtype)
        loss_fn(views[0], views[1])["loss"].backward()
        (parameter,) = loss_fn.parameters()
        assert parameter.grad is not None
        gradients.append(parameter.grad)
    mine, exact = gradients
    assert relative_error(member.mean(mine), exact) <= 10 * FLOOR_GRADIENT[torch.float32]


@pytest.mark.skipif(RANKS > 1, reason="for one rank")
@STRATEGIES
@DTYPES
@pytest.mark.parametrize("pairs", [1, 300])
def test_one_rank_gets_the_result_of_no_group(
    member: Member, strategy: Any, dtype: torch.dtype, pairs: int
) -> None:
    results = []
    for options in ({}, {"group": member.group, "strategy": strategy}):
        z = whole_batch(member.device, dtype)[:, :pairs].clone().requires_grad_()
        out = nt_xent(z[0], z[1], **options)
        out.loss.backward()
        results.append((*(value.detach() for value in out), z.grad))
    torch.testing.assert_close(*results, equal_nan=True)
