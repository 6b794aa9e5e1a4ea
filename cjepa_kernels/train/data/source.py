"""Finding the images and labels that ``data.source`` names: a folder, Parquet files, a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cjepa_kernels.suggestions import closest
from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.data.columns import (
    LABEL_NAMES,
    choose_image_column,
    choose_label_column,
    columns_of,
)
from cjepa_kernels.train.data.folder_listing import expanded_path, is_saved, walk_files
from cjepa_kernels.train.data.image_decoding import ReadImages
from cjepa_kernels.train.data.image_folder import has_image_suffix, list_image_folder
from cjepa_kernels.train.data.parquet_table import ParquetTable, find_parquet_files
from cjepa_kernels.train.data.split_names import (
    choose_splits,
    listed,
    split_files,
)

if TYPE_CHECKING:
    from cjepa_kernels.train.data.named_dataset import NamedTable

# A local directory may also hold a data set in these formats, which `datasets` reads.
_OTHER_FORMATS = {".arrow": "arrow", ".tar": "webdataset"}


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
class Source:
    """Images and labels by split, ``"train"`` and perhaps ``"test"``."""

    images: dict[str, ReadImages]
    labels: dict[str, list[Any]]  # names of classes, or values that have no names
    class_names: tuple[str, ...] | None  # all classes in their order; None: the values, sorted
    label_key: str  # the configuration key that errors about labels name
    reading: Reading


def find_source(config: DataConfig) -> Source:
    """Find the images and labels of a configuration; no image is opened.

    A path or name that does not exist is a FileNotFoundError. A source that is not clear is a
    ValueError.
    """
    kind, _, location = config.source.partition(":")
    if kind == "parquet" and location:
        return _parquet_source(config, expanded_path(location))
    if kind == "imagefolder" and location:
        return _folder_source(config, expanded_path(location))
    path = expanded_path(config.source)
    if path.is_dir():
        return _directory_source(config, path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _parquet_source(config, path)
    # A name on the hub is `name` or `owner/name`; anything else can only be a path.
    if path.is_file() or config.source.startswith((".", "~", "/")) or config.source.count("/") > 1:
        raise FileNotFoundError(
            f"data.source: no directory and no Parquet file {config.source!r}"
            if path.is_file()
            else f"data.source: no file or directory {config.source!r}"
        )
    _check_spelling(config.source)
    return _named_source(config, config.source)


def _check_spelling(source: str) -> None:
    """Refuse misspelt kinds of sources, for which the hub would be tried for half a minute."""
    kind = source.partition(":")[0]
    known = {"digits": "digits", "parquet": "parquet:PATH", "imagefolder": "imagefolder:PATH"}
    meant = None if "/" in kind else closest(kind, known)
    if meant is not None:
        raise ValueError(f"data.source: no source {source!r}, did you mean {known[meant]!r}?")


def _folder_source(config: DataConfig, root: Path) -> Source:
    for key in ("image_column", "label_column"):
        if getattr(config, key) is not None:
            raise ValueError(
                f"data.{key}: a folder of images has no columns, got {getattr(config, key)!r}"
            )
    folder = list_image_folder(root)
    test = folder.splits.get("test")
    return Source(
        images={part: images.read for part, (_, images) in folder.splits.items()},
        labels={part: list(images.classes) for part, (_, images) in folder.splits.items()},
        class_names=folder.class_names,
        label_key="data.source",
        reading=Reading(
            labels_from="the names of the class folders",
            test_from="the source" if test is None else f"the folder {test[0]!r}",
            notes=folder.notes,
        ),
    )


def _parquet_source(config: DataConfig, location: Path) -> Source:
    files = find_parquet_files(location)
    chosen = choose_splits(files, repr(str(location)))
    tables = {
        part: (
            f"the split {name!r} ({listed(file.name for file in of_split)})",
            ParquetTable.open(of_split),
        )
        for part, (name, of_split) in chosen.parts.items()
    }
    return _table_source(config, tables, chosen.notes)


def _named_source(config: DataConfig, name: str, **options: Any) -> Source:
    # Importing `datasets` takes a second, and most sources do not need it.
    from cjepa_kernels.train.data.named_dataset import open_named

    splits = open_named(name, config.source, **options)
    chosen = choose_splits(splits, repr(config.source))
    tables = {part: (f"the split {name!r}", table) for part, (name, table) in chosen.parts.items()}
    return _table_source(config, tables, chosen.notes)


def _directory_source(config: DataConfig, folder: Path) -> Source:
    """Find out what a directory holds; only the names of splits play a role."""
    if is_saved(folder) or _says_its_files(folder / "README.md"):
        return _named_source(config, str(folder))
    files = list(walk_files(folder, {}))
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    images = [file for file in files if has_image_suffix(file)]
    if parquet and images:
        examples = [str(paths[0].relative_to(folder)) for paths in (parquet, images)]
        raise ValueError(
            f"data.source: {str(folder)!r} holds Parquet files and image files "
            f"({listed(examples)}); choose by 'parquet:{folder}' or 'imagefolder:{folder}'"
        )
    if parquet:
        return _parquet_source(config, folder)
    if images:
        return _folder_source(config, folder)
    for suffix, builder in _OTHER_FORMATS.items():
        of_format = [file for file in files if file.suffix.lower() == suffix]
        if of_format:
            by_split = split_files(folder, of_format, suffix)
            return _named_source(
                config,
                builder,
                data_files={
                    split: [_literal(path) for path in paths] for split, paths in by_split.items()
                },
            )
    scripts = [file.name for file in files if file.suffix == ".py"]
    hint = f"; the script {scripts[0]!r} is not run" if scripts else ""
    raise ValueError(
        f"data.source: {str(folder)!r} holds neither images nor Parquet files, found "
        f"{listed(str(file.relative_to(folder)) for file in files)}{hint}"
    )


def _says_its_files(readme: Path) -> bool:
    """Whether a README in the hub's format says which files belong to which split."""
    try:
        head = readme.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return head.startswith("---") and "data_files:" in head[3:].partition("\n---")[0]


