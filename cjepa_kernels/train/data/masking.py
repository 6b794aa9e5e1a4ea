"""Multi-block masks of a batch: fixed numbers of visible and of predicted patches, disjoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cjepa_kernels.train.config import MaskingConfig
from cjepa_kernels.train.data.randomness import stream_key, uniform

_STREAM = 3
_PER_BLOCK = 4


@dataclass(frozen=True)
class PatchCounts:
    """How many patches an image has, and how many of them one mask takes."""

    total: int
    visible: int
    predicted: int


@dataclass(frozen=True)
class PatchMasks:
    """Which patches the context encoder sees and which ones the predictor predicts."""

    visible: Tensor  # (B, K) int64, ascending
    predicted: Tensor  # (B, M) int64, ascending


def multi_block_masks(
    samples: Tensor,
    grid: tuple[int, int],
    config: MaskingConfig,
    seed: int,
    epoch: int,
    view: int,
) -> PatchMasks:
    """Draw the masks of one view of a batch.

    Rectangular blocks are drawn. Predicted patches come from their union first, visible patches
    from outside of it first. Every image has the same counts, so that no image of a batch is
    truncated and CLS cannot tell images apart by the number of tokens.

    Args:
        samples: (B,) int64, indices of the images in the whole training set.
        grid: Rows and columns of patches.
        config: Counts or fractions, and block shapes.
        seed: The experiment's seed.
        epoch: Number of the epoch, from 0.
        view: 0 or 1. The masks of the two views are independent, because by a shared mask CLS
            could tell images apart without looking at them.

    Returns:
        The masks, on the device of ``samples``.

    Raises:
        ValueError: If the grid has fewer patches than are asked for.

    Source:
        Assran et al., "Self-supervised learning from images with a joint-embedding predictive
        architecture", arXiv 2301.08243, section 3.
    """
    rows, columns = grid
    patches = rows * columns
    counts = patch_counts(config, patches)
    draws = uniform(
        stream_key(seed, _STREAM, epoch, view), samples, _PER_BLOCK * config.blocks + patches
    )
    shape, tie_break = draws[:, :-patches], draws[:, -patches:]
    area, ratio, top, left = shape.view(len(samples), config.blocks, _PER_BLOCK).unbind(-1)
    low, high = config.block_scale
    area = (low + (high - low) * area) * patches
    low, high = (math.log(bound) for bound in config.block_ratio)
    ratio = (low + (high - low) * ratio).exp()
    # A block never spans the whole grid, so that a visible patch can be left beside it.
    height = (area * ratio).sqrt().round().clamp(1, max(rows - 1, 1))
    width = (area / ratio).sqrt().round().clamp(1, max(columns - 1, 1))
    inside_rows = _interval(top, height, rows)
    inside_columns = _interval(left, width, columns)
    blocked = (inside_rows[..., :, None] & inside_columns[..., None, :]).any(1).flatten(1)
    order = (2.0 * blocked + tie_break).argsort(dim=1, stable=True)
    return PatchMasks(
        visible=order[:, : counts.visible].sort(dim=1).values,
        predicted=order[:, patches - counts.predicted :].sort(dim=1).values,
    )


def patch_counts(config: MaskingConfig, patches: int) -> PatchCounts:
    """Turn the counts and fractions of a configuration into numbers of patches.

    Args:
        config: Counts, or fractions of the patches. A fraction gives the nearest number (a half
            is rounded up), at least 1.
        patches: Number of patches of an image.

    Returns:
        The numbers.

    Raises:
        ValueError: If visible and predicted patches cannot be disjoint.
    """
    counts = PatchCounts(
        total=patches,
        visible=_count(config.visible, patches),
        predicted=_count(config.predicted, patches),
    )
    if counts.visible + counts.predicted > patches:
        raise ValueError(
            "masking.visible + masking.predicted: expected at most the "
            f"{patches} patches of an image, got {_written(config.visible, counts.visible)} + "
            f"{_written(config.predicted, counts.predicted)}"
        )
    return counts


def _count(value: int | float, patches: int) -> int:
    if isinstance(value, int):
        return value
    return max(1, math.floor(value * patches + 0.5))


def _written(value: int | float, count: int) -> str:
    return str(value) if isinstance(value, int) else f"{count} ({value} of them)"


def _interval(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, blocks, size) bool: True inside a random interval of the given length."""
    first = (start * (size - length + 1.0)).floor()
    position = torch.arange(size, device=start.device)
    return (position >= first[..., None]) & (position < (first + length)[..., None])
