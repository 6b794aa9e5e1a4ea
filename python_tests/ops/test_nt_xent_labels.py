"""NT-Xent with labels, and DCL: against the float64 reference, and against the mask of labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from overloads import DEVICE, INTERPRETED
from sample_inputs import DTYPES, sides
from tolerances import (
    ACCURACY,
    AUTOCAST_LOSS,
    FLOOR_GRADIENT,
    FLOOR_VALUE,
    METRIC,
    relative_error,
    temperature_rounding,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cjepa_kernels import NTXentLoss, NTXentOutput, nt_xent

pytestmark = pytest.mark.usefixtures("kernels_only")
BATCH = 34


def labels_of(name: str) -> Tensor | None:
    if name == "none":
        return None
    return {
        "random": torch.randint(5, (BATCH,)),
        "one_class": torch.full((BATCH,), 7),
        "all_different": torch.randperm(BATCH).to(torch.int32),
        "huge": torch.tensor([-(2**63), 2**63 - 1]).repeat(BATCH // 2),
        "one_alone": torch.tensor([3] * (BATCH - 1) + [-4], dtype=torch.int8),
    }[name]


LABELS = ["random", "one_class", "all_different", "huge", "one_alone"]
# The names are those of labels. "none" is DCL as it was published.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LABELS},
    "sum": ("random", {"reduction": "sum"}),
    "none": ("random", {"reduction": "none"}),
    "dot_product": ("random", {"use_cosine_similarity": False, "temperature": 4.0}),
    "decoupled": ("none", {"decoupled": True}),
    "decoupled_random": ("random", {"decoupled": True, "reduction": "none"}),
    "decoupled_one_alone": ("one_alone", {"decoupled": True}),
}


def usual_formula(
    z_i: Tensor,
    z_j: Tensor,
    labels: Tensor | None,
    *,
    temperature: Tensor,
    decoupled: bool = False,
    use_cosine_similarity: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The formula in the dtype of the inputs, with the whole matrix in memory."""
    z = torch.cat([z_i, z_j])
    if use_cosine_similarity:
        z = nn.functional.normalize(z, dim=1)
    logits = z @ z.T / temperature
    sample = torch.arange(2 * BATCH) % BATCH
    excluded = sample[:, None] == sample
    if labels is not None:
        excluded |= (labels[:, None] == labels).repeat(2, 2)
    row = torch.arange(2 * BATCH)
    positive = logits[row, (row + BATCH) % (2 * BATCH)]
    logits = logits.masked_fill(excluded, -torch.inf)
    if not decoupled:
        logits = torch.cat([positive[:, None], logits], dim=1)
    losses = torch.logsumexp(logits, dim=1) - positive
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def make(
    name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, dict[str, Any]]:
    labels, options = CALLS[name]
    z_i, z_j = sides(BATCH, BATCH, 16, dtype)
    options = dict(options)
    temperature = torch.tensor(options.pop("temperature", 0.1)).to(dtype).requires_grad_()
    return z_i, z_j, labels_of(labels), temperature, options


