"""Test the counts, disjointness, independence and block structure of multi-block masks."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from repository import ROOT

pytest.importorskip("pydantic")

from cjepa_kernels.train.config import MaskingConfig, config_from_dict, load_config
from cjepa_kernels.train.data.masking import (
    PatchCounts,
    PatchMasks,
    multi_block_masks,
    patch_counts,
)
from cjepa_kernels.train.loop.module import build_loss

RECORDED_MASKS = "c3a6580f6d7515d7"


def draw(
    samples: torch.Tensor,
    grid: tuple[int, int] = (4, 4),
    config: MaskingConfig | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    view: int = 0,
) -> PatchMasks:
    return multi_block_masks(
        samples, grid, config or MaskingConfig(), seed=seed, epoch=epoch, view=view
    )


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
    in_first = torch.zeros(4000, 16).scatter_(1, first, 1.0)
    in_second = torch.zeros(4000, 16).scatter_(1, second, 1.0)
    shared = (in_first * in_second).sum(1).mean().item()
    # If the masks are independent, both predict a patch with a probability that is the product of
    # the two frequencies of this patch.
    expected = (in_first.mean(0) * in_second.mean(0)).sum().item()
    assert shared == pytest.approx(expected, abs=5 / 4000**0.5)


def test_predicted_patches_come_from_one_block() -> None:
    # The only block has as many patches as are predicted, so they must form a rectangle.
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


@pytest.mark.parametrize(
    ("value", "patches", "count"),
    [
        (0.625, 16, 10),
        (0.25, 16, 4),
        (0.625, 256, 160),
        # The exact products are 122.5 and 2.5; halves are rounded up.
        (0.625, 196, 123),
        (0.25, 10, 3),
        (0.001, 16, 1),
        (0.999, 16, 16),
        (10, 256, 10),
        (1, 16, 1),
    ],
)
def test_fractions_are_rounded_to_the_nearest_count(value: float, patches: int, count: int) -> None:
    config = MaskingConfig(visible=value, predicted=1)
    if count + 1 <= patches:
        assert patch_counts(config, patches) == PatchCounts(patches, count, 1)
    else:
        with pytest.raises(ValueError, match=rf"got {count} \({value} of them\) \+ 1"):
            patch_counts(config, patches)


@pytest.mark.parametrize(
    "value", [0, -1, 0.0, 1.0, 10.0, -0.5, math.nan, math.inf, True, "x", None, [1]]
)
@pytest.mark.parametrize("key", ["visible", "predicted"])
def test_what_is_neither_a_count_nor_a_fraction(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"masking\.{key}: ") as raised:
        config_from_dict({"masking": {key: value}})
    assert str(raised.value).count(f"masking.{key}") == 1


def test_numbers_that_yaml_reads_as_text() -> None:
    config = config_from_dict({}, ["masking.visible=5e-1", "masking.predicted=3"]).masking
    assert (config.visible, config.predicted) == (0.5, 3)
    assert isinstance(config.predicted, int)


@pytest.mark.parametrize("name", ["cjepa", "cifar10"])
def test_shipped_masks_are_those_of_the_counts(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml").masking
    assert (config.visible, config.predicted) == (0.625, 0.25)
    assert (MaskingConfig().visible, MaskingConfig().predicted) == (0.625, 0.25)
    samples = torch.arange(200)
    by_fraction = draw(samples, config=config, seed=3, epoch=2, view=1)
    by_count = draw(
        samples,
        config=config.model_copy(update={"visible": 10, "predicted": 4}),
        seed=3,
        epoch=2,
        view=1,
    )
    assert torch.equal(by_fraction.visible, by_count.visible)
    assert torch.equal(by_fraction.predicted, by_count.predicted)
    content = by_fraction.visible.numpy().tobytes() + by_fraction.predicted.numpy().tobytes()
    # The recorded results were made with these masks.
    assert hashlib.sha256(content).hexdigest()[:16] == RECORDED_MASKS


def test_too_few_levels_for_a_fraction() -> None:
    config = config_from_dict({"masking": {"predicted": 0.1}})
    with pytest.raises(ValueError, match=r"masking\.predicted: 3 .* at least 4 .* got 2"):
        build_loss(config, (1, 8, 8))
    assert build_loss(config, (1, 32, 32)) is not None
