"""Similarities of pairs are those that cross_logsumexp sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOOR_GRADIENT, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import chunked, cross_logsumexp, pair_similarity, reference, triton
from cjepa_kernels.functional import dispatch
from cjepa_kernels.ops import registry
from cjepa_kernels.reference.rows import round_operands

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pairs(rows: int, features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, features)
    y = x + 0.3 * torch.randn(rows, features)
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", [*DTYPES, "autocast"], ids=str)
def test_equals_the_largest_similarity_of_one_pair(backend: str, dtype: Any, cosine: bool) -> None:
    """With one row or one column, each entry is its own largest similarity."""
    autocast = dtype == "autocast"
    # No element of a unit row is close to the middle between two numbers of a dtype. Every back end
    # therefore rounds the rows alike.
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, -4.0, 3.0]])
    y = torch.tensor([[4.0, 3.0, 0.0], [-3.0, 4.0, 0.0]])
    x, y = (z.to(torch.float32 if autocast else dtype) for z in (x, y))
    options: dict[str, Any] = {"use_cosine_similarity": cosine, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        similarity = pair_similarity(x, y, **options)
        expected = [cross_logsumexp(x[k : k + 1], y[k : k + 1], **options) for k in range(2)]
    torch.testing.assert_close(
        similarity, torch.cat([out.row_max for out in expected]), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (7, 33), (64, 300)], ids=str)
def test_values_and_gradients(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, cosine: bool
) -> None:
    x, y = (z.requires_grad_() for z in pairs(*shape, dtype))
    truth = [z.detach().double().requires_grad_() for z in (x, y)]
    rows = [reference.embed_rows(z, cosine, 1e-8) for z in truth]
    expected = (rows[0] * rows[1]).sum(dim=1)
    similarity = pair_similarity(x, y, use_cosine_similarity=cosine, backend=backend)  # type: ignore[arg-type]
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale = max(1.0, expected.abs().max().item())
    assert (similarity - expected).abs().max() <= METRIC[dtype] * scale
    upstream = torch.randn(len(x))
    gradients = torch.autograd.grad(similarity, (x, y), upstream.to(similarity.dtype))
    eager = [z.detach().clone().requires_grad_() for z in (x, y)]
    rows = [F.normalize(z, dim=1, eps=1e-8) if cosine else z for z in eager]
    of_eager = torch.autograd.grad((rows[0] * rows[1]).sum(dim=1), eager, upstream.to(dtype))
    of_truths = torch.autograd.grad(expected, truth, upstream.double())
    for z, actual, of_truth, same_dtype in zip((x, y), gradients, of_truths, of_eager, strict=True):
        assert actual.dtype == z.dtype
        if cosine and shape[1] == 1:  # unit rows are 1 or -1, so the exact gradient is 0
            assert actual.abs().max() <= 10 * FLOOR_GRADIENT[dtype] / z.abs().min()
        else:
            bound = FLOOR_GRADIENT[dtype] + 2 * relative_error(same_dtype, of_truth)
            assert relative_error(actual, of_truth) <= bound


def test_gradient_is_not_rounded_under_autocast() -> None:
    """The gradient of fp32 rows uses the rounded rows of the other side, as in the kernels."""
    x, y = (z.requires_grad_() for z in pairs(6, 16))
    with torch.autocast("cpu", torch.bfloat16):
        similarity = pair_similarity(x, y).sum()
    rounded = chunked.rows.operands(y.detach(), True, 1e-8, torch.bfloat16)
    unit = reference.normalize_rows(x.detach(), 1e-8)
    expected = rounded - (rounded * unit).sum(dim=1, keepdim=True) * unit
    expected /= x.detach().norm(dim=1, keepdim=True)
    (gradient,) = torch.autograd.grad(similarity, x)
    # The gradient is projected with the exact unit row, not with a rounded one.
    assert relative_error(gradient, expected) <= FLOOR_GRADIENT[torch.float32]


def test_where_products_are_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded to the nearest number with 10 bits of mantissa. NaN stays NaN."""
    x = torch.tensor([1 + 2**-11 + 2**-20, 1 - 2**-12 + 2**-20, -(1 + 2**-11 + 2**-20), torch.nan])
    rounded = round_operands(x, torch.float32, tf32=True)
    torch.testing.assert_close(
        rounded, torch.tensor([1 + 2**-10, 1.0, -(1 + 2**-10), torch.nan]), equal_nan=True,
        rtol=0, atol=0,
    )  # fmt: skip
    for allowed in (True, False):
        monkeypatch.setattr(triton, "allows_tf32", lambda allowed=allowed: allowed)
        assert triton.rounds_to_tf32(x) == allowed
        assert not triton.rounds_to_tf32(x.double())
    y = torch.randn(5, 4)
    monkeypatch.setitem(registry.rounds_to_tf32, "triton", lambda _: True)
    expected = (round_operands(F.normalize(y, dim=1), torch.float32, tf32=True) ** 2).sum(1)
    on_cpu = pair_similarity(y, y)
    monkeypatch.setattr(dispatch, "choose_overload", lambda *_: ".triton")
    torch.testing.assert_close(pair_similarity(y, y), expected)
    torch.testing.assert_close(on_cpu, torch.ones(5))
    assert (expected - 1).abs().max() > 1e-5


def test_edges(backend: str) -> None:
    """Rows of zeros, rows with NaN or infinity, and very large rows."""
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    x[0], x[1, 2], x[2, 0] = 0, torch.nan, torch.inf
    x[3] *= 1e15
    x.requires_grad_()
    similarity = pair_similarity(x, y, backend=backend)  # type: ignore[arg-type]
    assert similarity.isnan().tolist() == [False, True, True, False, False]
    assert similarity[0] == 0
    torch.testing.assert_close(similarity[3:], torch.cosine_similarity(x, y)[3:])
    (gradient,) = torch.autograd.grad(similarity[[0, 3, 4]].sum(), x)
    assert torch.equal(gradient[0], torch.zeros(4))
    assert gradient[1:3].isnan().all()  # NaN and infinity reach the gradient
    assert gradient[3:].isfinite().all()


def test_takes_part_in_a_compiled_graph() -> None:
    x, y = (z.requires_grad_() for z in pairs(6, 8))
    compiled = torch.compile(pair_similarity, fullgraph=True, backend="aot_eager")
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.testing.assert_close(compiled(x, y), pair_similarity(x, y))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(3, 4), torch.ones(2, 4)), {}, ValueError, "as many rows.*got 3 and 2"),
        ((torch.ones(3, 4), torch.ones(3, 5)), {}, ValueError, "same D, got 4 and 5"),
        ((torch.ones(3), torch.ones(3)), {}, ValueError, r"x must be \(M, D\), got \(3,\)"),
        ((torch.ones(0, 4), torch.ones(0, 4)), {}, ValueError, "x must hold at least one row"),
        (([1.0], torch.ones(1, 1)), {}, TypeError, "x must be a tensor, got list"),
        ((torch.ones(1, 1), torch.ones(1, 1)), {"eps": 0.0}, ValueError, "eps must be positive"),
        ((torch.ones(1, 1), torch.ones(1, 1)), {"backend": "gpu"}, ValueError, "backend must be"),
    ],
    ids=["rows", "features", "one_dim", "empty", "list", "eps", "backend"],
)
def test_bad_arguments_are_refused(arguments: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pair_similarity(*arguments, **options)
