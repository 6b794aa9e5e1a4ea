"""The images of each batch, which depend on the seed and the epoch and are dealt to the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from cjepa_kernels.train.data.dataset import Dataset, LabeledImages
from cjepa_kernels.train.data.randomness import permutation, stream_key

_ORDER_STREAM = 0


class IndexedImages(NamedTuple):
    """A batch as it is loaded."""

    images: Tensor  # (B, C, H, W) uint8
    samples: Tensor  # (B,) int64, indices in the whole training set
    labels: Tensor | None = None  # (B,) int64, the classes of the images


class EpochBatches(Sampler[list[int]]):
    """Batches of one rank: a permutation that depends on (seed, epoch), dealt to the ranks.

    Args:
        count: Number of samples.
        batch_size: Samples per batch over all ranks; a rest that fills no batch is dropped.
        seed: The experiment's seed.
        rank: This process.
        ranks: Number of processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, ranks: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = permutation(stream_key(self.seed, _ORDER_STREAM, self.epoch), self.count)
        for batch in range(len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield whole[self.rank :: self.ranks].tolist()


class _PretrainImages(TorchDataset[IndexedImages]):
    """Whole batches by position, with each image's index in the training set and its class."""

    def __init__(self, data: LabeledImages, samples: Tensor) -> None:
        self.data = data
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, positions: Any) -> IndexedImages:
        samples = self.samples[positions]
        return IndexedImages(self.data.images[samples], samples, self.data.labels[samples])


class PretrainData(L.LightningDataModule):
    """Builds the loader of the pretraining images once the rank is known.

    Args:
        dataset: The images.
        samples: (n,) int64, indices of the training images that pretraining sees.
        batch_size: Pairs per batch over all ranks.
        seed: The experiment's seed.
    """

    def __init__(self, dataset: Dataset, samples: Tensor, batch_size: int, seed: int) -> None:
        super().__init__()
        self.images = _PretrainImages(dataset.train, samples)
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader[IndexedImages]:
        assert self.trainer is not None
        batches = EpochBatches(
            len(self.images),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )
        # With batch_size=None the loader takes the sampler's items as whole batches.
        return DataLoader(self.images, sampler=batches, batch_size=None)
