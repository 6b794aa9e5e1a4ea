"""The losses beside NT-Xent that are compared with other projects' formulas.

A candidate takes two views (B, D), as those of NT-Xent do. InfoNCE and CLIP contrast the rows of
one with those of the other. SupCon and NT-Xent with labels contrast the M = 2B rows of both, in
``CLASSES`` classes. python_tests/bench/test_losses.py holds the formulas against the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels import info_nce, nt_xent, sup_con
from cjepa_kernels.bench import candidates
from cjepa_kernels.bench.candidates import Candidate
from cjepa_kernels.bench.formulas import Formula
from cjepa_kernels.bench.sizes import Size
from cjepa_kernels.extras import require

CLASSES = 100
COMPARED = Size(8192, 256)  # The rows and features for which there are targets.


@dataclass(frozen=True)
class Loss:
    """A loss of this package, and what it is compared with.

    Attributes:
        title: Title in tables.
        ours: The candidate of this package.
        exact: Name of the plain formula, whose values in float64 are taken as exact.
        others: What ours is compared with, by rising memory.
        limits: Upper bounds on the time of ours / that of another candidate at ``COMPARED``.
        sides: 2 if the rows of a size are those of each view, 1 if they are those of both.
        products: FLOPs of the matrix products of forward + backward / M² D, for M rows of D
            features. The forward saves its exponentials. The rectangle takes 2 for its similarities
            and 2 for each side's gradient; the triangle takes 1, because S is symmetric, and 2.
    """

    title: str
    ours: Candidate
    exact: str
    others: tuple[Candidate, ...]
    limits: Mapping[str, float] = field(default_factory=dict)
    sides: int = 1
    products: int = 3

    def size(self, rows: int, features: int) -> Size:
        """The size of the views with which the loss contrasts so many rows."""
        return Size(self.sides * rows, features)

    def candidates(self) -> dict[str, Candidate]:
        """All candidates by name, ours first."""
        return {one.name: one for one in (self.ours, *self.others)}


@cache
def classes(samples: int, device: torch.device) -> Tensor:
    """(samples,) int64, a random class of each sample. The same number gives the same classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CLASSES, (samples,), generator=generator).to(device)


def classes_of_rows(z_i: Tensor) -> Tensor:
    """(M,) int64, the classes of the rows of both views."""
    return classes(len(z_i), z_i.device).repeat(2)


def _of(formula: Callable[..., Tensor]) -> Callable[[float], Formula]:
    return lambda temperature: partial(formula, temperature=temperature)


