"""SupCon against the float64 reference and against the usual formula, in values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from overloads import DEVICE, INTERPRETED
from sample_inputs import DTYPES
from tolerances import (
    ALIGNED_ROUNDINGS_OF_LOSS,
    AUTOCAST_LOSS,
    FLOOR_GRADIENT,
    FLOOR_VALUE,
    METRIC,
    UNDERFLOW,
    aligned_tolerance,
    relative_error,
    temperature_rounding,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cjepa_kernels import SupConOutput, nt_xent, sup_con

pytestmark = pytest.mark.usefixtures("kernels_only")
ROWS = 48


def usual_formula(
    embeddings: Tensor,
    labels: Tensor | None,
    *,
    temperature: Tensor,
    use_cosine_similarity: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Equation 2 of the paper in the dtype of the inputs, with the whole matrix in memory."""
    if labels is None:
        labels = torch.arange(len(embeddings))
    if embeddings.ndim == 3:
        labels = labels.repeat_interleave(embeddings.shape[1])
        embeddings = embeddings.flatten(0, 1)
    z = nn.functional.normalize(embeddings, dim=1) if use_cosine_similarity else embeddings
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_probability = logits - logits.logsumexp(dim=1, keepdim=True)
    is_positive = (labels[:, None] == labels) & ~itself
    count = is_positive.sum(dim=1)
    losses = -log_probability.where(is_positive, 0.0).sum(dim=1) / count.clamp(min=1)
    if reduction == "none":
        return losses
    return losses.sum() / (count > 0).sum().clamp(min=1) if reduction == "mean" else losses.sum()


