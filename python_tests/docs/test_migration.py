"""Pages of docs/migrate: the code before and the code after have the same loss and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from documents import DOCS, gradients, python_blocks, run_block
from pytorch_metric_learning import losses, reducers
from ranks import Ranks
from tolerances import ALIGNED_LOSS, FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

from cjepa_kernels import nt_xent, pair_similarity
from docs.generate_figures import TEMPLATES

PAGES = sorted(page.stem for page in (DOCS / "migrate").glob("*.md"))


def run_under(page: str, heading: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the first block under a heading."""
    namespace = {} if namespace is None else namespace
    blocks = python_blocks(DOCS / "migrate" / f"{page}.md")
    run_block(next(block for block in blocks if block.heading == heading), namespace)
    return namespace


def run_page(page: str) -> dict[str, Any]:
    """Run all blocks in the order of the page."""
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in python_blocks(DOCS / "migrate" / f"{page}.md"):
        run_block(block, namespace)
    return namespace


@pytest.fixture
def projects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in peers.stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors in a dtype, and set the usual one back even after an error."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("projects")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("page", PAGES)
def test_after_equals_before(page: str, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        before, after = (run_under(page, heading) for heading in ("Before", "After"))
    assert before["loss"].dtype == after["loss"].dtype == dtype
    assert relative_error(after["loss"], before["loss"]) <= FLOOR_VALUE[dtype]
    expected, actual = gradients(before), gradients(after)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(actual[name], gradient) <= FLOOR_GRADIENT[dtype], name


def test_there_are_six_pages() -> None:
    assert PAGES == [
        "h-jepa",
        "info-nce-pytorch",
        "lightly",
        "open_clip",
        "pytorch-metric-learning",
        "sentence-transformers",
    ]


def views_with_hard_pairs() -> tuple[Tensor, Tensor]:
    """Two aligned views, except that the last four pairs are of different samples."""
    generator = torch.Generator().manual_seed(0)
    z_i = torch.randn(64, 128, generator=generator)
    z_j = z_i + 0.6 * torch.randn(64, 128, generator=generator)
    z_j[60:] = torch.randn(4, 128, generator=generator)
    return z_i, z_j


@pytest.mark.parametrize("temperature", [0.1, 0.03, 0.02, 0.01])
def test_reducers_are_those_of_metric_learning(temperature: float) -> None:
    mean_above = run_page("pytorch-metric-learning")["mean_above"]
    z_i, z_j = views_with_hard_pairs()
    embeddings, labels = torch.cat([z_i, z_j]), torch.arange(64).repeat(2)
    terms = nt_xent(z_i, z_j, temperature=temperature, reduction="none").loss
    theirs = losses.NTXentLoss(temperature, reducer=reducers.DoNothingReducer())
    nonzero = (theirs(embeddings, labels)["loss"]["losses"] > 0).sum()
    assert (terms > 2**-24).sum() == nonzero
    if temperature <= 0.02:
        assert (terms > 0).sum() > 2 * nonzero
    for options, reducer in (
        ({}, reducers.AvgNonZeroReducer()),
        ({"low": 0.1}, reducers.ThresholdReducer(low=0.1)),
    ):
        expected = losses.NTXentLoss(temperature, reducer=reducer)(embeddings, labels)
        loss = mean_above(z_i, z_j, temperature=temperature, **options)
        assert relative_error(loss, expected) <= ALIGNED_LOSS


def test_nothing_above_the_bound_is_zero_with_a_gradient() -> None:
    z = torch.eye(4, requires_grad=True)
    loss = run_page("pytorch-metric-learning")["mean_above"](z, z, temperature=0.01)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(4, 4))


