"""HJEPALoss: values, gradients, masks, reductions and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cjepa_kernels import HJEPALoss, create_loss_from_config

FORMULAS = {
    "smoothl1": lambda d, delta: torch.where(d.abs() < 1, 0.5 * d * d, d.abs() - 0.5),
    "mse": lambda d, delta: d * d,
    "huber": lambda d, delta: torch.where(
        d.abs() < delta, 0.5 * d * d, delta * (d.abs() - 0.5 * delta)
    ),
}


def levels(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(3, 8, 5), (3, 4, 5), (3, 2, 5)]
    predictions = [(3 * torch.randn(s, dtype=dtype)).requires_grad_() for s in shapes]
    targets = [(3 * torch.randn(s, dtype=dtype)).requires_grad_() for s in shapes]
    return predictions, targets


def normalized(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("loss_type", list(FORMULAS))
@pytest.mark.parametrize("treatment", ["l2", "layer", "plain"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
def test_values_and_gradients(loss_type: Any, treatment: str, detach: bool) -> None:
    predictions, targets = levels()
    loss_fn = HJEPALoss(
        loss_type,
        [1.0, 0.5, 0.25],
        huber_delta=0.7,
        normalize_embeddings=treatment != "plain",
        target_norm="layer" if treatment == "layer" else None,
        detach_targets=detach,
    )
    out = loss_fn(predictions, targets)
    inputs = predictions if detach else predictions + targets
    actual = torch.autograd.grad(out["loss"], inputs)

    expected_levels = []
    for prediction, target in zip(predictions, targets, strict=True):
        p, t = prediction, target.detach() if detach else target
        if treatment == "l2":
            p, t = normalized(p), normalized(t)
        elif treatment == "layer":
            t = (t - t.mean(-1, keepdim=True)) / (
                t.var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
        expected_levels.append(FORMULAS[loss_type](p - t, 0.7).mean())
    expected = sum(w * x for w, x in zip([1.0, 0.5, 0.25], expected_levels, strict=True))
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["loss_unweighted"], torch.stack(expected_levels).mean())
    for index, level in enumerate(expected_levels):
        torch.testing.assert_close(out[f"loss_h{index}"], level)
    for a, b in zip(actual, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_keep_rows(reduction: Any) -> None:
    predictions, targets = levels()
    masks = [torch.rand(p.shape[:-1]) < 0.5 for p in predictions]
    out = HJEPALoss(reduction=reduction)(predictions, targets, masks)
    means = []
    for index, (p, t, mask) in enumerate(zip(predictions, targets, masks, strict=True)):
        rows = F.smooth_l1_loss(normalized(p)[mask], normalized(t)[mask], reduction="none")
        means.append(rows.sum() if reduction == "sum" else rows.mean())
        level = out[f"loss_h{index}"]
        if reduction == "none":
            torch.testing.assert_close(level[mask], rows)
            assert (level[~mask] == 0).all()
        else:
            torch.testing.assert_close(level, means[-1])
    torch.testing.assert_close(out["loss"], torch.stack(means).sum())


@pytest.mark.parametrize("last_axis", [False, True], ids=["(B,N)", "(B,N,1)"])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float32, torch.float16, torch.int64, torch.uint8], ids=str
)
def test_masks_in_the_forms_of_hjepa(dtype: torch.dtype, last_axis: bool) -> None:
    predictions, targets = levels()
    masks = [torch.rand(p.shape[:-1]) < 0.5 for p in predictions]
    expected = HJEPALoss()(predictions, targets, masks)["loss"]
    given = [mask.to(dtype)[..., None] if last_axis else mask.to(dtype) for mask in masks]
    assert torch.equal(HJEPALoss()(predictions, targets, given)["loss"], expected)
    some = [given[0], None, given[2]]  # one level has no mask
    by_hand = [masks[0], torch.ones_like(masks[1]), masks[2]]
    torch.testing.assert_close(
        HJEPALoss()(predictions, targets, some)["loss"],
        HJEPALoss()(predictions, targets, by_hand)["loss"],
    )


def test_a_mask_of_numbers_is_checked_in_a_compiled_graph_too() -> None:
    predictions, targets = levels(torch.float32)
    masks = [(torch.rand(p.shape[:-1]) < 0.5).float() for p in predictions]
    loss_fn = HJEPALoss()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(predictions, targets, masks)["loss"], loss_fn(predictions, targets, masks)["loss"]
    )
    masks[1] = masks[1] * 0.5
    with pytest.raises(RuntimeError, match=r"masks\[1\] must hold 0 and 1 alone"):
        compiled(predictions, targets, masks)


def test_a_trainer_that_passes_context_features_to_every_loss() -> None:
    """H-JEPA's trainer names all arguments and passes features that this loss does not use."""
    predictions, targets = levels()
    outputs = {"predictions": predictions, "targets": targets, "context_features": torch.ones(3, 5)}
    for loss_fn in (HJEPALoss(), create_loss_from_config({"type": "mse"})):
        plain = loss_fn(predictions, targets)
        named = loss_fn(**outputs)
        fourth = loss_fn(predictions, targets, None, None)
        assert torch.equal(named["loss"], plain["loss"])
        assert torch.equal(fourth["loss"], plain["loss"])
        named.update(context_std=0.5)  # the trainer adds its own metrics to the result


def test_a_mask_of_true_equals_no_mask() -> None:
    predictions, targets = levels()
    masks = [torch.ones(p.shape[:-1], dtype=torch.bool) for p in predictions]
    torch.testing.assert_close(
        HJEPALoss()(predictions, targets, masks), HJEPALoss()(predictions, targets)
    )


