"""Deterministic corruptions of test images, at three strengths, for the robustness probe."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

NOISE_STD = (0.1, 0.2, 0.3)  # standard deviation of the noise, as a fraction of the range 0..255
BLUR_STD = (0.04, 0.08, 0.12)  # standard deviation of the Gaussian, as a fraction of the side
SHIFT = (0.0625, 0.125, 0.1875)  # distance of the translation, as a fraction of the side
STRENGTHS = (1, 2, 3)

_SEED = 20_052_002  # one constant: every run, arm and encoder is tested on the same images
_CHUNK = 1024  # images per step, so that large images do not all become floats at once


def _noise(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + 255.0 * NOISE_STD[strength - 1] * noise


def _gaussian_kernel(std: float) -> Tensor:
    radius = max(1, math.ceil(3 * std))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / std) ** 2)
    return kernel / kernel.sum()


def _blur(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    n, channels, height, width = pixels.shape
    flat = pixels.reshape(n * channels, 1, height, width)
    rows = _gaussian_kernel(BLUR_STD[strength - 1] * height).reshape(1, 1, -1, 1)
    columns = _gaussian_kernel(BLUR_STD[strength - 1] * width).reshape(1, 1, 1, -1)
    pad = (columns.shape[3] // 2,) * 2 + (rows.shape[2] // 2,) * 2
    blurred = F.conv2d(F.conv2d(F.pad(flat, pad, mode="replicate"), rows), columns)
    return blurred.reshape(pixels.shape)


def _shift(pixels: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    n = len(pixels)
    direction = torch.randint(0, 4, (n,), generator=generator)  # right, left, down, up
    sign = 1.0 - 2.0 * (direction % 2)
    offset = 2.0 * SHIFT[strength - 1] * sign  # grid coordinates span 2 over a side
    theta = torch.eye(2, 3).repeat(n, 1, 1)
    theta[:, 0, 2] = torch.where(direction < 2, offset, 0.0)
    theta[:, 1, 2] = torch.where(direction < 2, 0.0, offset)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


_CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "shift": _shift,
}
KINDS = tuple(_CORRUPTIONS)


def corrupt(images: Tensor, kind: str, strength: int) -> Tensor:
    """Corrupt images, the same way each time it is called.

    The strengths are relative, so that they mean the same for 8 x 8 and 224 x 224 images:
    ``noise`` adds Gaussian noise of 10, 20 or 30 % of the pixel range; ``blur`` convolves with a
    Gaussian whose standard deviation is 4, 8 or 12 % of the side; ``shift`` moves each image by
    6.25, 12.5 or 18.75 % of the side in one of four directions (bilinear, edges replicated).

    Args:
        images: (N, C, H, W), uint8.
        kind: ``"noise"``, ``"blur"`` or ``"shift"``.
        strength: 1, 2 or 3.

    Returns:
        (N, C, H, W), uint8.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If the shape, the kind or the strength is not one of the above.

    Source:
        The kinds follow Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
        Corruptions and Perturbations", arXiv 1903.12261.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if kind not in _CORRUPTIONS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if strength not in STRENGTHS:
        raise ValueError(f"strength must be 1, 2 or 3, got {strength!r}")
    generator = torch.Generator().manual_seed(_SEED + 10 * KINDS.index(kind) + strength)
    out = torch.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        pixels = images[start : start + _CHUNK].float()
        changed = _CORRUPTIONS[kind](pixels, strength, generator)
        out[start : start + _CHUNK] = changed.round().clamp(0, 255).to(torch.uint8)
    return out
