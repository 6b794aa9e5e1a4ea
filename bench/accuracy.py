"""Errors of loss and gradients against float64, on the inputs that are timed.

The exact values come from the closed form of the gradient, a block of rows at a time, and share
no code with the package; python_tests/test_bench.py holds them against its reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from formulas import TEMPERATURE
from plan import Size, find_formula, views
from torch import Tensor

BLOCK = 512
# Above this many rows the gradient is checked at a random subset of them.
LARGEST_COMPLETE = 8192
SUBSET = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADER = ["M", "D", "dtype", "rows checked", "relative error of", "native", "eager"]
QUANTITIES = ("loss", "grad_z_i", "grad_z_j")


class Exact(NamedTuple):
    """Loss over all anchors, and the gradient of the anchors asked for."""

    loss: Tensor  # ()
    gradient: Tensor  # (len(anchors), D)


def exact(z_i: Tensor, z_j: Tensor, anchors: Tensor) -> Exact:
    """Mean NT-Xent and its gradient in float64.

    With p_ab = exp(l_ab - LSE_a), dL/dl_ab = (p_ab - [b = pos(a)]) / M. Each similarity is an
    entry of its row and of its column, and the norm takes the radial part out.

    Args:
        z_i: (B, D) of any floating dtype.
        z_j: The same shape.
        anchors: Indices into the M rows [z_i; z_j].
    """
    z = torch.cat([z_i, z_j]).detach().double()
    rows, batch = len(z), len(z_i)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    u = z / norm
    lse = torch.cat(
        [_logits(u, block).logsumexp(1) for block in torch.split(torch.arange(rows), BLOCK)]
    )
    loss = (lse - (u * u.roll(batch, 0)).sum(1) / TEMPERATURE).mean()
    gradients = []
    for block in torch.split(anchors, BLOCK):
        logits = _logits(u, block)
        weight = (logits - lse[block, None]).exp() + (logits - lse).exp()
        weight[torch.arange(len(block)), (block + batch) % rows] -= 2
        direction = weight @ u / (rows * TEMPERATURE)
        radial = (direction * u[block]).sum(1, keepdim=True) * u[block]
        gradients.append((direction - radial) / norm[block])
    return Exact(loss, torch.cat(gradients))


def _logits(u: Tensor, block: Tensor) -> Tensor:
    """(len(block), M), an anchor's similarity with itself being -inf."""
    logits = u[block] @ u.T / TEMPERATURE
    logits[torch.arange(len(block)), block] = -torch.inf
    return logits


def checked_anchors(rows: int) -> Tensor:
    """All rows, or a fixed random subset of them, in ascending order."""
    if rows <= LARGEST_COMPLETE:
        return torch.arange(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order[:SUBSET].sort().values


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def measure_errors(size: Size, dtype: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Errors of each name at a size: one record each, for the results file."""
    z_i, z_j = (z.to(DTYPES[dtype]).requires_grad_() for z in views(size))
    anchors = checked_anchors(size.rows)
    truth = exact(z_i, z_j, anchors)
    of_view_i = int((anchors < len(z_i)).sum())
    expected = (truth.loss, truth.gradient[:of_view_i], truth.gradient[of_view_i:])
    records = []
    for name in names:
        loss = find_formula(name, (z_i, z_j))(z_i, z_j)
        gradient = torch.cat(torch.autograd.grad(loss, (z_i, z_j)))[anchors]
        actual = (loss.detach(), gradient[:of_view_i], gradient[of_view_i:])
        errors = {
            quantity: relative_error(*pair)
            for quantity, *pair in zip(QUANTITIES, actual, expected, strict=True)
        }
        records.append(
            {
                "M": size.rows,
                "D": size.features,
                "dtype": dtype,
                "name": name,
                "rows_checked": len(anchors),
                **errors,
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """Rows under ``HEADER``: native beside eager, one line a quantity."""
    cases: dict[tuple[int, int, str, int], dict[str, dict[str, Any]]] = {}
    for record in records:
        key = (record["M"], record["D"], record["dtype"], record["rows_checked"])
        cases.setdefault(key, {})[record["name"]] = record
    return [
        [
            *map(str, case),
            quantity,
            *(f"{by_name[n][quantity]:.1e}" if n in by_name else "-" for n in ("native", "eager")),
        ]
        for case, by_name in cases.items()
        for quantity in QUANTITIES
    ]
