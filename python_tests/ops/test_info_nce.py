"""InfoNCE against the float64 reference and against cross entropy, in values and gradients."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from eager import textbook_info_nce
from overloads import DEVICE, INTERPRETED
from sample_inputs import DTYPES, cross_logsumexp_inputs, sides
from tolerances import (
    ACCURACY,
    ALIGNED_ROUNDINGS_OF_GRADIENT,
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

from cjepa_kernels import InfoNCEOutput, backends, info_nce
from cjepa_kernels.definitions import CrossLogSumExpForward
from cjepa_kernels.functional.anchors import add_negatives

pytestmark = pytest.mark.usefixtures("kernels_only")


CALLS: dict[str, dict[str, Any]] = {
    "in_batch": {},
    "hard_negatives": {"negatives": 30},
    "more_keys": {"keys": 50, "positives": "permuted"},
    "shared_positives": {"keys": 5, "positives": "repeated"},
    "clip": {"symmetric": True},
    "clip_permuted": {"symmetric": True, "keys": 40, "positives": "permuted", "negatives": 7},
    "smoothed": {"label_smoothing": 0.1, "negatives": 9},
    "clip_smoothed": {"label_smoothing": 0.3, "symmetric": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "dot_product": {"use_cosine_similarity": False, "temperature": 4.0},
    "queue": {"in_batch_negatives": False, "negatives": 60},
    "queue_smoothed": {"in_batch_negatives": False, "negatives": 1, "label_smoothing": 0.2},
    "queue_shared": {
        "in_batch_negatives": False,
        "negatives": 20,
        "keys": 5,
        "positives": "repeated",
        "reduction": "none",
    },
    "queue_dot": {
        "in_batch_negatives": False,
        "negatives": 30,
        "use_cosine_similarity": False,
        "temperature": 4.0,
    },
}
QUERIES = 33


def make(call: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves (query, key and perhaps negatives) and the other arguments of a call."""
    options = dict(call)
    keys, extra = options.pop("keys", QUERIES), options.pop("negatives", 0)
    query, key = sides(QUERIES, keys, 16, dtype)
    leaves = [query, key]
    if extra:
        leaves.append(torch.randn(extra, 16).to(dtype).requires_grad_())
    kind = options.pop("positives", None)
    if kind == "permuted":
        options["positives"] = torch.randperm(keys)[:QUERIES]
    elif kind == "repeated":
        options["positives"] = torch.randint(keys, (QUERIES,))
    return leaves, options


