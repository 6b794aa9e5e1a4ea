"""A short training with a loss, to hold a loss of another project and ours against each other."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, TRAINED_50_STEPS, relative_error
from torch import Tensor, nn

STEPS = 50
SAMPLES = 10


class Model(nn.Module):
    """Two towers of 8 features, and a scale of logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.towers = nn.ModuleList(nn.Linear(12, 8, dtype=dtype) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        with torch.no_grad():
            for parameter in self.towers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


Step = Callable[[nn.Module, Model, Tensor, Tensor], Tensor]


class Trained(NamedTuple):
    """What a training leaves."""

    losses: Tensor  # (STEPS,)
    first_gradients: dict[str, Tensor]  # before the first step
    weights: dict[str, Tensor]  # after the last step


def train(loss_fn: nn.Module, step: Step, *, dtype: torch.dtype = torch.float64) -> Trained:
    """Train for 50 steps of gradient descent.

    Args:
        loss_fn: The loss.
        step: Returns the loss from ``loss_fn``, the model and two views (10, 12) of a batch.
        dtype: Of all tensors.
    """
    model = Model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses: list[Tensor] = []
    first: dict[str, Tensor] = {}
    for _ in range(STEPS):
        samples, noise = torch.randn(2, SAMPLES, 12, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        loss = step(loss_fn, model, samples, samples + 0.3 * noise)
        loss.backward()
        if not first:
            first = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad + 0
                for name, parameter in model.named_parameters()
            }
        optimizer.step()
        losses.append(loss.detach())
    return Trained(torch.stack(losses), first, dict(model.state_dict()))


def assert_same_training(
    ours: nn.Module, theirs: nn.Module, step: Step, *, dtype: torch.dtype = torch.float64
) -> None:
    """Losses, gradients and weights of both trainings are equal within rounding."""
    actual, expected = train(ours, step, dtype=dtype), train(theirs, step, dtype=dtype)
    assert actual.losses.dtype == expected.losses.dtype == dtype
    assert expected.losses[-1] < 0.9 * expected.losses[0]  # It has trained something.
    assert relative_error(actual.losses[:1], expected.losses[:1]) <= FLOOR_VALUE[dtype]
    for name, gradient in expected.first_gradients.items():
        assert relative_error(actual.first_gradients[name], gradient) <= FLOOR_GRADIENT[dtype], name
    assert relative_error(actual.losses, expected.losses) <= TRAINED_50_STEPS[dtype]
    for name, weight in expected.weights.items():
        assert relative_error(actual.weights[name], weight) <= TRAINED_50_STEPS[dtype], name


def peer(source: str, module: str, name: str, formula: Any) -> Any:
    """A class of another project, or our own writing of its formula.

    Args:
        source: ``package``, which skips the test where the project is not installed, or
            ``formula``.
        module: The project's module.
        name: The name of the class there.
        formula: What stands for the class.
    """
    if source == "formula":
        return formula
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: its formula is compared instead")
    return getattr(importlib.import_module(module), name)


SOURCES = ("formula", "package")
