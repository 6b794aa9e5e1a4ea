"""How the data of an experiment were understood, for the terminal, the log and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from cjepa_kernels.train.config import ExperimentConfig, MaskingConfig, uses_labels
from cjepa_kernels.train.data.dataset import (
    Dataset,
    EncodedDataset,
    open_dataset,
    pretrain_indices,
)
from cjepa_kernels.train.data.masking import PatchCounts, patch_counts
from cjepa_kernels.train.data.split_names import listed
from cjepa_kernels.train.model.vit import patch_grid

_NAMED_CLASSES = 20
# Masks of published recipes leave between a quarter (MAE) and half (I-JEPA) of an image visible.
# They predict at least a quarter of it, as the shipped recipes do.
_FEW_VISIBLE = 0.25
_FEW_PREDICTED = 0.1


@dataclass(frozen=True)
class ImageSize:
    """Pixels and channels of every image after decoding."""

    width: int
    height: int
    channels: int


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
    ignored_columns: tuple[str, ...]
    image_size: ImageSize
    labels_from: str
    test_from: str
    patches: PatchCounts | None  # None: model.patch_size or masking does not fit the images
    notes: tuple[str, ...]  # sentences on what was left out, resized, converted
    warnings: tuple[str, ...]  # sentences on what is probably not meant

    def lines(self) -> list[str]:
        """Say the same in plain sentences, one or more a line."""
        size, patches = self.image_size, self.patches
        channels = "grey" if size.channels == 1 else "colour"
        lines = [
            f"Data: {self.source}.",
            f"{self.train:,} training images and {self.test:,} test images of "
            f"{len(self.classes)} classes.",
            f"Images per class (training + test): {self._named_counts()}.",
            f"The labels come from {self.labels_from}.",
            f"The test images come from {self.test_from}.",
        ]
        if self.image_column is not None:
            lines.insert(3, f"The images come from the column {self.image_column!r}.")
        if self.ignored_columns:
            lines.append(f"Columns that are not used: {', '.join(self.ignored_columns)}.")
        lines += self.notes
        lines.append(f"Every image has {size.width} x {size.height} pixels, in {channels}.")
        if patches is not None:
            lines.append(
                f"An image has {patches.total} patches: {patches.visible} are visible "
                f"({_share(patches.visible, patches.total)}), {patches.predicted} are predicted "
                f"({_share(patches.predicted, patches.total)})."
            )
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return [_printable(line) for line in lines]

    def print(self, console: Console) -> None:
        """Print the sentences."""
        for line in self.lines():
            style = "yellow" if line.startswith("Warning: ") else None
            console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain values, ready for JSON, with a key for each field."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DataSummary:
        """Read what :meth:`to_dict` returned."""
        patches = values["patches"]
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return DataSummary(
            **{
                **values,
                **lists,
                "image_size": ImageSize(**values["image_size"]),
                "patches": None if patches is None else PatchCounts(**patches),
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


def summarize(config: ExperimentConfig, dataset: Dataset | EncodedDataset) -> DataSummary:
    """Describe the data of an experiment, decoded or not.

    A ``data.pretrain_classes`` that does not fit the data is a ValueError.
    """
    channels, height, width = dataset.image_shape
    try:
        patches = count_patches(config, dataset)
    except ValueError:
        patches = None
    reading, labels = dataset.reading, dataset.labels
    names, class_counts = dataset.class_names, {}
    for part in ("train", "test"):
        counts = torch.bincount(labels[part], minlength=len(names)).tolist()
        class_counts[part] = dict(zip(names, counts, strict=True))
    notes = list(reading.notes)
    if config.data.pretrain_classes is not None:
        chosen = pretrain_indices(config.data, dataset)
        seen = sorted(set(labels["train"][chosen].tolist()))
        classes = ", ".join(names[index] for index in seen)
        notes.append(f"Pretraining sees {len(chosen):,} images, those of the classes {classes}.")
    if uses_labels(config):
        notes.append(
            "The contrastive term trains with the labels of the training images "
            "(loss.contrastive_type: sup_con), so the pretraining is supervised."
        )
    return DataSummary(
        source=dataset.name,
        train=len(labels["train"]),
        test=len(labels["test"]),
        classes=names,
        class_counts=class_counts,
        label_column=reading.label_column,
        image_column=reading.image_column,
        ignored_columns=reading.ignored_columns,
        image_size=ImageSize(width=width, height=height, channels=channels),
        labels_from=reading.labels_from,
        test_from=reading.test_from,
        patches=patches,
        notes=tuple(notes),
        warnings=(*_class_warnings(class_counts), *_mask_warnings(config, patches)),
    )


@dataclass(frozen=True)
class InspectedData:
    """What :func:`inspect_data` found."""

    dataset: Dataset | EncodedDataset
    summary: DataSummary
    damage: tuple[str, ...] | None  # one message for each damaged image; None: not looked for

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for JSON, and ``damaged`` if damaged images were looked for."""
        content = self.summary.to_dict()
        return content if self.damage is None else {**content, "damaged": list(self.damage)}


def inspect_data(
    config: ExperimentConfig,
    *,
    verify: bool,
    show_progress: bool = False,
    on_damage: Callable[[str], None] | None = None,
) -> InspectedData:
    """Describe the data of an experiment without loading them into memory.

    Args:
        config: The experiment.
        verify: Whether every image is decoded to find the damaged ones.
        show_progress: Whether decoding a large set shows a progress bar on stderr.
        on_damage: Called with a message for each damaged image, as soon as it is found.

    Raises:
        FileNotFoundError: If a path or a named dataset does not exist.
        ValueError: If the data do not fit the configuration.
    """
    damage: dict[str, None] = {}

    def note(message: str) -> None:
        if message not in damage and on_damage is not None:
            on_damage(message)
        damage[message] = None

    dataset = open_dataset(config.data, on_damage=note if verify else None)
    if verify and isinstance(dataset, EncodedDataset):
        for name, part in dataset.parts.items():
            dataset.layout.find_damage(part, name, show_progress, note)
    return InspectedData(dataset, summarize(config, dataset), tuple(damage) if verify else None)


def count_patches(config: ExperimentConfig, dataset: Dataset | EncodedDataset) -> PatchCounts:
    """Count the patches of an image and those that a mask takes.

    It is a ValueError if the patches do not divide the images, or if a mask takes more patches than
    there are.
    """
    rows, columns = patch_grid(config.model.patch_size, dataset.image_shape)
    return patch_counts(config.masking, rows * columns)


def _class_warnings(class_counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    warnings = []
    for part, what in (("train", "training"), ("test", "test")):
        missing = [name for name, count in class_counts[part].items() if count == 0]
        if missing:
            warnings.append(f"there is no {what} image of {listed(missing)}.")
    return warnings


def _mask_warnings(config: ExperimentConfig, patches: PatchCounts | None) -> list[str]:
    if patches is None:
        return []
    usual = MaskingConfig()
    warnings = []
    for key, count, few in (
        ("visible", patches.visible, _FEW_VISIBLE),
        ("predicted", patches.predicted, _FEW_PREDICTED),
    ):
        if count < few * patches.total:
            fraction = getattr(usual, key)
            warnings.append(
                f"only {count} of {patches.total} patches are {key} "
                f"(masking.{key}: {getattr(config.masking, key)}). A fraction such as {fraction}, "
                "which the shipped experiments use, grows with the image."
            )
    return warnings


def _printable(line: str) -> str:
    """Escape characters in the names of files and classes, such as a line break."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in line
    )


def _share(count: int, total: int) -> str:
    return f"{round(100 * count / total, 1):g} %"