def _literal(file: Path) -> str:
    """Escape a path for ``datasets``, which reads every path as a pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(file.absolute()))


def _table_source(
    config: DataConfig,
    tables: Mapping[str, tuple[str, ParquetTable | NamedTable]],
    notes: tuple[str, ...],
) -> Source:
    """Find the columns of images and of labels in tables by part, each with its name in errors."""
    for where, table in tables.values():
        if len(table) == 0:
            raise ValueError(f"data.source: {where} of {config.source!r} is empty")
    columns = columns_of(tables["train"][1].schema)
    image = choose_image_column(columns, config.image_column)
    label = choose_label_column(columns, image, config.label_column)
    labels = {}
    for part, (where, table) in tables.items():
        here = {column.name: column for column in columns_of(table.schema)}
        if image.name not in here or not here[image.name].holds_images:
            raise ValueError(
                f"data.image_column: {where} has no column {image.name!r} of images, only "
                f"{listed(here.values())}"
            )
        if label.name not in here or not here[label.name].holds_labels:
            raise ValueError(
                f"data.label_column: {where} has no column {label.name!r} of labels, only "
                f"{listed(here.values())}"
            )
        values = table.values(label.name)
        labels[part] = _named_labels(values, here[label.name].class_names, label.name, where)
    guessed = (
        config.label_column is None
        and label.class_names is None
        and label.name.lower() not in LABEL_NAMES
    )
    distinct = set(labels["train"])
    if guessed and len(distinct) == len(labels["train"]) > 1:
        raise ValueError(
            f"data.label_column: the column {label.name!r} holds another value in each of the "
            f"{len(distinct):,} rows of {tables['train'][0]}, so it cannot be the labels; the "
            f"columns are {listed(columns)}"
        )
    test = tables.get("test")
    return Source(
        images={
            part: partial(table.read_images, image.name) for part, (_, table) in tables.items()
        },
        labels=labels,
        class_names=label.class_names,
        label_key="data.label_column",
        reading=Reading(
            image_column=image.name,
            label_column=label.name,
            ignored_columns=tuple(c.name for c in columns if c not in (image, label)),
            labels_from=f"the column {label.name!r} ({label.type})",
            test_from="the source" if test is None else test[0],
            notes=notes,
        ),
    )


def _named_labels(
    values: list[Any], class_names: tuple[str, ...] | None, column: str, where: str
) -> list[Any]:
    """Refuse missing labels, and replace numbers of a ClassLabel by their names."""
    missing = [row for row, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise ValueError(
            f"data.label_column: {column!r} of {where} has missing labels in {len(missing):,} of "
            f"{len(values):,} rows, the first of them is row {missing[0]}"
        )
    if class_names is None:
        return values
    for row, value in enumerate(values):
        if not 0 <= value < len(class_names):
            raise ValueError(
                f"data.label_column: {column!r} of {where} has {len(class_names)} classes, got the "
                f"class {value} in row {row}"
            )
    return [class_names[value] for value in values]
