"""``compat.open_clip.ClipLoss`` is ``open_clip.ClipLoss``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peer_losses
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peer_training import SOURCES, Model, assert_same_training, peer
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels.compat.open_clip import ClipLoss


def features(model: Model, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    pair = zip(model.towers, (images, texts), strict=True)
    image, text = (F.normalize(tower(x), dim=1) for tower, x in pair)
    return image, text


def scale_alone(loss_fn: nn.Module, model: Model, images: Tensor, texts: Tensor) -> Tensor:
    loss: Tensor = loss_fn(*features(model, images, texts), model.log_scale.exp())
    return loss


def scale_and_bias(loss_fn: nn.Module, model: Model, images: Tensor, texts: Tensor) -> Tensor:
    """As open_clip's trainer calls it, with a scale of one dimension."""
    image, text = features(model, images, texts)
    out = loss_fn(
        image_features=image,
        text_features=text,
        logit_scale=model.log_scale.exp().reshape(1),
        logit_bias=torch.tensor(-0.5),
        output_dict=True,
    )
    assert set(out) == {"contrastive_loss"}
    loss: Tensor = out["contrastive_loss"]
    return loss


@pytest.mark.parametrize("step", [scale_alone, scale_and_bias])
@pytest.mark.parametrize("source", SOURCES)
def test_fifty_steps(source: str, step: Any) -> None:
    theirs = peer(source, "open_clip.loss", "ClipLoss", peer_losses.ClipLoss)
    assert_same_training(ClipLoss(cache_labels=True), theirs(cache_labels=True), step)


def test_features_are_taken_as_they_come() -> None:
    image, text = 3 * torch.randn(2, 7, 5, dtype=torch.float64)
    assert (
        relative_error(ClipLoss()(image, text, 2.0), peer_losses.ClipLoss()(image, text, 2.0))
        <= FLOOR_VALUE[torch.float64]
    )


@pytest.mark.parametrize(
    "scale",
    [3, torch.tensor(3), torch.tensor([3], dtype=torch.int32), torch.tensor(2.7)],
    ids=["int", "int64", "int32", "fp32"],
)
def test_a_scale_of_another_dtype_than_the_features(scale: Any) -> None:
    image, text = torch.randn(2, 7, 5, dtype=torch.float64)
    actual, expected = (make()(image, text, scale) for make in (ClipLoss, peer_losses.ClipLoss))
    assert relative_error(actual, expected) <= FLOOR_VALUE[torch.float64]


def test_the_bias_has_a_gradient_of_zero() -> None:
    """DDP raises for a parameter without a gradient."""
    bias = torch.tensor(-10.0, requires_grad=True)
    ClipLoss()(torch.eye(3), torch.eye(3), torch.tensor(2.0), bias).backward()
    assert bias.grad == 0


def on_a_rank(
    make: Callable[..., nn.Module], options: dict[str, bool]
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a rank and the gradients of its features and its scale."""
    rank, count = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    image, text = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = make(rank=rank, world_size=count, **options)(image, text, scale)
    return loss.detach(), list(torch.autograd.grad(loss, (image, text, scale)))


@pytest.mark.parametrize("gather_with_grad", [False, True], ids=["constants", "with_gradient"])
@pytest.mark.parametrize("local_loss", [False, True], ids=["whole", "local"])
@pytest.mark.parametrize("source", SOURCES)
def test_two_ranks(
    source: str, local_loss: bool, gather_with_grad: bool, ranks: Callable[[int], Ranks]
) -> None:
    theirs = peer(source, "open_clip.loss", "ClipLoss", peer_losses.ClipLoss)
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    actual = ranks(2).run(on_a_rank, ClipLoss, options)
    expected = ranks(2).run(on_a_rank, theirs, options)
    for (loss, gradients), (their_loss, their_gradients) in zip(actual, expected, strict=True):
        assert relative_error(loss, their_loss) <= FLOOR_VALUE[torch.float64]
        for ours, gradient in zip(gradients, their_gradients, strict=True):
            assert relative_error(ours, gradient) <= FLOOR_GRADIENT[torch.float64]


def wrong_rank() -> str:
    with pytest.raises(ValueError, match="rank and world_size must be those") as error:
        ClipLoss(rank=0, world_size=3)(torch.eye(2), torch.eye(2), 1.0)
    return str(error.value)


def test_a_wrong_rank_is_named(ranks: Callable[[int], Ranks]) -> None:
    messages = ranks(2).run(wrong_rank)
    assert messages[1].endswith("1 and 2, got 0 and 3")


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"use_horovod": True}, None, "use_horovod must be False, got True: .* open_clip.ClipLoss"),
        ({"world_size": 2}, {}, "world_size must be 1 without a process group, got 2"),
        ({}, {"logit_scale": 0.0}, "logit_scale must be positive"),
        ({}, {"logit_scale": torch.ones(2)}, r"logit_scale must be .* shape \(2,\)"),
        ({}, {"logit_scale": torch.tensor(True)}, "logit_scale must be .* torch.bool"),
        ({}, {"logit_bias": torch.ones(3)}, r"logit_bias must be .* shape \(3,\)"),
        ({}, {"text_features": torch.ones(2, 3)}, "as many rows as each other, got 3 and 2"),
        ({}, {"text_features": torch.ones(3)}, r"text_features must be \(N, D\), got \(3,\)"),
    ],
    ids=["horovod", "no_group", "zero", "scales", "bool", "biases", "rows", "shape"],
)
def test_what_is_not_covered_is_named(
    options: dict[str, Any], arguments: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(options, arguments)


def test_a_bias_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match=r"logit_bias must be a number or a tensor .* got 'x'"):
        call({}, {"logit_bias": "x"})


def call(options: dict[str, Any], arguments: dict[str, Any] | None) -> None:
    """Make the loss and, with arguments, call it with them."""
    loss_fn = ClipLoss(**options)
    if arguments is not None:
        features = {"image_features": torch.eye(3), "text_features": torch.eye(3)}
        loss_fn(**{**features, "logit_scale": torch.tensor(2.0), **arguments})