def results(
    loss: Tensor, leaves: list[Tensor], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream.to(loss))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_values_gradients_and_metrics(backend: Any, name: str, dtype: torch.dtype) -> None:
    leaves, options = make(CALLS[name], dtype)
    temperature = torch.tensor(options.pop("temperature", 0.07)).to(dtype).requires_grad_()
    out = info_nce(*leaves, temperature=temperature, backend=backend, **options)
    upstream = torch.rand(out.loss.shape)
    all_leaves = [*leaves, temperature]
    loss, gradients = results(out.loss, all_leaves, upstream)
    exact = [z.detach().double().requires_grad_() for z in all_leaves]
    truth_out = info_nce(*exact[:-1], temperature=exact[-1], backend="reference", **options)
    truth, truth_gradients = results(truth_out.loss, exact, upstream)
    eager_leaves = [z.detach().clone().requires_grad_() for z in all_leaves]
    eager = results(
        textbook_info_nce(*eager_leaves[:-1], temperature=eager_leaves[-1], **options),
        eager_leaves,
        upstream,
    )
    assert (loss >= 0).all()
    assert relative_error(loss, truth) <= FLOOR_VALUE[dtype] + 2 * relative_error(eager[0], truth)
    for k, (actual, expected) in enumerate(zip(gradients, truth_gradients, strict=True)):
        error = relative_error(eager[1][k], expected)
        floor = FLOOR_GRADIENT[dtype]
        if actual.ndim == 0:  # the temperature's
            anchors = len(truth_out.lse) if options.get("reduction") == "sum" else 1
            total = anchors * upstream.sum().item()
            rounding = temperature_rounding(truth_out.lse, temperature.item(), total, dtype)
            floor += rounding / expected.abs().item()
        assert relative_error(actual, expected) <= floor + 2 * error
        assert actual.dtype == dtype
    for field in InfoNCEOutput._fields[1:]:
        actual, expected = getattr(out, field), getattr(truth_out, field)
        assert not actual.requires_grad
        assert actual.shape == expected.shape
        if field == "accuracy":
            assert abs(actual - expected) <= ACCURACY[dtype]
            continue
        scale = max(1.0, expected.abs().max().item())
        assert (actual.double() - expected).abs().max() <= METRIC[dtype] * scale


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_is_cross_entropy(name: str) -> None:
    leaves, options = make(CALLS[name], torch.float64)
    out = info_nce(*leaves, backend="reference", **options)
    expected = textbook_info_nce(*leaves, **options)
    torch.testing.assert_close(out.loss, expected)
    for actual, truth in zip(
        torch.autograd.grad(out.loss.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth)


FORMS: dict[str, dict[str, Any]] = {
    "one_direction": {},
    "symmetric": {"symmetric": True},
    "queue": {"in_batch_negatives": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.07] if INTERPRETED else [0.005, 0.01, 0.02, 0.07])
def test_aligned_pairs_at_low_temperature(
    backend: Any, temperature: float, dtype: torch.dtype, form: str
) -> None:
    """The loss is tiny, never negative, and keeps its digits. The usual formula loses them all."""
    query = torch.randn(64, 64, dtype=torch.float64)
    key = query + 0.01 * torch.randn(64, 64, dtype=torch.float64)
    rows = [query, key]
    if form == "queue":
        rows.append(torch.randn(64, 64, dtype=torch.float64))
    leaves = [z.to(dtype).requires_grad_() for z in rows]
    options = {"temperature": temperature, **FORMS[form]}
    out = info_nce(*leaves, **options, backend=backend, reduction="none")
    assert (out.loss >= 0).all()
    assert out.accuracy == 1
    if dtype in (torch.bfloat16, torch.float16):
        return  # rounding the rows decides the loss
    exact = [z.detach().double().requires_grad_() for z in leaves]
    truth = info_nce(*exact, **options, backend="reference", reduction="none")
    allowed = aligned_tolerance(ALIGNED_ROUNDINGS_OF_LOSS, dtype, temperature)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=allowed, atol=UNDERFLOW)
    allowed = aligned_tolerance(ALIGNED_ROUNDINGS_OF_GRADIENT, dtype, temperature)
    for actual, expected in zip(
        torch.autograd.grad(out.loss.sum(), leaves),
        torch.autograd.grad(truth.loss.sum(), exact),
        strict=True,
    ):
        # At the lowest temperatures the gradient is below the smallest fp32 number.
        difference = (actual.double() - expected).abs().max()
        assert difference <= allowed * expected.abs().max() + UNDERFLOW


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
@pytest.mark.parametrize("smoothing", [0.0, 0.5], ids=["", "smoothed"])
@pytest.mark.parametrize("value", [0.01, 0.1])
def test_one_pair_without_negatives(
    backend: Any, symmetric: bool, smoothing: float, value: float
) -> None:
    query, key = sides(1, 1, 24)
    temperature = torch.tensor(value, requires_grad=True)
    out = info_nce(
        query,
        key,
        temperature=temperature,
        symmetric=symmetric,
        label_smoothing=smoothing,
        backend=backend,
    )
    assert out.loss == 0
    assert out.negative_similarity.isnan()
    for gradient in torch.autograd.grad(out.loss, (query, key, temperature)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_nan_and_infinity_give_nan(backend: Any, symmetric: bool, side: int, value: float) -> None:
    leaves = [z.detach().clone() for z in sides(6, 6, 24)]
    leaves[side][1, 0] = value
    out = info_nce(*leaves, symmetric=symmetric, backend=backend)
    assert out.loss.isnan()
    assert out.accuracy == 0


@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_empty_negatives_are_none(backend: Any, symmetric: bool) -> None:
    leaves = [*sides(12, 12, 6), torch.empty(0, 6, requires_grad=True)]
    options: dict[str, Any] = {"symmetric": symmetric, "backend": backend}
    loss, expected = info_nce(*leaves, **options).loss, info_nce(*leaves[:2], **options).loss
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, leaves)
    for actual, truth in zip(gradients, torch.autograd.grad(expected, leaves[:2]), strict=False):
        assert torch.equal(actual, truth)
    assert gradients[2].shape == (0, 6)


