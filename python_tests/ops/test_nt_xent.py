"""Values, gradients and metrics of nt_xent against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from eager import brute_force_metrics, textbook_nt_xent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overloads import INTERPRETED
from tolerances import (
    ALIGNED_GRADIENT,
    ALIGNED_LOSS,
    AUTOCAST_LOSS,
    FLOOR_GRADIENT,
    FLOOR_VALUE,
    METRIC,
    relative_error,
)
from torch import Tensor

from cjepa_kernels import nt_xent, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A tile has at most 128 rows. These are 130 rows in the interpreter and 258 rows elsewhere.
PAST_A_TILE = (65 if INTERPRETED else 129, 130)
# The shapes have one pair, one feature, odd sizes around the vector widths, or more than one tile.
SHAPES = [(1, 1), (1, 8), (2, 3), (3, 1), (5, 7), (17, 33), (64, 64), PAST_A_TILE]
TEMPERATURES = [1e-3, 0.01, 0.02, 0.0231, 0.05, 0.07, 0.1, 0.5, 1.0, 100.0]
REDUCTIONS = ["mean", "sum", "none"]
pytestmark = pytest.mark.usefixtures("kernels_only")


def views(batch: int, features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two correlated views with leaf tensors that want a gradient."""
    z_i = torch.randn(batch, features, dtype=torch.float64)
    z_j = z_i + torch.randn(batch, features, dtype=torch.float64)
    return z_i.to(dtype).requires_grad_(), z_j.to(dtype).requires_grad_()


