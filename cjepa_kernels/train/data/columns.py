"""Choosing the columns of a table that hold the images and the labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cjepa_kernels.suggestions import closest, listed
from cjepa_kernels.train.data.image_decoding import EncodedImage

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_PANDAS_INDEX = "__index_level_"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    type: str  # as errors and summaries show it
    is_image_feature: bool  # an Image of the `datasets` library
    holds_bytes: bool  # encoded files, bare or in a struct
    holds_labels: bool  # integers, strings or booleans
    class_names: tuple[str, ...] | None  # of a ClassLabel

    @property
    def holds_images(self) -> bool:
        """Whether the values can be encoded images."""
        return self.is_image_feature or self.holds_bytes

    def __str__(self) -> str:
        return f"{self.name} ({self.type})"


def columns_of(schema: pa.Schema) -> list[Column]:
    """Describe the columns of a table, without the index that pandas adds.

    The metadata that the ``datasets`` library stores in the schema are taken into account.
    """
    features = _features(schema)
    return [
        _column(field.name, field.type, features.get(field.name))
        for field in schema
        if not field.name.startswith(_PANDAS_INDEX)
    ]


def choose_image_column(columns: Sequence[Column], wanted: str | None) -> Column:
    """Choose the column of the images.

    This is the column ``wanted`` (``data.image_column``), or the only one of type Image, or the
    only one of encoded files. Otherwise a ValueError lists all columns and their types.
    """
    if wanted is not None:
        column = _named(columns, wanted, "image_column")
        if not column.holds_images:
            raise ValueError(
                f"data.image_column: expected encoded images in column {wanted!r}, got "
                f"{column.type}"
            )
        return column
    image_columns = [column for column in columns if column.is_image_feature]
    image_columns = image_columns or [column for column in columns if column.holds_bytes]
    if len(image_columns) != 1:
        number = "no column" if not image_columns else "more than one column"
        raise ValueError(
            f"data.image_column: {number} of encoded images (type Image, binary, or a struct "
            f"with bytes) among {listed(columns)}; name the column with data.image_column"
        )
    return image_columns[0]


def choose_label_column(columns: Sequence[Column], image: Column, wanted: str | None) -> Column:
    """Choose the column of the labels.

    This is the column ``wanted`` (``data.label_column``), or the only one of type ClassLabel or
    with a usual name, or the only one beside the images. Otherwise a ValueError lists all columns
    and their types.
    """
    if wanted is not None:
        column = _named(columns, wanted, "label_column")
        if not column.holds_labels:
            raise ValueError(
                f"data.label_column: expected integers or strings in column {wanted!r}, got "
                f"{column.type}"
            )
        return column
    others = [column for column in columns if column is not image]
    if not others:
        raise ValueError(
            f"data.label_column: there is no column beside the images ({image}), so the images "
            "have no labels. Training needs a class for every image, because the probes measure "
            "by the classes: add a column of integers or strings"
        )
    label_columns = [
        column
        for column in others
        if column.holds_labels
        and (column.class_names is not None or column.name.lower() in LABEL_NAMES)
    ]
    if not label_columns and len(others) == 1 and others[0].holds_labels:
        label_columns = others
    if len(label_columns) != 1:
        what = (
            f"none is of type ClassLabel or called {', '.join(LABEL_NAMES)} with integers or "
            "strings"
            if not label_columns
            else f"{', '.join(column.name for column in label_columns)} could all be the labels"
        )
        raise ValueError(
            f"data.label_column: {what}; the columns are {listed(columns)}; name the column of "
            "the labels with data.label_column"
        )
    return label_columns[0]


def encoded_image(value: Any, place: str) -> EncodedImage:
    """Take the image of one row: the file's bytes, or a struct with its bytes or its path.

    ``place`` names the row and its file or split in errors.
    """
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
        if path:
            place = f"{place} ({path})"
            value = Path(path) if value is None else value
    return EncodedImage("data.image_column", place, value)


def _named(columns: Sequence[Column], wanted: str, key: str) -> Column:
    for column in columns:
        if column.name == wanted:
            return column
    meant = closest(wanted, [column.name for column in columns])
    hint = "" if meant is None else f"; did you mean {meant!r}?"
    raise ValueError(f"data.{key}: no column {wanted!r} among {listed(columns)}{hint}")


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])
        return dict(stored["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def _column(name: str, arrow: pa.DataType, feature: Any) -> Column:
    kind = feature.get("_type") if isinstance(feature, dict) else None
    values = arrow.value_type if pa.types.is_dictionary(arrow) else arrow
    integers = pa.types.is_integer(values)
    class_names = None
    if kind == "ClassLabel" and integers:
        names = feature.get("names") or range(int(feature.get("num_classes") or 0))
        class_names = tuple(str(name) for name in names)
    binary = _is_binary(values) or (
        pa.types.is_struct(arrow)
        and any(field.name == "bytes" and _is_binary(field.type) for field in arrow)
    )
    strings = pa.types.is_string(values) or pa.types.is_large_string(values)
    if hasattr(pa.types, "is_string_view"):
        strings = strings or pa.types.is_string_view(values)
    return Column(
        name=name,
        type=kind if kind in ("ClassLabel", "Image") else str(arrow),
        is_image_feature=kind == "Image",
        holds_bytes=binary,
        holds_labels=integers or strings or pa.types.is_boolean(values),
        class_names=class_names,
    )


def _is_binary(arrow: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(arrow)
        or pa.types.is_large_binary(arrow)
        or pa.types.is_fixed_size_binary(arrow)
    )