def test_without_negatives() -> None:
    """There are no negatives with a single pair, or with a mask that is True everywhere."""
    z = torch.randn(2, 8, 16, requires_grad=True)
    for out in (
        nt_xent(z[0, :1], z[1, :1]),
        nt_xent(z[0], z[1], mask=torch.ones(8, 8, dtype=torch.bool)),
    ):
        assert out.loss == 0
        assert out.negative_similarity.isnan()
        (gradient,) = torch.autograd.grad(out.loss, z)
        assert torch.equal(gradient, torch.zeros_like(z))
    diagonal = nt_xent(z[0], z[1], mask=torch.eye(8, dtype=torch.bool))
    assert torch.equal(diagonal.loss, nt_xent(z[0], z[1]).loss)


@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_where_gradients_vanish_in_fp16(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(256, 128, generator=generator)
    other = z + 0.3 * torch.randn(256, 128, generator=generator)
    zeros = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        z_i = z.to(dtype, copy=True).requires_grad_()
        loss = nt_xent(z_i, other.to(dtype), temperature=temperature).loss
        (gradient,) = torch.autograd.grad(loss, z_i)
        zeros[dtype] = gradient.eq(0).double().mean().item()
    assert zeros[torch.float16] >= (0.9 if temperature == 0.05 else 1)
    assert zeros[torch.bfloat16] < 0.01
    assert zeros[torch.float32] < 0.01


def image_text_pairs(
    samples: int, features: int, noise: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features (B, D) of images, and the same with added noise as those of their texts."""
    image = torch.randn(samples, features)
    return image.to(dtype), (image + noise * torch.randn(samples, features)).to(dtype)


def direction_losses(image: Tensor, text: Tensor, rounded: torch.dtype) -> Tensor:
    """Losses (2, B) of both directions at a scale of 100, in fp64 from rounded unit rows."""
    rows = [F.normalize(z.float(), dim=1).to(rounded).double() for z in (image, text)]
    logits = 100 * rows[0] @ rows[1].T
    return torch.stack([logits.logsumexp(dim) - logits.diagonal() for dim in (1, 0)])


@pytest.mark.usefixtures("projects")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
def test_clip_in_half_precision(dtype: Any) -> None:
    """At a scale of 100 the losses are near those in fp64, and no loss is negative."""
    page = run_page("open_clip")
    autocast = dtype == "autocast"
    scale = torch.tensor(100.0)
    rounded = torch.bfloat16 if autocast else dtype
    for samples, features, noise in ((1, 8, 0.0), (64, 32, 0.0), (512, 256, 0.05), (96, 16, 1.0)):
        inputs = image_text_pairs(samples, features, noise, torch.float32 if autocast else dtype)
        image, text = (z.requires_grad_() for z in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = [page["loss_fn"](image, text, logit_scale=scale)["loss"]]
            unit = (F.normalize(z.float(), dim=1).to(z.dtype) for z in (image, text))
            losses += [page["ClipLoss"]()(*unit, scale)]
            losses += [
                page["info_nce"](*pair, temperature=0.01).loss
                for pair in ((image, text), (text, image))
            ]
            of_pairs = page["info_nce"](image, text, temperature=0.01, reduction="none").loss
        expected = direction_losses(image.detach(), text.detach(), rounded)
        means = expected.mean(dim=1)
        for loss, mean in zip(losses, [means.mean(), means.mean(), *means], strict=True):
            assert loss >= 0
            # A feature between two numbers of the dtype may be rounded to either of them, which
            # changes a logit by up to 0.1.
            bound = 1e-4 + 0.1 / samples * (rounded != torch.float32)
            assert abs(loss - mean) <= bound + 1e-3 * mean
        assert (of_pairs >= 0).all()
        error = (of_pairs - expected[0]).abs()
        assert error.max() <= (1e-4 if rounded == torch.float32 else 0.15)
        assert error.median() <= 1e-4
        (gradient,) = torch.autograd.grad(losses[0], image)
        assert gradient.dtype == image.dtype
        assert gradient.isfinite().all()


def test_a_cosine_in_bf16_is_off_by_a_hundredth() -> None:
    """The page warns of this error."""
    image, text = image_text_pairs(256, 1024, 0.05, torch.bfloat16)
    rows = [F.normalize(z.float(), dim=1).bfloat16().double() for z in (image, text)]
    exact = (rows[0] * rows[1]).sum(dim=1)
    assert 0.003 < (F.cosine_similarity(image, text) - exact).abs().max() < 0.015
    assert (pair_similarity(image, text) - exact).abs().median() < 1e-6


@pytest.mark.usefixtures("projects")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_retrieval_accuracy_is_that_of_the_similarities(
    dtype: torch.dtype, autocast: bool
) -> None:
    accuracy_of = run_page("open_clip")["retrieval_accuracy"]

    def accuracy(image: Tensor, text: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return float(accuracy_of(image, text))

    for samples, features, noise in ((64, 32, 0.0), (200, 16, 1.0), (200, 8, 3.0)):
        image, text = image_text_pairs(samples, features, noise, dtype)
        s = F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).T
        others = s.masked_fill(torch.eye(samples, dtype=torch.bool), -torch.inf)
        margin = (s.diagonal() - others.amax(dim=1)).abs().amin()
        assert margin > 1e-6 or noise == 0
        expected = (s.diagonal() > others.amax(dim=1)).double().mean()
        assert accuracy(image, text) == pytest.approx(expected.item(), abs=0.006)
        assert expected == 1 if noise == 0 else expected < 1
    image, text = image_text_pairs(64, 32, 0.0, dtype)
    same = image[:1].repeat(64, 1)
    assert accuracy(same, same) == 0  # Every other text is equally similar.
    text[1] = text[0]
    image[1] = image[0]
    assert accuracy(image, text) == pytest.approx(62 / 64)
    assert accuracy(image[:1], text[:1]) == 1


MEASURED = {
    "gain_lightly": "lightly",
    "gain_metric_learning": "pytorch-metric-learning",
    "gain_sup_con": "pytorch-metric-learning",
    "gain_open_clip": "open_clip",
    "gain_info_nce": "info-nce-pytorch",
}


@pytest.mark.parametrize(("name", "page"), MEASURED.items())
def test_what_one_gains_is_what_was_recorded(name: str, page: str) -> None:
    table = TEMPLATES[name]()
    assert table.count("\n") >= 5
    assert table in (DOCS / "migrate" / f"{page}.md").read_text(encoding="utf-8"), table


@default_dtype(torch.float64)
def clip_of_ranks() -> tuple[float, dict[str, Tensor]]:
    """The loss and gradients of the page's loss, averaged over the ranks as DDP averages them.

    Each rank has an equal share of the batch. Without a group, one process has the whole batch.
    """
    page = run_under("open_clip", "After")
    run_under("open_clip", "Many GPUs", page)
    generator = torch.Generator().manual_seed(1)
    images, texts = (
        torch.randn(12, 48, generator=generator),
        torch.randn(12, 24, generator=generator),
    )
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    for module in (page["image_tower"], page["text_tower"]):
        module.zero_grad()
    page["log_scale"].grad = None
    features = page["image_tower"](images[own]), page["text_tower"](texts[own])
    unit = (F.normalize(z, dim=1) for z in features)
    loss = page["loss_fn"](*unit, page["log_scale"].exp())
    loss.backward()
    averaged = gradients(page)
    total = loss.detach().clone()
    if dist.is_initialized():
        for tensor in (total, *averaged.values()):
            dist.all_reduce(tensor)
            tensor /= ranks
    return total.item(), averaged


def test_clip_loss_of_all_ranks_is_that_of_one_process(ranks: Callable[[int], Ranks]) -> None:
    loss, expected = clip_of_ranks()
    for total, averaged in ranks(2).run(clip_of_ranks):
        assert total == pytest.approx(loss, rel=FLOOR_VALUE[torch.float64])
        for name, gradient in expected.items():
            assert relative_error(averaged[name], gradient) <= FLOOR_GRADIENT[torch.float64], name
