"""Labelled images as uint8 tensors: digits, Parquet files, image folders, ``datasets`` names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from cjepa_kernels.suggestions import closest
from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.data.image_decoding import (
    EncodedImages,
    ImageLayout,
    treatment_lines,
)
from cjepa_kernels.train.data.source import Reading, Source, find_source
from cjepa_kernels.train.data.split_names import listed

# Splits and subsets belong to the task, so all seeds of an experiment share them.
_SPLIT_SEED = 0
_DIGITS_TEST_IMAGES = 450
_TEST_FRACTION = 0.2
_DIVIDED = "with equal shares of every class, the same in every run"


@dataclass(frozen=True)
class LabeledImages:
    """Images with one class each."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class Dataset:
    """A training and a test set over the same classes."""

    name: str
    train: LabeledImages
    test: LabeledImages
    class_names: tuple[str, ...]
    reading: Reading = field(default_factory=Reading)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def labels(self) -> Mapping[str, Tensor]:
        """(N,) int64 of ``"train"`` and ``"test"``."""
        return {"train": self.train.labels, "test": self.test.labels}


@dataclass(frozen=True)
class EncodedDataset:
    """A data set of which labels and headers are read, and no image is decoded."""

    name: str
    labels: Mapping[str, Tensor]  # (N,) int64 of "train" and "test"
    parts: Mapping[str, EncodedImages]  # of "train" and "test"
    class_names: tuple[str, ...]
    layout: ImageLayout
    reading: Reading

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image once it is decoded."""
        width, height = self.layout.size
        return (1 if self.layout.mode == "L" else 3), height, width

    def decode(self, *, show_progress: bool = True) -> Dataset:
        """Decode the images, on the CPU; a large set can show a progress bar on stderr.

        A damaged image is a ValueError.
        """
        decoded = {
            part: LabeledImages(self.layout.decode(encoded, part, show_progress), self.labels[part])
            for part, encoded in self.parts.items()
        }
        return Dataset(
            name=self.name,
            **decoded,
            class_names=self.class_names,
            reading=self.reading,
        )


def load_dataset(config: DataConfig, *, show_progress: bool = True) -> Dataset:
    """Load and decode the images of an experiment.

    Args:
        config: Source, columns, image size and subset sizes.
        show_progress: Whether decoding a large set shows a progress bar on stderr.

    Raises:
        FileNotFoundError: If a path or a named dataset does not exist.
        ValueError: If a column, a label or an image does not fit the configuration.
    """
    opened = open_dataset(config)
    if isinstance(opened, Dataset):
        return opened
    return opened.decode(show_progress=show_progress)


def open_dataset(
    config: DataConfig, *, on_damage: Callable[[str], None] | None = None
) -> Dataset | EncodedDataset:
    """Find the images of an experiment, their labels and their sizes, before any is decoded.

    The digits need no decoding. Errors are those of :func:`load_dataset`.

    Args:
        config: Source, columns, image size and subset sizes.
        on_damage: Called with the message of an image that cannot be opened, which then counts
            for nothing but its class. Default: the message is raised.
    """
    if config.source == "digits":
        return _load_digits(config)
    source = find_source(config)
    class_names, labels = _number_classes(source)
    images, reading = dict(source.images), source.reading
    rows = {part: torch.arange(len(values)) for part, values in labels.items()}
    if "test" not in rows:
        rows = _divide(labels["train"], class_names)
        labels["test"], images["test"] = labels["train"], images["train"]
        test_from = (
            f"a random fifth of the source ({len(rows['test']):,} of {len(labels['train']):,} "
            f"images, {_DIVIDED}): the source has no test split"
        )
        reading = replace(reading, test_from=test_from)
    subsets = {part: _choose_subset(config, part, labels[part], rows[part]) for part in rows}
    parts = {
        part: EncodedImages(images[part], subset.rows.tolist()) for part, subset in subsets.items()
    }
    layout = ImageLayout.of(parts.values(), config.image_size, config.bit_depth, on_damage)
    subset_notes = (note for subset in subsets.values() for note in subset.notes)
    return EncodedDataset(
        name=config.source,
        labels={part: labels[part][subset.rows] for part, subset in subsets.items()},
        parts=parts,
        class_names=class_names,
        layout=layout,
        reading=replace(reading, notes=(*reading.notes, *subset_notes, *treatment_lines(layout))),
    )


def resolve_pretrain_classes(
    config: DataConfig, dataset: Dataset | EncodedDataset
) -> tuple[int, ...] | None:
    """Return the indices of the classes that pretraining may see, or None for all of them.

    It is a ValueError if ``data.pretrain_classes`` names a class that does not exist, names none,
    or leaves none out for the probes.
    """
    classes = config.pretrain_classes
    if classes is None:
        return None
    count = len(dataset.class_names)
    if classes == "half":
        classes = list(range(count // 2))
    if not classes or max(classes) >= count:
        raise ValueError(
            f"data.pretrain_classes: expected class indices 0..{count - 1}, got {classes}"
        )
    if len(classes) == count:
        raise ValueError(
            f"data.pretrain_classes: at least one of the {count} classes must be left out, "
            f"got {classes}"
        )
    return tuple(classes)


def pretrain_indices(config: DataConfig, dataset: Dataset | EncodedDataset) -> Tensor:
    """Return (n,) int64, the ascending indices of the training images that pretraining sees."""
    classes = resolve_pretrain_classes(config, dataset)
    labels = dataset.labels["train"]
    if classes is None:
        return torch.arange(len(labels))
    return torch.isin(labels, torch.tensor(classes)).nonzero().flatten()


def balanced_subset(labels: Tensor, size: int | None, *, key: str) -> Tensor:
    """Choose a fixed random subset with classes as equal in number as the data allows.

    Args:
        labels: (N,) int64.
        size: Number of images, or None for all.
        key: The configuration key that asks for it, for the error message.

    Returns:
        (size,) int64 indices, ascending.

    Raises:
        ValueError: If there are fewer than ``size`` images.
    """
    if size is None:
        return torch.arange(len(labels))
    if size > len(labels):
        raise ValueError(f"{key}: expected at most the {len(labels)} images there are, got {size}")
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    position_in_class = np.empty(len(labels), dtype=np.int64)
    shuffled = labels.numpy()[order]
    for label in np.unique(shuffled):
        members = order[shuffled == label]
        position_in_class[members] = np.arange(len(members))
    chosen = order[np.argsort(position_in_class[order], kind="stable")][:size]
    return torch.from_numpy(np.sort(chosen))


def _load_digits(config: DataConfig) -> Dataset:
    if config.image_size not in (None, 8):
        raise ValueError(f"data.image_size: digits are 8 x 8 pixels, got {config.image_size}")
    for key, what in (
        ("image_column", "columns"),
        ("label_column", "columns"),
        ("bit_depth", "encoded images"),
    ):
        if getattr(config, key) is not None:
            raise ValueError(f"data.{key}: digits have no {what}, got {getattr(config, key)!r}")
    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = _stratified_rows(labels, _DIGITS_TEST_IMAGES)
    subsets = {
        part: _choose_subset(config, part, labels, rows)
        for part, rows in (("train", train), ("test", test))
    }
    return Dataset(
        name="digits",
        **{
            part: LabeledImages(images[subset.rows], labels[subset.rows])
            for part, subset in subsets.items()
        },
        class_names=tuple(str(digit) for digit in range(10)),
        reading=Reading(
            labels_from="scikit-learn",
            test_from=(
                f"a random quarter of scikit-learn's images ({_DIGITS_TEST_IMAGES} of "
                f"{len(labels):,}, {_DIVIDED})"
            ),
            notes=(*subsets["train"].notes, *subsets["test"].notes),
        ),
    )


def _number_classes(source: Source) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Number the classes; a test image of a class that training does not know is refused."""
    in_training = set(source.labels["train"])
    in_test = dict.fromkeys(source.labels.get("test", ()))
    unknown = [label for label in in_test if label not in in_training]
    if unknown:
        known = [str(label) for label in in_training]
        nearest = {label: closest(label, known) for label in unknown}
        names = [
            f"{label!r}" + (f" (the nearest training class is {name!r})" if name else "")
            for label, name in nearest.items()
        ]
        raise ValueError(
            f"{source.label_key}: test images of classes without a training image: "
            f"{listed(names)}; the training classes are {listed(sorted(in_training))}"
        )
    order = sorted(in_training) if source.class_names is None else list(source.class_names)
    index = {label: position for position, label in enumerate(order)}
    labels = {
        part: torch.tensor([index[label] for label in values], dtype=torch.int64)
        for part, values in source.labels.items()
    }
    return tuple(str(label) for label in order), labels


