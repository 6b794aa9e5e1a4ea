"""The rectangle with positives against the float64 reference, in values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from overloads import DEVICE, INTERPRETED
from sample_inputs import DTYPES, cross_logsumexp_inputs, sides
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import PairedLogSumExp, ops, paired_logsumexp, reference

pytestmark = pytest.mark.usefixtures("kernels_only")

# Every row has its own column, rows share columns, or one column is everybody's positive.
KINDS = ["repeated", "one_column"]
SHAPES = [(1, 2, 4), (5, 3, 7), (97, 193, 33)]
if not INTERPRETED:
    KINDS += ["in_order", "permuted"]
    SHAPES += [(2, 3, 1), (64, 64, 64), (200, 1000, 24), (1000, 200, 24)]


def positives_of(kind: str, rows: int, columns: int) -> Tensor:
    """(rows,) the column of each row's positive."""
    if kind == "in_order":
        return torch.arange(rows) % columns
    if kind == "permuted":
        return torch.randperm(columns)[torch.arange(rows) % columns]
    if kind == "repeated":
        return torch.randint(columns, (rows,))
    return torch.full((rows,), columns - 1)


def textbook(
    x: Tensor, y: Tensor, positives: Tensor, *, temperature: float | Tensor, cosine: bool
) -> PairedLogSumExp:
    """The usual formula in the dtype of the inputs, with the whole matrix in memory."""
    if cosine:
        x, y = (F.normalize(z, dim=1, eps=1e-8) for z in (x, y))
    similarity = x @ y.T
    of_positive = F.one_hot(positives, len(y)).bool()
    negatives = similarity.masked_fill(of_positive, -math.inf)
    return PairedLogSumExp(
        *(torch.logsumexp(negatives / temperature, dim=dim) for dim in (1, 0)),
        *(negatives.detach().amax(dim=dim) for dim in (1, 0)),
        positive=similarity[torch.arange(len(x)), positives],
        mean_similarity=similarity.detach().mean(),
    )


def finite(values: Tensor) -> Tensor:
    """The finite values: a row or a column without negatives has a log-sum-exp of -inf."""
    return values[values.isfinite()]


def gradients_of(
    out: PairedLogSumExp, leaves: list[Tensor], upstream: list[Tensor]
) -> list[Tensor]:
    """Gradients through all outputs that have one, as far as they are finite."""
    total = out.row_lse.new_zeros(())
    outputs = (out.row_lse, out.column_lse, out.positive)
    for value, weight in zip(outputs, upstream, strict=True):
        total = total + (value * weight.to(value)).where(value.isfinite(), 0.0).sum()
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


