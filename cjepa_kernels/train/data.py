"""Labelled images as uint8 tensors: digits, Parquet files, image folders, ``datasets`` names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.image_decoding import EncodedImages, ImageLayout

# Splits and subsets are part of the task, not of a run: every seed of an experiment shares them.
_SPLIT_SEED = 0
_DIGITS_TEST_IMAGES = 450
_TEST_FRACTION = 0.2
_TEST_SPLITS = ("test", "validation", "valid", "val")


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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


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
    if config.source == "digits":
        return _load_digits(config)
    splits = _open_splits(config.source)
    first = splits["train"]
    image_column = _find_column(
        first, config.image_column, "image_column", datasets.Image, _is_encoded_image
    )
    label_column = _find_column(
        first, config.label_column, "label_column", datasets.ClassLabel, _is_integer
    )
    _check_feature(first, image_column, "image_column", "encoded images", _holds_images)
    _check_feature(first, label_column, "label_column", "integers or strings", _holds_labels)
    labels, class_names = _read_labels(splits, label_column)
    rows = _split_rows(labels, config)
    parts = {
        name: _encoded_images(splits[source], image_column, rows[name].tolist())
        for name, source in (("train", "train"), ("test", "test" if "test" in splits else "train"))
    }
    layout = ImageLayout.of(parts.values(), config.image_size)
    return Dataset(
        name=config.source,
        train=LabeledImages(
            layout.decode(parts["train"], "training", show_progress), labels["train"][rows["train"]]
        ),
        test=LabeledImages(
            layout.decode(parts["test"], "test", show_progress),
            labels["test" if "test" in labels else "train"][rows["test"]],
        ),
        class_names=class_names,
    )


def resolve_pretrain_classes(config: DataConfig, dataset: Dataset) -> tuple[int, ...] | None:
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


def pretrain_indices(config: DataConfig, dataset: Dataset) -> Tensor:
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
    labels = dataset.train.labels
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
    for key in ("image_column", "label_column"):
        if getattr(config, key) is not None:
            raise ValueError(f"data.{key}: digits have no columns, got {getattr(config, key)!r}")
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
        "digits", parts["train"], parts["test"], tuple(str(digit) for digit in range(10))
    )


def _encoded_images(split: datasets.Dataset, column: str, rows: list[int]) -> EncodedImages:
    encoded = split.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return EncodedImages(encoded.select(rows), column, str(split.split), rows)


def _open_splits(source: str) -> dict[str, datasets.Dataset]:
    """Open a source with the ``datasets`` library; keys "train" and, if there is one, "test"."""
    kind, _, location = source.partition(":")
    with _quiet_datasets():
        if kind == "parquet" and location:
            loaded = _read("parquet", source, data_files=_parquet_files(location))
        elif kind == "imagefolder" and location:
            if not Path(location).is_dir():
                raise FileNotFoundError(f"data.source: no directory {location!r}")
            loaded = _read("imagefolder", source, data_dir=location)
        else:
            _check_spelling(source)
            loaded = _read(source, source)
    test = next((name for name in _TEST_SPLITS if name in loaded), None)
    if "train" not in loaded:
        raise ValueError(f"data.source: {source!r} has no split 'train', only {sorted(loaded)}")
    splits = {"train": loaded["train"]}
    if test is not None:
        splits["test"] = loaded[test]
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"data.source: the split {name!r} of {source!r} is empty")
    return splits


def _check_spelling(source: str) -> None:
    """Refuse what is nearly a known kind of source: the hub would be tried for half a minute."""
    kind = source.partition(":")[0]
    known = {"digits": "digits", "parquet": "parquet:PATH", "imagefolder": "imagefolder:PATH"}
    close = difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0.7)
    if close and "/" not in kind and not Path(source).exists():
        raise ValueError(f"data.source: no source {source!r}; the nearest is {known[close[0]]!r}")


def _read(name: str, source: str, **options: Any) -> datasets.DatasetDict:
    # A name on the hub is `name` or `owner/name`; anything else can only be a path.
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise FileNotFoundError(f"data.source: no file or directory {name!r}")
    try:
        loaded = datasets.load_dataset(name, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data.source: nothing found for {source!r} ({error}); expected 'digits', "
            "'parquet:PATH', 'imagefolder:PATH', a local dataset directory, or the name of a "
            "dataset that is cached or reachable"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"data.source: cannot read {source!r}: {cause}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"data.source: {source!r} does not hold the splits of a dataset")
    return loaded


def _parquet_files(location: str) -> dict[str, list[str]]:
    path = Path(location)
    if path.is_file():
        return {"train": [str(path)]}
    if not path.is_dir():
        raise FileNotFoundError(f"data.source: no file or directory {location!r}")
    files = {
        split: sorted(str(file) for file in path.glob(f"{split}*.parquet"))
        for split in ("train", *_TEST_SPLITS)
    }
    if not files["train"]:
        raise FileNotFoundError(
            f"data.source: expected train.parquet (and test.parquet) in {location!r}, "
            f"found {sorted(file.name for file in path.iterdir())[:10]}"
        )
    return {split: found for split, found in files.items() if found}


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _is_encoded_image(feature: Any) -> bool:
    return isinstance(feature, dict) and "bytes" in feature


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def _find_column(
    split: datasets.Dataset,
    wanted: str | None,
    key: str,
    feature_type: type,
    otherwise: Callable[[Any], bool],
) -> str:
    """Find a column by name, else by its feature type, else by what a plain file would hold."""
    features = split.features
    if wanted is not None:
        if wanted not in features:
            close = difflib.get_close_matches(wanted, list(features), n=1, cutoff=0.0)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            raise ValueError(f"data.{key}: no column {wanted!r} among {list(features)}{hint}")
        return wanted
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    found = typed or [name for name, feature in features.items() if otherwise(feature)]
    if len(found) != 1:
        raise ValueError(
            f"data.{key}: expected exactly one {feature_type.__name__} column, found {found} among "
            f"{list(features)}; name it with data.{key}"
        )
    return str(found[0])


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or _is_encoded_image(feature)


def _holds_labels(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and (
        "int" in feature.dtype or "string" in feature.dtype
    )


def _check_feature(
    split: datasets.Dataset, column: str, key: str, expected: str, holds: Callable[[Any], bool]
) -> None:
    if not holds(split.features[column]):
        raise ValueError(
            f"data.{key}: expected {expected} in column {column!r}, got {split.features[column]}"
        )


def _read_labels(
    splits: dict[str, datasets.Dataset], column: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    feature = splits["train"].features[column]
    values = {}
    for name, split in splits.items():
        if column not in split.features:
            raise ValueError(
                f"data.label_column: the split {name!r} has no column {column!r}, only "
                f"{list(split.features)}"
            )
        values[name] = list(split[column])
        if any(value is None or value == -1 for value in values[name]):
            raise ValueError(f"data.label_column: {column!r} of split {name!r} has missing labels")
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        index: dict[Any, int] = {label: label for label in range(len(names))}
    else:
        distinct = sorted({value for part in values.values() for value in part})
        names = tuple(str(value) for value in distinct)
        index = {value: position for position, value in enumerate(distinct)}
    labels = {
        name: torch.tensor([index[value] for value in part], dtype=torch.int64)
        for name, part in values.items()
    }
    return labels, names


def _split_rows(labels: dict[str, Tensor], config: DataConfig) -> dict[str, Tensor]:
    """Rows of the training and of the test set; a source without a test split is divided."""
    if "test" in labels:
        rows = {name: torch.arange(len(part)) for name, part in labels.items()}
    else:
        every = np.arange(len(labels["train"]))
        counts = torch.bincount(labels["train"])
        test_images = int(np.ceil(_TEST_FRACTION * len(every)))
        if int(counts[counts > 0].min()) < 2 or test_images < int((counts > 0).sum()):
            raise ValueError(
                f"data.source: too few images ({len(every)}) to divide into a training and a test "
                "set that both hold every class; provide a test split"
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
