"""The prediction loss in every back end: values, gradients, strides, errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from overloads import RUNNABLE
from sample_inputs import in_order
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

from cjepa_kernels import (
    HJEPALoss,
    backends,
    chunked,
    ops,
    prediction_loss,
    reference,
)

LOSS_TYPES = ["smoothl1", "mse", "huber"]
NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "l2": {},
    "layer": {"target_norm": "layer"},
    "plain": {"normalize_embeddings": False},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 3, 16), (5, 17, 33), (4, 100, 130), (7, 48)]
pytestmark = pytest.mark.usefixtures("poisoned_memory", "kernels_only")


def sides(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Prediction and target, whose differences lie on both sides of every threshold."""
    return tuple((1.5 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def check(
    prediction: Tensor,
    target: Tensor,
    backend: Any,
    *,
    mask: Tensor | None = None,
    reduction: Any = "mean",
    **options: Any,
) -> None:
    """Check the values and both gradients by the tolerance rule."""
    threshold = options.get("huber_delta", options.get("smoothl1_beta", 1.0))
    of_reference = {
        k: v for k, v in options.items() if k not in ("huber_delta", "smoothl1_beta")
    } | {"threshold": threshold, "mask": mask, "reduction": reduction}
    results = []
    upstream = None
    for kind in ("actual", "eager", "exact"):
        p, t = prediction, target
        if kind == "exact":
            p, t = (x.detach().double().requires_grad_() for x in (p, t))
        if kind == "actual":
            loss = prediction_loss(p, t, mask=mask, reduction=reduction, backend=backend, **options)
        else:
            loss = reference.prediction_loss(p, t, **of_reference)
        if upstream is None:
            upstream = torch.rand(loss.shape) + 0.5
        results.append((loss, *torch.autograd.grad(loss, (p, t), upstream.to(loss.dtype))))
    for k, (actual, eager, exact) in enumerate(zip(*results, strict=True)):
        floor = (FLOOR_GRADIENT if k else FLOOR_VALUE)[prediction.dtype]
        assert actual.dtype == (
            prediction.dtype if k else reference.accumulation_dtype(actual.dtype)
        )
        assert actual.shape == exact.shape
        assert relative_error(actual, exact) <= 2 * relative_error(eager, exact) + floor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_shapes_and_dtypes(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, normalization: str
) -> None:
    if normalization == "layer" and shape[-1] == 1:
        pytest.skip("the deviation of one number is 0")
    check(*sides(shape, dtype), backend, **NORMALIZATIONS[normalization])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True], ids=["all_rows", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_reductions_and_masks(
    backend: str,
    loss_type: str,
    normalization: str,
    reduction: str,
    masked: bool,
    dtype: torch.dtype,
) -> None:
    mask = torch.rand(3, 11) < 0.6 if masked else None
    options = {"smoothl1": {"smoothl1_beta": 0.3}, "huber": {"huber_delta": 0.4}}
    check(
        *sides((3, 11, 37), dtype),
        backend,
        mask=mask,
        reduction=reduction,
        loss_type=loss_type,
        **NORMALIZATIONS[normalization],
        **options.get(loss_type, {}),
    )


@pytest.mark.parametrize(
    "dtypes", [p for p in itertools.permutations(DTYPES, 2) if p[0] != torch.float64], ids=str
)
def test_sides_of_different_dtypes(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    prediction = torch.randn(3, 5, 20).to(dtypes[0]).requires_grad_()
    target = torch.randn(3, 5, 20).to(dtypes[1]).requires_grad_()
    loss = prediction_loss(prediction, target, backend=backend)
    expected = reference.prediction_loss(prediction, target)
    grads = torch.autograd.grad(loss, (prediction, target))
    for x, a, b in zip(
        (prediction, target),
        grads,
        torch.autograd.grad(expected, (prediction, target)),
        strict=True,
    ):
        assert a.dtype == x.dtype
        rounded = (
            torch.float32 if x.dtype == torch.float64 else x.dtype
        )  # mixed dtypes are computed in fp32
        assert relative_error(a, b) <= FLOOR_GRADIENT[rounded]
    assert relative_error(loss, expected) <= FLOOR_VALUE[torch.float32]


def strided(x: Tensor, kind: str) -> Tensor:
    """The same numbers in another layout."""
    if kind == "patches_of_more":  # hidden[:, 1:] is such a view
        return torch.cat((torch.full_like(x[:, :1], torch.nan), x), 1)[:, 1:]
    if kind == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "features_apart":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    if kind == "features_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x[:1].expand(x.shape)


KINDS = ["patches_of_more", "transposed", "features_apart", "features_first", "expanded"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(backend: str, kind: str, dtype: torch.dtype) -> None:
    plain = tuple(torch.randn(4, 6, 32).to(dtype) for _ in range(2))
    if kind == "expanded":
        plain = tuple(x[:1].repeat(4, 1, 1) for x in plain)
    mask = torch.rand(4, 6) < 0.7
    other = [strided(x, kind).detach().requires_grad_() for x in plain]
    assert not all(x.is_contiguous() for x in other)
    same = [x.clone().requires_grad_() for x in plain]
    losses = [
        prediction_loss(p, t, mask=m, backend=backend)
        for (p, t), m in ((other, strided(mask[..., None], "features_apart")[..., 0]), (same, mask))
    ]
    grads = [torch.autograd.grad(loss, x) for loss, x in zip(losses, (other, same), strict=True)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_same_bits_on_any_number_of_threads(
    threads: int, reduction: Any, dtype: torch.dtype
) -> None:
    inputs = [x.requires_grad_() for x in torch.randn(2, 9, 201, 96, dtype=dtype)]

    def run() -> list[Tensor]:
        loss = prediction_loss(*inputs, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    expected = run()
    torch.set_num_threads(threads)
    for _ in range(2):
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)


def test_bf16_gradients_are_fp32_ones_rounded_to_the_nearest(backend: str) -> None:
    sides_bf16 = [torch.randn(3, 40, 50).bfloat16() for _ in range(2)]
    grads = []
    for inputs in (sides_bf16, [x.float() for x in sides_bf16]):
        inputs = [x.requires_grad_() for x in inputs]
        grads.append(torch.autograd.grad(prediction_loss(*inputs, backend=backend), inputs))  # type: ignore[arg-type]
    for narrow, wide in zip(*grads, strict=True):
        assert torch.equal(narrow, wide.bfloat16())


def test_targets_of_inference_mode_and_changes_in_place(backend: str) -> None:
    prediction = torch.randn(2, 3, 8, requires_grad=True)
    loss_fn = HJEPALoss(num_hierarchies=1, backend=backend)  # type: ignore[arg-type]
    with torch.inference_mode():  # a target encoder may run in this mode
        target, mask = torch.randn(2, 3, 8), torch.rand(2, 3) < 0.7
    if backend == "reference":  # its autograd cannot save a mask of inference_mode
        mask = mask.clone()
    grads = [
        torch.autograd.grad(loss_fn(prediction, t, m)["loss"], prediction)[0]
        for t, m in ((target, mask), (target.clone(), mask.clone()))
    ]
    assert torch.equal(*grads)
    changed = torch.randn(2, 3, 8)
    loss = loss_fn(prediction, changed)["loss"]
    changed += 1
    if backend != "reference":  # the reference saves copies
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, prediction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count", [1, 3])
def test_results_can_be_changed_in_place(backend: str, reduction: Any, count: int) -> None:
    levels = [torch.randn(2, 3, 8, requires_grad=True) for _ in range(count)]
    targets = [torch.randn(2, 3, 8) for _ in range(count)]
    out = HJEPALoss(num_hierarchies=count, reduction=reduction, backend=backend)(levels, targets)  # type: ignore[arg-type]
    before = {name: value.detach().clone() for name, value in out.items()}
    with torch.no_grad():
        out["loss_h0"] *= 2
    assert torch.equal(out["loss_h0"], 2 * before.pop("loss_h0"))
    for name, value in before.items():
        assert torch.equal(out[name], value), name


def test_large_gradients_are_whole(backend: str) -> None:
    """The native gradient is so large that the kernel's stores bypass the caches.

    Rows of 500 features do not begin at aligned addresses.
    """
    batch = 70 if backend == "native" else 2
    for features in (512, 500):
        check(*sides((batch, 150, features), torch.float32), backend)


def test_rows_of_zero_norm(backend: str) -> None:
    prediction, target = sides((3, 4, 8), torch.float32)
    prediction, target = prediction.detach().clone(), target.detach().clone()
    prediction[0, 1], target[1, 2] = 0, 1e-12
    prediction, target = prediction.requires_grad_(), target.requires_grad_()
    loss = prediction_loss(prediction, target, backend=backend)
    grads = torch.autograd.grad(loss, (prediction, target))
    assert (grads[0][0, 1] == 0).all()
    assert (grads[1][1, 2] == 0).all()
    check(prediction, target, backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_is_no_number_is_as_in_the_reference(
    backend: str, value: float, normalization: str, loss_type: Any
) -> None:
    options = NORMALIZATIONS[normalization]
    prediction, target = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    prediction[0, 1, 20] = value
    for side in (0, 1):
        p, t = (x.clone().requires_grad_() for x in (prediction, target)[:: 1 - 2 * side])
        loss = prediction_loss(p, t, loss_type=loss_type, backend=backend, **options)
        expected = reference.prediction_loss(p, t, loss_type=loss_type, **options)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        for a, b in zip(
            torch.autograd.grad(loss, (p, t)), torch.autograd.grad(expected, (p, t)), strict=True
        ):
            # A gradient scaler skips a step if it finds a value that is not finite.
            assert torch.equal(a.isfinite().all(-1), b.isfinite().all(-1))
        errors = prediction_loss(
            p, t, loss_type=loss_type, reduction="none", backend=backend, **options
        )
        of_reference = reference.prediction_loss(
            p, t, loss_type=loss_type, reduction="none", **options
        )
        assert torch.equal(errors.isfinite(), of_reference.isfinite())


def test_a_dropped_row_reaches_nothing(backend: str) -> None:
    prediction, target = (x.detach().clone() for x in sides((2, 5, 24), torch.float32))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    prediction[1, 3], target[1, 3, 0] = torch.nan, torch.inf
    inputs = [x.requires_grad_() for x in (prediction, target)]
    for reduction in ("mean", "sum", "none"):
        loss = prediction_loss(*inputs, mask=mask, reduction=reduction, backend=backend).sum()  # type: ignore[arg-type]
        for grad in torch.autograd.grad(loss, inputs):
            assert grad.isfinite().all()
            assert (grad[1, 3] == 0).all()
        assert loss.isfinite()


def test_nothing_kept_is_zero(backend: str) -> None:
    prediction, target = sides((2, 5, 24), torch.float32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    loss = prediction_loss(prediction, target, mask=mask, backend=backend)
    assert loss == 0
    assert (torch.autograd.grad(loss, prediction)[0] == 0).all()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    batch=st.integers(1, 4),
    patches=st.integers(1, 6),
    features=st.integers(3, 70),
    threshold=st.floats(0.05, 3),
    loss_type=st.sampled_from(LOSS_TYPES),
    normalization=st.sampled_from(list(NORMALIZATIONS)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    backend: str,
    batch: int,
    patches: int,
    features: int,
    threshold: float,
    loss_type: str,
    normalization: str,
    reduction: str,
    share: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    name = "huber_delta" if loss_type == "huber" else "smoothl1_beta"
    dtype = torch.float32 if backend == "triton" else torch.float64
    check(
        *sides((batch, patches, features), dtype),
        backend,
        mask=torch.rand(batch, patches) < share,
        reduction=reduction,
        loss_type=loss_type,
        **{name: threshold},
        **NORMALIZATIONS[normalization],
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(backend: str, normalization: str) -> None:
    if backend == "triton":
        pytest.skip("fp64 goes to the chunked back end")
    inputs = [torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def function(p: Tensor, t: Tensor) -> Tensor:
        return prediction_loss(
            p,
            t,
            loss_type="mse",
            reduction="none",
            backend=backend,  # type: ignore[arg-type]
            **NORMALIZATIONS[normalization],
        )

    assert torch.autograd.gradcheck(function, inputs)


def levels(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Predictions, targets and masks of three levels of different widths."""
    shapes = [(3, 9, 12), (3, 4, 12), (3, 20)]
    predictions, targets = (
        [torch.randn(s).to(dtype).requires_grad_() for s in shapes] for _ in range(2)
    )
    return predictions, targets, [torch.rand(3, 9) < 0.7, None, torch.rand(3) < 0.9]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("detach", [False, True])
def test_a_hierarchy_is_its_levels(backend: str, reduction: Any, detach: bool) -> None:
    """Compare each result of the module, and the gradients through all of them at once."""
    predictions, targets, masks = levels()
    weights = [1.0, 0.0, 0.3]
    options: dict[str, Any] = {"reduction": reduction, "detach_targets": detach}
    results = []
    for name in (backend, "reference"):
        out = HJEPALoss("smoothl1", weights, backend=name, **options)(predictions, targets, masks)  # type: ignore[arg-type]
        inputs = predictions if detach else predictions + targets
        total = 2 * out["loss"] + 3 * out["loss_unweighted"] + out["loss_h1"].square().sum()
        results.append([*(out[key] for key in sorted(out)), *torch.autograd.grad(total, inputs)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= FLOOR_GRADIENT[torch.float32]
    if detach:
        out = HJEPALoss(hierarchy_weights=weights, backend=backend, **options)(
            predictions, targets, masks
        )
        out["loss"].backward()
        assert all(t.grad is None for t in targets)


def arguments(case: int, dtype: torch.dtype, *, grad: bool = True) -> dict[str, Any]:
    """Arguments of the operator; ``case`` chooses masks, loss type, normalization, reduction."""
    predictions, targets, masks = levels(dtype)
    if not grad:
        predictions, targets = ([x.detach() for x in side] for side in (predictions, targets))
    no_mask = torch.empty(0, dtype=torch.bool)
    return {
        "predictions": predictions,
        "targets": targets if case else [t.detach() for t in targets],
        "masks": [no_mask if m is None else m for m in masks] if case % 2 else [],
        "weights": [1.0, 0.5, 0.25],
        "loss_type": ("smoothl1", "mse", "huber")[case],
        "normalization": ("l2", "layer", "none")[case],
        "threshold": 0.7,
        "eps": 1e-8,
        "reduction": ("mean", "sum", "none")[case],
    }


@pytest.mark.parametrize("overload", RUNNABLE)
@pytest.mark.parametrize("case", range(3))
def test_opcheck(overload: str, case: int) -> None:
    inputs = in_order("prediction_loss", arguments(case, torch.float32))
    torch.library.opcheck(ops.operator("prediction_loss", overload), inputs)


@pytest.mark.parametrize("overload", RUNNABLE)
@pytest.mark.parametrize("case", range(3))
def test_opcheck_backward(overload: str, case: int) -> None:
    inputs = arguments(case, torch.float32, grad=False)
    out = ops.run("prediction_loss", overload, **inputs)
    # Each case has upstream gradients for other results.
    backward_inputs = inputs | {
        "grad_loss": (out.loss, out.loss, None)[case],
        "grad_unweighted": (None, out.unweighted, out.unweighted)[case],
        "grad_levels": (None, None, out.levels)[case],
        "statistics": out.statistics,
        "scales": out.scales,
        "targets_too": case > 0,
    }
    torch.library.opcheck(
        ops.operator("prediction_loss_backward", overload),
        in_order("prediction_loss_backward", backward_inputs),
    )


@pytest.mark.parametrize("overload", RUNNABLE)
@pytest.mark.parametrize("case", range(3))
def test_the_operators_own_autograd(overload: str, case: int) -> None:
    """torch.compile and torch.export use the registered autograd. The modules use ``ops.call``."""
    inputs = arguments(case, torch.float32 if overload == ".triton" else torch.float64)
    registered = ops.run("prediction_loss", overload, **inputs)
    direct = ops.call(
        "prediction_loss", overload, **(inputs | {"weights": tuple(inputs["weights"])})
    )
    leaves = inputs["predictions"] + (inputs["targets"] if case else [])
    for result in (registered, direct):
        total = result.loss + 2 * result.unweighted + result.levels.square().sum()
        result_grads = torch.autograd.grad(total, leaves)
        if result is registered:
            expected = result_grads
        for a, b in zip(result_grads, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_double_backward_names_the_way_out(backend: str) -> None:
    prediction, target = sides((2, 3, 4), torch.float32)
    loss = prediction_loss(prediction, target, loss_type="mse", backend=backend)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, prediction, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(grad.sum(), prediction)[0].isfinite().all()
        return
    with pytest.raises(
        RuntimeError, match=r'prediction_loss has no second derivative.*"reference"'
    ):
        torch.autograd.grad(grad.sum(), prediction)


def test_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 40, 10**6):
        monkeypatch.setattr(chunked.prediction_loss, "CHUNK_ELEMENTS", size)
        for reduction in ("mean", "none"):
            mask = torch.rand(5, 4) < 0.7
            check(*sides((5, 4, 10), torch.float32), "chunked", mask=mask, reduction=reduction)


@pytest.mark.parametrize("shape", [(5, 4, 10), (5, 40), (1, 7, 10), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("size", [1, 25, 40, 90, 10**6])
def test_chunks_are_of_bounded_size_and_hold_each_row_once(
    shape: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked.prediction_loss, "CHUNK_ELEMENTS", size)
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    chunks = [p for p, _, _ in chunked.prediction_loss._chunks(x, x, None)]
    assert torch.equal(torch.cat(chunks), x.view(-1, shape[-1]))
    assert max(map(torch.numel, chunks)) <= max(size, shape[-1])


def test_autocast_changes_nothing(backend: str) -> None:
    prediction, target = sides((3, 5, 16), torch.float32)
    expected = prediction_loss(prediction, target, backend=backend)  # type: ignore[arg-type]
    with torch.autocast(prediction.device.type, dtype=torch.bfloat16):
        loss = prediction_loss(prediction, target, backend=backend)  # type: ignore[arg-type]
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, prediction)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, prediction))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_type": "l1"}, ValueError, "loss_type must be one of.*'l1'"),
        ({"smoothl1_beta": 0.0}, ValueError, "smoothl1_beta must be positive and finite, got 0.0"),
        ({"huber_delta": float("inf")}, ValueError, "huber_delta must be positive"),
        ({"huber_delta": 1e39}, ValueError, "huber_delta must lie between 1e-30 and 1e.30, got"),
        ({"smoothl1_beta": 1e-39}, ValueError, "smoothl1_beta must lie between"),
        ({"eps": 1e-44}, ValueError, "eps must lie between"),
        ({"target_norm": "batch"}, ValueError, "target_norm must be 'layer' or None"),
        ({"eps": -1.0}, ValueError, "eps must be positive"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"mask": torch.ones(3, 3) > 0}, ValueError, r"mask must be \(2, 3\), one entry a patch"),
        ({"target": torch.ones(2, 3, 5)}, ValueError, "prediction and target must have the same"),
        ({"target": torch.ones(2, 3, 4).long()}, TypeError, "target must be of fp64, fp32"),
        ({"target": 1.0}, TypeError, "target must be a tensor, got float"),
        ({"prediction": torch.ones(4)}, ValueError, r"prediction must be \(B, N, D\) or \(B, D\)"),
        ({"backend": "metal"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options: Any, error: type, message: str) -> None:
    good = {"prediction": torch.ones(2, 3, 4), "target": torch.ones(2, 3, 4)}
    arguments = good | options
    with pytest.raises(error, match=message):
        prediction_loss(arguments.pop("prediction"), arguments.pop("target"), **arguments)


def test_levels_of_two_kinds_are_refused() -> None:
    predictions = [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)]
    with pytest.raises(TypeError, match=r"fp64 at every level or at none.*at level 1"):
        HJEPALoss(num_hierarchies=2)(predictions, predictions)
    other = [torch.ones(2, 3), torch.ones(2, 3, device="meta")]
    with pytest.raises(ValueError, match=r"predictions\[1\] must be on the device of"):
        HJEPALoss(num_hierarchies=2)(other, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(backend: str, reduction: Any) -> None:
    if backend == "triton":
        pytest.skip("torch.compile cannot trace Triton's interpreter")
    predictions, targets, masks = levels()
    loss_fn = HJEPALoss(reduction=reduction, backend=backend)  # type: ignore[arg-type]
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, loss_fn):
        out = function(predictions, targets, masks)
        results.append([out["loss"], *torch.autograd.grad(out["loss"], predictions)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(
    not (backends()["native"].available and sys.platform == "linux"),
    reason="the test needs the compiled kernels and Linux",
)
def test_only_the_gradient_takes_memory() -> None:
    """The process grows only by the gradient, 64 MiB, and by no temporary of that size."""
    code = """
import torch
from cjepa_kernels import prediction_loss

def grown(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is resident now
    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    before = peak()
    result = function()
    return result, (peak() - before) / 1024

torch.set_num_threads(2)
small = torch.randn(4, 4, 512, requires_grad=True)
torch.autograd.grad(prediction_loss(small, small.detach()), small)
sides = [torch.randn(64, 512, 512) for _ in range(2)]
sides[0].requires_grad_()
loss, forward = grown(lambda: prediction_loss(*sides))
_, backward = grown(lambda: torch.autograd.grad(loss, sides[0]))
print(forward, backward)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    forward, backward = map(float, result.stdout.split())
    assert forward < 6
    assert 60 < backward < 70