@pytest.mark.parametrize("value", [-1.0, math.inf, 1e35])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_a_temperature_out_of_range_is_nan_with_an_empty_queue_too(
    backend: Any, value: float
) -> None:
    """No kernel runs where nothing is summed."""
    out = info_nce(
        torch.randn(5, 6),
        torch.randn(5, 6),
        torch.randn(0, 6),
        in_batch_negatives=False,
        temperature=torch.tensor(value),
        backend=backend,
    )
    assert out.loss.isnan()


@pytest.mark.parametrize("smoothing", [0.0, 0.5], ids=["", "smoothed"])
def test_an_empty_queue(smoothing: float) -> None:
    for backend in ("reference", "chunked", "auto"):
        temperature = torch.tensor(0.1, requires_grad=True)
        leaves = [*sides(5, 5, 24), torch.empty(0, 24, requires_grad=True)]
        out = info_nce(
            *leaves,
            temperature=temperature,
            label_smoothing=smoothing,
            in_batch_negatives=False,
            backend=backend,  # type: ignore[arg-type]
        )
        assert out.loss == 0
        assert out.accuracy == 1
        assert out.negative_similarity.isnan()
        for gradient in torch.autograd.grad(out.loss, [*leaves, temperature]):
            assert (gradient == 0).all()


def test_a_negative_of_a_queue_that_is_the_positive(backend: Any) -> None:
    """A tie is a miss, although the positive comes from another product than the negatives."""
    query, key = sides(64, 64, 131)
    for scale in (1.0, 3.0):
        options: dict[str, Any] = {
            "temperature": 0.005,
            "in_batch_negatives": False,
            "reduction": "none",
            "use_cosine_similarity": scale == 1,
            "backend": backend,
        }
        out = info_nce(query, scale * key, scale * key.detach(), **options)
        assert out.accuracy == 0
        exact = [z.detach().double() for z in (query, scale * key, scale * key)]
        truth = info_nce(*exact, **options | {"backend": "reference"})
        # The two products differ by roundings of a similarity, which the temperature magnifies.
        similarity = max(
            1.0, truth.positive_similarity.abs().item(), (truth.lse * 0.005).max().item()
        )
        assert (out.loss - truth.loss).abs().max() <= METRIC[torch.float32] * similarity / 0.005
        assert (out.loss >= 0).all()


def test_the_keys_of_a_batch_are_no_negatives_of_a_queue(backend: Any) -> None:
    """Another batch around a pair changes nothing for it."""
    query, key = sides(12, 12, 6)
    queue = torch.randn(20, 6)
    options: dict[str, Any] = {"in_batch_negatives": False, "backend": backend}
    losses = info_nce(query, key, queue, reduction="none", **options).loss
    alone = [
        info_nce(query[k : k + 1], key[k : k + 1], queue, **options).loss for k in range(len(query))
    ]
    assert relative_error(torch.stack(alone), losses) <= FLOOR_VALUE[torch.float32]


@pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "queue"])
def test_a_queue_gets_no_gradient(backend: Any, in_batch: bool) -> None:
    query, key = sides(12, 12, 6)
    queue = torch.randn(20, 6)
    options: dict[str, Any] = {"backend": backend, "in_batch_negatives": in_batch}
    out = info_nce(query, key.detach(), queue, **options)
    with_gradient = info_nce(query, key, queue.clone().requires_grad_(), **options)
    assert torch.equal(out.loss, with_gradient.loss)
    (actual,) = torch.autograd.grad(out.loss, query)
    (expected,) = torch.autograd.grad(with_gradient.loss, query)
    assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_queue_that_holds_positives_in_half_precision(backend: Any, dtype: torch.dtype) -> None:
    """The pull of a positive and the push of a negative nearly cancel in a query's gradient.

    Each would lose its digits if it were rounded to half precision before the sum.
    """
    query = torch.randn(33, 64)
    key = query + torch.randn(33, 64)
    leaves = [z.to(dtype).requires_grad_() for z in (query, key)]
    queue = torch.cat([key[:16], torch.randn(40, 64)]).to(dtype)
    exact = [z.detach().double().requires_grad_() for z in leaves]
    options: dict[str, Any] = {"in_batch_negatives": False}
    truth = info_nce(*exact, queue.double(), **options, backend="reference").loss
    loss = info_nce(*leaves, queue, **options, backend=backend).loss
    eager = textbook_info_nce(*leaves, queue, **options)
    (expected,) = torch.autograd.grad(truth, exact[0])
    error, of_eager = (
        relative_error(torch.autograd.grad(x, leaves[0])[0], expected) for x in (loss, eager)
    )
    assert error <= of_eager / 4


def value_and_gradients(
    formula: Any, leaves: list[Tensor], queue: Tensor, *, symmetric: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of queries and keys with a queue, and the gradients of the leaves."""
    options = {"backend": "reference"} if formula is info_nce else {}
    query, key, temperature = leaves
    out = formula(query, key, queue, temperature=temperature, symmetric=symmetric, **options)
    loss = out if isinstance(out, Tensor) else out.loss
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.skipif(DEVICE != "cpu", reason="only on a CPU they are multiplied apart")
@pytest.mark.parametrize(
    ("queries", "temperature", "symmetric"),
    [(33, 0.07, False), (33, 0.07, True), (1, 0.07, False), (20, 0.02, True)],
    ids=["one_direction", "symmetric", "one_pair", "aligned"],
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_constant_negatives_beside_trained_keys(
    backend: Any,
    dtype: torch.dtype,
    queries: int,
    temperature: float,
    symmetric: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are multiplied apart from the keys; nothing but rounding changes."""
    aligned = temperature == 0.02  # lower ones leave a loss of 0 in fp32
    query = torch.randn(queries, 64, dtype=torch.float64)
    key = query + (0.01 if aligned else 1.0) * torch.randn(queries, 64)
    # Positives among the negatives are ties. Their gradients cancel where the pairs are aligned.
    queue = torch.cat([key[: 0 if aligned else queries // 2], torch.randn(40, 64)]).to(dtype)
    leaves = [z.to(dtype).requires_grad_() for z in (query, key)]
    options: dict[str, Any] = {"symmetric": symmetric, "backend": backend}
    value = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    module = importlib.import_module("cjepa_kernels.functional.info_nce")
    calls: list[int] = []
    run = module.run_cross_logsumexp
    monkeypatch.setattr(
        module, "run_cross_logsumexp", lambda *a, **k: calls.append(len(a[1])) or run(*a, **k)
    )
    results = []
    for entries in (0, 2**30):
        monkeypatch.setattr(module, "CONSTANT_ENTRIES", entries)
        out = info_nce(*leaves, queue, temperature=value, **options)
        gradients = torch.autograd.grad(out.loss, [*leaves, value])
        assert out.loss >= 0
        results.append((out, gradients))
    assert calls == ([] if backend == "reference" else [queries, len(queue), queries + len(queue)])
    exact = [z.detach().double().requires_grad_() for z in (*leaves, value)]
    truth, of_truth = value_and_gradients(info_nce, exact, queue.double(), symmetric=symmetric)
    eager, of_eager = value_and_gradients(
        textbook_info_nce, [*leaves, value], queue, symmetric=symmetric
    )
    for out, gradients in results:
        # The usual formula has no digit of the loss of aligned pairs.
        allowed = FLOOR_VALUE[dtype] + 2 * relative_error(eager, truth)
        if aligned:
            allowed = aligned_tolerance(ALIGNED_ROUNDINGS_OF_LOSS, dtype, temperature)
        assert relative_error(out.loss, truth) <= allowed
        for gradient, plain, true in zip(gradients, of_eager, of_truth, strict=True):
            allowed = FLOOR_GRADIENT[dtype] + 2 * relative_error(plain, true)
            if aligned:
                allowed = aligned_tolerance(ALIGNED_ROUNDINGS_OF_GRADIENT, dtype, temperature)
            assert relative_error(gradient, true) <= allowed
    (out, _), (expected, _) = results
    assert relative_error(out.lse, expected.lse) <= FLOOR_VALUE[dtype]
    for field in ("positive_similarity", "negative_similarity"):
        assert abs(getattr(out, field) - getattr(expected, field)) <= METRIC[dtype]
    assert out.accuracy == expected.accuracy


@pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "queue"])
def test_autocast(backend: Any, in_batch: bool) -> None:
    query, key = sides(32, 32, 24)
    queue = None if in_batch else torch.randn(40, 24)
    options: dict[str, Any] = {"label_smoothing": 0.1, "in_batch_negatives": in_batch}
    expected = info_nce(query, key, queue, **options, backend=backend)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = info_nce(query, key, queue, **options, backend=backend)
    assert out.loss.dtype == torch.float32
    # The temperature of 0.07 magnifies the rounding of the rows.
    assert relative_error(out.loss, expected.loss) < AUTOCAST_LOSS


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled on the CPU")
@pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "queue"])
def test_compiles_without_a_break(in_batch: bool) -> None:
    query, key = sides(12, 12, 6)
    queue = None if in_batch else torch.randn(9, 6)
    options: dict[str, Any] = {"symmetric": in_batch, "in_batch_negatives": in_batch}

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return info_nce(a, b, queue, label_smoothing=0.1, **options).loss

    expected = torch.autograd.grad(loss(query, key), (query, key))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, truth in zip(
        torch.autograd.grad(compiled(query, key), (query, key)), expected, strict=True
    ):
        torch.testing.assert_close(actual, truth)


