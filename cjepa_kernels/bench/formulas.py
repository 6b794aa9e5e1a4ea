"""The formulas that nt_xent is compared with, each computed as in the project it is from.

Every function takes ``z_i`` and ``z_j`` of (B, D) on any device and returns the mean loss over the
M = 2B anchors. python_tests/bench/test_scripts.py holds them against the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.extras import require

TEMPERATURE = 0.1

Formula = Callable[[Tensor, Tensor], Tensor]


def eager(z_i: Tensor, z_j: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """The plain formula: it normalises, multiplies once, masks and takes the cross-entropy."""
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = z @ z.T / temperature
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = logits.masked_fill(diagonal, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_i)))


def lightly(z_i: Tensor, z_j: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Lightly's ``NTXentLoss`` without a memory bank.

    It computes each of the four blocks of views by a product of its own, cuts the diagonals of the
    two blocks within a view out by boolean indexing, concatenates everything and takes the
    cross-entropy.
    """
    batch = len(z_i)
    views = [F.normalize(z, dim=1) for z in (z_i, z_j)]
    off_diagonal = ~torch.eye(batch, dtype=torch.bool, device=z_i.device)
    logits = []
    for own, other in (views, views[::-1]):
        across = torch.einsum("bd,cd->bc", own, other) / temperature
        within = torch.einsum("bd,cd->bc", own, own) / temperature
        logits.append(torch.cat([across, within[off_diagonal].view(batch, -1)], dim=1))
    labels = torch.arange(batch, device=z_i.device).repeat(2)
    return F.cross_entropy(torch.cat(logits), labels)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(own: Tensor) -> Tensor:
    """The rows of all ranks, (R n, D), of a group whose R ranks hold n rows each.

    The backward adds up the gradients of all ranks for all rows over the ranks.
    """
    rows: Tensor = _Gather.apply(own)  # type: ignore[no-untyped-call]
    return rows


def lightly_of_group(z_i: Tensor, z_j: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Lightly's ``NTXentLoss`` with ``gather_distributed=True``: the mean over the own anchors.

    Four blocks of own rows against the gathered rows of all ranks, each of which holds as many.
    """
    batch, rank = len(z_i), dist.get_rank()
    own = [F.normalize(z, dim=1) for z in (z_i, z_j)]
    gathered = [gather_with_gradient(z) for z in own]
    off_diagonal = torch.ones(batch, len(gathered[0]), dtype=torch.bool)
    off_diagonal[:, rank * batch : (rank + 1) * batch].fill_diagonal_(False)
    logits = []
    for view in (0, 1):
        across = torch.einsum("bd,cd->bc", own[view], gathered[1 - view]) / temperature
        within = torch.einsum("bd,cd->bc", own[view], gathered[view]) / temperature
        logits.append(torch.cat([across, within[off_diagonal].view(batch, -1)], dim=1))
    labels = (torch.arange(batch) + rank * batch).repeat(2)
    return F.cross_entropy(torch.cat(logits), labels)


def _four_block_logits(
    z_i: Tensor, z_j: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """H-JEPA's logits (2B, 2B + 1), positive first, and its positives and negatives of view i."""
    batch = len(z_i)
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    s = z @ z.T / temperature
    diagonal = torch.eye(batch, dtype=torch.bool, device=z.device)
    first, second = slice(0, batch), slice(batch, None)
    positives, negatives = [], []
    for own, other in ((first, second), (second, first)):
        positives.append(s[own, other].diagonal()[:, None])
        blocks = [s[own, own], s[own, other]]
        negatives.append(
            torch.cat([block.masked_fill(diagonal, float("-inf")) for block in blocks], dim=1)
        )
    rows = [torch.cat(parts, dim=1) for parts in zip(positives, negatives, strict=True)]
    return torch.cat(rows), positives[0], negatives[0]


def four_blocks(z_i: Tensor, z_j: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """H-JEPA's formula, the loss alone: four blocks, concatenated twice."""
    logits = _four_block_logits(z_i, z_j, temperature)[0]
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


def hjepa(z_i: Tensor, z_j: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """H-JEPA's formula with the accuracy and the two means that it computes in every call."""
    logits, positive, negatives = _four_block_logits(z_i, z_j, temperature)
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = F.cross_entropy(logits, labels)
    with torch.no_grad():
        (logits.argmax(dim=1) == labels).float().mean()
        positive.mean()
        negatives.mean()
    return loss


def metric_learning(temperature: float = TEMPERATURE) -> Formula:
    """``NTXentLoss`` of pytorch-metric-learning itself, whose memory grows with M^3.

    Raises:
        ImportError: If the library is missing; the message says how to get it.
    """
    loss_fn = require("pytorch_metric_learning.losses", extra="bench").NTXentLoss(
        temperature=temperature
    )

    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        labels = torch.arange(len(z_i), device=z_i.device).repeat(2)
        result: Tensor = loss_fn(torch.cat([z_i, z_j]), labels)
        return result

    return loss


def hjepa_prediction(
    predictions: list[Tensor], targets: list[Tensor], weights: list[float]
) -> Tensor:
    """H-JEPA's smooth-L1 prediction term without masks, both sides L2-normalised."""
    levels = [
        F.smooth_l1_loss(F.normalize(p, dim=-1), F.normalize(t, dim=-1).detach())
        for p, t in zip(predictions, targets, strict=True)
    ]
    return torch.stack(
        [weight * level for weight, level in zip(weights, levels, strict=True)]
    ).sum()


def compiled(temperature: float = TEMPERATURE) -> Formula:
    """The plain formula under ``torch.compile``, for one size."""
    torch._dynamo.reset()  # Else the sizes before count towards its limit of recompilations.

    def plain(z_i: Tensor, z_j: Tensor) -> Tensor:
        return eager(z_i, z_j, temperature=temperature)

    formula: Formula = torch.compile(plain, dynamic=False)
    return formula