def as_float64(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def check(
    z_i: Tensor,
    z_j: Tensor,
    backend: str,
    *,
    reduction: str = "mean",
    temperature: float = 0.1,
    cosine: bool = True,
    mask: Tensor | None = None,
) -> None:
    """Check loss, metrics and gradients by the tolerance rule, for a random upstream gradient."""
    dtype = z_i.dtype
    options = {"temperature": temperature, "use_cosine_similarity": cosine, "mask": mask}
    out = nt_xent(z_i, z_j, reduction=reduction, backend=backend, **options)  # type: ignore[arg-type]
    upstream = torch.rand_like(out.loss) + 0.5
    gradients = torch.autograd.grad(out.loss, (z_i, z_j), upstream)

    truth_i, truth_j = as_float64(z_i, z_j)
    truth = reference.nt_xent(truth_i, truth_j, **options)  # type: ignore[arg-type]
    truth_loss = reference.reduce(truth.loss, reduction)  # type: ignore[arg-type]
    truth_gradients = torch.autograd.grad(truth_loss, (truth_i, truth_j), upstream.double())
    if cosine and z_i.shape[1] == 1:  # unit rows are 1 or -1, so the exact gradient is 0
        truth_gradients = tuple(torch.zeros_like(g) for g in truth_gradients)

    eager_i, eager_j = (z.detach().clone().requires_grad_() for z in (z_i, z_j))
    eager = textbook_nt_xent(eager_i, eager_j, **options)  # type: ignore[arg-type]
    eager_loss = reference.reduce(eager, reduction)  # type: ignore[arg-type]
    eager_gradients = torch.autograd.grad(eager_loss, (eager_i, eager_j), upstream.to(eager.dtype))

    def bound(eager_value: Tensor, truth_value: Tensor, floor: float) -> float:
        eager_error = relative_error(eager_value, truth_value)
        return floor + (2 * eager_error if math.isfinite(eager_error) else 0.0)

    assert relative_error(out.loss, truth_loss) <= bound(eager_loss, truth_loss, FLOOR_VALUE[dtype])
    for actual, expected, eager_gradient in zip(
        gradients, truth_gradients, eager_gradients, strict=True
    ):
        assert actual.dtype == dtype
        assert actual.isfinite().all()
        assert relative_error(actual, expected) <= bound(
            eager_gradient, expected, FLOOR_GRADIENT[dtype]
        )
    scale = max(1.0, truth.lse.abs().max().item() * temperature)
    assert relative_error(out.lse, truth.lse) <= 2 * METRIC[dtype] + FLOOR_VALUE[dtype]
    for name in ("positive_similarity", "negative_similarity"):
        actual, expected = getattr(out, name), getattr(truth, name)
        if expected.isnan():
            assert actual.isnan()
        else:
            assert abs(actual.item() - expected.item()) <= METRIC[dtype] * scale
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in out} == {accumulation}
    assert not any(t.requires_grad for t in out[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "features"), SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_shapes_and_dtypes(backend: str, batch: int, features: int, dtype: torch.dtype) -> None:
    check(*views(batch, features, dtype), backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_chunks_of_any_size(chunk: int, reduction: str, dtype: torch.dtype) -> None:
    mask = torch.rand(17, 17) < 0.2
    check(*views(17, 9, dtype), "chunked", reduction=reduction)
    check(*views(17, 9, dtype), "chunked", reduction=reduction, mask=mask)


def hard_views(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Aligned, anti-aligned and duplicate rows beside random ones."""
    z_i = torch.randn(21, 19, dtype=torch.float64)
    z_j = z_i + 0.1 * torch.randn_like(z_i)
    z_j[3] = -z_i[3]  # the positive is farther away than every negative
    z_i[5], z_j[5] = z_i[4], z_j[4]  # two samples have the same rows
    z_i[7] = z_j[7]
    return z_i.to(dtype).requires_grad_(), z_j.to(dtype).requires_grad_()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(backend: str, temperature: float, dtype: torch.dtype) -> None:
    check(*hard_views(dtype), backend, temperature=temperature)


# The kernels stop using the constant shift below a temperature of 0.0266. With it, weights would
# leave the range of fp32 below 0.0217.
@pytest.mark.parametrize("temperature", [0.0215, 0.0266, 0.0267])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_antipodal_rows(backend: str, temperature: float, dtype: torch.dtype) -> None:
    """All rows are as far from the first row as possible."""
    z = F.normalize(torch.randn(1, 24), dim=1).expand(6, 24).clone()
    z[1:] *= -1
    z = (z + 0.01 * torch.randn(6, 24)).to(dtype)
    check(z[:3].requires_grad_(), z[3:].requires_grad_(), backend, temperature=temperature)


def test_small_upstream_gradients_beside_a_large_one(backend: str) -> None:
    """A large upstream gradient of one fp16 sample does not change the gradients of the others.

    That sample is far from all others, so its own gradient is almost 0.
    """
    z = torch.randn(2, 40, 24)
    z[1] += z[0]
    z[:, :, 0], z[:, 0] = 0.0, torch.eye(24)[0]
    z = z.half().requires_grad_()
    (truth,) = as_float64(z)
    upstream = torch.ones(80)
    upstream[::40] = 2.0**20
    gradients = []
    for x, name in ((z, backend), (truth, "reference")):
        loss = nt_xent(x[0], x[1], temperature=0.05, reduction="none", backend=name).loss
        gradients += torch.autograd.grad(loss, x, upstream.to(loss))
    assert relative_error(*gradients) <= FLOOR_GRADIENT[torch.float16]


def test_upstream_gradients_of_zero(backend: str) -> None:
    z_i, z_j = views(8, 5)
    temperature = torch.tensor(0.2, requires_grad=True)
    loss = nt_xent(z_i, z_j, temperature=temperature, reduction="none", backend=backend).loss
    for gradient in torch.autograd.grad(loss, (z_i, z_j, temperature), torch.zeros(16)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("masked", [False, True], ids=["all_pairs", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reductions_similarities_and_masks(
    backend: str, reduction: str, cosine: bool, masked: bool, dtype: torch.dtype
) -> None:
    mask = torch.rand(23, 23) < 0.3 if masked else None
    temperature = 0.2 if cosine else 5.0
    check(
        *views(23, 12, dtype),
        backend,
        reduction=reduction,
        cosine=cosine,
        mask=mask,
        temperature=temperature,
    )


@pytest.mark.parametrize(
    ("temperature", "batch", "features"),
    [(0.05, *PAST_A_TILE), (0.02, *PAST_A_TILE), (0.05, 65, 768)],
)
def test_aligned_views_keep_their_gradient(
    backend: str, temperature: float, batch: int, features: int
) -> None:
    """The textbook formula subtracts two nearly equal numbers. The back ends lose no digits."""
    z_i = torch.randn(batch, features)
    z_j = z_i + 0.1 * torch.randn_like(z_i)
    z_i, z_j = z_i.requires_grad_(), z_j.requires_grad_()
    truth_i, truth_j = as_float64(z_i, z_j)
    truth = reference.nt_xent(truth_i, truth_j, temperature=temperature).loss.mean()
    truth.backward()
    textbook = textbook_nt_xent(z_i, z_j, temperature=temperature).mean()
    out = nt_xent(z_i, z_j, temperature=temperature, backend=backend)
    out.loss.backward()
    assert relative_error(out.loss, truth) < ALIGNED_LOSS
    assert relative_error(z_i.grad, truth_i.grad) < ALIGNED_GRADIENT
    assert relative_error(z_j.grad, truth_j.grad) < ALIGNED_GRADIENT
    assert relative_error(textbook, truth) > 10 * ALIGNED_LOSS


@pytest.mark.parametrize("masked", [False, True], ids=["all_pairs", "masked"])
def test_reference_is_the_textbook_loss_in_float64(masked: bool) -> None:
    z_i, z_j = views(31, 11, torch.float64)
    mask = torch.rand(31, 31) < 0.2 if masked else None
    expected = textbook_nt_xent(z_i, z_j, temperature=0.3, mask=mask)
    actual = reference.nt_xent(z_i, z_j, temperature=0.3, mask=mask).loss
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(actual)
    for a, b in zip(
        torch.autograd.grad(actual, (z_i, z_j), upstream),
        torch.autograd.grad(expected, (z_i, z_j), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True], ids=["all_pairs", "masked"])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_metrics_by_counting_pairs(
    backend: str, cosine: bool, masked: bool, dtype: torch.dtype
) -> None:
    z_i, z_j = (z.detach() for z in views(13, 5, dtype))
    mask = torch.rand(13, 13) < 0.4 if masked else None
    out = nt_xent(z_i, z_j, use_cosine_similarity=cosine, mask=mask, backend=backend)
    expected = brute_force_metrics(z_i, z_j, cosine=cosine, mask=mask)
    actual = (out.accuracy, out.positive_similarity, out.negative_similarity)
    assert [float(a) for a in actual] == pytest.approx(expected, abs=METRIC[dtype])
    assert 0 < out.accuracy < 1


@pytest.mark.parametrize("batch", [65, 130])
def test_large_masks(backend: str, batch: int) -> None:
    mask = torch.rand(batch, 2 * batch)[:, ::2] < 0.3
    check(*views(batch, 6), backend, mask=mask)
    check(*views(batch, 6), backend, mask=mask.repeat(1, 2)[:, ::2].T)


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_but_zero_is_true_in_a_mask(backend: str, byte: int) -> None:
    excluded = torch.rand(20, 20) < 0.3
    mask = (excluded.to(torch.uint8) * byte).view(torch.bool)
    z_i, z_j = views(20, 6)
    expected = nt_xent(z_i, z_j, mask=excluded, backend=backend)
    for actual, plain in zip(nt_xent(z_i, z_j, mask=mask, backend=backend), expected, strict=True):
        torch.testing.assert_close(actual, plain)


def test_lse_includes_the_positive_and_excludes_the_anchor(backend: str) -> None:
    z_i, z_j = (z.detach() for z in views(6, 4))
    z = torch.nn.functional.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    out = nt_xent(z_i, z_j, backend=backend)
    torch.testing.assert_close(out.lse, torch.logsumexp(logits, dim=1))


def test_three_dimensional_inputs_are_flattened(backend: str) -> None:
    z_i, z_j = (torch.randn(3, 5, 7, requires_grad=True) for _ in range(2))
    mask = torch.rand(15, 15) < 0.2
    out = nt_xent(z_i, z_j, mask=mask, backend=backend)
    flat_i, flat_j = (z.detach().reshape(15, 7).requires_grad_() for z in (z_i, z_j))
    flat = nt_xent(flat_i, flat_j, mask=mask, backend=backend)
    assert torch.equal(out.loss, flat.loss)
    out.loss.backward()
    flat.loss.backward()
    assert torch.equal(z_i.grad, flat_i.grad.reshape(3, 5, 7))
    assert torch.equal(z_j.grad, flat_j.grad.reshape(3, 5, 7))


def test_strides_do_not_matter(backend: str) -> None:
    """One view holds the CLS rows of (B, N, D) features, the other one is transposed."""
    features = torch.randn(9, 4, 6)
    transposed = torch.randn(6, 9).T
    strided = nt_xent(features[:, 0], transposed, backend=backend)
    dense = nt_xent(features[:, 0].contiguous(), transposed.contiguous(), backend=backend)
    assert torch.equal(strided.loss, dense.loss)


@pytest.mark.parametrize("frozen", ["z_i", "z_j"])
def test_one_frozen_view(backend: str, frozen: str) -> None:
    z_i, z_j = views(8, 5)
    expected = torch.autograd.grad(nt_xent(z_i, z_j, backend=backend).loss, (z_i, z_j))
    constant, trained, index = (z_i, z_j, 1) if frozen == "z_i" else (z_j, z_i, 0)
    constant.requires_grad_(False)
    nt_xent(z_i, z_j, backend=backend).loss.backward()
    assert constant.grad is None
    assert torch.equal(trained.grad, expected[index])


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_temperature_gradient(
    backend: str, reduction: str, cosine: bool, dtype: torch.dtype
) -> None:
    z_i, z_j = views(19, 6, dtype)
    truth_i, truth_j = as_float64(z_i, z_j)
    temperature = torch.tensor(0.2 if cosine else 3.0, dtype=dtype, requires_grad=True)
    truth_temperature = temperature.detach().double().requires_grad_()
    loss = nt_xent(
        z_i,
        z_j,
        temperature=temperature,
        use_cosine_similarity=cosine,
        reduction=reduction,  # type: ignore[arg-type]
        backend=backend,
    ).loss
    truth = reference.nt_xent(
        truth_i, truth_j, temperature=truth_temperature, use_cosine_similarity=cosine
    ).loss
    upstream = torch.rand_like(loss) + 0.5
    (actual,) = torch.autograd.grad(loss, temperature, upstream)
    reduced = reference.reduce(truth, reduction)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(reduced, truth_temperature, upstream.double())
    assert relative_error(actual, expected) < 10 * FLOOR_GRADIENT[dtype]


def test_temperature_tensor_gives_the_loss_of_the_float(backend: str) -> None:
    z_i, z_j = views(12, 7)
    tensor = nt_xent(z_i, z_j, temperature=torch.tensor(0.25, dtype=torch.float64), backend=backend)
    number = nt_xent(z_i, z_j, temperature=0.25, backend=backend)
    torch.testing.assert_close(tensor.loss, number.loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_temperature_of_another_dtype_gets_its_gradient(
    backend: str, temperature_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    z_i, z_j = views(12, 7, dtype)
    temperature = torch.tensor(0.25, dtype=temperature_dtype, requires_grad=True)
    loss = nt_xent(z_i, z_j, temperature=temperature, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, temperature)
    exact = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    truth = nt_xent(z_i.double(), z_j.double(), temperature=exact, backend="reference").loss
    (expected,) = torch.autograd.grad(truth, exact)
    assert gradient.dtype == temperature_dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
def test_bad_temperature_tensor_gives_nan(backend: str, value: float) -> None:
    z_i, z_j = views(4, 3)
    assert nt_xent(z_i, z_j, temperature=torch.tensor(value), backend=backend).loss.isnan()


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_non_finite_embeddings_give_a_nan_loss(
    backend: str, dtype: torch.dtype, poison: float, cosine: bool
) -> None:
    z_i, z_j = (z.detach().clone() for z in views(9, 4, dtype))
    z_j[2, 1] = poison
    z_i, z_j = z_i.requires_grad_(), z_j.requires_grad_()
    gradients = []
    for name in (backend, "reference"):
        loss = nt_xent(z_i, z_j, use_cosine_similarity=cosine, backend=name).loss
        assert loss.isnan()
        gradients.append(torch.cat(torch.autograd.grad(loss, (z_i, z_j))))
    actual, expected = (gradient.isnan().any(dim=1) for gradient in gradients)
    assert expected[9 + 2]
    assert actual[expected].all()


def test_rows_of_zeros_get_no_gradient(backend: str) -> None:
    z_i, z_j = (z.detach().clone() for z in views(9, 4))
    z_i[3], z_j[5] = 0.0, 1e-9
    z_i, z_j = z_i.requires_grad_(), z_j.requires_grad_()
    loss = nt_xent(z_i, z_j, backend=backend).loss
    for gradient, zero in zip(torch.autograd.grad(loss, (z_i, z_j)), (3, 5), strict=True):
        assert (gradient[zero] == 0).all()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-16])
def test_loss_scale_changes_nothing_but_the_scale(backend: str, scale: float) -> None:
    z_i, z_j = views(16, 8)
    plain = torch.autograd.grad(nt_xent(z_i, z_j, backend=backend).loss, z_i)[0]
    scaled = torch.autograd.grad(scale * nt_xent(z_i, z_j, backend=backend).loss, z_i)[0]
    assert torch.equal(scaled, plain * scale)


def test_same_bits_every_time(backend: str) -> None:
    z_i, z_j = views(150, 40)
    runs = []
    for _ in range(3):
        out = nt_xent(z_i, z_j, backend=backend)
        runs.append([*out, *torch.autograd.grad(out.loss, (z_i, z_j))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_autocast_multiplies_in_the_low_dtype_and_returns_fp32(backend: str) -> None:
    z_i, z_j = views(32, 24)
    expected = nt_xent(z_i, z_j, backend=backend)
    gradient = torch.autograd.grad(expected.loss, z_i)[0]
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = nt_xent(z_i, z_j, backend=backend)
        assert out.loss.dtype == torch.float32
        (actual,) = torch.autograd.grad(out.loss, z_i)
    assert actual.dtype == torch.float32
    assert relative_error(out.loss, expected.loss) < AUTOCAST_LOSS
    assert relative_error(actual, gradient) < 2 * AUTOCAST_LOSS
    if backend != "reference":  # the reference does not follow autocast
        assert not torch.equal(out.loss, expected.loss)


ANY = settings(
    max_examples=3 if INTERPRETED else 8,
    deadline=None,
    # The fixture gives the same back end for all examples of a test, so one setup is enough.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@ANY
@given(
    batch=st.integers(1, 24),
    features=st.integers(2, 20),
    temperature=st.floats(1e-3, 100),
    cosine=st.booleans(),
    mask_share=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_shape_and_value(
    backend: str,
    dtype: torch.dtype,
    batch: int,
    features: int,
    temperature: float,
    cosine: bool,
    mask_share: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    # At other temperatures rounding decides by chance whether eager PyTorch's error is larger.
    if dtype == torch.float32:
        batch = max(batch, 2)
        temperature = min(max(temperature, 0.1), 10.0) * (1.0 if cosine else 20.0)
    z_i, z_j = (torch.randn(batch, features, dtype=dtype).requires_grad_() for _ in range(2))
    mask = None if mask_share is None else torch.rand(batch, batch) < mask_share
    check(z_i, z_j, backend, temperature=temperature, cosine=cosine, mask=mask)


@ANY
@given(batch=st.integers(2, 20), features=st.integers(2, 12), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_order_and_scale_of_the_samples_do_not_matter(
    backend: str, dtype: torch.dtype, batch: int, features: int, seed: int
) -> None:
    torch.manual_seed(seed)
    z_i, z_j = (torch.randn(batch, features, dtype=dtype) for _ in range(2))
    order = torch.randperm(batch)
    scale = torch.rand(batch, 1, dtype=dtype) + 0.5
    expected = nt_xent(z_i, z_j, backend=backend)
    permuted = nt_xent((z_i * scale)[order], z_j[order], backend=backend)
    swapped = nt_xent(z_j, z_i, backend=backend)
    for other in (permuted, swapped):
        torch.testing.assert_close(other[:4], expected[:4])