z44 = torch.zeros(4, 4)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host does not read the numbers")
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((z44, [1.0]), {}, TypeError, "key must be a tensor, got list"),
        ((z44[:2], z44), {}, ValueError, "positives must be given where query and key .* 2 and 4"),
        ((z44, z44, z44[:, :2]), {}, ValueError, "query and negatives must have the same D"),
        ((z44, z44, z44[:, :0]), {}, ValueError, "negatives must hold at least one feature"),
        (
            (z44, z44),
            {"in_batch_negatives": False},
            ValueError,
            "negatives must be given with in_batch_negatives=False",
        ),
        (
            (z44, z44, z44),
            {"in_batch_negatives": False, "symmetric": True},
            ValueError,
            "symmetric must be False with in_batch_negatives=False, got True",
        ),
        ((z44, z44), {"in_batch_negatives": 0}, TypeError, "in_batch_negatives must be True or"),
        (
            (z44, z44),
            {"positives": torch.tensor([0, 1, 1, 2]), "symmetric": True},
            ValueError,
            "positives must name no row twice with symmetric=True, got 1 more than once",
        ),
        ((z44, z44), {"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ((z44, z44), {"label_smoothing": 1.0}, ValueError, "label_smoothing must lie .* got 1.0"),
        ((z44, z44), {"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
        ((z44, z44), {"label_smoothing": math.nan}, ValueError, "label_smoothing must lie"),
        ((z44, z44), {"temperature": 0.0}, ValueError, "Temperature must be positive"),
        ((z44, z44), {"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
    ids=lambda value: value.replace("\\", "") if isinstance(value, str) else "",
)
def test_mistakes_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        info_nce(*arguments, **options)


WRONG_POSITIVES = {
    "negative": ([0, 1, 2, -1], False),
    "too_large": ([0, 1, 2, 9], False),
    "one_of_the_negatives": ([0, 1, 2, 4], False),
    "repeated": ([0, 1, 1, 2], True),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled on the CPU")
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("name", WRONG_POSITIVES)
def test_wrong_positives_where_the_host_does_not_read_them(name: str, backend: Any) -> None:
    """Under torch.compile, as on a GPU, the loss is NaN. The compiled kernels raise instead."""
    numbers, symmetric = WRONG_POSITIVES[name]
    query, key, negatives = torch.randn(4, 6), torch.randn(4, 6), torch.randn(3, 6)

    def loss(positives: Tensor) -> Tensor:
        return info_nce(query, key, negatives, positives, symmetric=symmetric, backend=backend).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    fine = torch.tensor([3, 0, 1, 2])
    torch.testing.assert_close(compiled(fine), loss(fine))
    wrong = torch.tensor(numbers)
    if backend == "auto" and backends()["native"].available:
        with pytest.raises((ValueError, RuntimeError), match="positives must be numbers of rows"):
            compiled(wrong)
    else:
        assert compiled(wrong).isnan()


@pytest.mark.parametrize("in_batch", [True, False], ids=["in_batch", "queue"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_temperature_in_half_precision(
    backend: Any, dtype: torch.dtype, in_batch: bool
) -> None:
    """Its two parts nearly cancel for rows in clusters, so neither is rounded before the sum."""
    centers = torch.randn(4, 16)
    query, key, queue = (centers.repeat(8, 1) + 0.1 * torch.randn(32, 16) for _ in range(3))
    negatives = None if in_batch else queue
    options: dict[str, Any] = {"in_batch_negatives": in_batch}
    value = torch.tensor(0.05).to(dtype)
    gradients = []
    for temperature, name in ((value, backend), (value.double(), "reference")):
        temperature = temperature.clone().requires_grad_()
        loss = info_nce(
            query, key, negatives, temperature=temperature, backend=name, **options
        ).loss
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert gradients[0].dtype == dtype
    assert relative_error(*gradients) <= torch.finfo(dtype).eps


def test_tensors_made_under_inference_mode(backend: Any) -> None:
    query, key = sides(12, 12, 6)
    with torch.inference_mode():
        positives, temperature = torch.randperm(12), torch.tensor(0.1)
        queue = torch.randn(5, 6)
    options: dict[str, Any] = {"symmetric": True, "label_smoothing": 0.1, "backend": backend}
    loss = info_nce(query, key, queue, positives, temperature=temperature, **options).loss
    expected = info_nce(
        query, key, queue.clone(), positives.clone(), temperature=temperature.clone(), **options
    ).loss
    assert torch.equal(loss, expected)
    for actual, truth in zip(
        torch.autograd.grad(loss, (query, key)),
        torch.autograd.grad(expected, (query, key)),
        strict=True,
    ):
        assert torch.equal(actual, truth)


class Model(nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return info_nce(query, key, symmetric=True, label_smoothing=0.1).loss


@pytest.mark.skipif(DEVICE != "cpu", reason="exported on the CPU")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exports_with_any_batch(strict: bool) -> None:
    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(4, 6), torch.randn(4, 6))
    program = torch.export.export(
        Model(), example, dynamic_shapes=({0: batch}, {0: batch}), strict=strict
    )
    assert "cjepa_kernels.cross_logsumexp" in str(program.graph)
    other = (torch.randn(9, 6), torch.randn(9, 6))
    torch.testing.assert_close(program.module()(*other), Model()(*other))


@pytest.mark.skipif(DEVICE != "cpu", reason="no device is needed")
def test_tensors_without_numbers() -> None:
    with FakeTensorMode():
        query, key = torch.randn(4, 6), torch.randn(7, 6)
        positives = torch.arange(4)
        assert info_nce(query, key, positives=positives, symmetric=True).loss.shape == ()


def test_a_constant_negative_within_rounding_is_a_tie() -> None:
    """It comes from another product than the positive, which may add up in another order."""
    query = torch.randn(3, 16)
    out, more = (
        CrossLogSumExpForward(*torch.ops.cjepa_kernels.cross_logsumexp(**inputs))
        for inputs in (
            cross_logsumexp_inputs(query, query, positives=torch.full((3,), positive))
            for positive in (0, -1)
        )
    )
    below = more.row_max * (1 - torch.finfo(torch.float32).eps)
    merged = add_negatives(out, more._replace(row_max=below), features=16, tau=0.1)
    assert (merged.row_max >= more.row_max).all()
    kept = add_negatives(out, more._replace(row_max=-2 * below), features=16, tau=0.1)
    assert torch.equal(kept.row_max, out.row_max)
