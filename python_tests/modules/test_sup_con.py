"""SupConLoss: the function with its options, its temperature, and what it returns."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from cjepa_kernels import SupConLoss, SupConOutput, sup_con

LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.2, "reduction": "sum"},
        {"use_cosine_similarity": False, "temperature": 3.0, "reduction": "none"},
    ],
    ids=["default", "sum", "dot_product"],
)
def test_the_module_is_the_function(options: dict[str, Any]) -> None:
    z = torch.randn(6, 5)
    out = SupConLoss(**options)(z, LABELS)
    expected = sup_con(z, LABELS, **options)
    assert set(out) == set(SupConOutput._fields) - {"lse"}
    for name, value in out.items():
        assert torch.equal(value, getattr(expected, name))


def test_views_without_labels() -> None:
    views = torch.randn(4, 3, 5)
    labels = torch.arange(4).repeat_interleave(3)
    assert torch.equal(
        SupConLoss()(views)["loss"], SupConLoss()(views.flatten(0, 1), labels)["loss"]
    )


def test_the_loss_alone() -> None:
    z = torch.randn(6, 5)
    expected = SupConLoss()(z, LABELS)
    loss_fn = SupConLoss(return_dict=False)
    assert torch.equal(loss_fn(z, LABELS), expected.pop("loss"))
    assert loss_fn.last_metrics == expected


def test_a_learnable_temperature_trains() -> None:
    loss_fn = SupConLoss(temperature=0.2, learnable_temperature=True)
    loss_fn(torch.randn(6, 5), LABELS)["loss"].backward()
    assert loss_fn.log_temperature is not None
    assert loss_fn.log_temperature.grad is not None
    assert loss_fn.log_temperature.grad.abs() > 0


def test_copies_and_pickles() -> None:
    z = torch.randn(6, 5)
    loss_fn = SupConLoss(temperature=0.3, return_dict=False)
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(other(z, LABELS), loss_fn(z, LABELS))
        assert repr(other) == repr(loss_fn)
    assert "temperature=0.3" in repr(loss_fn)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "Temperature must be positive"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"use_cosine_similarity": None}, TypeError, "use_cosine_similarity must be True or"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
        ({"return_dict": None}, TypeError, "return_dict must be True or False, got None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SupConLoss(**options)