def test_a_level_with_nothing_kept_counts_zero() -> None:
    predictions, targets = levels()
    masks = [torch.ones(p.shape[:-1], dtype=torch.bool) for p in predictions]
    masks[1][:] = False
    out = HJEPALoss()(predictions, targets, masks)
    assert out["loss_h1"] == 0
    out["loss"].backward()
    assert (predictions[1].grad == 0).all()


def test_nan_in_a_dropped_row_does_not_reach_the_loss() -> None:
    predictions, targets = levels()
    masks = [torch.ones(p.shape[:-1], dtype=torch.bool) for p in predictions]
    masks[0][1, 2] = False
    poisoned = predictions[0].detach().clone()
    poisoned[1, 2] = torch.nan
    predictions[0] = poisoned.requires_grad_()
    out = HJEPALoss()(predictions, targets, masks)
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert poisoned.grad.isfinite().all()


def test_zero_rows_have_a_zero_gradient() -> None:
    predictions, targets = levels(torch.float32)
    zero = torch.zeros(3, 8, 5, requires_grad=True)
    predictions[0] = zero
    HJEPALoss()(predictions, targets)["loss"].backward()
    assert (zero.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    predictions, targets = levels(dtype)
    out = HJEPALoss()(predictions, targets)
    expected = HJEPALoss()([p.float() for p in predictions], [t.float() for t in targets])
    assert torch.equal(out["loss"], expected["loss"])
    out["loss"].backward()
    assert predictions[0].grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(HJEPALoss()(predictions, targets)["loss"], out["loss"])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    features=st.integers(1, 9),
    reduction=st.sampled_from(["mean", "sum"]),
    loss_type=st.sampled_from(list(FORMULAS)),
    seed=st.integers(0, 2**31),
)
def test_gradcheck_on_any_shape(
    rows: int, features: int, reduction: Any, loss_type: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, t = (
        torch.randn(2, rows, features, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    mask = torch.rand(2, rows, generator=generator) < 0.7
    loss_fn = HJEPALoss(
        loss_type, 1.0, 1, reduction, normalize_embeddings=False, detach_targets=False
    )
    assert torch.autograd.gradcheck(lambda a, b: loss_fn(a, b, mask)["loss"], (p, t))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_type": "l1"}, ValueError, "loss_type must be one of.*'l1'"),
        ({"num_hierarchies": 0}, ValueError, "num_hierarchies must be at least 1, got 0"),
        ({"num_hierarchies": 2.0}, TypeError, "num_hierarchies must be an int"),
        ({"hierarchy_weights": [1.0]}, ValueError, r"num_hierarchies=3, got 1"),
        ({"hierarchy_weights": [1.0, -1.0, 1.0]}, ValueError, "finite and not negative"),
        ({"hierarchy_weights": [1.0, "a", 1.0]}, TypeError, "must be numbers, got 'a'"),
        ({"hierarchy_weights": None}, TypeError, "must be a number or a sequence, got None"),
        ({"normalize_embeddings": "false"}, TypeError, "normalize_embeddings must be True or"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"huber_delta": 0.0}, ValueError, "huber_delta must be positive"),
        ({"eps": float("nan")}, ValueError, "eps must be positive"),
        ({"target_norm": "batch"}, ValueError, "target_norm must be 'layer' or None, got 'batch'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of.*'cuda'"),
        ({"smoothl1_beta": -1.0}, ValueError, "smoothl1_beta must be positive"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        HJEPALoss(**options)


GOOD = [torch.randn(2, 3, 4)]


@pytest.mark.parametrize(
    ("predictions", "targets", "masks", "error", "message"),
    [
        (GOOD * 2, GOOD * 2, None, ValueError, "predictions must have one tensor per level"),
        (GOOD, GOOD * 2, None, ValueError, "targets must have one tensor per level"),
        (GOOD, GOOD, GOOD * 2, ValueError, "masks must have one tensor per level"),
        (
            GOOD,
            [torch.randn(2, 4, 3)],
            None,
            ValueError,
            r"predictions\[0\] and targets\[0\] must have the same shape",
        ),
        ([torch.randn(4)], [torch.randn(4)], None, ValueError, r"\(B, N, D\) or \(B, D\)"),
        ([torch.randn(0, 4)], [torch.randn(0, 4)], None, ValueError, "not empty"),
        (GOOD, [GOOD[0].long()], None, TypeError, r"targets\[0\] must be of fp64"),
        (GOOD, GOOD, [[True]], TypeError, r"masks\[0\] must be a bool tensor, got list"),
        (GOOD, GOOD, [torch.full((2, 3), 0.5)], ValueError, r"masks\[0\] must hold .* got 0.5"),
        (GOOD, GOOD, [torch.full((2, 3, 1), 2)], ValueError, r"masks\[0\] must hold 0 and 1 alone"),
        (GOOD, GOOD, [torch.full((2, 3), torch.nan)], ValueError, "must hold 0 and 1 alone"),
        (GOOD, GOOD, [torch.ones(2, 3, 4)], ValueError, r"masks\[0\] must be \(2, 3\)"),
        (GOOD, GOOD, [torch.ones(2, 4) > 0], ValueError, r"masks\[0\] must be \(2, 3\)"),
        (3.0, GOOD, None, TypeError, "predictions must be a tensor or a sequence"),
        ([None], GOOD, None, TypeError, r"predictions\[0\] must be a tensor, got NoneType"),
        (GOOD, [GOOD[0].to("meta")], None, ValueError, "same device"),
    ],
)
def test_bad_inputs_are_refused(
    predictions: Any, targets: Any, masks: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        HJEPALoss(num_hierarchies=1)(predictions, targets, masks)


def test_extra_repr() -> None:
    assert "reduction=sum" in repr(HJEPALoss(reduction="sum"))
    assert "target_norm=layer" in repr(HJEPALoss(target_norm="layer"))
