"""ContrastiveJEPALoss and NTXentLoss as modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    info_nce,
    nt_xent,
    sup_con,
)

KEYS = {
    "loss",
    "jepa_loss",
    "contrastive_loss",
    "contrastive_accuracy",
    "contrastive_pos_sim",
    "contrastive_neg_sim",
    "loss_h0",
    "loss_h1",
    "loss_unweighted",
}


def batch() -> dict[str, Any]:
    predictions = [torch.randn(4, n, 8, requires_grad=True) for n in (6, 3)]
    targets = [torch.randn(4, n, 8) for n in (6, 3)]
    context = [torch.randn(4, 7, 8, requires_grad=True) for _ in range(2)]
    return {
        "predictions": predictions,
        "targets": targets,
        "context_features_i": context[0],
        "context_features_j": context[1],
    }


def cjepa(**options: Any) -> ContrastiveJEPALoss:
    return ContrastiveJEPALoss(HJEPALoss(num_hierarchies=2), **options)


def test_the_loss_is_the_weighted_sum_of_its_terms(backend: Any) -> None:
    inputs = batch()
    out = cjepa(jepa_weight=0.7, contrastive_weight=0.3, backend=backend)(**inputs)
    assert set(out) == KEYS
    jepa = HJEPALoss(num_hierarchies=2)(inputs["predictions"], inputs["targets"])
    contrastive = nt_xent(
        inputs["context_features_i"][:, 0], inputs["context_features_j"][:, 0], backend=backend
    )
    torch.testing.assert_close(out["loss"], 0.7 * jepa["loss"] + 0.3 * contrastive.loss)
    torch.testing.assert_close(out["contrastive_accuracy"], contrastive.accuracy)
    torch.testing.assert_close(out["contrastive_pos_sim"], contrastive.positive_similarity)
    torch.testing.assert_close(out["contrastive_neg_sim"], contrastive.negative_similarity)
    out["loss"].backward()
    for features in (inputs["context_features_i"], inputs["context_features_j"]):
        assert (features.grad[:, 0] != 0).any()
        assert (features.grad[:, 1:] == 0).all()


LABELS = torch.tensor([5, 6, 5, 6])
TERMS: dict[str, Any] = {
    "nt_xent": lambda a, b: nt_xent(a, b, temperature=0.2),
    "nt_xent_labels": lambda a, b: nt_xent(a, b, temperature=0.2, labels=LABELS),
    "dcl": lambda a, b: nt_xent(a, b, temperature=0.2, decoupled=True),
    "dcl_labels": lambda a, b: nt_xent(a, b, temperature=0.2, decoupled=True, labels=LABELS),
    "info_nce": lambda a, b: info_nce(a, b, temperature=0.2, symmetric=True),
    "sup_con_labels": lambda a, b: sup_con(torch.stack([a, b], dim=1), LABELS, temperature=0.2),
}


@pytest.mark.parametrize("name", TERMS)
def test_contrastive_types(name: str) -> None:
    inputs = batch()
    kind = name.removesuffix("_labels")
    loss_fn = cjepa(contrastive_type=kind, contrastive_temperature=0.2)
    assert loss_fn.contrastive_type == kind
    assert (f"contrastive_type={kind}" in repr(loss_fn)) == (kind != "nt_xent")
    out = loss_fn(**inputs, labels=LABELS if name.endswith("_labels") else None)
    assert set(out) == KEYS
    cls = [inputs[f"context_features_{view}"][:, 0] for view in "ij"]
    expected = TERMS[name](*cls)
    torch.testing.assert_close(out["contrastive_loss"], expected.loss)
    torch.testing.assert_close(out["contrastive_pos_sim"], expected.positive_similarity)
    torch.testing.assert_close(out["contrastive_neg_sim"], expected.negative_similarity)
    of_pairs = nt_xent(*cls, labels=LABELS) if kind == "sup_con" else expected
    torch.testing.assert_close(out["contrastive_accuracy"], of_pairs.accuracy)
    out["loss"].backward()
    for view in "ij":
        assert (inputs[f"context_features_{view}"].grad[:, 0] != 0).any()


def test_labels_that_are_missing_or_not_taken() -> None:
    with pytest.raises(ValueError, match="labels must be given with contrastive_type='sup_con'"):
        cjepa(contrastive_type="sup_con")(**batch())
    expected = r"labels must be None with contrastive_type='info_nce', got .* \(4,\) .* torch.int64"
    with pytest.raises(ValueError, match=expected):
        cjepa(contrastive_type="info_nce")(**batch(), labels=LABELS)


@pytest.mark.parametrize("kind", ["nt_xent", "dcl", "info_nce", "sup_con"])
def test_distributed_means_one_process_without_a_group(kind: Any) -> None:
    inputs = batch() | {"labels": LABELS if kind == "sup_con" else None}
    loss_fn = cjepa(contrastive_type=kind, distributed=True)
    assert loss_fn.distributed is True
    alone = cjepa(contrastive_type=kind)
    assert torch.equal(loss_fn(**inputs)["loss"], alone(**inputs)["loss"])
    loss_fn.distributed = False
    assert loss_fn.distributed is False


@pytest.mark.parametrize("off", ["jepa_weight", "contrastive_weight"])
def test_a_term_of_weight_zero_is_monitored_and_not_trained(off: str) -> None:
    inputs = batch()
    out = cjepa(**{off: 0.0})(**inputs)
    assert set(out) == KEYS
    on = 0.1 * out["contrastive_loss"] if off == "jepa_weight" else out["jepa_loss"]
    assert torch.equal(out["loss"], on)
    out["loss"].backward()
    unused = inputs["predictions"][0] if off == "jepa_weight" else inputs["context_features_i"]
    assert unused.grad is None


def test_nan_in_a_term_of_weight_zero_stays_out() -> None:
    inputs = batch()
    inputs["context_features_i"] = torch.full((4, 7, 8), torch.nan)
    assert cjepa(contrastive_weight=0.0)(**inputs)["loss"].isfinite()


def test_both_weights_zero_give_a_zero_loss() -> None:
    assert cjepa(jepa_weight=0, contrastive_weight=0)(**batch())["loss"] == 0


def test_masks_reach_the_jepa_loss() -> None:
    inputs = batch()
    masks = [torch.rand(4, n) < 0.5 for n in (6, 3)]
    out = cjepa()(**inputs, masks=masks)
    expected = HJEPALoss(num_hierarchies=2)(inputs["predictions"], inputs["targets"], masks)
    assert torch.equal(out["jepa_loss"], expected["loss"])


def test_any_module_that_returns_a_loss_can_be_wrapped() -> None:
    class Mean(nn.Module):
        def forward(self, predictions: Any, targets: Any, masks: Any) -> dict[str, Tensor]:
            return {"loss": predictions[0].mean()}

    inputs = batch()
    out = ContrastiveJEPALoss(Mean())(**inputs)
    assert torch.equal(out["jepa_loss"], inputs["predictions"][0].mean())
    assert "Level 0" not in ContrastiveJEPALoss(Mean()).get_loss_summary(out)


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({"contrastive_on_context": True}, {}, "context_features not provided"),
        ({}, {}, "must be provided for contrastive learning"),
        ({}, {"context_features_i": torch.randn(4, 7, 8)}, "must be provided for contrastive"),
        (
            {},
            {"target_features_i": torch.randn(4, 8), "target_features_j": torch.randn(4, 8)},
            r"target_features_i must be \(B, N\+1, D\).*\(4, 8\)",
        ),
        (
            {},
            {
                "context_features_i": torch.randn(4, 7, 8),
                "context_features_j": torch.randn(3, 7, 8),
            },
            "must have the same shape",
        ),
    ],
    ids=["on_context", "nothing", "one_view", "rank", "shapes"],
)
def test_bad_features_are_refused(options: Any, inputs: Any, message: str) -> None:
    levels = [torch.randn(4, n, 8) for n in (6, 3)]
    with pytest.raises(ValueError, match=message):
        cjepa(**options)(levels, levels, **inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"jepa_weight": -1.0}, ValueError, "jepa_weight must be finite and not negative, got -1"),
        ({"contrastive_weight": float("inf")}, ValueError, "contrastive_weight must be finite"),
        ({"contrastive_weight": "0.1"}, TypeError, "contrastive_weight must be a number"),
        ({"contrastive_temperature": 0}, ValueError, "Temperature must be positive"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"contrastive_type": "vicreg"}, ValueError, "contrastive_type must be one of .*'vicreg'"),
        ({"strategy": "star"}, ValueError, "strategy must be one of"),
        (
            {"strategy": "ring", "contrastive_type": "sup_con"},
            ValueError,
            'strategy must be "auto" or "all_gather" with contrastive_type="sup_con", got "ring"',
        ),
        (
            {"contrastive_type": "sup_con", "distributed": 1},
            TypeError,
            "distributed must be a bool",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cjepa(**options)


def test_jepa_loss_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"jepa_loss must be an nn\.Module, got function"):
        ContrastiveJEPALoss(lambda *_: {})  # type: ignore[arg-type]


def test_attributes_kept_from_the_first_implementation() -> None:
    loss_fn = cjepa(contrastive_temperature=0.2, reduction="sum", eps=1e-6)
    assert isinstance(loss_fn.contrastive, NTXentLoss)
    assert (loss_fn.contrastive.temperature, loss_fn.contrastive.eps) == (0.2, 1e-6)
    assert loss_fn.contrastive.use_cosine_similarity is True
    assert loss_fn.contrastive.reduction == "sum"
    assert (loss_fn.jepa_weight, loss_fn.contrastive_weight, loss_fn.eps) == (1.0, 0.1, 1e-6)
    assert loss_fn.contrastive_on_context is False
    assert "temperature=0.2" in loss_fn.extra_repr()
    assert "reduction=sum" in loss_fn.contrastive.extra_repr()


def test_summary_has_the_labels_of_the_first_implementation() -> None:
    loss_fn = cjepa()
    summary = loss_fn.get_loss_summary(loss_fn(**batch()))
    for label in (
        "C-JEPA Loss Summary:",
        "Total Loss: ",
        "JEPA Loss (weight=1.000): ",
        "Contrastive Loss (weight=0.100): ",
        "Contrastive Accuracy: ",
        "Positive Similarity: ",
        "Negative Similarity: ",
        "JEPA Hierarchical Breakdown:",
        "Level 0: ",
        "Level 1: ",
    ):
        assert label in summary


def test_learnable_temperature_trains_and_stays_positive() -> None:
    loss_fn = NTXentLoss(0.5, learnable_temperature=True)
    assert [name for name, _ in loss_fn.named_parameters()] == ["log_temperature"]
    assert loss_fn.temperature.item() == pytest.approx(0.5)
    z_i = torch.randn(16, 8)
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=5.0)
    losses = []
    for _ in range(20):
        loss = loss_fn(z_i, z_i + 0.05 * torch.randn(16, 8))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0 < loss_fn.temperature.item() < 0.4
    assert losses[-1] < losses[0]
    loss_fn.temperature = 0.3
    assert loss_fn.temperature.item() == pytest.approx(0.3)
    assert "learnable_temperature=True" in loss_fn.extra_repr()


def test_temperature_of_a_module_can_be_set() -> None:
    loss_fn = NTXentLoss(0.5)
    z = torch.randn(2, 6, 4)
    loss_fn.temperature = 0.2
    assert torch.equal(loss_fn(z[0], z[1])["loss"], nt_xent(z[0], z[1], temperature=0.2).loss)
    with pytest.raises(ValueError, match="Temperature must be positive"):
        loss_fn.temperature = -1.0
    with pytest.raises(TypeError, match="learnable_temperature=True"):
        loss_fn.temperature = torch.tensor(0.1)
