"""Labelled images as uint8 tensors: digits, Parquet files, image folders, ``datasets`` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.data.image_decoding import (
    EncodedImages,
    ImageLayout,
    treatment_lines,
)
from cjepa_kernels.train.data.image_folder import nearest_class
from cjepa_kernels.train.data.source import Source, find_source
from cjepa_kernels.train.data.split_names import listed

# Splits and subsets are part of the task, not of a run: every seed of an experiment shares them.
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
class Reading:
    """How a source was understood."""

    image_column: str | None = None
    label_column: str | None = None
    ignored_columns: tuple[str, ...] = ()
    labels_from: str = "the source"
    test_from: str = "the source"
    notes: tuple[str, ...] = ()  # sentences


@dataclass(frozen=True)
class Dataset:
    """A training and a test set over the same classes."""

    name: str
    train: LabeledImages
    test: LabeledImages
    class_names: tuple[str, ...]
    reading: Reading = Reading()

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
        """Decode the images.

        Args:
            show_progress: Whether decoding a large set shows a progress bar on stderr.

        Returns:
            The two sets, on the CPU.

        Raises:
            ValueError: If an image is damaged.
        """
        names = {"train": "training", "test": "test"}
        images = {
            part: self.layout.decode(encoded, names[part], show_progress)
            for part, encoded in self.parts.items()
        }
        return Dataset(
            name=self.name,
            train=LabeledImages(images["train"], self.labels["train"]),
            test=LabeledImages(images["test"], self.labels["test"]),
            class_names=self.class_names,
            reading=self.reading,
        )


def load_dataset(config: DataConfig, *, show_progress: bool = True) -> Dataset:
    """Load and decode the images of an experiment.

    Args:
        config: Source, columns, image size and subset sizes.
        show_progress: Whether decoding a large set shows a progress bar on stderr.

    Returns:
        The two sets, on the CPU.

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

    Args:
        config: Source, columns, image size and subset sizes.
        on_damage: Called with the message of an image that cannot be opened, which then counts
            for nothing but its class. Default: the message is raised.

    Returns:
        The two sets. The digits need no decoding.

    Raises:
        FileNotFoundError: If a path or a named dataset does not exist.
        ValueError: If a column, a label or an image does not fit the configuration.
    """
    if config.source == "digits":
        return _load_digits(config)
    found = find_source(config)
    class_names, labels = _number_classes(found)
    rows = _split_rows(labels, class_names, config)
    of_part = {part: part if part in labels else "train" for part in ("train", "test")}
    parts = {
        part: EncodedImages(found.images[split], rows[part].tolist())
        for part, split in of_part.items()
    }
    chosen = {part: labels[split][rows[part]] for part, split in of_part.items()}
    layout = ImageLayout.of(parts.values(), config.image_size, config.bit_depth, on_damage)
    every = len(labels["train"])
    divided = _test_images(every)
    available = (
        {part: len(values) for part, values in labels.items()}
        if "test" in labels
        else {"train": every - divided, "test": divided}
    )
    reading = Reading(
        image_column=found.image_column,
        label_column=found.label_column,
        ignored_columns=found.ignored_columns,
        labels_from=found.labels_from,
        test_from=(
            found.test_from
            or f"a random fifth of the source ({divided:,} of {every:,} images, {_DIVIDED}): the "
            "source has no test split"
        ),
        notes=(
            *found.notes,
            *_subset_notes(config, available),
            *treatment_lines(layout),
        ),
    )
    return EncodedDataset(config.source, chosen, parts, class_names, layout, reading)


def resolve_pretrain_classes(
    config: DataConfig, dataset: Dataset | EncodedDataset
) -> tuple[int, ...] | None:
    """Turn ``data.pretrain_classes`` into class indices.

    Args:
        config: The data section.
        dataset: What it loads.

    Returns:
        The classes that pretraining may see, or None for all of them.

    Raises:
        ValueError: If a class does not exist, has no training image, or none is left to probe.
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
    """Select the training images that pretraining may see.

    Args:
        config: The data section.
        dataset: What it loads.

    Returns:
        (n,) int64 indices into ``dataset.train``, ascending.

    Raises:
        ValueError: If ``data.pretrain_classes`` does not fit the dataset.
    """
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
    train, test = train_test_split(
        np.arange(len(labels)),
        test_size=_DIGITS_TEST_IMAGES,
        stratify=bunch.target,
        random_state=_SPLIT_SEED,
    )
    parts = {}
    for name, rows in (("train", torch.from_numpy(train)), ("test", torch.from_numpy(test))):
        kept = balanced_subset(
            labels[rows], getattr(config, f"{name}_size"), key=f"data.{name}_size"
        )
        parts[name] = LabeledImages(images[rows[kept]], labels[rows[kept]])
    return Dataset(
        name="digits",
        train=parts["train"],
        test=parts["test"],
        class_names=tuple(str(digit) for digit in range(10)),
        reading=Reading(
            labels_from="scikit-learn",
            test_from=(
                f"a random quarter of scikit-learn's images ({_DIGITS_TEST_IMAGES} of "
                f"{len(labels):,}, {_DIVIDED})"
            ),
            notes=tuple(_subset_notes(config, {"train": len(train), "test": len(test)})),
        ),
    )


