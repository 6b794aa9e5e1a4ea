"""Blocks of rows of the prediction loss: parts of a row, and programs that take several blocks.

The tests of the operator compare every option. Here the table's choices change. Run the tests with
TRITON_INTERPRET=1, or on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from tolerances import relative_error
from torch import Tensor

from cjepa_kernels import backends, prediction_loss
from cjepa_kernels.tune import PREDICTION

if not backends()["triton"].available:
    pytest.skip(backends()["triton"].reason, allow_module_level=True)

from cjepa_kernels.triton import configs
from cjepa_kernels.triton.prediction_loss import Parts, _Level

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # bf16: the gradients are rounded to it
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("features", "itemsize", "parts"),
    [
        (768, 2, (3, 256)),
        (768, 4, (6, 128)),
        (384, 2, (3, 128)),
        (1024, 2, (4, 256)),
        (1024, 4, (8, 128)),
        (4096, 2, (4, 1024)),
        (1, 2, (1, 16)),
        (100, 2, (4, 32)),
    ],
)
def test_parts_hold_the_features(features: int, itemsize: int, parts: tuple[int, int]) -> None:
    assert Parts.of(features, itemsize) == parts


def test_no_width_wastes_more_than_a_third() -> None:
    """One power of two, which wastes up to a half, was the reason for parts."""
    for features in range(64, 5000):
        for itemsize in (2, 4):
            count, width = Parts.of(features, itemsize)
            assert features <= count * width < 1.5 * features
            assert width & (width - 1) == 0
            assert (count - 1) * width < features


def test_a_block_has_a_power_of_two_of_rows() -> None:
    for features in (1, 100, 768, 1024, 9000):
        rows = Parts.of(features, 2).rows(4096)
        assert rows >= 1
        assert rows & (rows - 1) == 0
        assert rows == 1 or rows * features <= 4096


def results(
    backend: str, sides: tuple[Tensor, Tensor], mask: Tensor | None, normalization: str
) -> tuple[Tensor, ...]:
    """The loss and both gradients."""
    inputs = [x.detach().requires_grad_() for x in sides]
    loss = prediction_loss(
        *inputs,
        mask=mask,
        normalize_embeddings=normalization == "l2",
        target_norm="layer" if normalization == "layer" else None,
        backend=backend,  # type: ignore[arg-type]
    )
    return loss, *torch.autograd.grad(loss * 3, inputs)


@pytest.mark.parametrize(
    ("features", "dtype", "normalization", "masked"),
    [
        (96, torch.bfloat16, "l2", True),
        (50, torch.float32, "layer", False),
        (48, torch.float32, "layer", True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "choice",
    [
        {"elements": 256, "programs": 4},  # 6 blocks or more, which 4 programs do not share evenly
        {"elements": 100, "programs": 10**6},  # a program for each row
        {"elements": 4096, "programs": 1},  # one block, most of whose rows do not exist
    ],
    ids=["several_blocks", "one_row", "one_block"],
)
def test_every_choice_of_blocks(
    choice: dict[str, int], features: int, dtype: torch.dtype, normalization: str, masked: bool
) -> None:
    # A view has other strides than a tensor of its own.
    sides = torch.randn(2, 3, 7, features + 3, device=DEVICE).to(dtype)[..., 3:].unbind()
    mask = (torch.rand(3, 7, device=DEVICE) < 0.6) if masked else None
    entries = [
        replace(configs.choose(kernel, 90, dtype, features), architecture=0, **choice)
        for kernel in PREDICTION
    ]
    with configs.tuned([replace(e, architecture=a) for e in entries for a in (80, 90, 100)]):
        level = _Level("prediction_loss", sides[0], sides[1], mask)
        if choice["programs"] < 10 and DEVICE == "cpu":
            assert level.programs == choice["programs"]
        actual = results("triton", sides, mask, normalization)
        again = results("triton", sides, mask, normalization)
    exact = results("reference", tuple(x.double() for x in sides), mask, normalization)
    for value, expected, repeated in zip(actual, exact, again, strict=True):
        assert relative_error(value, expected) <= BOUND[dtype]
        assert torch.equal(value, repeated)