@pytest.mark.parametrize("name", ["random", "decoupled_random"] if INTERPRETED else CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_gradients_and_metrics(backend: Any, name: str, dtype: torch.dtype) -> None:
    z_i, z_j, labels, temperature, options = make(name, dtype)
    leaves = (z_i, z_j, temperature)
    out = nt_xent(z_i, z_j, labels=labels, temperature=temperature, backend=backend, **options)
    upstream = torch.rand(out.loss.shape)
    gradients = torch.autograd.grad(out.loss, leaves, upstream.to(out.loss))
    exact = [z.detach().double().requires_grad_() for z in leaves]
    truth = nt_xent(*exact[:2], labels=labels, temperature=exact[2], backend="reference", **options)
    truth_gradients = torch.autograd.grad(truth.loss, exact, upstream.double())
    eager_leaves = [z.detach().clone().requires_grad_() for z in leaves]
    eager = usual_formula(*eager_leaves[:2], labels, temperature=eager_leaves[2], **options)
    eager_gradients = torch.autograd.grad(eager, eager_leaves, upstream.to(eager))
    assert options.get("decoupled") or (out.loss >= 0).all()
    floor = FLOOR_VALUE[dtype]
    assert relative_error(out.loss, truth.loss) <= floor + 2 * relative_error(eager, truth.loss)
    for actual, plain, expected in zip(gradients, eager_gradients, truth_gradients, strict=True):
        floor = FLOOR_GRADIENT[dtype]
        if actual.ndim == 0 and expected != 0:  # the temperature's
            anchors = len(truth.lse) if options.get("reduction") == "sum" else 1
            total = anchors * upstream.sum().item()
            rounding = temperature_rounding(truth.lse, temperature.item(), total, dtype)
            floor += rounding / expected.abs().item()
        assert relative_error(actual, expected) <= floor + 2 * relative_error(plain, expected)
        assert actual.dtype == dtype
    for field in NTXentOutput._fields[1:]:
        actual, expected = getattr(out, field), getattr(truth, field)
        assert not actual.requires_grad
        assert actual.shape == expected.shape
        assert torch.equal(actual.isnan(), expected.isnan())
        if field == "accuracy":
            assert abs(actual - expected) <= ACCURACY[dtype]
        elif not expected.isnan().any():
            scale = max(1.0, expected.abs().max().item())
            assert (actual.double() - expected).abs().max() <= METRIC[dtype] * scale


@pytest.mark.parametrize("name", ["random"] if INTERPRETED else LABELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_labels_are_the_mask_of_equal_labels(backend: Any, name: str, dtype: torch.dtype) -> None:
    z_i, z_j, labels, temperature, _ = make(name, dtype)
    assert labels is not None
    options: dict[str, Any] = {"temperature": temperature, "backend": backend, "reduction": "none"}
    actual = nt_xent(z_i, z_j, labels=labels, **options)
    expected = nt_xent(z_i, z_j, mask=labels[:, None] == labels, **options)
    allowed = FLOOR_VALUE[dtype]
    for of_labels, of_mask in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            of_labels, of_mask, rtol=allowed, atol=allowed, equal_nan=True, check_dtype=False
        )
    leaves = (z_i, z_j, temperature)
    upstream = torch.rand(actual.loss.shape).to(dtype)
    for of_labels, of_mask in zip(
        *(torch.autograd.grad(out.loss, leaves, upstream) for out in (actual, expected)),
        strict=True,
    ):
        assert relative_error(of_labels, of_mask) <= FLOOR_GRADIENT[dtype]


def test_equal_labels_have_no_negatives(backend: Any) -> None:
    z_i, z_j = sides(6, 6, 4)
    out = nt_xent(z_i, z_j, labels=torch.ones(6, dtype=torch.int64), backend=backend)
    assert out.loss == 0
    assert out.accuracy == 1
    assert out.negative_similarity.isnan()
    for gradient in torch.autograd.grad(out.loss, (z_i, z_j)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_aligned_pairs_at_a_low_temperature(backend: Any, dtype: torch.dtype) -> None:
    """NT-Xent's loss underflows at 0.005, and DCL's is as exact as the similarities are."""
    z_i = torch.randn(BATCH, 64).to(dtype).requires_grad_()
    z_j = z_i.detach().clone().requires_grad_()
    labels = torch.randint(5, (BATCH,))
    options: dict[str, Any] = {"temperature": 0.005, "labels": labels, "reduction": "none"}
    out = nt_xent(z_i, z_j, backend=backend, **options)
    assert (out.loss >= 0).all()
    assert out.accuracy == 1
    exact = [z.detach().double().requires_grad_() for z in (z_i, z_j)]
    decoupled = nt_xent(z_i, z_j, backend=backend, decoupled=True, **options)
    truth = nt_xent(*exact, backend="reference", decoupled=True, **options)
    assert decoupled.loss.max() < -50  # below zero, and finite
    assert relative_error(decoupled.loss, truth.loss) <= FLOOR_VALUE[dtype]
    actual = torch.autograd.grad(decoupled.loss.sum(), (z_i, z_j))
    expected = torch.autograd.grad(truth.loss.sum(), exact)
    # The gradient of an aligned pair is a small difference on the sphere, divided by 0.005.
    for gradient, true in zip(actual, expected, strict=True):
        assert relative_error(gradient, true) <= FLOOR_GRADIENT[dtype]


def test_pairs_of_patches(backend: Any) -> None:
    z_i, z_j = torch.randn(2, 6, 3, 5)
    labels = torch.tensor([1, 2, 1, 3, 3, 2])
    flat = [z.flatten(0, 1) for z in (z_i, z_j)]
    expected = nt_xent(*flat, labels=labels.repeat_interleave(3), backend=backend)
    for given in (labels, labels[:, None].expand(6, 3)):
        assert torch.equal(nt_xent(z_i, z_j, labels=given, backend=backend).loss, expected.loss)
    own = torch.arange(18).reshape(6, 3) % 4
    actual = nt_xent(z_i, z_j, labels=own, backend=backend)
    assert torch.equal(actual.loss, nt_xent(*flat, labels=own.flatten(), backend=backend).loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_makes_the_accuracy_zero(backend: Any, value: float) -> None:
    z_i, z_j = (z.detach() for z in sides(8, 8, 6))
    z_i[0, 0] = value
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    out = nt_xent(z_i, z_j, labels=labels, backend=backend)
    assert out.loss.isnan()
    assert out.accuracy == 0


def test_autocast(backend: Any) -> None:
    z_i, z_j = sides(32, 32, 24)
    labels = torch.randint(4, (32,))
    expected = nt_xent(z_i, z_j, labels=labels, backend=backend)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = nt_xent(z_i, z_j, labels=labels, backend=backend)
    assert out.loss.dtype == torch.float32
    assert relative_error(out.loss, expected.loss) < AUTOCAST_LOSS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_temperature_in_half_precision(backend: Any, dtype: torch.dtype) -> None:
    """Its two parts nearly cancel for rows in clusters, so neither is rounded before the sum."""
    centers = torch.randn(4, 16)
    z_i, z_j = (centers.repeat(8, 1) + 0.1 * torch.randn(32, 16) for _ in range(2))
    labels = torch.arange(32) // 2
    value = torch.tensor(0.05).to(dtype)
    gradients = []
    for temperature, name in ((value, backend), (value.double(), "reference")):
        temperature = temperature.clone().requires_grad_()
        loss = nt_xent(z_i, z_j, labels=labels, temperature=temperature, backend=name).loss
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert gradients[0].dtype == dtype
    assert relative_error(*gradients) <= torch.finfo(dtype).eps


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled on the CPU")
def test_compiles_without_a_break() -> None:
    z_i, z_j = sides(12, 12, 6)
    labels = torch.arange(12) // 3

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a, b, labels=labels, decoupled=True).loss

    expected = torch.autograd.grad(loss(z_i, z_j), (z_i, z_j))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, truth in zip(
        torch.autograd.grad(compiled(z_i, z_j), (z_i, z_j)), expected, strict=True
    ):
        torch.testing.assert_close(actual, truth)


class Model(nn.Module):
    def forward(self, z_i: Tensor, z_j: Tensor, labels: Tensor) -> Tensor:
        return nt_xent(z_i, z_j, labels=labels).loss


@pytest.mark.skipif(DEVICE != "cpu", reason="exported on the CPU")
def test_exports_with_any_batch() -> None:
    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(4, 6), torch.randn(4, 6), torch.tensor([1, 2, 2, 3]))
    program = torch.export.export(
        Model(), example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    )
    assert "cjepa_kernels.self_logsumexp" in str(program.graph)
    other = (torch.randn(9, 6), torch.randn(9, 6), torch.arange(9) % 4)
    torch.testing.assert_close(program.module()(*other), Model()(*other))


@pytest.mark.skipif(DEVICE != "cpu", reason="no device is needed")
def test_tensors_without_numbers() -> None:
    with FakeTensorMode():
        z_i, z_j, labels = torch.randn(4, 6), torch.randn(4, 6), torch.arange(4)
        assert nt_xent(z_i, z_j, labels=labels, decoupled=True).loss.shape == ()


def test_labels_made_under_inference_mode(backend: Any) -> None:
    z_i, z_j = sides(12, 12, 6)
    with torch.inference_mode():
        labels = torch.randint(3, (12,))
    loss = nt_xent(z_i, z_j, labels=labels, backend=backend).loss
    expected = nt_xent(z_i, z_j, labels=labels.clone(), backend=backend).loss
    for actual, truth in zip(
        torch.autograd.grad(loss, (z_i, z_j)),
        torch.autograd.grad(expected, (z_i, z_j)),
        strict=True,
    ):
        assert torch.equal(actual, truth)


z44 = torch.zeros(4, 4)
l4 = torch.tensor([1, 1, 2, 2])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host does not read the labels")
@pytest.mark.parametrize(
    ("z", "options", "error", "message"),
    [
        (z44, {"labels": [1, 1, 2, 2]}, ValueError, "labels must be a tensor of integers, got li"),
        (z44, {"labels": l4.float()}, ValueError, "labels must be a tensor of integers, got torc"),
        (
            z44,
            {"labels": l4[:3]},
            ValueError,
            r"labels must be \(4,\), one for each sample, got \(3",
        ),
        (z44, {"labels": l4[:, None]}, ValueError, r"labels must be \(4,\), one for each sample"),
        (
            z44.reshape(2, 2, 4),
            {"labels": torch.ones(2, 3, dtype=torch.int64)},
            ValueError,
            r"labels must be \(2,\) or \(2, 2\), got \(2, 3\)",
        ),
        (
            z44,
            {"labels": l4, "mask": torch.eye(4, dtype=torch.bool)},
            ValueError,
            r"labels must be None with a mask, got a tensor of shape \(4,\)",
        ),
        (
            z44,
            {"mask": l4},
            TypeError,
            "mask must be a bool tensor, .*pass labels of the samples as",
        ),
        (
            z44,
            {"decoupled": True, "mask": torch.eye(4, dtype=torch.bool)},
            ValueError,
            "decoupled must be False with a mask, got True",
        ),
        (z44, {"decoupled": 1}, TypeError, "decoupled must be True or False, got 1"),
        (
            z44[:1],
            {"decoupled": True},
            ValueError,
            "decoupled must be False .* without negatives.*one",
        ),
        (
            z44,
            {"decoupled": True, "labels": 7 * torch.ones(4, dtype=torch.int64)},
            ValueError,
            "decoupled must be False .* without negatives.*labels that are all 7",
        ),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else "",
)
def test_mistakes_are_named(
    z: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nt_xent(z, z, **options)


def test_the_module_has_the_loss_of_the_function() -> None:
    z_i, z_j = sides(12, 12, 6)
    labels = torch.arange(12) // 3
    loss_fn = NTXentLoss(0.2, decoupled=True, return_logits=True)
    assert "decoupled=True" in repr(loss_fn)
    out = loss_fn(z_i, z_j, labels=labels)
    expected = nt_xent(z_i, z_j, labels=labels, temperature=0.2, decoupled=True)
    assert torch.equal(out["loss"], expected.loss)
    # The logits are those of the negatives that count, with the positive in column 0.
    logits = out["logits"]
    torch.testing.assert_close(logits[:, 1:].logsumexp(dim=1).sub(logits[:, 0]).mean(), out["loss"])
    with pytest.raises(TypeError, match="decoupled must be True or False"):
        NTXentLoss(decoupled=None)
