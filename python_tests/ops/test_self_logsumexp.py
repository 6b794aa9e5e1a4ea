"""The rows of one batch against each other, in values and gradients by the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from overloads import DEVICE, INTERPRETED, OVERLOADS, RUNNABLE
from sample_inputs import (
    DTYPES,
    detached,
    in_order,
    self_inputs,
    self_logsumexp_backward_inputs,
    self_logsumexp_inputs,
    with_attraction,
)
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor

from cjepa_kernels import SelfLogSumExp, backends, ops, reference, self_logsumexp
from cjepa_kernels.functional.self_logsumexp import run_self_logsumexp
from cjepa_kernels.ops import registry

pytestmark = pytest.mark.usefixtures("kernels_only")

# What is left out of a row's sum beside the row itself.
KINDS = ["nothing", "pairs", "classes", "pairs and classes"]
ROWS = [1, 2, 7, 193]
if not INTERPRETED:
    ROWS += [50, 97, 401]


def options_of(kind: str, rows: int) -> dict[str, Tensor]:
    """Random positives of some of the rows, and random classes of all."""
    options = {}
    if "pairs" in kind:
        positives = torch.full((rows,), -1)
        order, pairs = torch.randperm(rows), rows // 3
        positives[order[:pairs]] = order[pairs : 2 * pairs]
        positives[order[pairs : 2 * pairs]] = order[:pairs]
        options["positives"] = positives
    if "classes" in kind:
        options["labels"] = torch.randint(-2, 3, (rows,)) * 2**40
    return options


def rows_of(rows: int, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows, of which half lie near the other half."""
    z = torch.randn(rows, features, dtype=torch.float64)
    z[rows // 2 :] = 0.5 * z[rows // 2 :] + z[: rows - rows // 2]
    return z.to(dtype).requires_grad_()


def textbook(
    z: Tensor,
    *,
    positives: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float | Tensor,
    cosine: bool,
) -> SelfLogSumExp:
    """The usual formula in the dtype of the inputs, with the whole matrix in memory."""
    if cosine:
        z = F.normalize(z, dim=1, eps=1e-8)
    similarity = z @ z.T
    excluded = torch.eye(len(z), dtype=torch.bool)
    positive = similarity.new_zeros(len(z))
    if positives is not None:
        of_positive = positives[:, None] == torch.arange(len(z))
        excluded = excluded | of_positive
        positive = similarity.where(of_positive, 0.0).sum(dim=1)
    if labels is not None:
        excluded = excluded | (labels[:, None] == labels)
    negatives = similarity.masked_fill(excluded, -math.inf)
    return SelfLogSumExp(
        lse=torch.logsumexp(negatives / temperature, dim=1),
        largest=negatives.detach().amax(dim=1),
        positive=positive,
    )


def gradient_of(out: SelfLogSumExp, leaf: Tensor, upstream: list[Tensor]) -> Tensor:
    """The gradient through both outputs that have one, as far as they are finite."""
    total = out.lse.new_zeros(())
    for value, weight in zip((out.lse, out.positive), upstream, strict=True):
        if value.requires_grad:  # the textbook's positive without pairs is a constant
            total = total + (value * weight.to(value)).where(value.isfinite(), 0.0).sum()
    return torch.autograd.grad(total, leaf)[0]


def check(
    z: Tensor, backend: Any, *, temperature: float = 0.1, cosine: bool = True, **which: Tensor
) -> None:
    """Check every output and the gradient by the tolerance rule."""
    dtype = z.dtype
    options: dict[str, Any] = {"temperature": temperature, "use_cosine_similarity": cosine}
    out = self_logsumexp(z, backend=backend, **which, **options)
    upstream = [torch.rand_like(out.lse) - 0.3 for _ in range(2)]
    truth_leaf = z.detach().double().requires_grad_()
    truth = self_logsumexp(truth_leaf, backend="reference", **which, **options)
    eager_leaf = z.detach().clone().requires_grad_()
    eager = textbook(eager_leaf, temperature=temperature, cosine=cosine, **which)
    scale = max(1.0, z.detach().double().square().sum(dim=1).max().item() if not cosine else 1.0)
    for name in SelfLogSumExp._fields:
        actual, expected, same_dtype = (getattr(o, name).detach() for o in (out, truth, eager))
        counted = expected.isfinite()
        assert (actual[~counted] == -math.inf).all(), name
        actual, expected, same_dtype = (
            value[counted].double() for value in (actual, expected, same_dtype)
        )
        if not counted.any():
            continue
        if name == "lse":
            bound = FLOOR_VALUE[dtype] + 2 * relative_error(same_dtype, expected)
            assert relative_error(actual, expected) <= bound, name
        else:
            bound = METRIC[dtype] * scale + 2 * (same_dtype - expected).abs().max().item()
            assert (actual - expected).abs().max().item() <= bound, name
    actual, expected, same_dtype = (
        gradient_of(o, leaf, upstream)
        for o, leaf in ((out, z), (truth, truth_leaf), (eager, eager_leaf))
    )
    error = relative_error(same_dtype, expected)
    bound = FLOOR_GRADIENT[dtype] + (2 * error if math.isfinite(error) else 0.0)
    assert actual.isfinite().all()
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_dtypes_and_kinds(backend: str, rows: int, dtype: torch.dtype, kind: str) -> None:
    check(rows_of(rows, 33, dtype), backend, **options_of(kind, rows))


# A native block has 96 rows, and 192 from 1536 rows on. A Triton tile has at most 128.
SIZES = [(129, 40)] if INTERPRETED else [(96, 16), (129, 40), (383, 16), (1541, 9)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["constant_shift", "running_maxima"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_sizes_around_the_blocks(
    backend: str, shape: tuple[int, int], temperature: float, kind: str
) -> None:
    check(rows_of(*shape), backend, temperature=temperature, **options_of(kind, shape[0]))


TEMPERATURES = [0.005, 0.05] if INTERPRETED else [1e-3, 0.005, 0.02, 0.05, 1.0, 100.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_and_opposite_pairs(backend: str, temperature: float, dtype: torch.dtype) -> None:
    """A positive is the row itself or its opposite. Duplicates of positives are negatives."""
    x = torch.randn(20, 19, dtype=torch.float64)
    z = torch.cat([x[:10], x[:10], x[10:], -x[10:], x[:5]])
    positives = torch.cat(
        [torch.arange(10, 20), torch.arange(10), torch.arange(30, 40), torch.arange(20, 30)]
    )
    positives = torch.cat([positives, torch.full((5,), -1)])
    check(z.to(dtype).requires_grad_(), backend, temperature=temperature, positives=positives)


LABELS = {
    "one class": torch.zeros(61, dtype=torch.int64),
    "classes of one": torch.arange(61) * -7,
    "one row apart": (torch.arange(61) == 40).to(torch.uint8),
    "far apart": torch.arange(61) % 2 * (2**63 - 1) - 2**62,
    "in runs": torch.arange(61, dtype=torch.int32) // 9,
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["constant_shift", "running_maxima"])
def test_any_labels(backend: str, name: str, temperature: float) -> None:
    check(rows_of(61, 12), backend, temperature=temperature, labels=LABELS[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dot_product(backend: str, dtype: torch.dtype) -> None:
    which = options_of("pairs and classes", 43)
    check(rows_of(43, 12, dtype), backend, temperature=5.0, cosine=False, **which)


@pytest.mark.parametrize("kind", KINDS[1:3])
@pytest.mark.parametrize("value", [0.02, 0.2, 3.0])
def test_temperature_gradient(backend: Any, value: float, kind: str) -> None:
    """The positive's similarity is not divided by the temperature and has no part in it."""
    z, which = rows_of(37, 6).detach(), options_of(kind, 37)
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        temperature = torch.tensor(value).to(dtype).requires_grad_()
        leaf = z.to(dtype).requires_grad_()
        out = self_logsumexp(leaf, temperature=temperature, backend=name, **which)
        loss = out.lse.square().sum() + out.positive.sum()
        results.append(torch.autograd.grad(loss, temperature)[0])
    assert relative_error(*results) < 10 * FLOOR_GRADIENT[torch.float32]


@OVERLOADS
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["constant_shift", "running_maxima"])
@pytest.mark.usefixtures("poisoned_memory")
def test_two_views_are_one_view_with_positives(
    overload: str, labelled: bool, temperature: float
) -> None:
    z = rows_of(198, 20)
    labels = torch.randint(7, (99,)) if labelled else None
    options: dict[str, Any] = {"temperature": temperature, "use_cosine_similarity": True}
    options |= {"eps": 1e-8, "overload": overload}
    halves = [half.detach().clone().requires_grad_() for half in z.chunk(2)]
    both = run_self_logsumexp(halves[0], halves[1], classes=labels, **options)
    one = run_self_logsumexp(
        z,
        None,
        positives=torch.arange(198).roll(99),
        classes=None if labels is None else labels.repeat(2),
        **options,
    )
    upstream = torch.randn(198)
    gradients = []
    for out, leaves in ((both, halves), (one, [z])):
        loss = ((out.lse + out.positive / temperature) * upstream).sum()
        gradients.append(torch.cat(torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(both[:5], one[:5], strict=True):
        assert relative_error(actual, expected) <= 2 * FLOOR_VALUE[torch.float32]
    assert relative_error(*gradients) <= 2 * FLOOR_GRADIENT[torch.float32]


def test_a_pair_has_one_similarity(backend: Any) -> None:
    """Both rows read the same entry of S."""
    z, which = rows_of(150, 33), options_of("pairs", 150)
    positive = self_logsumexp(z, backend=backend, **which).positive
    of_other = positive[which["positives"].clamp(min=0)]
    paired = which["positives"] >= 0
    if backend != "chunked":  # whose chunks take both entries
        assert torch.equal(positive[paired], of_other[paired])
    assert (positive[~paired] == 0).all()


@pytest.mark.parametrize("output", ["lse", "positive"])
def test_gradient_through_one_output(backend: Any, output: str) -> None:
    z, which = rows_of(31, 10), options_of("pairs", 31)
    upstream = torch.linspace(-1, 1, 31)
    gradients = []
    for leaf, name in ((z, backend), (z.detach().double().requires_grad_(), "reference")):
        value = getattr(self_logsumexp(leaf, backend=name, **which), output)
        gradients.append(torch.autograd.grad(value, leaf, upstream.to(value))[0])
    assert relative_error(*gradients) <= 2 * FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_nothing_to_sum(backend: Any, rows: int) -> None:
    """A sum over nothing is -inf, and whatever gradient reaches it, nothing comes out."""
    z = rows_of(rows, 6)
    out = self_logsumexp(z, labels=torch.full((rows,), 3), backend=backend)
    assert (out.lse == -math.inf).all()
    assert (out.largest == -math.inf).all()
    assert (torch.autograd.grad(F.softplus(out.lse).sum(), z)[0] == 0).all()


def test_nan_reaches_every_result_it_has_a_part_in(backend: Any) -> None:
    z = rows_of(14, 4).detach().clone()
    z[2, 1] = math.nan
    out = self_logsumexp(z, positives=torch.arange(14) ^ 1, backend=backend)
    assert out.positive[2:4].isnan().all()
    assert out.lse[torch.arange(14) != 3].isnan().all()  # row 2 is the positive of row 3


def test_same_bits_every_time(backend: Any) -> None:
    z, which = rows_of(150, 40), options_of("pairs and classes", 150)
    upstream = [torch.rand(150) for _ in range(2)]
    runs = []
    for _ in range(3):
        out = self_logsumexp(z, backend=backend, **which)
        runs.append([*out, gradient_of(out, z, upstream)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_saved_exponentials_change_nothing(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    z, which = rows_of(220, 12), options_of("pairs and classes", 220)
    gradients = []
    for limit in (0, 2**30):
        monkeypatch.setattr("cjepa_kernels.functional.dispatch.SAVED_BYTES", limit)
        out = self_logsumexp(z, backend=backend, **which)
        gradients.append(gradient_of(out, z, [torch.ones(220), torch.ones(220)]))
    assert torch.equal(*gradients)


# opcheck is slow, so not every combination runs.
CHECKED = pytest.mark.parametrize(
    ("overload", "case", "dtype"),
    [
        pytest.param(overload, case, dtype, id=f"{overload.lstrip('.')}-{case}-{dtype}")
        for k, overload in enumerate(RUNNABLE)
        for case in range(6)
        for n, dtype in enumerate((torch.float64, torch.bfloat16))
        if (k + case + n) % 2 == 0
    ],
)


@CHECKED
def test_opcheck(overload: str, case: int, dtype: torch.dtype) -> None:
    inputs = self_inputs(dtype)[case]
    torch.library.opcheck(
        ops.operator("self_logsumexp", overload), in_order("self_logsumexp", inputs)
    )
    out = ops.run("self_logsumexp", overload, **inputs)
    backward_inputs = detached(self_logsumexp_backward_inputs(inputs, out))
    torch.library.opcheck(
        ops.operator("self_logsumexp_backward", overload),
        in_order("self_logsumexp_backward", backward_inputs),
    )


@pytest.mark.skipif(not backends()["native"].available, reason="the compiled kernels are missing")
@pytest.mark.parametrize("case", range(6))
def test_opcheck_with_saved_exponentials(case: int) -> None:
    inputs = self_inputs()[case] | {"keep": True}
    out = ops.run("self_logsumexp", "", **inputs)
    rows = out.lse.shape[0]
    assert out.saved_for_backward.numel() == ops.saved_exponentials_size(rows)
    # The part of the saved exponentials that no pair of rows fills holds whatever was in memory.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ops.operator("self_logsumexp"), in_order("self_logsumexp", inputs), test_utils=utilities
    )


@pytest.mark.parametrize("overload", ["", ".chunked"], ids=["dispatched", "chunked"])
@pytest.mark.parametrize("case", range(6))
def test_gradcheck(overload: str, case: int) -> None:
    inputs = self_inputs()[case]
    names = ("z_i", "z_j", "temperature_tensor")

    def results(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        given = inputs | dict(zip(names, tensors, strict=True))
        if inputs["class_means"] is not None:  # of the rows that gradcheck moves
            given = with_attraction(given)
        out = ops.run("self_logsumexp", overload, **given)
        return out.lse.where(out.lse.isfinite(), 0.0), out.positive

    assert torch.autograd.gradcheck(results, [inputs[name] for name in names])


def test_compile_and_autocast() -> None:
    z, which = rows_of(24, 8), options_of("pairs and classes", 24)

    def loss(z: Tensor, positives: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(z.device.type, dtype=torch.bfloat16):
            out = self_logsumexp(z, positives=positives, labels=labels)
        return (out.lse + out.positive).where(out.lse.isfinite(), 0.0).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for call in (loss, compiled):
        value = call(z, which["positives"], which["labels"])
        results.append([value, *torch.autograd.grad(value, z)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


z34 = torch.zeros(3, 4)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host does not read the numbers")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positives": [1, 0, -1]}, TypeError, "positives must be a tensor of int64, got list"),
        ({"positives": torch.zeros(3)}, TypeError, "of int64, got torch.float32"),
        ({"positives": torch.arange(2)}, ValueError, r"positives must be \(3,\), .* got \(2,\)"),
        ({"positives": torch.tensor([1, 0, 3])}, ValueError, "from 0 to 2 .* got 3 for row 2"),
        ({"positives": torch.tensor([1, 0, 2])}, ValueError, "the row itself, got 2 for row 2"),
        ({"positives": torch.tensor([1, 2, -1])}, ValueError, "the row itself, got 1 for row 0"),
        ({"positives": torch.tensor([1, 0, -2])}, ValueError, "got -2 for row 2"),
        ({"labels": [1, 2, 3]}, ValueError, "labels must be a tensor of integers, got list"),
        ({"labels": torch.zeros(3)}, ValueError, "a tensor of integers, got torch.float32"),
        ({"labels": torch.arange(4)}, ValueError, r"labels must be \(3,\), one .* got \(4,\)"),
        ({"labels": torch.arange(3, device="meta")}, ValueError, "labels must be on the device"),
        ({"temperature": 0.0}, ValueError, "Temperature must be positive"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_mistakes_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        self_logsumexp(z34, **options)


@OVERLOADS
def test_the_operator_refuses_or_marks_wrong_numbers(overload: str) -> None:
    """Nobody checks the numbers of a direct call, nor of one on a GPU."""
    inputs = self_logsumexp_inputs(torch.randn(4, 3), positives=torch.tensor([1, 0, 7, -1]))
    if overload == ".native" or (not overload and "native" in registry.dispatched.values()):
        with pytest.raises((ValueError, RuntimeError), match="must hold -1, or rows that are each"):
            ops.run("self_logsumexp", overload, **inputs)
        return
    out = ops.run("self_logsumexp", overload, **inputs)
    assert out.positive[2].isnan()
    expected = reference.self_logsumexp(
        inputs["z_i"], positives=torch.tensor([1, 0, -1, -1])
    ).positive
    assert relative_error(out.positive[:2], expected[:2]) <= FLOOR_VALUE[torch.float32]
