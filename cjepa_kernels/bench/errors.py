"""Exact losses and gradients in float64, and the errors of others against them.

The gradient is computed by its closed form, a block of rows at a time. It shares no code with the
losses, and python_tests/bench/test_scripts.py holds it against the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.bench.formulas import TEMPERATURE, Formula

BLOCK = 512
# Above this many rows the gradient is checked at a random subset of them.
LARGEST_COMPLETE = 8192
SUBSET = 1024


class Exact(NamedTuple):
    """Loss over all anchors, and the gradient of the anchors asked for."""

    loss: Tensor  # ()
    gradient: Tensor  # (len(anchors), D)


def exact(z_i: Tensor, z_j: Tensor, anchors: Tensor, *, temperature: float = TEMPERATURE) -> Exact:
    """Mean NT-Xent and its gradient in float64, at any temperature.

    With p_ab = exp(l_ab - LSE_a), dL/dl_ab = (p_ab - [b = pos(a)]) / M. The positive's own
    p - 1 is minus the sum of the others, which keeps its digits where p is almost 1. Each
    similarity is an entry of its row and of its column, and the norm takes the radial part out.

    Args:
        z_i: (B, D) of any floating dtype.
        z_j: The same shape.
        anchors: Indices into the M rows [z_i; z_j].
        temperature: Divides the similarities.
    """
    z = torch.cat([z_i, z_j]).detach().double()
    rows, batch = len(z), len(z_i)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    u = z / norm
    positive = (u * u.roll(batch, 0)).sum(1) / temperature  # (M,)
    blocks = torch.split(torch.arange(rows, device=z.device), BLOCK)
    negatives = torch.cat(
        [_negative_logits(u, block, temperature).logsumexp(1) for block in blocks]
    )
    lse = torch.logaddexp(negatives, positive)
    missed = torch.sigmoid(negatives - positive)  # (M,), 1 - p of the positive
    loss = torch.nn.functional.softplus(negatives - positive, threshold=1e9).mean()
    gradients = []
    for block in torch.split(anchors.to(z.device), BLOCK):
        logits = _negative_logits(u, block, temperature)
        weight = (logits - lse[block, None]).exp() + (logits - lse).exp()
        partner = (block + batch) % rows
        weight.scatter_(1, partner[:, None], -(missed[block] + missed[partner])[:, None])
        direction = weight @ u / (rows * temperature)
        radial = (direction * u[block]).sum(1, keepdim=True) * u[block]
        gradients.append((direction - radial) / norm[block])
    return Exact(loss, torch.cat(gradients))


def _negative_logits(u: Tensor, block: Tensor, temperature: float) -> Tensor:
    """(len(block), M), an anchor's similarity with itself and with its positive being -inf."""
    rows = len(u)
    logits = u[block] @ u.T / temperature
    for left_out in (block, (block + rows // 2) % rows):
        logits.scatter_(1, left_out[:, None], -torch.inf)
    return logits


def checked_anchors(rows: int) -> Tensor:
    """All rows, or above ``LARGEST_COMPLETE`` a fixed random subset, in ascending order."""
    if rows <= LARGEST_COMPLETE:
        return torch.arange(rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order[:SUBSET].sort().values


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def of_formula(
    formula: Formula, inputs: tuple[Tensor, Tensor], truth: Exact, anchors: Tensor
) -> dict[str, Any]:
    """The errors ``loss`` and ``gradient`` of a formula on some views.

    Args:
        formula: The loss.
        inputs: The views that ``truth`` belongs to.
        truth: Of ``exact``.
        anchors: The rows of its gradient.
    """
    loss = formula(*inputs)
    gradient = torch.cat(torch.autograd.grad(loss, inputs))[anchors.to(loss.device)]
    return {
        "loss": relative_error(loss.detach(), truth.loss),
        "gradient": relative_error(gradient, truth.gradient),
    }