def check(
    x: Tensor,
    y: Tensor,
    positives: Tensor,
    backend: Any,
    *,
    temperature: float = 0.1,
    cosine: bool = True,
) -> None:
    """Check every output and both gradients by the tolerance rule."""
    dtype = x.dtype
    leaves = [x, y]
    options: dict[str, Any] = {"temperature": temperature, "use_cosine_similarity": cosine}
    out = paired_logsumexp(x, y, positives, backend=backend, **options)
    upstream = [torch.rand_like(lse) - 0.3 for lse in (out.row_lse, out.column_lse, out.positive)]
    truth_leaves = [z.detach().double().requires_grad_() for z in leaves]
    truth = reference.paired_logsumexp(*truth_leaves, positives, **options)
    eager_leaves = [z.detach().clone().requires_grad_() for z in leaves]
    eager = textbook(*eager_leaves, positives, temperature=temperature, cosine=cosine)
    scale = max(1.0, truth.positive.abs().max().item())
    for name in PairedLogSumExp._fields:
        actual, expected, same_dtype = (getattr(o, name).detach() for o in (out, truth, eager))
        assert (actual.isfinite() == expected.isfinite()).all(), name
        assert (actual[~actual.isfinite()] == -math.inf).all(), name
        kept = [finite(value).double() for value in (actual, expected, same_dtype)]
        if not kept[0].numel():
            continue
        if name.endswith("lse"):
            bound = FLOOR_VALUE[dtype] + 2 * relative_error(kept[2], kept[1])
            assert relative_error(kept[0], kept[1]) <= bound, name
        else:
            bound = METRIC[dtype] * scale + 2 * (kept[2] - kept[1]).abs().max().item()
            assert (kept[0] - kept[1]).abs().max().item() <= bound, name
    for actual, expected, same_dtype in zip(
        gradients_of(out, leaves, upstream),
        gradients_of(truth, truth_leaves, upstream),
        gradients_of(eager, eager_leaves, upstream),
        strict=True,
    ):
        if cosine and x.shape[1] == 1:  # unit rows are 1 or -1, so the exact gradient is 0
            expected = torch.zeros_like(expected)
        error = relative_error(same_dtype, expected)
        bound = FLOOR_GRADIENT[dtype] + (2 * error if math.isfinite(error) else 0.0)
        assert actual.isfinite().all()
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_shapes_dtypes_and_kinds(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> None:
    check(*sides(*shape, dtype), positives_of(kind, *shape[:2]), backend)


# A native block has 96 rows, and 192 if a side has 1536 or more. A Triton tile has at most 128.
SIZES = [(401, 97, 37), (96, 192, 16), (1537, 210, 9), (60, 1700, 9), (1600, 1550, 8)]


@pytest.mark.parametrize("shape", SIZES[:1] if INTERPRETED else SIZES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["constant_shift", "running_maxima"])
@pytest.mark.parametrize("kind", ["in_order", "repeated"])
@pytest.mark.usefixtures("poisoned_memory")
def test_sizes_around_the_blocks(
    backend: str, shape: tuple[int, int, int], temperature: float, kind: str
) -> None:
    check(*sides(*shape), positives_of(kind, *shape[:2]), backend, temperature=temperature)


TEMPERATURES = [0.005, 0.05] if INTERPRETED else [1e-3, 0.005, 0.02, 0.05, 1.0, 100.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_and_opposite_pairs(backend: str, temperature: float, dtype: torch.dtype) -> None:
    """A positive is the row itself or its opposite. Duplicates of positives are negatives."""
    x = torch.randn(40, 19, dtype=torch.float64)
    y = torch.cat([x, -x[:10], x[:5]])
    positives = torch.arange(40)
    positives[10:20] = torch.arange(40, 50)
    leaves = [z.to(dtype).requires_grad_() for z in (x, y)]
    check(*leaves, positives, backend, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dot_product(backend: str, dtype: torch.dtype) -> None:
    x, y = sides(23, 40, 12, dtype)
    positives = positives_of("repeated", 23, 40)
    check(x, y, positives, backend, temperature=5.0, cosine=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.02, 0.2, 3.0])
def test_temperature_gradient(backend: Any, value: float, dtype: torch.dtype) -> None:
    x, y = (z.detach() for z in sides(19, 26, 6, dtype))
    positives = positives_of("repeated", 19, 26)
    results = []
    for to, name in ((dtype, backend), (torch.float64, "reference")):
        temperature = torch.tensor(value, dtype=dtype).to(to).requires_grad_()
        out = paired_logsumexp(x.to(to), y.to(to), positives, temperature=temperature, backend=name)
        loss = out.row_lse.sum() + 0.5 * out.column_lse.sum() + 0.0 * out.positive.sum()
        results.append(torch.autograd.grad(loss, temperature)[0])
    assert relative_error(*results) < 10 * FLOOR_GRADIENT[dtype]


@pytest.mark.parametrize("output", ["row_lse", "column_lse", "positive"])
def test_gradient_through_one_output(backend: Any, output: str) -> None:
    x, y = sides(31, 44, 10)
    positives = positives_of("repeated", 31, 44)
    gradients = []
    for leaves, name in (((x, y), backend), ([z.detach().double() for z in (x, y)], "reference")):
        leaves = [z.requires_grad_() for z in leaves]
        value = getattr(paired_logsumexp(*leaves, positives, backend=name), output)
        upstream = torch.linspace(-1, 1, len(value)).to(value)
        gradients.append(torch.autograd.grad(value, leaves, upstream))
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) <= 2 * FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("frozen", ["x", "y"])
def test_one_frozen_side(backend: Any, frozen: str) -> None:
    x, y = sides(18, 11, 5)
    positives = positives_of("repeated", 18, 11)
    expected = gradients_of(
        paired_logsumexp(x, y, positives, backend=backend),
        [x, y],
        [torch.ones(18), torch.ones(11), torch.ones(18)],
    )
    constant, trained, index = (x, y, 1) if frozen == "x" else (y, x, 0)
    constant.requires_grad_(False)
    out = paired_logsumexp(x, y, positives, backend=backend)
    (out.row_lse.sum() + out.column_lse.sum() + out.positive.sum()).backward()
    assert constant.grad is None
    assert torch.equal(trained.grad, expected[index])


@pytest.mark.parametrize("shape", [(1, 1), (5, 1)], ids=str)
def test_without_negatives(backend: Any, shape: tuple[int, int]) -> None:
    """A sum over nothing is -inf, and whatever gradient reaches it, nothing comes out."""
    x, y = sides(*shape, 6)
    out = paired_logsumexp(x, y, torch.zeros(shape[0], dtype=torch.int64), backend=backend)
    assert (out.row_lse == -math.inf).all()
    assert (out.row_max == -math.inf).all()
    for gradient in torch.autograd.grad(F.softplus(out.row_lse).sum(), (x, y)):
        assert (gradient == 0).all()


def test_nan_reaches_every_result(backend: Any) -> None:
    x, y = (z.detach().clone() for z in sides(9, 12, 4))
    y[2, 1] = math.nan
    out = paired_logsumexp(x, y, torch.arange(9), backend=backend)
    assert out.positive[2].isnan()
    # The NaN is the only key that is no negative of query 2.
    assert out.row_lse[torch.arange(9) != 2].isnan().all()
    assert out.mean_similarity.isnan()


def test_same_bits_every_time(backend: Any) -> None:
    x, y = sides(150, 90, 40)
    positives = positives_of("repeated", 150, 90)
    upstream = [torch.rand(n) for n in (150, 90, 150)]
    runs = []
    for _ in range(3):
        out = paired_logsumexp(x, y, positives, backend=backend)
        runs.append([*out, *gradients_of(out, [x, y], upstream)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


x34 = torch.zeros(3, 4)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host does not read the numbers")
@pytest.mark.parametrize(
    ("positives", "error", "message"),
    [
        ([0, 1, 2], TypeError, "positives must be a tensor of int64, got list"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "must be a tensor of int64, got torch.float32"),
        (torch.arange(3, dtype=torch.int32), TypeError, "of int64, got torch.int32"),
        (torch.arange(2), ValueError, r"positives must be \(3,\), one number .* got \(2,\)"),
        (torch.tensor([0, 3, 1]), ValueError, "must be numbers from 0 to 2, .* got 3"),
        (torch.tensor([0, -1, 1]), ValueError, "must be numbers from 0 to 2, .* got -1"),
        (torch.arange(3, device="meta"), ValueError, "positives and the rows must be on the same"),
    ],
    ids=["list", "float", "int32", "length", "too_large", "negative", "device"],
)
def test_mistakes_are_named(positives: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paired_logsumexp(x34, x34, positives)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's back ends know wrong numbers")
@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_wrong_number_under_compile_is_an_error_too(wrong: int) -> None:
    compiled = torch.compile(paired_logsumexp, backend="aot_eager", fullgraph=True)
    x, y = torch.randn(3, 4), torch.randn(4, 4)
    expected = paired_logsumexp(x, y, torch.tensor([3, 0, 1]))
    actual = compiled(x, y, torch.tensor([3, 0, 1]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises((ValueError, RuntimeError), match="positives must be numbers of rows"):
        compiled(x, y, torch.tensor([0, wrong, 1]))


def test_wrong_numbers_are_nan_where_nobody_reads_them() -> None:
    """The operator marks them as a GPU does."""
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    out = reference.paired_logsumexp(x, y, torch.tensor([0, 2, 4]))
    inputs = cross_logsumexp_inputs(x, y, positives=torch.tensor([0, 5, 4]))
    positive = ops.run("cross_logsumexp", ".chunked", **inputs).positive
    assert positive[1].isnan()
    torch.testing.assert_close(positive[::2], out.positive[::2])
