"""Two random views of each image of a batch: one affine resampling, then changes of colour."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cjepa_kernels.train.config import ViewsConfig
from cjepa_kernels.train.data.randomness import normal, stream_key, uniform

_STREAM = 1
_NOISE_STREAM = 2
_GEOMETRIC = 9
_PHOTOMETRIC = 4


def two_views(
    images: Tensor, samples: Tensor, config: ViewsConfig, seed: int, epoch: int
) -> Tensor:
    """Draw both views of a batch.

    Args:
        images: (B, C, H, W) uint8.
        samples: (B,) int64, indices of the images in the whole training set.
        config: Strengths of the augmentation.
        seed: The experiment's seed.
        epoch: Number of the epoch, from 0.

    Returns:
        (2B, C, H, W) fp32 in [0, 1]: the first views of all images, then the second views.
    """
    scaled = images.float() / 255.0
    return torch.cat(
        [one_view(scaled, samples, config, seed=seed, epoch=epoch, view=view) for view in (0, 1)]
    )


def one_view(
    images: Tensor, samples: Tensor, config: ViewsConfig, seed: int, epoch: int, view: int
) -> Tensor:
    """Draw one view of a batch.

    Args:
        images: (B, C, H, W) fp32 in [0, 1].
        samples: (B,) int64, indices of the images in the whole training set.
        config: Strengths of the augmentation.
        seed: The experiment's seed.
        epoch: Number of the epoch, from 0.
        view: 0 or 1.

    Returns:
        (B, C, H, W) fp32 in [0, 1].
    """
    draws = uniform(stream_key(seed, _STREAM, epoch, view), samples, _GEOMETRIC + _PHOTOMETRIC)
    columns = draws.unbind(1)
    view_images = _resample(images, columns[:_GEOMETRIC], config)
    view_images = _recolour(view_images, columns[_GEOMETRIC:], config)
    if config.noise > 0.0:
        key = stream_key(seed, _NOISE_STREAM, epoch, view)
        noise = normal(key, samples, images[0].numel()).view_as(images)
        view_images = view_images + config.noise * noise
    return view_images.clamp(0.0, 1.0)


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw


def _resample(images: Tensor, draws: tuple[Tensor, ...], config: ViewsConfig) -> Tensor:
    """Rotate, zoom, shift, crop and mirror in a single bilinear resampling."""
    angle = _between(draws[0], -config.rotation, config.rotation) * (math.pi / 180.0)
    scale = _between(draws[1], *config.scale)
    # The sampling grid spans [-1, 1], so a shift by a fraction of the side is twice that fraction.
    shift_x = _between(draws[2], -2.0 * config.shift, 2.0 * config.shift)
    shift_y = _between(draws[3], -2.0 * config.shift, 2.0 * config.shift)
    width, height = scale, scale
    if config.crop_area is not None:
        side = _between(draws[4], *config.crop_area).sqrt()
        low, high = (math.log(ratio) / 2.0 for ratio in config.crop_ratio)
        ratio = _between(draws[5], low, high).exp()
        crop_width, crop_height = (side * ratio).clamp(max=1.0), (side / ratio).clamp(max=1.0)
        shift_x = shift_x + _between(draws[6], -1.0, 1.0) * (1.0 - crop_width)
        shift_y = shift_y + _between(draws[7], -1.0, 1.0) * (1.0 - crop_height)
        width, height = width * crop_width, height * crop_height
    if config.flip > 0.0:
        width = torch.where(draws[8] < config.flip, -width, width)
    aspect = images.shape[-2] / images.shape[-1]
    theta = torch.stack(
        [
            torch.stack([angle.cos() * width, -angle.sin() * height * aspect, shift_x], dim=1),
            torch.stack([angle.sin() * width / aspect, angle.cos() * height, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recolour(images: Tensor, draws: tuple[Tensor, ...], config: ViewsConfig) -> Tensor:
    """Scale brightness, contrast about the image's mean, and saturation about its grey version."""

    def factor(draw: Tensor, strength: float) -> Tensor:
        return _between(draw, 1.0 - strength, 1.0 + strength).view(-1, 1, 1, 1)

    if config.brightness > 0.0:
        images = images * factor(draws[0], config.brightness)
    if config.contrast > 0.0:
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = mean + (images - mean) * factor(draws[1], config.contrast)
    if images.shape[1] > 1 and (config.saturation > 0.0 or config.grayscale > 0.0):
        saturation = factor(draws[2], config.saturation)
        coloured = (draws[3] >= config.grayscale).view(-1, 1, 1, 1)
        grey = images.mean(dim=1, keepdim=True)
        images = grey + (images - grey) * saturation * coloured
    return images
