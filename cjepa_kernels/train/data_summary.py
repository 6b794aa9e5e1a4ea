"""What was understood of the data of an experiment, for the terminal, the log and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from cjepa_kernels.train.config import ExperimentConfig
from cjepa_kernels.train.data import Dataset
from cjepa_kernels.train.masking import check_counts
from cjepa_kernels.train.vit import patch_grid

_NAMED_CLASSES = 20


@dataclass(frozen=True)
class ImageSize:
    """Pixels and channels of every image after decoding."""

    width: int
    height: int
    channels: int


@dataclass(frozen=True)
class PatchCounts:
    """How many patches an image has, and how many of them one mask takes."""

    total: int
    visible: int
    predicted: int


@dataclass(frozen=True)
class DataSummary:
    """What a person should see of the data before anything is trained."""

    source: str
    train: int  # images
    test: int  # images
    classes: tuple[str, ...]
    class_counts: Mapping[str, Mapping[str, int]]  # {"train": {class: images}, "test": ...}
    label_column: str | None
    image_column: str | None
    image_size: ImageSize
    test_from: str
    patches: PatchCounts

    def lines(self) -> list[str]:
        """Say the same in plain sentences.

        Returns:
            One sentence or more a line, without a line break.
        """
        size, patches = self.image_size, self.patches
        channels = "grey" if size.channels == 1 else "colour"
        return [
            f"Data: {self.source}.",
            f"{self.train:,} training images and {self.test:,} test images of "
            f"{len(self.classes)} classes.",
            f"Images per class (training + test): {self._named_counts()}.",
            f"The test images come from {self.test_from}.",
            f"Every image has {size.width} x {size.height} pixels, in {channels}.",
            f"An image has {patches.total} patches: {patches.visible} are visible, "
            f"{patches.predicted} are predicted.",
        ]

    def print(self, console: Console) -> None:
        """Print the sentences.

        Args:
            console: Where they go.
        """
        for line in self.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values, ready for JSON.

        Returns:
            A mapping with a key for each field.
        """
        return {**dataclasses.asdict(self), "classes": list(self.classes)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DataSummary:
        """Read what :meth:`to_dict` returned.

        Args:
            values: A mapping with a key for each field.
        """
        return DataSummary(
            **{
                **values,
                "classes": tuple(values["classes"]),
                "image_size": ImageSize(**values["image_size"]),
                "patches": PatchCounts(**values["patches"]),
            }
        )

    def _named_counts(self) -> str:
        counts = self.class_counts
        shown = [
            f"{name} ({counts['train'][name]} + {counts['test'][name]})"
            for name in self.classes[:_NAMED_CLASSES]
        ]
        left_out = len(self.classes) - len(shown)
        return ", ".join(shown) + (f" and {left_out} more classes" if left_out else "")


def summarize(config: ExperimentConfig, dataset: Dataset) -> DataSummary:
    """Describe the data of an experiment.

    Args:
        config: The experiment.
        dataset: What its data section loads.

    Returns:
        The summary.

    Raises:
        ValueError: If the patches do not divide the images, or a mask takes more patches than
            there are.
    """
    channels, height, width = dataset.image_shape
    rows, columns = patch_grid(config.model.patch_size, dataset.image_shape)
    check_counts(config.masking, rows * columns)
    return DataSummary(
        source=dataset.name,
        train=len(dataset.train.labels),
        test=len(dataset.test.labels),
        classes=dataset.class_names,
        class_counts={
            name: _count_classes(labels, dataset.class_names)
            for name, labels in (("train", dataset.train.labels), ("test", dataset.test.labels))
        },
        label_column=config.data.label_column,
        image_column=config.data.image_column,
        image_size=ImageSize(width=width, height=height, channels=channels),
        test_from="the source",
        patches=PatchCounts(
            total=rows * columns,
            visible=config.masking.visible,
            predicted=config.masking.predicted,
        ),
    )


def _count_classes(labels: torch.Tensor, names: tuple[str, ...]) -> dict[str, int]:
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))
