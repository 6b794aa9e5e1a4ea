"""Sizes, dtypes and inputs of a benchmark."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Size(NamedTuple):
    """M = 2B rows and D features."""

    rows: int
    features: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}"


class SizeError(ValueError, argparse.ArgumentTypeError):
    """A size that cannot be measured. ``argparse`` shows the message of an error of this kind."""


def parse_sizes(text: str) -> tuple[Size, ...]:
    """``2048x256,8192x128`` as sizes.

    Raises:
        SizeError: If a size is not MxD with an even M of 4 or more and a D of 2 or more.
    """
    sizes = []
    for size in text.split(","):
        rows, _, features = size.strip().partition("x")
        right = rows.isdecimal() and features.isdecimal() and int(features) > 1
        if not right or int(rows) < 4 or int(rows) % 2:
            raise SizeError(
                f"expected MxD with an even M of 4 or more and a D of 2 or more, got {size!r}"
            )
        sizes.append(Size(int(rows), int(features)))
    return tuple(sizes)


def views(
    size: Size,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    drawn_on: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Two correlated views (B, D), leaves of the graph. The same size gives the same views.

    Args:
        size: M = 2B rows and D features.
        device: Where the views are.
        dtype: Of the views.
        drawn_on: The device that draws the numbers. A GPU draws millions of rows much faster than
            the CPU, and draws other numbers.
    """
    generator = torch.Generator(drawn_on).manual_seed(0)
    shape = (size.rows // 2, size.features)
    z_i = torch.randn(shape, generator=generator, device=drawn_on)
    z_j = z_i + torch.randn(shape, generator=generator, device=drawn_on)
    return (
        z_i.to(device, dtype).requires_grad_(),
        z_j.to(device, dtype).requires_grad_(),
    )