def _number_classes(found: Source) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Number the classes; a test image of a class that training does not know is refused."""
    in_training = set(found.labels["train"])
    in_test = dict.fromkeys(found.labels.get("test", ()))
    unknown = [label for label in in_test if label not in in_training]
    if unknown:
        known = _as_text(in_training)
        names = [f"{label!r}{nearest_class(str(label), known)}" for label in unknown]
        raise ValueError(
            f"{found.label_key}: test images of classes without a training image: {listed(names)}; "
            f"the training classes are {listed(sorted(in_training))}"
        )
    order = sorted(in_training) if found.class_names is None else list(found.class_names)
    index = {label: position for position, label in enumerate(order)}
    labels = {
        part: torch.tensor([index[label] for label in values], dtype=torch.int64)
        for part, values in found.labels.items()
    }
    return tuple(_as_text(order)), labels


def _as_text(labels: Sequence[Any] | set[Any]) -> list[str]:
    return [str(label) for label in labels]


def _subset_notes(config: DataConfig, available: Mapping[str, int]) -> list[str]:
    notes = []
    for part in ("train", "test"):
        size = getattr(config, f"{part}_size")
        if size is not None:
            what = "training" if part == "train" else "test"
            notes.append(
                f"{size:,} of the {available[part]:,} {what} images are used, drawn at random with "
                f"classes as equal in number as possible (data.{part}_size)."
            )
    return notes


def _test_images(count: int) -> int:
    """Size of the test set of a source without one."""
    return int(np.ceil(_TEST_FRACTION * count))


def _split_rows(
    labels: dict[str, Tensor], class_names: Sequence[str], config: DataConfig
) -> dict[str, Tensor]:
    """Rows of the training and of the test set; a source without a test split is divided."""
    if "test" in labels:
        rows = {name: torch.arange(len(part)) for name, part in labels.items()}
    else:
        every = np.arange(len(labels["train"]))
        counts = Counter(labels["train"].tolist())
        smallest, images = min(counts.items(), key=lambda item: item[1])
        test_images = _test_images(len(every))
        if images < 2 or test_images < len(counts):
            raise ValueError(
                f"data.source: too few images ({len(every)} of {len(counts)} classes, "
                f"{images} of class {class_names[smallest]!r}) to divide into a training and a "
                "test set that both hold every class; provide a test split"
            )
        train, test = train_test_split(
            every, test_size=test_images, stratify=labels["train"].numpy(), random_state=_SPLIT_SEED
        )
        rows = {
            "train": torch.from_numpy(train).sort()[0],
            "test": torch.from_numpy(test).sort()[0],
        }
    for name in rows:
        of_split = labels.get(name, labels["train"])[rows[name]]
        kept = balanced_subset(of_split, getattr(config, f"{name}_size"), key=f"data.{name}_size")
        rows[name] = rows[name][kept]
    return rows


def channel_statistics(images: Tensor, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over some images.

    Args:
        images: (N, C, H, W) uint8.
        indices: (n,) int64, the images to take into account.

    Returns:
        Two (C,) fp32 tensors on the scale where 255 is 1; a constant channel has deviation 1.
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
