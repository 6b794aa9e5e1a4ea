"""What an encoder gives the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor


class Features(NamedTuple):
    """Features of images.

    Attributes:
        cls: (n, D) fp32, the CLS tokens.
        mean: (n, D) fp32, the means of the patch tokens.
    """

    cls: Tensor
    mean: Tensor


FeatureExtractor: TypeAlias = Callable[[Tensor], Features]
"""Takes uint8 images (n, C, H, W) and returns their features on the CPU, from the encoder in eval
mode, without augmentation or mask."""
