"""CLS rows of features: the view, and the gradient, whose zeros need no memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, backends, ops
from cjepa_kernels.tokens import cls_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("shape", [(3, 1, 5), (4, 7, 16), (2, 2, 1), (60, 200, 100)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_value_and_gradient_of_plain_indexing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape[0], shape[2]).to(dtype)
    rows = cls_tokens(features)
    assert torch.equal(rows, features[:, 0])
    assert rows.data_ptr() == features.data_ptr()
    (grad,) = torch.autograd.grad(rows, features, upstream)
    (expected,) = torch.autograd.grad(features[:, 0], features, upstream)
    assert grad.dtype == dtype
    assert torch.equal(grad, expected)


def test_it_adds_to_the_gradient_of_other_uses() -> None:
    leaf = torch.randn(30, 90, 128, requires_grad=True)
    results = []
    for take in (cls_tokens, lambda x: x[:, 0]):
        features = 2 * leaf
        loss = (take(features) ** 3).sum() + features[:, 1:].square().sum() + features.sum()
        results.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*results)


def test_strided_features_and_gradients() -> None:
    features = torch.randn(6, 5, 4).transpose(0, 1).requires_grad_()
    upstream = torch.randn(4, 5).T
    (grad,) = torch.autograd.grad(cls_tokens(features), features, upstream)
    assert torch.equal(grad[:, 0], upstream)
    assert (grad[:, 1:] == 0).all()


def test_without_a_gradient_it_is_plain_indexing() -> None:
    features = torch.randn(3, 4, 5)
    assert cls_tokens(features).grad_fn is None
    with torch.no_grad():
        assert cls_tokens(features.requires_grad_()).grad_fn is None


def test_it_can_be_differentiated_twice() -> None:
    features = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cls_tokens(x) ** 2, features)
    assert torch.autograd.gradgradcheck(lambda x: cls_tokens(x) ** 2, features)


@pytest.mark.skipif(
    not (backends()["native"].available and sys.platform == "linux"),
    reason="the test needs the compiled kernels and Linux",
)
def test_the_zeros_take_no_memory() -> None:
    """Features of 100 MiB have 50 CLS rows of 2 KiB, so their gradient needs only a few pages."""
    code = """
import torch
from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss
from cjepa_kernels.tokens import cls_tokens

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

patches = torch.randn(50, 1, 8)
loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1), contrastive_on_context=True)
features = [torch.randn(50, 1024, 512, requires_grad=True) for _ in range(2)]
for first in (True, False):
    loss = loss_fn([patches], [patches], *features)["loss"]
    before = resident()
    grads = torch.autograd.grad(loss, features)
    grown = (resident() - before) / 1024
    assert all(g.shape == f.shape for g, f in zip(grads, features))
print(grown)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    assert float(result.stdout) < 20


def test_opcheck() -> None:
    for rows in (torch.randn(3, 5), torch.randn(5, 3, dtype=torch.bfloat16).T):
        torch.library.opcheck(ops.operator("pad_tokens"), (rows, 4))
    if backends()["native"].available:
        with pytest.raises(ValueError, match="too many tokens"):
            ops.operator("pad_tokens")(torch.randn(3, 5), 2**62)


@pytest.mark.parametrize("kind", ["fork", "plain"])
def test_the_whole_loss_has_the_gradient_of_plain_indexing(kind: str) -> None:
    loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1), contrastive_on_context=True)
    patches = torch.randn(8, 6, 16)
    context = torch.randn(16, 7, 16, requires_grad=True)

    def gradient(features: Any) -> Tensor:
        out = loss_fn([context[:8, 1:]], [patches], *features)
        return torch.autograd.grad(out["loss"], context)[0]

    # The training program calls cls_tokens once for both views.
    cls = cls_tokens(context)[:, None] if kind == "fork" else context
    expected = gradient((context[:8, :1], context[8:, :1]))
    torch.testing.assert_close(gradient((cls[:8], cls[8:])), expected, rtol=1e-6, atol=1e-9)
