"""A new back end: a mapping from operators to implementations, and its name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cjepa_kernels import BackendStatus, backends, chunked, cross_logsumexp, nt_xent, ops
from cjepa_kernels.functional import dispatch

module: Any = importlib.import_module("cjepa_kernels.backends")  # a function has the same name


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Compute three times NT-Xent, so that a result shows which back end computed it."""
    out = chunked.nt_xent.forward(*args)
    return out._replace(loss=3 * out.loss)


def backward(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return chunked.nt_xent.backward(3 * grad_loss, *args)


def registered(name: str, status: BackendStatus) -> Iterator[str]:
    """Register a back end that has one operator, yield its name, and make it unknown again."""
    ops.register_backend(name, {"nt_xent": (forward, backward)})
    module.add_backend(name, lambda: status)
    yield name
    module.remove_backend(name)


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    yield from registered("toy", BackendStatus(True, ("any",), "three times the loss"))


def test_values_and_gradients_come_from_it(toy: Any) -> None:
    results = {}
    for name in ("chunked", toy):
        z_i, z_j = torch.manual_seed(0) and torch.randn(2, 5, 4).unbind()
        z_i.requires_grad_()
        temperature = torch.tensor(0.5, requires_grad=True)
        loss = nt_xent(z_i, z_j, temperature=temperature, backend=name).loss
        results[name] = [loss, *torch.autograd.grad(loss, (z_i, temperature))]
    for ours, others in zip(results[toy], results["chunked"], strict=True):
        torch.testing.assert_close(ours, 3 * others)


def test_it_takes_part_in_a_compiled_graph(toy: Any) -> None:
    z_i, z_j = torch.randn(2, 5, 4)
    z_i.requires_grad_()
    compiled = torch.compile(nt_xent, backend="aot_eager", fullgraph=True)
    losses = [function(z_i, z_j, backend=toy).loss for function in (compiled, nt_xent)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z_i)[0] for loss in losses))


def test_it_is_listed_and_errors_name_it(toy: Any) -> None:
    assert backends()[toy].reason == "three times the loss"
    with pytest.raises(ValueError, match=r"backend must be one of .*'toy'"):
        nt_xent(torch.eye(2), torch.eye(2), backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match='"toy" has no operator cross_logsumexp'):
        cross_logsumexp(torch.eye(2), torch.eye(2), backend=toy)


@pytest.fixture(scope="module")
def of_gpus() -> Iterator[Any]:
    yield from registered("of_gpus", BackendStatus(True, ("cuda",), "on GPUs only"))


@pytest.mark.parametrize("compiled", [False, True])
def test_tensors_on_a_device_that_it_does_not_serve_are_an_error(
    of_gpus: Any, compiled: bool
) -> None:
    function = torch.compile(nt_xent, backend="aot_eager") if compiled else nt_xent
    with pytest.raises(ValueError, match='"of_gpus" serves tensors on cuda, got tensors on cpu'):
        function(torch.eye(2), torch.eye(2), backend=of_gpus)
    on_meta = torch.empty(3, 4, device="meta")  # the values of this device are never computed
    assert nt_xent(on_meta, on_meta, backend=of_gpus).loss.is_meta


def test_native_refuses_tensors_on_a_gpu() -> None:
    """The dispatcher would run another back end there in silence."""
    with pytest.raises(ValueError, match='"native" serves tensors on cpu, got tensors on cuda'):
        dispatch.choose_overload("native", torch.device("cuda"))
    assert dispatch.choose_overload("native", torch.device("meta")) == ""
