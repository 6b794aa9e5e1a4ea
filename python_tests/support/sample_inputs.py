"""Inputs of the operators that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sample_inputs(dtype: torch.dtype = torch.float64) -> list[tuple[Any, ...]]:
    """Arguments of the forward operator: one list feeds opcheck and gradcheck."""

    def z(batch: int, features: int) -> Tensor:
        return torch.randn(batch, features, dtype=dtype, requires_grad=True)

    mask = torch.rand(4, 4) < 0.4
    temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    return [
        (z(3, 5), z(3, 5), None, None, 0.2, True, 1e-8, "mean", None, False),
        (z(4, 3), z(4, 3), mask, None, 0.5, True, 1e-8, "none", None, False),
        (z(4, 3), z(4, 3), mask, temperature, 1.0, True, 1e-8, "sum", None, False),
        (z(5, 2), z(5, 2), None, temperature, 1.0, False, 1e-8, "mean", None, False),
        (z(2, 4), z(2, 4), None, None, 0.1, True, 1e-8, "sum", None, False),
    ]


def cross_inputs(dtype: torch.dtype = torch.float64) -> list[tuple[Any, ...]]:
    """The same of cross_logsumexp."""

    def z(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    strided = torch.randn(3, 7, dtype=dtype).T.requires_grad_()
    return [
        (z(3, 5), z(4, 5), None, 0.2, True, 1e-8, None),
        (z(1, 4), z(6, 4), temperature, 1.0, True, 1e-8, None),
        (z(5, 2), z(1, 2), temperature, 1.0, False, 1e-8, None),
        (z(5, 3), strided, None, 0.02, True, 1e-8, None),
        (strided, z(2, 3), None, 2.0, False, 1e-8, None),
    ]


def sides(
    rows: int, columns: int, features: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random x, and y whose rows lie near rows of x, as leaves that want a gradient."""
    x = torch.randn(rows, features, dtype=torch.float64)
    y = x[torch.arange(columns) % rows] + torch.randn(columns, features, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
