"""Calls of cross_logsumexp with strides, frozen sides, bad numbers and wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sample_inputs import DTYPES, sides
from tolerances import AUTOCAST_LOSS, relative_error
from torch import Tensor

from cjepa_kernels import CrossLogSumExp, backends, cross_logsumexp, reference

pytestmark = pytest.mark.usefixtures("kernels_only")


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_strides_do_not_matter(backend: Any, cosine: bool) -> None:
    """One side holds the CLS rows of (B, N, D) features, the other one is transposed."""
    strided = (torch.randn(9, 4, 6)[:, 0].requires_grad_(), torch.randn(6, 21).T.requires_grad_())
    dense = tuple(z.detach().clone(memory_format=torch.contiguous_format) for z in strided)
    results = []
    for x, y in (strided, tuple(z.requires_grad_() for z in dense)):
        out = cross_logsumexp(x, y, use_cosine_similarity=cosine, backend=backend)
        # The gradient that .sum() passes on is one number, expanded with stride 0.
        results.append([*out, *torch.autograd.grad(out.row_lse.sum(), (x, y))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_strided_upstream_gradient(backend: Any) -> None:
    x, y = sides(9, 14, 5)
    out = cross_logsumexp(x, y, backend=backend)
    row, column = torch.randn(9, 2, dtype=x.dtype)[:, 1], torch.randn(14, 3, dtype=x.dtype)[:, 0]
    strided = torch.autograd.grad(out[:2], (x, y), (row, column), retain_graph=True)
    dense = torch.autograd.grad(out[:2], (x, y), (row.contiguous(), column.contiguous()))
    for actual, expected in zip(strided, dense, strict=True):
        assert torch.equal(actual, expected)


def test_upstream_gradients_of_zero(backend: Any) -> None:
    x, y = sides(8, 11, 5)
    temperature = torch.tensor(0.2, requires_grad=True)
    out = cross_logsumexp(x, y, temperature=temperature, backend=backend)
    zeros = [torch.zeros_like(lse) for lse in out[:2]]
    for gradient in torch.autograd.grad(out[:2], (x, y, temperature), zeros):
        assert (gradient == 0).all()


@pytest.mark.parametrize("frozen", ["x", "y"])
def test_one_frozen_side(backend: Any, frozen: str) -> None:
    x, y = sides(8, 11, 5)
    out = cross_logsumexp(x, y, backend=backend)
    expected = torch.autograd.grad(out.row_lse.sum() + out.column_lse.sum(), (x, y))
    constant, trained, index = (x, y, 1) if frozen == "x" else (y, x, 0)
    constant.requires_grad_(False)
    out = cross_logsumexp(x, y, backend=backend)
    (out.row_lse.sum() + out.column_lse.sum()).backward()
    assert constant.grad is None
    assert torch.equal(trained.grad, expected[index])


def test_one_tensor_on_both_sides(backend: Any) -> None:
    x = torch.randn(13, 6, requires_grad=True)
    out = cross_logsumexp(x, x, backend=backend)
    expected = reference.cross_logsumexp(x, x)
    torch.testing.assert_close(out.row_lse, expected.row_lse)
    torch.testing.assert_close(out.row_lse, out.column_lse)
    torch.testing.assert_close(
        torch.autograd.grad(out.row_lse.sum(), x), torch.autograd.grad(expected.row_lse.sum(), x)
    )


@pytest.mark.parametrize("temperature_dtype", DTYPES, ids=str)
def test_temperature_tensor_gives_the_values_of_the_float(
    backend: Any, temperature_dtype: torch.dtype
) -> None:
    x, y = sides(12, 7, 5)
    temperature = torch.tensor(0.25, dtype=temperature_dtype, requires_grad=True)
    tensor = cross_logsumexp(x, y, temperature=temperature, backend=backend)
    number = cross_logsumexp(x, y, temperature=0.25, backend=backend)
    torch.testing.assert_close(tensor, number)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan])
def test_bad_temperature_tensor_gives_nan(backend: Any, value: float) -> None:
    x, y = sides(4, 6, 3)
    out = cross_logsumexp(x, y, temperature=torch.tensor(value), backend=backend)
    assert out.row_lse.isnan().all()
    assert out.column_lse.isnan().all()


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_give_nan(backend: Any, poison: float, cosine: bool) -> None:
    x, y = (z.detach().clone() for z in sides(9, 12, 4))
    y[2, 1] = poison
    x, y = x.requires_grad_(), y.requires_grad_()
    gradients = []
    for name in (backend, "reference"):
        out = cross_logsumexp(x, y, use_cosine_similarity=cosine, backend=name)
        assert out.row_lse.isnan().all()
        assert out.column_lse[2].isnan()
        total = out.row_lse.sum() + out.column_lse.sum()
        gradients.append(torch.cat(torch.autograd.grad(total, (x, y))))
    actual, expected = (gradient.isnan().any(dim=1) for gradient in gradients)
    assert expected[9 + 2]
    assert actual[expected].all()


def test_rows_of_zeros_get_no_gradient(backend: Any) -> None:
    x, y = (z.detach().clone() for z in sides(9, 12, 4))
    x[3], y[5] = 0.0, 1e-9
    x, y = x.requires_grad_(), y.requires_grad_()
    out = cross_logsumexp(x, y, backend=backend)
    assert out.row_lse[3].item() == pytest.approx(math.log(12), abs=1e-5)
    for gradient, zero in zip(torch.autograd.grad(out[1].sum(), (x, y)), (3, 5), strict=True):
        assert (gradient[zero] == 0).all()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-16])
def test_loss_scale_changes_nothing_but_the_scale(backend: Any, scale: float) -> None:
    x, y = sides(16, 30, 8)

    def gradients(factor: float) -> tuple[Tensor, ...]:
        out = cross_logsumexp(x, y, backend=backend)
        return torch.autograd.grad(factor * (out.row_lse.sum() + out.column_lse.mean()), (x, y))

    for scaled, plain in zip(gradients(scale), gradients(1.0), strict=True):
        assert torch.equal(scaled, plain * scale)


def test_same_bits_every_time(backend: Any) -> None:
    x, y = sides(150, 90, 40)
    runs = []
    for _ in range(3):
        out = cross_logsumexp(x, y, backend=backend)
        runs.append([*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (x, y))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.skipif(not backends()["native"].available, reason="no compiled kernel here")
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_native_same_bits_on_any_number_of_threads(temperature: float) -> None:
    x, y = sides(700, 1200, 33)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out = cross_logsumexp(x, y, temperature=temperature, backend="native")
        results.append([*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (x, y))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_gradients(backend: Any) -> None:
    x, y = sides(6, 9, 4)
    expected = cross_logsumexp(x, y, backend=backend)
    with torch.no_grad():
        out = cross_logsumexp(x, y, backend=backend)
    assert isinstance(out, CrossLogSumExp)
    assert not any(t.requires_grad for t in out)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_autocast_multiplies_in_the_low_dtype_and_returns_fp32(backend: Any) -> None:
    x, y = sides(32, 51, 24)
    expected = cross_logsumexp(x, y, backend=backend)
    gradient = torch.autograd.grad(expected.row_lse.sum(), x)[0]
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = cross_logsumexp(x, y, backend=backend)
        assert out.row_lse.dtype == torch.float32
        (actual,) = torch.autograd.grad(out.row_lse.sum(), x)
    assert actual.dtype == torch.float32
    assert relative_error(out.row_lse, expected.row_lse) < AUTOCAST_LOSS
    assert relative_error(out.column_lse, expected.column_lse) < AUTOCAST_LOSS
    assert relative_error(actual, gradient) < 2 * AUTOCAST_LOSS
    if backend != "reference":  # the reference does not follow autocast
        assert not torch.equal(out.row_lse, expected.row_lse)


x34 = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], x34), {}, TypeError, "x must be a tensor, got list"),
        ((x34, None), {}, TypeError, "y must be a tensor, got NoneType"),
        ((x34.int(), x34), {}, TypeError, "x must be of fp64, fp32, bf16 or fp16, got torch.int32"),
        ((x34, x34.bool()), {}, TypeError, "y must be of fp64.* got torch.bool"),
        ((x34[0], x34), {}, ValueError, r"x must be \(M, D\), got \(4,\)"),
        ((x34, x34[None]), {}, ValueError, r"y must be \(N, D\), got \(1, 3, 4\)"),
        ((x34[:0], x34), {}, ValueError, r"x must hold at least one row and one .* got \(0, 4\)"),
        ((x34, x34[:, :0]), {}, ValueError, r"y must hold at least one row and one .*\(3, 0\)"),
        ((x34, x34[:, :2]), {}, ValueError, "x and y must have the same D, got 4 and 2 features"),
        (
            (x34, x34.to("meta")),
            {},
            ValueError,
            "x and y must be on the same device, got cpu and meta",
        ),
        ((x34, x34), {"temperature": -0.1}, ValueError, "Temperature must be positive.* got -0.1"),
        ((x34, x34), {"temperature": "0.1"}, TypeError, "temperature must be a float .* got '0.1'"),
        ((x34, x34), {"temperature": torch.ones(2)}, ValueError, r"temperature must .* \(2,\)"),
        (
            (x34, x34),
            {"temperature": torch.ones((), device="meta")},
            ValueError,
            "temperature must be on the device of x, cpu, got meta",
        ),
        ((x34, x34), {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        (
            (x34, x34),
            {"use_cosine_similarity": 1},
            TypeError,
            "use_cosine_similarity must be True or False, got 1",
        ),
        ((x34, x34), {"backend": "numpy"}, ValueError, "backend must be one of .* got 'numpy'"),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else "",
)
def test_mistakes_are_named(
    arguments: tuple[Any, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cross_logsumexp(*arguments, **options)


def test_missing_back_end_is_an_error() -> None:
    missing = [name for name, status in backends().items() if not status.available]
    for name in missing:
        with pytest.raises(RuntimeError, match=f'"{name}" was asked for and is not available'):
            cross_logsumexp(x34, x34, backend=name)  # type: ignore[arg-type]
