"""Values and gradients of cross_logsumexp against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overloads import INTERPRETED
from sample_inputs import DTYPES, sides
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import CrossLogSumExp, chunked, cross_logsumexp, reference

# The shapes (M, N, D) have a single pair, one row or column against many, odd sizes beyond a tile,
# or very unequal sides. For the interpreter, triton/test_kernels.py covers the last kind.
SHAPES = [
    (1, 1, 4),
    (2, 3, 1),
    (5, 3, 7),
    (1, 300, 16),
    (300, 1, 16),
    (64, 64, 64),
    (97, 193, 33),
    *([] if INTERPRETED else [(200, 1000, 24), (1000, 200, 24)]),
]
# Below a temperature of about 0.0235 a constant shift would leave the range of fp32.
TEMPERATURES = [1e-3, 0.01, 0.02, 0.0231, 0.05, 0.1, 1.0, 100.0]
pytestmark = pytest.mark.usefixtures("kernels_only")


def textbook(
    x: Tensor, y: Tensor, *, temperature: float | Tensor, use_cosine_similarity: bool
) -> CrossLogSumExp:
    """The usual formula, in the dtype of the inputs and with the whole matrix in memory."""
    if use_cosine_similarity:
        x, y = (F.normalize(z, dim=1, eps=1e-8) for z in (x, y))
    similarity = x @ y.T
    lse = [torch.logsumexp(similarity / temperature, dim=dim) for dim in (1, 0)]
    return CrossLogSumExp(*lse, *(similarity.detach().amax(dim=dim) for dim in (1, 0)))


def check(
    x: Tensor, y: Tensor, backend: Any, *, temperature: float = 0.1, cosine: bool = True
) -> None:
    """Check the log-sum-exps, the maxima and both gradients by the tolerance rule."""
    dtype = x.dtype
    options: dict[str, Any] = {"temperature": temperature, "use_cosine_similarity": cosine}
    out = cross_logsumexp(x, y, backend=backend, **options)
    upstream = [torch.rand_like(lse) - 0.3 for lse in out[:2]]
    gradients = torch.autograd.grad(out[:2], (x, y), upstream)

    truth_leaves = [z.detach().double().requires_grad_() for z in (x, y)]
    truth = reference.cross_logsumexp(*truth_leaves, **options)
    truth_upstream = [u.double() for u in upstream]
    truth_gradients = torch.autograd.grad(truth[:2], truth_leaves, truth_upstream)
    if cosine and x.shape[1] == 1:  # unit rows are 1 or -1, so the exact gradient is 0
        truth_gradients = tuple(torch.zeros_like(g) for g in truth_gradients)

    eager_leaves = [z.detach().clone().requires_grad_() for z in (x, y)]
    eager = textbook(*eager_leaves, **options)
    eager_upstream = [u.to(dtype) for u in upstream]
    eager_gradients = torch.autograd.grad(eager[:2], eager_leaves, eager_upstream)

    def check_one(actual: Tensor, expected: Tensor, same_dtype: Tensor, floor: float) -> None:
        assert actual.isfinite().all()
        error = relative_error(same_dtype, expected)
        bound = floor + (2 * error if math.isfinite(error) else 0.0)
        assert relative_error(actual, expected) <= bound

    for lse, expected, same_dtype in zip(out[:2], truth[:2], eager[:2], strict=True):
        check_one(lse, expected, same_dtype, FLOOR_VALUE[dtype])
    for gradient, expected, same_dtype in zip(
        gradients, truth_gradients, eager_gradients, strict=True
    ):
        assert gradient.dtype == dtype
        check_one(gradient, expected, same_dtype, FLOOR_GRADIENT[dtype])
    scale = max(1.0, truth.row_max.abs().max().item())
    for largest, expected, same_dtype in zip(out[2:], truth[2:], eager[2:], strict=True):
        bound = METRIC[dtype] * scale + 2 * (same_dtype.double() - expected).abs().max()
        assert (largest.double() - expected).abs().max() <= bound
        assert not largest.requires_grad
    assert [len(t) for t in out] == [len(x), len(y)] * 2
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in out} == {accumulation}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_shapes_and_dtypes(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*sides(*shape, dtype), backend)


# A native block has 96 rows, and 192 rows if a side has 1536 or more. Some sizes end in the middle
# of a block. A Triton tile has at most 128 rows; triton/test_kernels.py covers more sizes of tiles.
SIZES = [(96, 192, 16), (401, 97, 37), (1537, 210, 9), (60, 1700, 9), (1600, 1550, 8)]


@pytest.mark.parametrize("shape", SIZES[:2] if INTERPRETED else SIZES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["constant_shift", "running_maxima"])
@pytest.mark.usefixtures("poisoned_memory")
def test_sizes_around_the_blocks(
    backend: str, shape: tuple[int, int, int], temperature: float
) -> None:
    check(*sides(*shape), backend, temperature=temperature)


@pytest.mark.parametrize("rows", [1, 5, 4096], ids=["one_row", "five_rows", "whole"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_chunks_of_any_size(
    rows: int, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked.rows, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(chunked.rows, "MIN_CHUNK_ROWS", rows)
    check(*sides(17, 23, 9, dtype), "chunked", temperature=temperature)
    check(*sides(23, 17, 9, dtype), "chunked", temperature=temperature)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((10, 2**30), 10), ((2**15, 2**15), 64), ((2**15, 1), 2**15), ((2**22, 4), 2**19)],
    ids=str,
)
def test_a_chunk_is_bounded_whatever_the_shape(shape: tuple[int, int], chunk: int) -> None:
    assert chunked.rows.chunk_rows(*shape) == chunk


def hard_sides(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Aligned, anti-aligned and duplicate rows beside random ones."""
    x = torch.randn(41, 19, dtype=torch.float64)
    y = torch.randn(58, 19, dtype=torch.float64)
    y[:30] = x[:30] + 0.1 * y[:30]
    y[3] = -x[3]
    y[4] = y[5] = x[4] = x[5]  # two columns are equal to the row and tie for the largest
    y[6] = -x.mean(dim=0)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(backend: str, temperature: float, dtype: torch.dtype) -> None:
    check(*hard_sides(dtype), backend, temperature=temperature)


