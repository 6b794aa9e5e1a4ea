"""The differences from the first implementation that docs/differences.md lists, row by row.

If the first implementation's formula is simple, a test contains it and shows the difference.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, NTXentLoss, nt_xent

LEVELS = [torch.randn(4, 6, 8), torch.randn(4, 3, 8)]


def cjepa(**options: Any) -> ContrastiveJEPALoss:
    return ContrastiveJEPALoss(HJEPALoss(num_hierarchies=2), **options)


def features(*, requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, 4, 7, 8)
    return z[0].clone().requires_grad_(requires_grad), z[1].clone().requires_grad_(requires_grad)


def test_negative_similarity_is_finite(backend: str) -> None:
    out = nt_xent(torch.randn(5, 3), torch.randn(5, 3), backend=backend)
    assert out.negative_similarity.isfinite()


def test_positive_similarity_of_identical_views_is_one(backend: str) -> None:
    z = torch.randn(5, 3)
    out = nt_xent(z, z.clone(), temperature=0.1, backend=backend)
    assert out.positive_similarity.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("batch", [2, 3, 16, 37, 130])
@pytest.mark.parametrize("features", [1, 7, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_full_collapse_reports_accuracy_zero(
    backend: str, batch: int, features: int, dtype: torch.dtype
) -> None:
    z = torch.randn(1, features, dtype=dtype).expand(batch, features)
    assert nt_xent(z, z.clone(), backend=backend).accuracy == 0.0


def test_mask_takes_pairs_of_samples_out_of_the_negatives(backend: str) -> None:
    z_i, z_j = torch.randn(2, 6, 4, dtype=torch.float64)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1, 4] = True  # the mask is made symmetric
    mask.fill_diagonal_(True)  # the diagonal is ignored, because a positive is never excluded
    out = nt_xent(z_i, z_j, temperature=0.5, mask=mask, reduction="none", backend=backend)
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    weights = (z @ z.T / 0.5).exp()
    for a in range(12):
        others = [weights[a, b] for b in range(12) if b != a and {a % 6, b % 6} != {1, 4}]
        expected = math.log(sum(others)) - math.log(weights[a, (a + 6) % 12])
        assert out.loss[a].item() == pytest.approx(expected, abs=1e-12)


def test_mask_of_three_dimensional_inputs_counts_patches() -> None:
    z = torch.randn(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r"mask must be \(15, 15\).*got \(3, 3\)"):
        nt_xent(z[0], z[1], mask=torch.zeros(3, 3, dtype=torch.bool))


def test_contrasting_features_without_gradient_warns_once_and_names_the_cause() -> None:
    loss_fn = cjepa()
    target = features(requires_grad=False)
    predictions = [level.clone().requires_grad_() for level in LEVELS]
    with pytest.warns(UserWarning, match="carry no gradient.*EMA"):
        loss_fn(predictions, LEVELS, target_features_i=target[0], target_features_j=target[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(predictions, LEVELS, target_features_i=target[0], target_features_j=target[1])
        with torch.no_grad():
            cjepa()(predictions, LEVELS, *target)
        cjepa()(predictions, LEVELS, *features())


def test_default_order_is_target_then_context() -> None:
    context, target = features(), features()
    given = {"context_features_i": context[0], "context_features_j": context[1]}
    both = {**given, "target_features_i": target[0], "target_features_j": target[1]}
    on_context = cjepa(contrastive_on_context=True)(LEVELS, LEVELS, **both)
    by_default = cjepa()(LEVELS, LEVELS, **both)
    fallback = cjepa()(LEVELS, LEVELS, **given)
    assert torch.equal(fallback["contrastive_loss"], on_context["contrastive_loss"])
    expected = nt_xent(target[0][:, 0], target[1][:, 0]).loss
    assert torch.equal(by_default["contrastive_loss"], expected)


def test_context_features_is_ignored_beside_a_pair_and_refused_alone() -> None:
    pair = features()
    out = cjepa()(LEVELS, LEVELS, *pair, context_features=torch.randn(4, 7, 8))
    assert torch.equal(out["loss"], cjepa()(LEVELS, LEVELS, *pair)["loss"])
    with pytest.raises(ValueError, match="two views"):
        cjepa()(LEVELS, LEVELS, context_features=torch.randn(4, 7, 8))


def test_weights_take_effect_when_set_and_stay_out_of_the_state_dict() -> None:
    loss_fn = cjepa()
    pair = features()
    predictions = [level + 1 for level in LEVELS]
    loss_fn.contrastive_weight, loss_fn.jepa_weight = 0.5, 2.0
    out = loss_fn(predictions, LEVELS, *pair)
    expected = 2.0 * out["jepa_loss"] + 0.5 * out["contrastive_loss"]
    torch.testing.assert_close(out["loss"], expected)
    assert loss_fn.state_dict() == {}


def test_old_checkpoints_load() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss_fn = cjepa()

    old = {
        "loss_fn._jepa_weight": torch.tensor(1.0),
        "loss_fn._contrastive_weight": torch.tensor(0.1),
        "loss_fn.jepa_loss._hierarchy_weights": torch.tensor([1.0, 1.0]),
    }
    Holder().load_state_dict(old)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Holder().load_state_dict({**old, "loss_fn.other": torch.tensor(1.0)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_zeros_has_a_finite_gradient(backend: str, dtype: torch.dtype) -> None:
    z_i, z_j = torch.randn(2, 6, 5).to(dtype)
    z_i[2] = 0
    z_i, z_j = z_i.clone().requires_grad_(), z_j.clone().requires_grad_()
    loss = nt_xent(z_i, z_j, backend=backend).loss
    loss.backward()
    assert loss.isfinite()
    assert (z_i.grad[2] == 0).all()
    assert z_i.grad.isfinite().all()
    assert z_i.grad.norm() < 100
    assert z_j.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(0, 4), torch.randn(0, 4)), ValueError, r"at least one pair.*\(0, 4\)"),
        ((torch.randn(4, 0), torch.randn(4, 0)), ValueError, r"one feature.*\(4, 0\)"),
        ((torch.randn(2, 3, 4), torch.randn(3, 2, 4)), ValueError, "must have the same shape"),
        ((torch.randn(4), torch.randn(4)), ValueError, r"\(B, D\) or \(B, N, D\), got \(4,\)"),
        ((torch.ones(4, 2, dtype=torch.int64),) * 2, TypeError, "z_i must be of fp64.*int64"),
        (
            (torch.randn(4, 2), torch.arange(4)),
            TypeError,
            r"z_j must be the embeddings of the second view, got what looks like labels.*\(4,\)",
        ),
        (([[1.0]], torch.randn(1, 1)), TypeError, "z_i must be a tensor, got list"),
        ((torch.randn(2, 2), torch.randn(2, 2, device="meta")), ValueError, "same device"),
    ],
    ids=["empty", "no_features", "shapes", "one_dim", "int", "labels", "list", "devices"],
)
def test_bad_embeddings_are_refused(arguments: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        NTXentLoss()(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "Temperature must be positive.*-0.1"),
        ({"temperature": 0.0}, ValueError, "Temperature must be positive"),
        ({"temperature": math.nan}, ValueError, "Temperature must be positive.*nan"),
        ({"temperature": math.inf}, ValueError, "finite"),
        ({"temperature": 1e-38}, ValueError, "temperature must lie between 1e-30 and 1e.30.*1e-38"),
        ({"temperature": 1e38}, ValueError, "temperature must lie between 1e-30 and 1e.30.*1e.38"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a float"),
        ({"temperature": True}, TypeError, "temperature must be a float"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of.*'avg'"),
        ({"eps": -1.0}, ValueError, "eps must be positive and finite, got -1.0"),
        ({"eps": 1e-38}, ValueError, "eps must lie between 1e-30 and 1e.30, got 1e-38"),
        ({"eps": 1e31}, ValueError, "eps must lie between 1e-30 and 1e.30, got 1e.31"),
        ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
        ({"use_cosine_similarity": "false"}, TypeError, "use_cosine_similarity must be True or"),
        ({"backend": "cuda"}, ValueError, "backend must be one of.*'cuda'"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_bad_options_are_refused_by_module_and_function(
    options: Any, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        NTXentLoss(**options)
    with pytest.raises(error, match=message):
        nt_xent(torch.randn(2, 2), torch.randn(2, 2), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": torch.ones(2)}, ValueError, r"shape \(\) or \(1,\).*shape \(2,\)"),
        ({"temperature": torch.tensor(1)}, ValueError, "floating-point tensor.*int64"),
        ({"temperature": torch.tensor(0.1, device="meta")}, ValueError, "temperature.*device"),
        ({"mask": torch.ones(3, 3)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"group": 3}, TypeError, "group must be a process group or None, got int"),
        ({"mask": [[True]]}, TypeError, "mask must be a bool tensor, got list"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask must be \(3, 3\)"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool, device="meta")}, ValueError, "mask.*device"),
    ],
    ids=[
        "vector",
        "int",
        "device",
        "float_mask",
        "group",
        "list_mask",
        "mask_shape",
        "mask_device",
    ],
)
def test_bad_tensors_are_refused(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        nt_xent(torch.randn(3, 2), torch.randn(3, 2), **options)


def test_features_of_any_rank_and_any_sequence_of_levels_are_taken() -> None:
    flat = (torch.randn(4, 8), torch.randn(4, 8))
    HJEPALoss(num_hierarchies=2)(flat, flat)
    out = cjepa()(tuple(LEVELS), tuple(LEVELS), *features())
    assert out["loss"].isfinite()


def test_logits_only_on_request_and_divided_by_the_temperature() -> None:
    z_i, z_j = torch.randn(2, 5, 4, dtype=torch.float64)
    assert "logits" not in NTXentLoss()(z_i, z_j)
    out = NTXentLoss(temperature=0.2, return_logits=True, reduction="none")(z_i, z_j)
    logits = out["logits"]
    assert logits.shape == (10, 11)
    labels = torch.zeros(10, dtype=torch.long)
    torch.testing.assert_close(F.cross_entropy(logits, labels, reduction="none"), out["loss"])
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    assert logits[7, 0].item() == pytest.approx((z[7] @ z[2] / 0.2).item())
    # The negatives of the anchor's own view come first.
    assert logits[7, 1 + 3].item() == pytest.approx((z[7] @ z[8] / 0.2).item())
    assert logits[7, 1 + 5 + 3].item() == pytest.approx((z[7] @ z[3] / 0.2).item())


def test_one_pair(backend: str) -> None:
    z_i, z_j = (torch.randn(1, 6, requires_grad=True) for _ in range(2))
    out = nt_xent(z_i, z_j, backend=backend)
    out.loss.backward()
    assert out.loss == 0
    assert out.accuracy == 1
    assert out.negative_similarity.isnan()
    assert (z_i.grad == 0).all()
    assert (z_j.grad == 0).all()


def test_everything_masked_is_like_one_pair(backend: str) -> None:
    z_i, z_j = (torch.randn(5, 6, requires_grad=True) for _ in range(2))
    out = nt_xent(z_i, z_j, mask=torch.ones(5, 5, dtype=torch.bool), backend=backend)
    out.loss.backward()
    assert out.loss == 0
    assert out.accuracy == 1
    assert out.negative_similarity.isnan()
    assert (z_i.grad == 0).all()
