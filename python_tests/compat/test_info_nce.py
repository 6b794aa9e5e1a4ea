"""``compat.info_nce`` is ``info_nce`` of info-nce-pytorch."""

from __future__ import annotations

from typing import Any

import peer_losses
import pytest
import torch
from peer_training import SOURCES, Model, assert_same_training, peer
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels.compat.info_nce import InfoNCE, info_nce


def embed(model: Model, samples: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    return model.towers[0](samples), model.towers[1](others)


def in_batch(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    loss: Tensor = loss_fn(*embed(model, samples, others))
    return loss


def unpaired(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    negatives = model.towers[1](others.flip(0)[:4] + samples[:4])
    loss: Tensor = loss_fn(*embed(model, samples, others), negatives)
    return loss


def paired(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    negatives = model.towers[1](torch.stack([others.roll(shift, 0) for shift in (1, 3)], dim=1))
    loss: Tensor = loss_fn(*embed(model, samples, others), negatives)
    return loss


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (in_batch, {}),
        (unpaired, {"temperature": 0.3}),
        (paired, {"temperature": 0.3, "negative_mode": "paired", "reduction": "mean"}),
    ],
    ids=["in_batch", "unpaired", "paired"],
)
@pytest.mark.parametrize("source", SOURCES)
def test_fifty_steps(source: str, step: Any, options: dict[str, Any]) -> None:
    theirs = peer(source, "info_nce", "InfoNCE", peer_losses.InfoNCE)
    assert_same_training(InfoNCE(**options), theirs(**options), step)


def losses(function: Any, mode: str, reduction: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss and its gradients, that of the temperature among them."""
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3, 5) if mode == "paired" else (4, 5)
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in ((6, 5), (6, 5), shape)]
    inputs.append(torch.tensor(0.2, dtype=dtype))
    for x in inputs:
        x.requires_grad_()
    loss = function(*inputs, reduction=reduction, negative_mode=mode)
    return [loss, *torch.autograd.grad(loss.sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_losses_and_gradients(mode: str, reduction: str, dtype: torch.dtype) -> None:
    ours = losses(info_nce, mode, reduction, dtype)
    plain, exact = (
        losses(peer_losses.info_nce, mode, reduction, d) for d in (dtype, torch.float64)
    )
    assert ours[0].shape == exact[0].shape
    for name, actual, eager, expected in zip(
        ("loss", "query", "key", "negatives", "temperature"), ours, plain, exact, strict=True
    ):
        floor = FLOOR_VALUE[dtype] if name == "loss" else FLOOR_GRADIENT[dtype]
        bound = 2 * relative_error(eager, expected) + floor
        assert relative_error(actual, expected) <= bound, name


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_no_negative_at_all(mode: str) -> None:
    query = torch.randn(3, 5, requires_grad=True)
    negatives = torch.zeros((3, 0, 5) if mode == "paired" else (0, 5))
    loss = info_nce(query, torch.randn(3, 5), negatives, negative_mode=mode)
    (gradient,) = torch.autograd.grad(loss, query)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(3, 5))


def test_aligned_pairs_lose_no_digits() -> None:
    """The plain formula takes a logarithm near 0 of numbers near 1."""
    query = torch.eye(4)
    negatives = torch.eye(4).roll(1, 0)
    expected = torch.tensor(-20.0).exp()
    for mode, rows in (("unpaired", negatives[:1, :] * 0 + negatives[3:]), ("paired", negatives)):
        rows = rows.reshape((4, 1, 4) if mode == "paired" else (1, 4))
        loss = info_nce(query, query, rows, 0.05, "none", mode)
        distinct = loss[loss < 0.5]
        assert relative_error(distinct, expected.expand_as(distinct)) <= FLOOR_VALUE[torch.float32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_mode": "pairs"}, "negative_mode must be one of"),
        ({"temperature": -0.1}, "Temperature must be positive"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"positive_key": torch.ones(2, 3)}, "as many rows as each other, got 3 and 2"),
        ({"negative_keys": torch.ones(3, 2, 3)}, 'must be .M, D. with negative_mode="unpaired"'),
        (
            {"negative_keys": torch.ones(2, 2, 3), "negative_mode": "paired"},
            r"negative_keys must be \(3, M, 3\) .* got \(2, 2, 3\)",
        ),
        ({"negative_keys": torch.ones(2, 4)}, "query and negative_keys must have the same D"),
        (
            {"negative_keys": torch.ones(2, 3, device="meta")},
            "query and negative_keys must be on the same device",
        ),
    ],
    ids=["mode", "temperature", "reduction", "rows", "unpaired", "paired", "features", "device"],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(**{"query": torch.eye(3), "positive_key": torch.eye(3), **arguments})


@pytest.mark.parametrize("option", [{"negative_mode": "x"}, {"temperature": 0}, {"reduction": ""}])
def test_the_constructor_names_what_is_wrong(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option)).capitalize()[1:]):
        InfoNCE(**option)
