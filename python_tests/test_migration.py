"""docs/migrate: the code before and the code after have the same loss and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import torch.distributed as dist
from documents import DOCS, gradients, python_blocks, run_block
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor

PAGES = sorted(page.stem for page in (DOCS / "migrate").glob("*.md"))


def run_under(page: str, heading: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the first block under a heading."""
    namespace = {} if namespace is None else namespace
    blocks = python_blocks(DOCS / "migrate" / f"{page}.md")
    run_block(next(block for block in blocks if block.heading == heading), namespace)
    return namespace


@pytest.fixture
def projects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in peers.stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("projects")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("page", PAGES)
def test_after_equals_before(page: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        before, after = (run_under(page, heading) for heading in ("Before", "After"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert before["loss"].dtype == after["loss"].dtype == dtype
    assert relative_error(after["loss"], before["loss"]) <= FLOOR_VALUE[dtype]
    expected, actual = gradients(before), gradients(after)
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(actual[name], gradient) <= FLOOR_GRADIENT[dtype], name


def test_there_are_four_pages() -> None:
    assert PAGES == ["h-jepa", "lightly", "open_clip", "pytorch-metric-learning"]


def clip_of_ranks(function: str) -> tuple[float, dict[str, Tensor]]:
    """The page's loss of a whole batch, or of this rank's half; gradients as DDP averages them."""
    torch.set_default_dtype(torch.float64)
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
    loss = page[function](*features, page["log_scale"].exp())
    loss.backward()
    found = gradients(page)
    total = loss.detach().clone()
    if dist.is_initialized():
        for tensor in (total, *found.values()):
            dist.all_reduce(tensor)
            tensor /= ranks
    torch.set_default_dtype(torch.float32)
    return total.item(), found


def test_clip_loss_of_all_ranks_is_that_of_one_process(ranks: Callable[[int], Ranks]) -> None:
    loss, expected = clip_of_ranks("clip_loss")
    for total, found in ranks(2).run(clip_of_ranks, "clip_loss_of_all_ranks"):
        assert total == pytest.approx(loss, rel=FLOOR_VALUE[torch.float64])
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) <= FLOOR_GRADIENT[torch.float64], name