def labels_of(name: str) -> Tensor:
    return {
        "random": torch.randint(20, (ROWS,)),  # classes of one, of two, and larger ones
        "few_classes": torch.randint(4, (ROWS,), dtype=torch.int32),
        "one_class": torch.full((ROWS,), 7),
        "all_different": torch.randperm(ROWS),
        "pairs": torch.randperm(ROWS) // 2,
        "huge": torch.tensor([-(2**63), 2**63 - 1, 0]).repeat(ROWS // 3),
        "one_alone": torch.tensor([3] * (ROWS - 1) + [-4]),
        "samples": torch.randint(5, (ROWS // 3,)),
    }[name]


# Each: the shape of the embeddings before D, the labels, and the options.
CALLS: dict[str, tuple[tuple[int, ...], str | None, dict[str, Any]]] = {
    **{
        name: ((ROWS,), name, {})
        for name in ("random", "few_classes", "one_class", "all_different", "huge", "one_alone")
    },
    "pairs": ((ROWS,), "pairs", {"reduction": "none"}),
    "sum": ((ROWS,), "random", {"reduction": "sum"}),
    "none": ((ROWS,), "random", {"reduction": "none"}),
    "dot_product": ((ROWS,), "random", {"use_cosine_similarity": False, "temperature": 4.0}),
    "low_temperature": ((ROWS,), "random", {"temperature": 0.005, "reduction": "none"}),
    "two_views": ((ROWS // 2, 2), None, {}),
    "three_views": ((ROWS // 3, 3), None, {}),
    "views_with_labels": ((ROWS // 3, 3), "samples", {}),
    "one_view": ((ROWS, 1), None, {}),
}


def make(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Any]]:
    shape, of_labels, options = CALLS[name]
    options = dict(options)
    labels = None if of_labels is None else labels_of(of_labels)
    temperature = torch.tensor(options.pop("temperature", 0.1)).to(dtype).requires_grad_()
    # Rows of a class, or of a sample, lie near each other.
    centers = torch.randn(40, 16)
    near = centers[(torch.arange(shape[0]) if labels is None else labels.long()) % 40]
    z = near.reshape(shape[0], *[1] * (len(shape) - 1), 16) + torch.randn(*shape, 16)
    return z.to(dtype).requires_grad_(), labels, temperature, options


@pytest.mark.parametrize("name", ["random", "three_views"] if INTERPRETED else CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_gradients_and_metrics(backend: Any, name: str, dtype: torch.dtype) -> None:
    z, labels, temperature, options = make(name, dtype)
    leaves = (z, temperature)
    out = sup_con(z, labels, temperature=temperature, backend=backend, **options)
    upstream = torch.rand(out.loss.shape)
    gradients = torch.autograd.grad(out.loss, leaves, upstream.to(out.loss))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = sup_con(exact[0], labels, temperature=exact[1], backend="reference", **options)
    truth_gradients = torch.autograd.grad(truth.loss, exact, upstream.double())
    eager_leaves = [x.detach().clone().requires_grad_() for x in leaves]
    eager = usual_formula(eager_leaves[0], labels, temperature=eager_leaves[1], **options)
    eager_gradients = torch.autograd.grad(eager, eager_leaves, upstream.to(eager))
    assert (out.loss >= 0).all()
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
    assert out.num_anchors == truth.num_anchors
    for field in SupConOutput._fields[1:-1]:
        actual, expected = getattr(out, field), getattr(truth, field)
        assert not actual.requires_grad
        assert actual.shape == expected.shape
        assert torch.equal(actual.isnan(), expected.isnan())
        if not expected.isnan().any():
            scale = max(1.0, expected.abs().max().item())
            assert (actual.double() - expected).abs().max() <= METRIC[dtype] * scale


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_the_usual_formula(name: str) -> None:
    z, labels, temperature, options = make(name, torch.float64)
    out = sup_con(z, labels, temperature=temperature, backend="reference", **options)
    expected = usual_formula(z, labels, temperature=temperature, **options)
    torch.testing.assert_close(out.loss, expected)
    for actual, truth in zip(
        torch.autograd.grad(out.loss.sum(), (z, temperature)),
        torch.autograd.grad(expected.sum(), (z, temperature)),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth)


def test_two_views_are_nt_xent(backend: Any) -> None:
    z = torch.randn(20, 2, 8, requires_grad=True)
    out = sup_con(z, backend=backend)
    expected = nt_xent(z[:, 0], z[:, 1], backend=backend)
    torch.testing.assert_close(out.loss, expected.loss, rtol=FLOOR_VALUE[torch.float32], atol=0)
    torch.testing.assert_close(out.positive_similarity, expected.positive_similarity)
    torch.testing.assert_close(out.negative_similarity, expected.negative_similarity)
    torch.testing.assert_close(out.lse.reshape(20, 2).T.flatten(), expected.lse)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (out.loss, expected.loss)]
    assert relative_error(*gradients) <= FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.02])
def test_aligned_pairs_at_a_low_temperature(
    backend: Any, temperature: float, dtype: torch.dtype
) -> None:
    """The loss of an anchor with one positive keeps its digits; that of a class has its bound."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4])
    z = torch.randn(5, 64, dtype=torch.float64)[labels]
    leaf = (z + 0.01 * torch.randn(11, 64)).to(dtype).requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
    out = sup_con(leaf, labels, backend=backend, **options)
    assert (out.loss >= 0).all()
    assert (out.loss[6:10] >= torch.tensor(3.0, dtype=out.loss.dtype).log()).all()
    assert out.loss[10] == 0
    assert out.num_anchors == 10
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    assert gradient.isfinite().all()
    if dtype.itemsize == 2:
        return  # rounding the rows decides the loss
    exact = leaf.detach().double().requires_grad_()
    truth = sup_con(exact, labels, backend="reference", **options)
    allowed = aligned_tolerance(ALIGNED_ROUNDINGS_OF_LOSS, dtype, temperature)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=allowed, atol=UNDERFLOW)


@pytest.mark.parametrize("rows", [48] if INTERPRETED else [48, 500])
@pytest.mark.parametrize(("temperature", "noise"), [(0.1, 0.01), (0.02, 0.01), (0.02, 0.1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tight_classes(
    backend: Any, dtype: torch.dtype, noise: float, temperature: float, rows: int
) -> None:
    """The rows of a class nearly agree, and so do what attracts a row to them and what repels it.

    The gradient is their difference. It must have as many digits as the usual formula leaves it.
    """
    labels = torch.arange(rows) % 4
    z = torch.randn(4, 32, dtype=torch.float64)[labels] + noise * torch.randn(rows, 32)
    value = torch.tensor(temperature).to(dtype)  # also what the reference takes
    results = []
    for of in (dtype, torch.float64):
        leaves = [x.to(dtype).to(of).requires_grad_() for x in (z, value)]
        loss = sup_con(
            leaves[0],
            labels,
            temperature=leaves[1],
            backend=backend if of == dtype and not results else "reference",
        ).loss
        eager = usual_formula(leaves[0], labels, temperature=leaves[1])
        results.append([(x, *torch.autograd.grad(x, leaves)) for x in (loss, eager)])
    (ours, usual), (truth, _) = results
    for k, floor in enumerate((FLOOR_VALUE[dtype], FLOOR_GRADIENT[dtype])):
        allowed = floor + 2 * relative_error(usual[k], truth[k])
        assert relative_error(ours[k], truth[k]) <= allowed
    # The temperature's gradient is one number, in which the usual formula may be exact by chance.
    assert ours[2].isfinite()


@pytest.mark.parametrize("rows", [4, 100 if INTERPRETED else 700])
def test_duplicates_have_the_lower_bound(backend: Any, rows: int) -> None:
    """All rows of one class are equal: the loss is log of the number of positives, never less."""
    z = torch.randn(24).repeat(rows, 1).requires_grad_()
    out = sup_con(z, torch.zeros(rows, dtype=torch.int64), temperature=0.005, backend=backend)
    assert out.loss >= torch.tensor(rows - 1.0).log()
    torch.testing.assert_close(out.loss.item(), math.log(rows - 1), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(out.loss, z)
    assert gradient.abs().max() <= 1e-3 / 0.005 / rows  # rounding, divided by the temperature


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_one_large_row_of_dot_products(backend: Any, size: float) -> None:
    """The sum of the large row's class, without that row, keeps the digits of the other rows."""
    z = torch.randn(12, 64)
    z[5] *= size
    labels, temperature = torch.arange(12) % 3, torch.tensor(size)
    options: dict[str, Any] = {"use_cosine_similarity": False, "reduction": "none"}
    results = []
    for leaf in (z, z.double()):
        leaf.requires_grad_()
        loss = sup_con(leaf, labels, temperature=temperature, backend=backend, **options).loss
        eager = usual_formula(leaf, labels, temperature=temperature, **options)
        results.append([loss.detach(), eager.detach(), *torch.autograd.grad(loss.sum(), leaf)])
    (actual, same_dtype, gradient), (_, expected, of_expected) = results
    bound = FLOOR_VALUE[torch.float32] + 2 * relative_error(same_dtype, expected)
    assert relative_error(actual, expected) <= bound
    assert relative_error(gradient, of_expected) <= FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [0] * 6], ids=str)
def test_nan_and_infinity_give_nan(backend: Any, value: float, labels: list[int]) -> None:
    """The loss says so even if no anchor has a positive, because the gradient is NaN."""
    z = torch.randn(6, 5)
    z[1, 0] = value
    z.requires_grad_()
    out = sup_con(z, torch.tensor(labels), backend=backend)
    assert out.loss.isnan()
    assert torch.autograd.grad(out.loss, z)[0].isnan().any()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_anchor_has_a_positive(backend: Any, rows: int, reduction: Any) -> None:
    z = torch.randn(rows, 6, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    out = sup_con(
        z, torch.arange(rows), temperature=temperature, reduction=reduction, backend=backend
    )
    assert (out.loss == 0).all()
    assert out.num_anchors == 0
    assert out.positive_similarity.isnan()
    for gradient in torch.autograd.grad(out.loss.sum(), (z, temperature)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf, 1e35])
def test_a_temperature_out_of_range_is_nan_without_positives_too(
    backend: Any, value: float
) -> None:
    out = sup_con(
        torch.randn(5, 6), torch.arange(5), temperature=torch.tensor(value), backend=backend
    )
    assert out.loss.isnan()


def test_anchors_without_a_positive_are_negatives(backend: Any) -> None:
    z = torch.randn(7, 6, requires_grad=True)
    labels = torch.tensor([1, 1, 1, 2, 2, 3, 4])
    every = sup_con(z, labels, reduction="none", backend=backend).loss
    torch.testing.assert_close(sup_con(z, labels, backend=backend).loss, every[:5].mean())
    fewer = sup_con(z[:6], labels[:6], reduction="none", backend=backend).loss
    assert (every[:5] > fewer[:5]).all()
    assert (torch.autograd.grad(every.sum(), z)[0][6] != 0).any()


def test_the_order_of_the_rows_makes_no_difference(backend: Any) -> None:
    z, labels = torch.randn(ROWS, 16), labels_of("random")
    order = torch.randperm(ROWS)
    losses = sup_con(z, labels, reduction="none", backend=backend).loss
    shuffled = sup_con(z[order], labels[order], reduction="none", backend=backend).loss
    torch.testing.assert_close(shuffled, losses[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_temperature_in_half_precision(backend: Any, dtype: torch.dtype) -> None:
    """Its two parts nearly cancel for rows in clusters, so neither is rounded before the sum."""
    z = torch.randn(4, 16).repeat(12, 1) + 0.1 * torch.randn(48, 16)
    labels = torch.arange(48) % 4
    value = torch.tensor(0.05).to(dtype)
    gradients = []
    for temperature, name in ((value, backend), (value.double(), "reference")):
        temperature = temperature.clone().requires_grad_()
        loss = sup_con(z, labels, temperature=temperature, backend=name).loss
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert gradients[0].dtype == dtype
    assert relative_error(*gradients) <= torch.finfo(dtype).eps


def test_autocast(backend: Any) -> None:
    z, labels = torch.randn(ROWS, 24), labels_of("few_classes")
    expected = sup_con(z, labels, backend=backend)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = sup_con(z, labels, backend=backend)
    assert out.loss.dtype == torch.float32
    assert relative_error(out.loss, expected.loss) < AUTOCAST_LOSS


@pytest.mark.parametrize("name", ["chunked", "auto"])
def test_gradcheck(name: Any) -> None:
    z = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 1, 1, 2, 2, 3, 1])

    def loss(z: Tensor, temperature: Tensor) -> Tensor:
        return sup_con(z, labels, temperature=temperature, backend=name).loss

    assert torch.autograd.gradcheck(loss, (z, temperature))


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled on the CPU")
def test_compiles_without_a_break() -> None:
    z = torch.randn(12, 6, requires_grad=True)
    labels = torch.tensor([1, 1, 1, 2, 2, 3, 1, 4, 4, 4, 5, 5])

    def loss(z: Tensor) -> Tensor:
        return sup_con(z, labels).loss

    (expected,) = torch.autograd.grad(loss(z), z)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(z), z)
    torch.testing.assert_close(actual, expected)


class Model(nn.Module):
    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(z, labels).loss


@pytest.mark.skipif(DEVICE != "cpu", reason="exported on the CPU")
def test_exports_with_any_batch() -> None:
    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(4, 6), torch.tensor([1, 2, 2, 3]))
    program = torch.export.export(Model(), example, dynamic_shapes=({0: batch}, {0: batch}))
    assert "cjepa_kernels.class_similarity" in str(program.graph)
    other = (torch.randn(9, 6), torch.arange(9) % 4)
    torch.testing.assert_close(program.module()(*other), Model()(*other))


@pytest.mark.skipif(DEVICE != "cpu", reason="no device is needed")
def test_tensors_without_numbers() -> None:
    with FakeTensorMode():
        assert sup_con(torch.randn(4, 6), torch.arange(4)).loss.shape == ()
        assert sup_con(torch.randn(4, 3, 6), reduction="none").loss.shape == (12,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_labels_without_a_sign(dtype: torch.dtype) -> None:
    z, labels = torch.randn(12, 6), torch.arange(12) % 3
    large = torch.iinfo(dtype).max
    unsigned = torch.tensor([0, large, large - 1], dtype=dtype)[labels]
    torch.testing.assert_close(sup_con(z, unsigned).loss, sup_con(z, labels).loss)


def test_labels_made_under_inference_mode(backend: Any) -> None:
    z = torch.randn(12, 6, requires_grad=True)
    with torch.inference_mode():
        labels = torch.randint(3, (12,))
    (actual,) = torch.autograd.grad(sup_con(z, labels, backend=backend).loss, z)
    (expected,) = torch.autograd.grad(sup_con(z, labels.clone(), backend=backend).loss, z)
    assert torch.equal(actual, expected)


z44, z234 = torch.zeros(4, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, "embeddings must be a tensor, got list"),
        ((z44[0],), {}, ValueError, r"embeddings must be \(M, D\) or \(B, V, D\), got \(4,\)"),
        ((z44[:0], z44[:0, 0].long()), {}, ValueError, "embeddings must hold at least one row"),
        ((z44,), {}, ValueError, r"labels must be given for embeddings \(M, D\)"),
        ((z44, z44[0]), {}, ValueError, "labels must be a tensor of integers, got torch.float32"),
        ((z44, torch.arange(3)), {}, ValueError, r"labels must be \(4,\), one for each row, got"),
        ((z234, torch.arange(6)), {}, ValueError, r"labels must be \(2,\), one for each sample"),
        ((z234,), {"temperature": 0.0}, ValueError, "Temperature must be positive"),
        ((z234,), {"reduction": "max"}, ValueError, "reduction must be one of"),
        ((z234,), {"use_cosine_similarity": 1}, TypeError, "use_cosine_similarity must be True"),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else "",
)
def test_mistakes_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sup_con(*arguments, **options)
