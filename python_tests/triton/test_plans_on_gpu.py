"""Launch plans on a GPU: the bits of the usual code, streams, threads, CUDA graphs and memory.

Run the tests with CJEPA_LAUNCH_PLANS=1, which uses plans also where they have not passed these.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planned_calls import (
    NT_XENT,
    SELF,
    hierarchy,
    hierarchy_backward,
    nt_xent_backward,
    nt_xent_forward,
    rectangle,
    rectangle_backward,
    rows_of_a_batch,
    rows_of_a_batch_backward,
    same,
)
from torch import Tensor

from cjepa_kernels import NTXentLoss, backends, nt_xent
from cjepa_kernels.backends import compiled_module
from cjepa_kernels.ops import operator
from cjepa_kernels.triton import OPERATORS, planned

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)
if not backends()["triton"].available:
    pytest.skip(backends()["triton"].reason, allow_module_level=True)
if os.environ.get("CJEPA_LAUNCH_PLANS") != "1":
    pytest.skip("CJEPA_LAUNCH_PLANS=1 asks for launch plans", allow_module_level=True)
C: Any = compiled_module()
if C is None:
    pytest.skip(backends()["native"].reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def no_plans_yet() -> Iterator[None]:
    C.forget_plans()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


def check_replays(name: str, arguments: Any) -> None:
    """Compare a replayed call with the usual code, bit for bit, for other values."""
    function = OPERATORS[name.removesuffix("_backward")][name.endswith("_backward")]
    before = C.plan_count()
    for call in range(4):
        args = arguments(call)
        same(operator(name)(*args), function(*args))
    assert C.plan_count() == before + 1, planned.refusals().get(name)


@pytest.mark.parametrize("case", [*NT_XENT, "large_bf16", "wide", "large_fp32"])
def test_nt_xent_is_replayed(case: str) -> None:
    options = {
        **NT_XENT,
        "large_bf16": {"batch": 4096, "features": 256, "dtype": torch.bfloat16},
        "wide": {"batch": 2048, "features": 768, "dtype": torch.bfloat16},
        "large_fp32": {"batch": 2048, "features": 256},
    }[case]
    check_replays("nt_xent", lambda call: nt_xent_forward(call, **options))
    check_replays("nt_xent_backward", lambda call: nt_xent_backward(call, **options))


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU")
@pytest.mark.parametrize("features", [128, 512, 768])
def test_gluon_kernels_are_replayed(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "1")
    options: dict[str, Any] = {"batch": 8192, "features": features, "dtype": torch.bfloat16}
    check_replays("nt_xent", lambda call: nt_xent_forward(call, **options))
    check_replays("nt_xent_backward", lambda call: nt_xent_backward(call, **options))


def test_tf32_is_part_of_the_key() -> None:
    for allowed in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            check_replays("nt_xent", lambda call: nt_xent_forward(call, batch=200))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert C.plan_count() == 2


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_cross_logsumexp_is_replayed(tensor: bool) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "tensor": tensor}
    check_replays("cross_logsumexp", lambda call: rectangle(call, **options))
    check_replays(
        "cross_logsumexp_backward",
        lambda call: rectangle_backward(call, of_x=True, of_y=True, **options),
    )


@pytest.mark.parametrize("case", SELF)
def test_self_logsumexp_is_replayed(case: str) -> None:
    options: dict[str, Any] = SELF[case]
    check_replays("self_logsumexp", lambda call: rows_of_a_batch(call, **options))
    check_replays("self_logsumexp_backward", lambda call: rows_of_a_batch_backward(call, **options))


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "mask"])
def test_prediction_loss_is_replayed(mask: bool) -> None:
    options: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "loss_type": "smoothl1",
        "normalization": "layer",
        "reduction": "mean",
        "mask": mask,
    }
    check_replays("prediction_loss", lambda call: hierarchy(call, **options))
    check_replays("prediction_loss_backward", lambda call: hierarchy_backward(call, **options))


def step(z: Tensor, loss: NTXentLoss) -> list[Tensor]:
    """The loss and the gradient."""
    value = loss(z[0], z[1])
    return [value, *torch.autograd.grad(value, (z, *loss.parameters()))]


def inputs(batch: int = 512) -> Tensor:
    return torch.randn(2, batch, 256, dtype=torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
def test_training_steps_are_replayed(learnable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = NTXentLoss(0.1, learnable_temperature=learnable).cuda()
    batches = [inputs() for _ in range(4)]
    replayed = [step(z, loss) for z in batches]
    assert C.plan_count() == 2
    monkeypatch.setenv("CJEPA_WORKSPACE_MIB", "256.0")  # Another key, and the same launches.
    C.forget_plans()
    for z, expected in zip(batches, replayed, strict=True):
        same(step(z, loss), expected)
        C.forget_plans()


def test_a_schedule_of_the_temperature_takes_one_plan() -> None:
    z = inputs()
    for k in range(6):
        out = nt_xent(z[0], z[1], temperature=0.1 + 0.01 * k)
        torch.autograd.grad(out.loss, z)
    assert C.plan_count() == 2


def test_another_stream_and_another_thread() -> None:
    loss = NTXentLoss(0.1)
    batches = [inputs() for _ in range(6)]
    expected = [step(z, loss) for z in batches]
    torch.cuda.synchronize()
    found: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        torch.set_default_device("cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            found[k] = step(batches[k], loss)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for k, values in enumerate(expected):
        same(found[k], values)


def test_a_graph_captures_plans_and_makes_none() -> None:
    loss, z = NTXentLoss(0.1), inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for steps in (1, 3):  # The capture without plans, then with plans.
        with torch.cuda.stream(stream):
            for _ in range(steps):
                step(z, loss)
        torch.cuda.current_stream().wait_stream(stream)
        plans = C.plan_count()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(z, loss)
        assert C.plan_count() == plans
        with torch.no_grad():
            z.copy_(torch.randn_like(z))
        graph.replay()
        same(captured, step(z, loss))


def peak(z: Tensor, loss: NTXentLoss) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(z, loss)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def test_a_plan_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, z = NTXentLoss(0.1), inputs(8192)
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", "0")
    step(z, loss)
    usual = peak(z, loss)
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", "1")
    C.forget_plans()
    for _ in range(3):
        step(z, loss)
    assert C.plan_count() == 2
    assert peak(z, loss) <= 1.05 * usual + 2**20


def test_the_dispatcher_accepts_the_operators() -> None:
    args = nt_xent_forward(0, batch=64, features=32)
    for _ in range(3):
        operator("nt_xent")(*args)
    torch.library.opcheck(operator("nt_xent"), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_each_device_has_its_plans() -> None:
    loss = NTXentLoss(0.1)
    z = inputs().detach()
    found = []
    for device in ("cuda:0", "cuda:1"):
        there = z.to(device).requires_grad_()
        for _ in range(3):
            values = step(there, loss)
        found.append([value.cpu() for value in values])
    assert C.plan_count() == 4
    same(*found)
