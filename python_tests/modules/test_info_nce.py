"""InfoNCELoss, and what every loss module returns."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, InfoNCELoss, NTXentLoss, info_nce

METRICS = {"accuracy", "positive_similarity", "negative_similarity"}


def pair(rows: int = 12, features: int = 6) -> tuple[Tensor, Tensor]:
    query = torch.randn(rows, features)
    key = query + torch.randn(rows, features)
    return query.requires_grad_(), key.requires_grad_()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.2, "symmetric": True},
        {"label_smoothing": 0.1, "reduction": "sum"},
        {"use_cosine_similarity": False, "temperature": 3.0, "reduction": "none"},
        {"in_batch_negatives": False},
    ],
    ids=["default", "symmetric", "smoothed", "dot_product", "queue"],
)
def test_the_module_is_the_function(options: dict[str, Any]) -> None:
    query, key = pair()
    negatives, positives = torch.randn(5, 6), torch.randperm(12)
    out = InfoNCELoss(**options)(query, key, negatives, positives)
    expected = info_nce(query, key, negatives, positives, **options)
    assert set(out) == METRICS | {"loss"}
    for name, value in out.items():
        assert torch.equal(value, getattr(expected, name))


def test_logit_scale_takes_the_place_of_the_temperature() -> None:
    query, key = pair()
    scale = torch.tensor(10.0, requires_grad=True)
    loss = InfoNCELoss(temperature=0.5, symmetric=True)(query, key, logit_scale=scale)["loss"]
    temperature = torch.tensor(0.1, requires_grad=True)
    expected = info_nce(query, key, temperature=temperature, symmetric=True).loss
    torch.testing.assert_close(loss, expected)
    (actual,) = torch.autograd.grad(loss, scale)
    (of_temperature,) = torch.autograd.grad(expected, temperature)
    torch.testing.assert_close(actual, -of_temperature / 100)  # d(1 / scale) = -d(scale) / scale^2
    # The scale is exact in bf16, and its inverse is not.
    in_bf16 = InfoNCELoss(symmetric=True)(query, key, logit_scale=torch.tensor(100.0).bfloat16())
    assert torch.equal(in_bf16["loss"], info_nce(query, key, temperature=0.01, symmetric=True).loss)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (10.0, TypeError, "logit_scale must be a tensor, got float"),
        (torch.ones(2), ValueError, r"logit_scale must be .* got a tensor of shape \(2,\)"),
        (torch.tensor(3), ValueError, "logit_scale must be .* dtype torch.int64"),
        (torch.ones((), device="meta"), ValueError, "logit_scale must be on the device of query"),
    ],
    ids=["number", "shape", "dtype", "device"],
)
def test_mistakes_in_the_scale_are_named(scale: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InfoNCELoss()(*pair(), logit_scale=scale)


def test_a_module_pickled_before_return_dict() -> None:
    loss_fn = NTXentLoss()
    state = {k: v for k, v in loss_fn.__dict__.items() if k not in ("return_dict", "last_metrics")}
    older = NTXentLoss.__new__(NTXentLoss)
    older.__setstate__(state)
    assert torch.equal(call(older)["loss"], call(loss_fn)["loss"])


def test_a_module_pickled_before_in_batch_negatives() -> None:
    loss_fn = InfoNCELoss(symmetric=True)
    state = {k: v for k, v in loss_fn.__dict__.items() if k != "in_batch_negatives"}
    older = InfoNCELoss.__new__(InfoNCELoss)
    older.__setstate__(state)
    assert torch.equal(call(older)["loss"], call(loss_fn)["loss"])
    assert repr(older) == repr(loss_fn)


def test_a_learnable_temperature_trains() -> None:
    query, key = pair()
    loss_fn = InfoNCELoss(temperature=0.2, learnable_temperature=True)
    loss_fn(query, key)["loss"].backward()
    assert loss_fn.log_temperature is not None
    assert loss_fn.log_temperature.grad is not None
    assert loss_fn.log_temperature.grad.abs() > 0
    other = InfoNCELoss(learnable_temperature=True, temperature_shape=(1,))
    other.load_state_dict(loss_fn.state_dict())
    assert isinstance(other.temperature, Tensor)
    assert other.temperature.item() == pytest.approx(0.2)


def test_copies_and_pickles() -> None:
    query, key = pair()
    loss_fn = InfoNCELoss(temperature=0.3, symmetric=True, return_dict=False)
    expected = loss_fn(query, key)
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(other(query, key), expected)
        assert repr(other) == repr(loss_fn)
    assert "temperature=0.3, symmetric=True" in repr(loss_fn)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "Temperature must be positive"),
        ({"temperature": torch.tensor(0.1)}, TypeError, "temperature must be a float here"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must lie .* got 1.5"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"in_batch_negatives": None}, TypeError, "in_batch_negatives must be True or False"),
        (
            {"symmetric": True, "in_batch_negatives": False},
            ValueError,
            "symmetric must be False with in_batch_negatives=False, got True",
        ),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
        ({"return_dict": None}, TypeError, "return_dict must be True or False, got None"),
        ({"temperature_shape": (2,)}, ValueError, r"temperature_shape must be \(\) or \(1,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InfoNCELoss(**options)


def cjepa(return_dict: bool) -> ContrastiveJEPALoss:
    return ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1), return_dict=return_dict)


def call(loss_fn: nn.Module) -> Any:
    """A call that suits the module, with the same numbers every time."""
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(2, 4, 5, 8, generator=generator)
    if isinstance(loss_fn, ContrastiveJEPALoss):
        return loss_fn(patches[0], patches[1], patches[0], patches[1])
    if isinstance(loss_fn, HJEPALoss):
        return loss_fn(patches[0], patches[1])
    return loss_fn(patches[0, :, 0], patches[1, :, 0])


@pytest.mark.filterwarnings("ignore:the features chosen")
@pytest.mark.parametrize(
    "make",
    [
        lambda return_dict: NTXentLoss(return_dict=return_dict),
        lambda return_dict: InfoNCELoss(return_dict=return_dict),
        lambda return_dict: HJEPALoss(num_hierarchies=1, return_dict=return_dict),
        cjepa,
    ],
    ids=["NTXentLoss", "InfoNCELoss", "HJEPALoss", "ContrastiveJEPALoss"],
)
def test_the_loss_alone(make: Any) -> None:
    expected = call(make(True))
    loss_fn = make(False)
    assert loss_fn.last_metrics == {}
    loss = call(loss_fn)
    assert torch.equal(loss, expected.pop("loss"))
    assert set(loss_fn.last_metrics) == set(expected)
    for name, value in loss_fn.last_metrics.items():
        assert torch.equal(value, expected[name])
        assert not value.requires_grad


def test_the_loss_alone_compiles() -> None:
    query, key = pair()
    loss_fn = InfoNCELoss(return_dict=False)
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key), loss_fn(query, key))
    assert set(loss_fn.last_metrics) == METRICS


def test_a_jepa_loss_without_a_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"jepa_loss must return a dict, got .* return_dict=False"):
        ContrastiveJEPALoss(HJEPALoss(return_dict=False))