def _info_nce(x: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    return info_nce(x, y, temperature=temperature).loss


def _clip(x: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    return info_nce(x, y, temperature=temperature, symmetric=True).loss


def _sup_con(z_i: Tensor, z_j: Tensor, *, temperature: float) -> Tensor:
    rows = torch.cat([z_i, z_j])
    return sup_con(rows, classes_of_rows(z_i), temperature=temperature).loss


def _labels(z_i: Tensor, z_j: Tensor, *, temperature: float) -> Tensor:
    labels = classes(len(z_i), z_i.device)
    return nt_xent(z_i, z_j, temperature=temperature, labels=labels).loss


def _decoupled(z_i: Tensor, z_j: Tensor, *, temperature: float) -> Tensor:
    return nt_xent(z_i, z_j, temperature=temperature, decoupled=True).loss


def plain_info_nce(x: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE of the rows of x, as info-nce-pytorch computes it for keys without further ones."""
    logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device))


def open_clip(x: Tensor, y: Tensor, *, temperature: float) -> Tensor:
    """open_clip's ``ClipLoss`` of one process, which multiplies once for each direction."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    target = torch.arange(len(x), device=x.device)
    of_rows = F.cross_entropy(x / temperature @ y.T, target)
    of_columns = F.cross_entropy(y / temperature @ x.T, target)
    return (of_rows + of_columns) / 2


def plain_sup_con(z_i: Tensor, z_j: Tensor, *, temperature: float) -> Tensor:
    """SupCon by its definition: the mean log-softmax of an anchor's positives."""
    z, labels = F.normalize(torch.cat([z_i, z_j]), dim=1), classes_of_rows(z_i)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself
    logits = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    log_softmax = logits.log_softmax(1).masked_fill(~positive, 0.0)
    return -(log_softmax.sum(1) / positive.sum(1)).mean()  # A view is the other's positive.


def plain_labels(z_i: Tensor, z_j: Tensor, *, temperature: float) -> Tensor:
    """The plain formula of NT-Xent without the negatives of an anchor's own class."""
    z, labels = F.normalize(torch.cat([z_i, z_j]), dim=1), classes_of_rows(z_i)
    target = torch.arange(len(z), device=z.device).roll(len(z_i))
    left_out = (labels[:, None] == labels).scatter(1, target[:, None], False)
    logits = (z @ z.T / temperature).masked_fill(left_out, float("-inf"))
    return F.cross_entropy(logits, target)


def plain_decoupled(z_i: Tensor, z_j: Tensor, *, temperature: float) -> Tensor:
    """DCL by its definition: the log-sum-exp of the negatives minus the positive."""
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = z @ z.T / temperature
    number = torch.arange(len(z), device=z.device)
    target = number.roll(len(z_i))
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    left_out[number, number] = left_out[number, target] = True
    negatives = logits.masked_fill(left_out, float("-inf"))
    return (negatives.logsumexp(1) - logits[number, target]).mean()


def _metric_learning(temperature: float) -> Formula:
    """``SupConLoss`` of pytorch-metric-learning itself, which lists all pairs of rows."""
    loss_fn = require("pytorch_metric_learning.losses", extra="bench").SupConLoss(
        temperature=temperature
    )

    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        result: Tensor = loss_fn(torch.cat([z_i, z_j]), classes_of_rows(z_i))
        return result

    return loss


def _ours(name: str, formula: Callable[..., Tensor]) -> Candidate:
    return Candidate(name, "cjepa_kernels", _of(formula), degree=1)


LOSSES = {
    "info_nce": Loss(
        "InfoNCE",
        _ours("info_nce", _info_nce),
        "plain_info_nce",
        (Candidate("plain_info_nce", "plain formula, as info-nce-pytorch", _of(plain_info_nce)),),
        {"plain_info_nce": 0.28},
        sides=2,
        products=6,
    ),
    "clip": Loss(
        "CLIP",
        _ours("clip", _clip),
        "open_clip",
        (Candidate("open_clip", "open_clip's formula", _of(open_clip)),),
        {"open_clip": 0.18},
        sides=2,
        products=6,
    ),
    "sup_con": Loss(
        "SupCon",
        _ours("sup_con", _sup_con),
        "plain_sup_con",
        (
            Candidate("plain_sup_con", "plain formula", _of(plain_sup_con)),
            Candidate("metric_learning_sup_con", "pytorch-metric-learning", _metric_learning),
        ),
        {"plain_sup_con": 0.10, "metric_learning_sup_con": 0.04},
    ),
    "labels": Loss(
        "NT-Xent with labels",
        _ours("labels", _labels),
        "plain_labels",
        (
            replace(candidates.CANDIDATES[candidates.OURS], title="NT-Xent without labels"),
            Candidate("plain_labels", "plain formula", _of(plain_labels)),
        ),
        {candidates.OURS: 1.15},
    ),
    "decoupled": Loss(
        "DCL",
        _ours("decoupled", _decoupled),
        "plain_decoupled",
        (Candidate("plain_decoupled", "plain formula", _of(plain_decoupled)),),
    ),
}


class LossNameError(ValueError, argparse.ArgumentTypeError):
    """A loss that is not known. ``argparse`` shows the message of an error of this kind."""


def parse_losses(text: str) -> list[str]:
    """``info_nce,clip`` as names of losses.

    Raises:
        LossNameError: If one of them is none.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        raise LossNameError(f"expected losses of {', '.join(LOSSES)}; got {unknown}")
    return list(dict.fromkeys(names))


def find(name: str) -> Candidate:
    """The candidate of a name, of NT-Xent or of another loss.

    Raises:
        KeyError: If there is none.
    """
    for loss in LOSSES.values():
        if name in loss.candidates():
            return loss.candidates()[name]
    return candidates.find(name)
