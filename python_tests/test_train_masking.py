"""Multi-block masks: counts, disjointness, independence, block structure."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic")

from cjepa_kernels.train.config import MaskingConfig
from cjepa_kernels.train.masking import PatchMasks, multi_block_masks


def draw(
    samples: torch.Tensor,
    grid: tuple[int, int] = (4, 4),
    config: MaskingConfig | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> PatchMasks:
    return multi_block_masks(samples, grid, config or MaskingConfig(), seed, epoch, view)


@pytest.mark.parametrize(
    ("grid", "visible", "predicted"),
    [((4, 4), 10, 4), ((3, 7), 8, 13), ((1, 6), 2, 4), ((14, 14), 80, 40), ((1, 2), 1, 1)],
)
def test_masks_are_disjoint_ascending_and_inside(
    grid: tuple[int, int], visible: int, predicted: int
) -> None:
    masks = draw(torch.arange(50), grid, MaskingConfig(visible=visible, predicted=predicted))
    assert masks.visible.shape == (50, visible)
    assert masks.predicted.shape == (50, predicted)
    for seen, hidden in zip(masks.visible.tolist(), masks.predicted.tolist(), strict=True):
        assert seen == sorted(set(seen))
        assert hidden == sorted(set(hidden))
        assert not set(seen) & set(hidden)
        assert set(seen) | set(hidden) <= set(range(grid[0] * grid[1]))


def test_mask_depends_on_its_sample_alone() -> None:
    whole, part = draw(torch.arange(30)), draw(torch.tensor([12, 3]))
    assert torch.equal(part.visible, whole.visible[[12, 3]])
    assert torch.equal(part.predicted, whole.predicted[[12, 3]])


@pytest.mark.parametrize("change", [{"view": 1}, {"epoch": 1}, {"seed": 1}])
def test_views_epochs_and_seeds_are_independent(change: dict[str, int]) -> None:
    samples = torch.arange(4000)
    first, second = draw(samples).predicted, draw(samples, **change).predicted
    one = torch.zeros(4000, 16).scatter_(1, first, 1.0)
    two = torch.zeros(4000, 16).scatter_(1, second, 1.0)
    shared = (one * two).sum(1).mean().item()
    # Of independent masks, patch p is predicted by both with the product of its two frequencies.
    expected = (one.mean(0) * two.mean(0)).sum().item()
    assert shared == pytest.approx(expected, abs=5 / 4000**0.5)


def test_predicted_patches_come_from_one_block() -> None:
    # One block as large as the number of predicted patches: they must form a rectangle.
    config = MaskingConfig(
        visible=20, predicted=6, blocks=1, block_scale=(6 / 36, 6 / 36), block_ratio=(1.5, 1.5)
    )
    masks = draw(torch.arange(200), (6, 6), config)
    rows, columns = masks.predicted // 6, masks.predicted % 6
    assert (rows.amax(1) - rows.amin(1) == 2).all()
    assert (columns.amax(1) - columns.amin(1) == 1).all()
    corners = {(r, c) for r, c in zip(rows[:, 0].tolist(), columns[:, 0].tolist(), strict=True)}
    assert corners == {(r, c) for r in range(4) for c in range(5)}


def test_more_patches_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"masking\.visible.*at most the 16 .*13 \+ 4"):
        draw(torch.arange(2), config=MaskingConfig(visible=13, predicted=4))
