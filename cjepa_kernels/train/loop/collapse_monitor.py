"""The collapse monitor: how far the CLS features of different images still differ."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.train.data.dataset import Dataset
from cjepa_kernels.train.evaluation.collapse_measures import effective_rank, standard_deviation
from cjepa_kernels.train.evaluation.features import FeatureExtractor

_IMAGES = 512


class CollapseMonitor:
    """Measures the spread and the effective rank of the CLS features of some training images.

    Args:
        dataset: The images.
        samples: (n,) int64, the training images of which the monitor looks at 512 at most.
    """

    def __init__(self, dataset: Dataset, samples: Tensor) -> None:
        # A source may be sorted by class, so the first images could all be of one class.
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        self.samples = samples[order[:_IMAGES].sort()[0]]
        self._images = dataset.train.images

    def measure(self, extract: FeatureExtractor) -> dict[str, float]:
        """The metrics ``cls_std`` and ``cls_effective_rank`` of an encoder."""
        cls, _ = extract(self._images[self.samples])
        return {
            "cls_std": standard_deviation(cls.numpy()),
            "cls_effective_rank": effective_rank(cls.numpy()),
        }
