"""Mean similarities within and across classes against the reference, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import FLOOR_GRADIENT, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import backends, chunked, ops, reference
from cjepa_kernels.functional.class_similarity import class_similarity

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = [
    "chunked",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not backends()["native"].available, reason="the compiled kernels are missing"
        ),
    ),
]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
ROWS = 150
LABELS = {
    "random": lambda: torch.randint(7, (ROWS,)),
    "one_class": lambda: torch.zeros(ROWS, dtype=torch.int64),
    "all_different": lambda: torch.randperm(ROWS),
    "huge": lambda: torch.tensor([-(2**63), 2**63 - 1, 0]).repeat(ROWS // 3),
    "one_alone": lambda: torch.tensor([3] * (ROWS - 1) + [-4]),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot_product"])
@pytest.mark.parametrize(
    ("backend", "small"),
    [("chunked", True), ("chunked", False), pytest.param("native", False, marks=BACKENDS[1].marks)],
    ids=["small_chunks", "chunked", "native"],
)
def test_values_and_gradients(
    name: str,
    dtype: torch.dtype,
    cosine: bool,
    backend: Any,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small:  # several columns, rows and bags at a time, with a rest
        monkeypatch.setattr(chunked.class_similarity, "CHUNK_ELEMENTS", 4 * ROWS)
        monkeypatch.setattr(chunked.class_similarity, "BAG_ROWS", 8)
    classes = LABELS[name]()
    z = (0.2 * torch.randn(ROWS, 17) + torch.randn(17)).to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    # The back end rounds unit rows to the dtype before it multiplies them.
    rounded = reference.embed_rows(exact, cosine, 1e-8).to(dtype).double()
    options = {"use_cosine_similarity": cosine, "eps": 1e-8}
    out = class_similarity(z, None, classes, **options, backend=backend)
    truth = reference.class_similarity(rounded, classes, use_cosine_similarity=False)
    truth_gradient = class_similarity(exact, None, classes, **options, backend="reference")
    scale = (rounded @ rounded.T).abs().max().item()
    bound = METRIC[torch.float64 if dtype == torch.float64 else torch.float32] * scale
    assert (out.within - truth.within).abs().max() <= bound
    assert torch.equal(out.across.isnan(), truth.across.isnan())
    assert truth.across.isnan() or (out.across - truth.across).abs() <= bound
    upstream = torch.rand(ROWS)
    (actual,) = torch.autograd.grad(out.within, z, upstream.to(out.within))
    (expected,) = torch.autograd.grad(truth_gradient.within, exact, upstream.double())
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= 2 * FLOOR_GRADIENT[dtype]


@EVERY_BACKEND
def test_two_views_are_rows_one_after_the_other(backend: Any) -> None:
    z_i, z_j = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(3, (9,))
    options = {"use_cosine_similarity": True, "eps": 1e-8, "backend": backend}
    both = class_similarity(z_i, z_j, classes, **options)
    one = class_similarity(torch.cat([z_i, z_j]), None, classes.repeat(2), **options)
    for actual, expected in zip(both, one, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=METRIC[torch.float64])
    assert torch.equal(*(torch.autograd.grad(x.within.sum(), z_j)[0] for x in (both, one)))


@EVERY_BACKEND
@pytest.mark.parametrize("rows", [63, 64, 128, 1000, 4100, 5000])
@pytest.mark.parametrize("sizes", ["one", "random", "large", "mixed"])
def test_classes_that_cross_segments(backend: Any, rows: int, sizes: str) -> None:
    """The compiled kernel cuts the sorted rows into segments of 64 rows, and later 64 segments."""
    classes = {
        "one": torch.zeros(rows, dtype=torch.int64),
        "random": torch.randint(rows // 30 + 1, (rows,)),
        "large": torch.arange(rows) * 3 // rows,
        "mixed": (torch.arange(rows) - rows // 4).clamp(0, rows // 2),
    }[sizes][torch.randperm(rows)]
    z = torch.randn(rows, 5, dtype=torch.float64)
    options = {"use_cosine_similarity": True, "eps": 1e-8}
    out = class_similarity(z, None, classes, **options, backend=backend)
    truth = class_similarity(z, None, classes, **options, backend="reference")
    torch.testing.assert_close(out, truth, rtol=0, atol=METRIC[torch.float64], equal_nan=True)


@EVERY_BACKEND
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot_product"])
def test_what_is_not_finite_gives_nan(backend: Any, value: float, cosine: bool) -> None:
    z, classes = torch.randn(90, 5), torch.arange(90) % 3
    z[4, 2] = value
    out = class_similarity(
        z, None, classes, use_cosine_similarity=cosine, eps=1e-8, backend=backend
    )
    assert torch.equal(out.within.isnan(), classes == classes[4])
    assert out.across.isnan()


@EVERY_BACKEND
def test_one_row_more_than_the_rest_loses_no_digits(backend: Any) -> None:
    """Across one large class and a single row, the difference of two large sums is exact."""
    near = torch.randn(8) + 1e-3 * torch.randn(20000, 8)
    z = torch.cat([near, torch.randn(1, 8)])
    classes = torch.tensor([1] * 20000 + [2])
    out = class_similarity(z, None, classes, use_cosine_similarity=True, eps=1e-8, backend=backend)
    unit = reference.normalize_rows(z, 1e-8).double()
    expected = (unit[:-1] @ unit[-1]).mean()
    assert (out.across - expected).abs() <= METRIC[torch.float32]


@pytest.mark.parametrize(("overload", "views"), [("", 1), (".chunked", 2)], ids=str)
def test_opcheck_and_gradcheck(overload: str, views: int) -> None:
    z_i = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    z_j = torch.randn(9, 5, dtype=torch.float64, requires_grad=True) if views == 2 else None
    classes = torch.tensor([1, 1, 2, 2, 2, 3, 4, 4, 4])
    operator = ops.operator("class_similarity", overload)
    options = (classes, True, 1e-8, None, False)
    torch.library.opcheck(operator, (z_i, z_j, *options))

    def within(*z: Tensor) -> Tensor:
        return operator(*z, *([None] if views == 1 else []), *options)[0]

    assert torch.autograd.gradcheck(within, [z for z in (z_i, z_j) if z is not None])


@EVERY_BACKEND
def test_the_same_bits_on_every_call(backend: Any) -> None:
    z = torch.randn(3000, 40, requires_grad=True)
    classes = torch.randint(-5, 5, (3000,))

    def results() -> tuple[Tensor, Tensor]:
        out = class_similarity(
            z, None, classes, use_cosine_similarity=True, eps=1e-8, backend=backend
        )
        return out.within, torch.autograd.grad(out.within.sum(), z)[0]

    first = results()
    torch.set_num_threads(2)
    for actual, expected in zip(results(), first, strict=True):
        assert torch.equal(actual, expected)
