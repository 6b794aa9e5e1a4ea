"""Data sets that the ``datasets`` library opens: by name, or in its own formats on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from cjepa_kernels.train.data.image_decoding import EncodedImage


@dataclass(frozen=True)
class NamedTable:
    """The rows of one split."""

    records: datasets.Dataset
    split: str

    def __len__(self) -> int:
        return len(self.records)

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types."""
        return self.records.features.arrow_schema

    def values(self, column: str) -> list[Any]:
        """Read a whole column.

        Args:
            column: Its name.

        Returns:
            One Python value a row.
        """
        return list(self.records.select_columns([column])[column])

    def images(self, column: str) -> NamedImages:
        """Return the images of a column.

        Args:
            column: Its name.
        """
        records = self.records.select_columns([column])
        if isinstance(records.features[column], datasets.Image):
            records = records.cast_column(column, datasets.Image(decode=False))
        return NamedImages(records, column, self.split)


@dataclass(frozen=True)
class NamedImages:
    """A column of encoded images."""

    records: datasets.Dataset
    column: str
    split: str

    def __len__(self) -> int:
        return len(self.records)

    def read(self, rows: Sequence[int]) -> Iterator[EncodedImage]:
        """Yield some of the images.

        Args:
            rows: Which ones.
        """
        for row, record in zip(rows, self.records.select(rows), strict=True):
            value = record[self.column]
            content, path = (
                (value.get("bytes"), value.get("path"))
                if isinstance(value, dict)
                else (value, None)
            )
            place = f"row {row} of split {self.split!r}" + (f" ({path})" if path else "")
            if content is None and path is not None:
                content = Path(path)
            yield EncodedImage("data.image_column", place, content)


def open_named(name: str, source: str, **options: Any) -> dict[str, NamedTable]:
    """Open a data set with the ``datasets`` library.

    Args:
        name: A name on the hub, a kind of files, or a directory.
        source: What errors call it.
        options: For ``datasets.load_dataset``.

    Returns:
        The splits.

    Raises:
        FileNotFoundError: If nothing is found.
        ValueError: If what is found cannot be read.
    """
    try:
        with _quiet_datasets():
            if _is_saved(Path(name)):
                loaded = datasets.load_from_disk(name)
            else:
                loaded = datasets.load_dataset(name, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data.source: nothing found for {source!r} ({error}); expected 'digits', "
            "'parquet:PATH', 'imagefolder:PATH', a local dataset directory, or the name of a "
            "dataset that is cached or reachable"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # A RuntimeError says that a directory holds a script, which `datasets` no longer runs.
        cause = str(error.__cause__ or error) or type(error).__name__
        raise ValueError(f"data.source: cannot read {source!r}: {cause}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": NamedTable(loaded, "train")}
    if not isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"data.source: {source!r} does not hold the splits of a dataset")
    return {str(split): NamedTable(records, str(split)) for split, records in loaded.items()}


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


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
