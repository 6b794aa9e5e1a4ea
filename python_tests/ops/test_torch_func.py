"""torch.func, forward mode and second derivatives work in the reference. Other back ends refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from overloads import BACKENDS
from ranks import Ranks
from torch import Tensor, func
from torch.autograd import forward_ad

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    cross_logsumexp,
    nt_xent,
    prediction_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]
KERNELS = [name for name in BACKENDS if name != "reference"]
POINTER = 'use backend="reference"'
LOSSES = pytest.mark.parametrize(
    "name", ["nt_xent", "cross_logsumexp", "prediction_loss", "NTXentLoss", "ContrastiveJEPALoss"]
)
TRANSFORMS = pytest.mark.parametrize(
    "transform",
    ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap", "vmap_of_grad", "linearize"],
)


def make_loss(name: str, backend: Any) -> Loss:
    """A function that computes one number from two (B, D) tensors."""
    if name == "nt_xent":
        return lambda a, b: nt_xent(a, b, backend=backend).loss
    if name == "cross_logsumexp":
        return lambda a, b: cross_logsumexp(a, b, backend=backend).row_lse.sum()
    if name == "prediction_loss":
        return lambda a, b: prediction_loss(a, b, backend=backend)
    if name == "NTXentLoss":
        return lambda a, b: NTXentLoss(backend=backend)(a, b)["loss"]
    module = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1, backend=backend), backend=backend)
    return lambda a, b: module([a], [b], a[:, None], b[:, None])["loss"]


def plain(a: Tensor, b: Tensor) -> Tensor:
    """NT-Xent as users write it in a notebook."""
    z = torch.nn.functional.normalize(torch.cat([a, b]))
    rows = len(z)
    logits = (z @ z.T / 0.1).masked_fill(torch.eye(rows, dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(rows).roll(len(a)))


def apply(transform: str, loss: Loss, a: Tensor, b: Tensor) -> Any:
    if transform == "vmap":
        return func.vmap(loss)(torch.stack([a, b]), torch.stack([b, a]))
    if transform == "vmap_of_grad":
        return func.vmap(func.grad(loss))(torch.stack([a, b]), torch.stack([b, a]))
    if transform == "vjp":
        return func.vjp(loss, a, b)[1](torch.ones((), dtype=a.dtype))
    if transform == "jvp":
        return func.jvp(loss, (a, b), (b, a))[1]
    if transform == "linearize":
        return func.linearize(loss, a, b)[1](b, a)
    return getattr(func, transform)(loss)(a, b)


def pair() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    return a, b


@LOSSES
@TRANSFORMS
def test_kernels_point_to_the_reference(name: str, transform: str) -> None:
    for backend in KERNELS:
        loss = make_loss(name, backend)
        with pytest.raises(RuntimeError, match=POINTER):
            apply(transform, loss, *pair())
        # Without the check, a call under no_grad would lose the tangent silently.
        if transform in ("jvp", "linearize"):
            with torch.no_grad(), pytest.raises(RuntimeError, match=POINTER):
                apply(transform, loss, *pair())


@TRANSFORMS
def test_the_reference_is_transformed_like_the_plain_formula(transform: str) -> None:
    a, b = pair()
    for name in ("nt_xent", "NTXentLoss"):
        actual = apply(transform, make_loss(name, "reference"), a, b)
        torch.testing.assert_close(actual, apply(transform, plain, a, b))


@LOSSES
def test_the_reference_has_every_transform(name: str) -> None:
    """Forward mode and reverse mode agree, and the Hessian agrees with differences of gradients."""
    loss, (a, b) = make_loss(name, "reference"), pair()
    gradient = func.grad(loss)(a, b)
    torch.testing.assert_close(func.jacfwd(loss)(a, b), gradient)
    assert func.jvp(lambda x: loss(x, b), (a,), (b,))[1].item() == pytest.approx(
        (gradient * b).sum().item()
    )
    step = 1e-6 * torch.randn_like(a)
    difference = func.grad(loss)(a + step, b) - func.grad(loss)(a - step, b)
    product = (func.hessian(loss)(a, b) * (2 * step)).sum(dim=(2, 3))
    torch.testing.assert_close(product, difference, rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(
        apply("vmap_of_grad", loss, a, b), torch.stack([gradient, func.grad(loss)(b, a)])
    )


@LOSSES
def test_forward_mode_is_refused_by_the_kernels(name: str) -> None:
    a, b = pair()
    for backend in BACKENDS:
        loss = make_loss(name, backend)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(a, b)
            # Arguments without a tangent are not refused.
            torch.testing.assert_close(loss(a, b), make_loss(name, "reference")(a, b))
            if backend == "reference":
                tangent = forward_ad.unpack_dual(loss(dual, b)).tangent
                torch.testing.assert_close(tangent, (func.grad(loss)(a, b) * b).sum())
            else:
                with pytest.raises(RuntimeError, match=f"no forward-mode.*{POINTER}"):
                    loss(dual, b)
                with torch.no_grad(), pytest.raises(RuntimeError, match=POINTER):
                    loss(dual, b)


@LOSSES
def test_second_derivatives_are_refused_by_the_kernels(name: str) -> None:
    for backend in KERNELS:
        loss, (a, b) = make_loss(name, backend), pair()
        (gradient,) = torch.autograd.grad(loss(a.requires_grad_(), b), a, create_graph=True)
        with pytest.raises(RuntimeError, match=f"no second derivative.*{POINTER}"):
            gradient.sum().backward()


def test_a_batch_of_gradients() -> None:
    """PyTorch runs the backward under vmap.

    It computes the gradients one by one for operators of tensors. Operators with lists of tensors
    raise an error.
    """
    upstream = torch.randn(3, 6, dtype=torch.float64)
    for backend in KERNELS:
        a, b = pair()
        loss = nt_xent(a.requires_grad_(), b, reduction="none", backend=backend).loss
        (batched,) = torch.autograd.grad(
            loss, a, upstream, is_grads_batched=True, retain_graph=True
        )
        for k in range(3):
            (one,) = torch.autograd.grad(loss, a, upstream[k], retain_graph=True)
            torch.testing.assert_close(batched[k], one)
        prediction = prediction_loss(a, b, reduction="none", backend=backend)
        with pytest.raises(RuntimeError, match=f"one gradient at a time.*{POINTER}"):
            torch.autograd.grad(
                prediction, a, torch.randn(3, 3, 4, dtype=torch.float64), is_grads_batched=True
            )


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual"])
def test_the_compiler_points_to_the_reference_too(transform: str) -> None:
    torch._dynamo.reset()
    loss, (a, b) = make_loss("nt_xent", "auto"), pair()
    if transform == "dual":
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=POINTER):
            torch.compile(loss, backend="eager")(forward_ad.make_dual(a, b), b)
        return
    with pytest.raises(RuntimeError, match=POINTER):
        torch.compile(lambda a, b: apply(transform, loss, a, b), backend="eager")(a, b)


def gradient_of_a_group() -> str:
    """Run on each rank: the error of a transform of a loss over a group."""
    a, b = pair()
    try:
        func.grad(lambda x: nt_xent(x, b, group=torch.distributed.group.WORLD).loss)(a)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_group_points_to_the_reference_too(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(2).run(gradient_of_a_group):
        assert "torch.func" in message
        assert POINTER in message


def test_checkpoints_give_the_same_gradients(backend: Any) -> None:
    a, b = pair()
    (expected,) = torch.autograd.grad(nt_xent(a.requires_grad_(), b, backend=backend).loss, a)
    for reentrant in (True, False):
        loss = torch.utils.checkpoint.checkpoint(
            make_loss("nt_xent", backend), a, b, use_reentrant=reentrant
        )
        a.grad = None
        loss.backward()
        torch.testing.assert_close(a.grad, expected, rtol=0.0, atol=0.0)
