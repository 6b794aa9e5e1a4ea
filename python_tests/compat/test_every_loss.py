"""What all losses of ``cjepa_kernels.compat`` have in common: autocast, copies, one graph."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances
from tolerances import AUTOCAST_LOSS, relative_error
from torch import Tensor, nn

from cjepa_kernels.compat import (
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
)

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]
LABELS = torch.arange(32) % 5


def of_views(loss_fn: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    loss: Tensor = loss_fn(a, b)
    return loss


def of_clip(loss_fn: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    loss: Tensor = loss_fn(F.normalize(a), F.normalize(b), torch.tensor(20.0))
    return loss


def of_labels(loss_fn: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    loss: Tensor = loss_fn(a, LABELS)
    return loss


def of_references(loss_fn: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    loss: Tensor = loss_fn(a, LABELS, ref_emb=b, ref_labels=LABELS.clone())
    return loss


def of_paired(loss_fn: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    loss: Tensor = loss_fn(a, b, torch.stack([b.roll(1, 0), b.roll(2, 0)], dim=1))
    return loss


def of_columns(loss_fn: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    loss: Tensor = loss_fn([{"sentence_embedding": rows} for rows in (a, b, b.flip(0))], None)
    return loss


LOSSES: dict[str, tuple[nn.Module, Call]] = {
    "clip": (open_clip.ClipLoss(), of_clip),
    "nt_xent": (lightly.NTXentLoss(), of_views),
    "memory_bank": (lightly.NTXentLoss(memory_bank_size=(16, 24)), of_views),
    "dcl": (lightly.DCLLoss(), of_views),
    "dclw": (lightly.DCLWLoss(), of_views),
    "info_nce": (info_nce.InfoNCE(), of_views),
    "paired_info_nce": (info_nce.InfoNCE(negative_mode="paired"), of_paired),
    "pairs_of_labels": (pytorch_metric_learning.NTXentLoss(), of_labels),
    "pairs_of_references": (pytorch_metric_learning.NTXentLoss(), of_references),
    "sup_con": (pytorch_metric_learning.SupConLoss(), of_labels),
    "sup_con_of_references": (pytorch_metric_learning.SupConLoss(), of_references),
    "ranking": (
        sentence_transformers.MultipleNegativesRankingLoss(
            nn.Identity(), directions=sentence_transformers.DIRECTIONS
        ),
        of_columns,
    ),
}


def views() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 32, 24, generator=torch.Generator().manual_seed(0))
    return a.requires_grad_(), b


@pytest.mark.parametrize("name", LOSSES)
def test_autocast(name: str) -> None:
    loss_fn, call = LOSSES[name]
    a, b = views()
    expected = call(copy.deepcopy(loss_fn), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(copy.deepcopy(loss_fn), a, b)
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= AUTOCAST_LOSS
    gradient, exact = (torch.autograd.grad(x, a)[0] for x in (loss, expected))
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, exact) <= 2 * AUTOCAST_LOSS


@pytest.mark.parametrize("name", LOSSES)
def test_copies_have_the_same_loss(name: str) -> None:
    loss_fn, call = LOSSES[name]
    with torch.no_grad():
        expected = call(loss_fn, *views())
        for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
            assert torch.equal(call(other, *views()), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_representation_has_every_argument(name: str) -> None:
    loss_fn, _ = LOSSES[name]
    arguments = set(inspect.signature(type(loss_fn)).parameters) - {"model", "kwargs"}
    first = repr(loss_fn).splitlines()[1] if list(loss_fn.children()) else repr(loss_fn)
    shown = set(re.findall(r"(\w+)=", first))
    assert arguments <= shown <= arguments | {"distance", "reducer"}


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (info_nce.InfoNCE(0.5, "sum"), "(temperature=0.5, reduction=sum, negative_mode=unpaired)"),
        (info_nce.InfoNCE(torch.tensor([0.3])), "(temperature=0.3,"),
        (info_nce.InfoNCE(torch.ones(1, device="meta")), "(temperature=tensor of shape (1,),"),
        (lightly.NTXentLoss(memory_bank_size=(16, 24)), "memory_bank_size=(16, 24)"),
        (lightly.NTXentLoss(), "memory_bank_size=0"),
        (lightly.DCLLoss(weight_fn=F.cosine_similarity), "weight_fn=cosine_similarity"),
        (lightly.DCLWLoss(sigma=0.7), "sigma=0.7"),
        (
            pytorch_metric_learning.NTXentLoss(distance=distances.DotProductSimilarity()),
            "distance=DotProductSimilarity, reducer=None",
        ),
        (
            pytorch_metric_learning.SelfSupervisedLoss(
                pytorch_metric_learning.SupConLoss(), symmetric=False
            ),
            "symmetric=False",
        ),
    ],
    ids=lambda value: value.strip("(") if isinstance(value, str) else "",
)
def test_representations(loss_fn: nn.Module, expected: str) -> None:
    assert expected in repr(loss_fn)


@pytest.mark.parametrize("name", ["clip", "nt_xent", "dcl", "info_nce", "paired_info_nce"])
def test_one_graph(name: str) -> None:
    loss_fn, call = LOSSES[name]
    a, b = views()

    def step(a: Tensor, b: Tensor) -> Tensor:
        return call(loss_fn, a, b)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b), step(a, b))