# The kernels stop using the constant shift below a temperature of 0.0266. With it, weights would
# leave the range of fp32 below 0.0217.
@pytest.mark.parametrize("temperature", [0.0215, 0.0266, 0.0267])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_antipodal_rows(backend: str, temperature: float, dtype: torch.dtype) -> None:
    direction = F.normalize(torch.randn(1, 24), dim=1)
    x, y = (sign * direction + 0.01 * torch.randn(n, 24) for n, sign in ((5, 1), (7, -1)))
    leaves = [z.to(dtype).requires_grad_() for z in (x, y)]
    check(*leaves, backend, temperature=temperature)


def test_small_upstream_gradients_beside_a_large_one(backend: str) -> None:
    """A large upstream gradient of one fp16 row does not change the gradients of other rows."""
    x, y = (z.half().requires_grad_() for z in torch.randn(2, 20, 24))
    truth = [z.detach().double().requires_grad_() for z in (x, y)]
    upstream = torch.ones(20)
    upstream[0] = 2.0**20
    gradients = []
    for leaves, name in (((x, y), backend), (truth, "reference")):
        lse = cross_logsumexp(*leaves, backend=name).row_lse
        gradients.append(torch.autograd.grad(lse, leaves[0], upstream.to(lse))[0][1:])
    assert relative_error(*gradients) <= FLOOR_GRADIENT[torch.float16]