def _divide(labels: Tensor, class_names: Sequence[str]) -> dict[str, Tensor]:
    """Divide a source without a test split into rows of a training and of a test set."""
    counts = Counter(labels.tolist())
    smallest, images = min(counts.items(), key=lambda item: item[1])
    test_images = math.ceil(_TEST_FRACTION * len(labels))
    if images < 2 or test_images < len(counts):
        raise ValueError(
            f"data.source: too few images ({len(labels)} of {len(counts)} classes, "
            f"{images} of class {class_names[smallest]!r}) to divide into a training and a "
            "test set that both hold every class; provide a test split"
        )
    train, test = _stratified_rows(labels, test_images)
    return {"train": train.sort().values, "test": test.sort().values}


def _stratified_rows(labels: Tensor, test_images: int) -> tuple[Tensor, Tensor]:
    """Draw the rows of a training and of a test set, with equal shares of every class."""
    train, test = train_test_split(
        np.arange(len(labels)),
        test_size=test_images,
        stratify=labels.numpy(),
        random_state=_SPLIT_SEED,
    )
    return torch.from_numpy(train), torch.from_numpy(test)


class _Subset(NamedTuple):
    """The images of a set that are used."""

    rows: Tensor  # (n,) int64, in the source
    notes: tuple[str, ...]  # a sentence, unless all images are used


def _choose_subset(config: DataConfig, part: str, labels: Tensor, rows: Tensor) -> _Subset:
    """Choose among the rows of a part as ``data.train_size`` or ``data.test_size`` says."""
    key = f"{part}_size"
    size = getattr(config, key)
    chosen = rows[balanced_subset(labels[rows], size, key=f"data.{key}")]
    if size is None:
        return _Subset(chosen, ())
    what = "training" if part == "train" else "test"
    note = (
        f"{size:,} of the {len(rows):,} {what} images are used, drawn at random with "
        f"classes as equal in number as possible (data.{key})."
    )
    return _Subset(chosen, (note,))


def channel_statistics(images: Tensor, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel over some images.

    Both are (C,) fp32 on the scale where 255 is 1; a constant channel has deviation 1.
    """
    # Histograms are exact in integers and need no float copy of the images.
    values = torch.arange(256, dtype=torch.float64) / 255.0
    means, deviations = [], []
    for channel in images[indices].transpose(0, 1):
        counts = torch.bincount(channel.flatten().long(), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean).square()).sum() / counts.sum()
        means.append(mean)
        deviations.append(variance.sqrt() if variance > 1e-12 else torch.ones_like(variance))
    return torch.stack(means).float(), torch.stack(deviations).float()
