"""Data sets that the ``datasets`` library opens: by name, or in its own formats on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from cjepa_kernels.train.data.columns import encoded_image
from cjepa_kernels.train.data.folder_listing import is_saved
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
        """Read a whole column, one Python value a row."""
        return list(self.records.select_columns([column])[column])

    def read_images(self, column: str, rows: Sequence[int]) -> Iterator[EncodedImage]:
        """Yield the images of some rows of a column."""
        records = self.records.select_columns([column])
        if isinstance(records.features[column], datasets.Image):
            records = records.cast_column(column, datasets.Image(decode=False))
        for row, record in zip(rows, records.select(rows), strict=True):
            yield encoded_image(record[column], f"row {row} of split {self.split!r}")


def open_named(name: str, source: str, **options: Any) -> dict[str, NamedTable]:
    """Open the splits of a data set with the ``datasets`` library.

    Args:
        name: A name on the hub, a kind of files, or a directory.
        source: The name of the source in errors.
        options: Options of ``datasets.load_dataset``.

    Raises:
        FileNotFoundError: If nothing is found.
        ValueError: If the data set cannot be read.
    """
    try:
        with _quiet_datasets():
            if is_saved(Path(name)):
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