@pytest.mark.parametrize("temperature", [0.5, 5.0])
@pytest.mark.parametrize("shape", [(23, 40, 12), (1, 300, 5), (97, 193, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dot_product(
    backend: str, shape: tuple[int, int, int], temperature: float, dtype: torch.dtype
) -> None:
    check(*sides(*shape, dtype), backend, temperature=temperature, cosine=False)


@pytest.mark.parametrize("output", ["row_lse", "column_lse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_through_one_output(backend: Any, output: str, dtype: torch.dtype) -> None:
    x, y = sides(31, 44, 10, dtype)
    truth_leaves = [z.detach().double().requires_grad_() for z in (x, y)]
    lse = getattr(cross_logsumexp(x, y, backend=backend), output)
    truth = getattr(reference.cross_logsumexp(*truth_leaves), output)
    upstream = torch.randn_like(lse)
    actual = torch.autograd.grad(lse, (x, y), upstream)
    expected = torch.autograd.grad(truth, truth_leaves, upstream.double())
    for gradient, truth_gradient in zip(actual, expected, strict=True):
        assert relative_error(gradient, truth_gradient) <= 2 * FLOOR_GRADIENT[dtype]


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
@pytest.mark.parametrize("value", [0.02, 0.2, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_temperature_gradient(backend: Any, value: float, cosine: bool, dtype: torch.dtype) -> None:
    x, y = sides(19, 26, 6, dtype)
    truth_leaves = [z.detach().double() for z in (x, y)]
    temperature = torch.tensor(value, dtype=dtype, requires_grad=True)
    truth_temperature = temperature.detach().double().requires_grad_()
    options: dict[str, Any] = {"use_cosine_similarity": cosine}
    out = cross_logsumexp(x, y, temperature=temperature, backend=backend, **options)
    truth = reference.cross_logsumexp(*truth_leaves, temperature=truth_temperature, **options)
    upstream = [torch.rand_like(lse) + 0.5 for lse in out[:2]]
    (actual,) = torch.autograd.grad(out[:2], temperature, upstream)
    (expected,) = torch.autograd.grad(truth[:2], truth_temperature, [u.double() for u in upstream])
    assert actual.dtype == temperature.dtype
    assert relative_error(actual, expected) < 10 * FLOOR_GRADIENT[dtype]


def test_huge_loss_scale_with_antipodal_rows(backend: Any) -> None:
    """All rows are as far apart as possible, which makes the weights as large as possible.

    The temperature is just above the one at which the constant shift would leave the range of fp32.
    """
    direction = F.normalize(torch.randn(1, 24), dim=1)
    x = (direction + 1e-3 * torch.randn(20, 24)).requires_grad_()
    y = (-direction + 1e-3 * torch.randn(33, 24)).requires_grad_()
    truth_leaves = [z.detach().double().requires_grad_() for z in (x, y)]
    truth = reference.cross_logsumexp(*truth_leaves, temperature=0.024)
    expected = torch.autograd.grad(truth.row_lse.sum() + truth.column_lse.sum(), truth_leaves)
    out = cross_logsumexp(x, y, temperature=0.024, backend=backend)
    loss = (out.row_lse.sum() + out.column_lse.sum()) * 2.0**16
    eager_leaves = [z.detach().clone().requires_grad_() for z in (x, y)]
    eager = textbook(*eager_leaves, temperature=0.024, use_cosine_similarity=True)
    same_dtype = torch.autograd.grad(eager.row_lse.sum() + eager.column_lse.sum(), eager_leaves)
    for index, gradient in enumerate(torch.autograd.grad(loss, (x, y))):
        assert gradient.isfinite().all()
        bound = 2 * relative_error(same_dtype[index], expected[index])
        floor = FLOOR_GRADIENT[torch.float32]
        assert relative_error(gradient / 2.0**16, expected[index]) <= bound + floor


@pytest.mark.parametrize("cosine", [True, False], ids=["cosine", "dot"])
def test_reference_is_logsumexp_of_the_matrix(cosine: bool) -> None:
    x, y = (z.detach() for z in sides(14, 9, 5, torch.float64))
    out = reference.cross_logsumexp(x, y, temperature=0.3, use_cosine_similarity=cosine)
    for a in range(14):
        pairs = [F.cosine_similarity(x[a], b, dim=0) if cosine else x[a] @ b for b in y]
        expected = math.log(sum(math.exp(s.item() / 0.3) for s in pairs))
        assert out.row_lse[a].item() == pytest.approx(expected, rel=1e-12)
        assert out.row_max[a].item() == pytest.approx(max(s.item() for s in pairs), rel=1e-12)
    swapped = reference.cross_logsumexp(y, x, temperature=0.3, use_cosine_similarity=cosine)
    torch.testing.assert_close(out.column_lse, swapped.row_lse)
    torch.testing.assert_close(out.column_max, swapped.row_max)


@settings(
    max_examples=3 if INTERPRETED else 8,
    deadline=None,
    # The fixture gives the same back end for all examples of a test, so one setup is enough.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    features=st.integers(2, 20),
    temperature=st.floats(1e-3, 100),
    cosine=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_shape_and_value(
    backend: str,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    features: int,
    temperature: float,
    cosine: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    # At other temperatures rounding decides by chance whether eager PyTorch's error is larger.
    if dtype == torch.float32:
        temperature = min(max(temperature, 0.1), 10.0)
    x, y = (torch.randn(n, features, dtype=dtype).requires_grad_() for n in (rows, columns))
    check(x, y, backend, temperature=temperature, cosine=cosine)


def test_second_derivative_of_the_reference() -> None:
    x, y = sides(3, 4, 3, torch.float64)

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return cross_logsumexp(a, b, temperature=0.5, backend="reference")[:2]

    assert torch.autograd.gradgradcheck(both, (x, y))


@pytest.mark.parametrize("learnable", [False, True], ids=["", "learnable"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_the_gradient_of_one_side_alone(
    backend: Any, wanted: tuple[bool, bool], learnable: bool
) -> None:
    """A frozen side needs no matrix product and does not change the other gradients."""
    if wanted == (False, False) and not learnable:
        pytest.skip("nothing wants a gradient")
    rows = torch.randn(21, 12), torch.randn(13, 12)
    upstream = torch.randn(21), torch.randn(13)

    def gradients(of: tuple[bool, bool]) -> list[Tensor]:
        temperature = torch.tensor(0.2, requires_grad=True) if learnable else 0.2
        x, y = (z.clone().requires_grad_(own) for z, own in zip(rows, of, strict=True))
        out = cross_logsumexp(x, y, temperature=temperature, backend=backend)
        leaves = [z for z in (x, y, temperature) if isinstance(z, Tensor) and z.requires_grad]
        return list(torch.autograd.grad(out[:2], leaves, upstream))

    every = gradients((True, True))
    expected = [g for g, own in zip(every, (*wanted, learnable), strict=False) if own]
    for actual, other in zip(gradients(wanted), expected, strict=True):
        # Large terms cancel in a temperature's gradient, and a back end may sum over either side.
        # The bound is therefore that of test_temperature_gradient.
        allowed = (10 if actual.ndim == 0 else 1) * FLOOR_GRADIENT[torch.float32]
        assert relative_error(actual, other) <= allowed
