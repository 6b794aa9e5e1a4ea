"""The accuracy that C-JEPA reports beside SupCon."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, nt_xent
from cjepa_kernels.functional.view_accuracy import SAMPLES, view_accuracy

OPTIONS: dict[str, Any] = {"use_cosine_similarity": True, "eps": 1e-8, "backend": "auto"}


def views(batch: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    z_i = torch.randn(batch, 8)
    return z_i, z_i + noise * torch.randn(batch, 8)


@pytest.mark.parametrize("use_cosine_similarity", [True, False], ids=["cosine", "dot_product"])
@pytest.mark.parametrize("batch", [1, 2, 57, SAMPLES])
def test_in_small_batches_it_is_that_of_nt_xent(batch: int, use_cosine_similarity: bool) -> None:
    z_i, z_j = views(batch)
    labels = torch.randint(5, (batch,))
    options = OPTIONS | {"use_cosine_similarity": use_cosine_similarity}
    expected = nt_xent(z_i, z_j, labels=labels, **options).accuracy
    assert torch.equal(view_accuracy(z_i, z_j, labels, **options), expected)
    assert batch < 10 or 0 < expected < 1


def test_in_large_batches_it_is_that_of_samples_from_all_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("cjepa_kernels.functional.view_accuracy")
    monkeypatch.setattr(module, "SAMPLES", 10)
    z_i, z_j = views(34)
    labels = torch.randint(5, (34,))
    z = torch.nn.functional.normalize(torch.cat([z_i, z_j]), dim=1)
    similarity = z @ z.T
    other = (torch.arange(68) + 34) % 68
    positive = similarity[torch.arange(68), other]
    negatives = similarity.masked_fill((labels[:, None] == labels).repeat(2, 2), -2.0)
    hits = (positive > negatives.amax(dim=1)).float()
    chosen = torch.tensor([0, 3, 6, 10, 13, 17, 20, 23, 27, 30])
    expected = hits[torch.cat([chosen, chosen + 34])].mean()
    actual = view_accuracy(z_i, z_j, labels, **OPTIONS)
    torch.testing.assert_close(actual, expected)
    assert actual != hits.mean()  # or the test says nothing


@pytest.mark.parametrize(("scale", "expected"), [(1 - 2**-22, 0), (0.99, 1)], ids=str)
def test_a_negative_within_rounding_is_a_tie(scale: float, expected: int) -> None:
    """So a collapse, in which rows differ by rounding alone, is a miss."""
    row = torch.randn(57)
    z = torch.stack([row, scale * row, -row])
    options = OPTIONS | {"use_cosine_similarity": False}
    accuracy = view_accuracy(z, z, torch.arange(3), **options)
    # The second row's own similarity is below that to the first one, and the third row's is alone.
    torch.testing.assert_close(accuracy.item(), (expected + 1) / 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_makes_it_zero(value: float) -> None:
    z_i, z_j = views(300, noise=0.01)
    z_j[299, 3] = value  # no anchor, and no negative of half of the anchors
    labels = torch.arange(300) % 2
    assert view_accuracy(z_i, z_j, labels, **OPTIONS) == 0


def test_one_label_has_no_negatives() -> None:
    assert view_accuracy(*views(6), torch.full((6,), 3), **OPTIONS) == 1


def test_a_step_with_sup_con_computes_the_similarities_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    ops = importlib.import_module("cjepa_kernels.ops")
    call = ops.call
    monkeypatch.setattr(
        ops, "call", lambda name, *a, **k: calls.append(name) or call(name, *a, **k)
    )
    features = [torch.randn(9, 3, 8, requires_grad=True) for _ in range(2)]
    loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1), contrastive_type="sup_con")
    patches = torch.randn(9, 2, 8)
    out = loss_fn(patches, patches, *features, labels=torch.arange(9) % 4)
    assert calls.count("self_logsumexp") == 1
    assert "nt_xent" not in calls
    assert not out["contrastive_accuracy"].requires_grad


def test_it_compiles() -> None:
    z_i, z_j = views(20)
    labels = torch.arange(20) % 3
    compiled = torch.compile(view_accuracy, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = view_accuracy(z_i, z_j, labels, **OPTIONS)
    assert torch.equal(compiled(z_i, z_j, labels, **OPTIONS), expected)
