"""Images and labels of Parquet files, which are read in pieces and never copied on disk."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cjepa_kernels.train.data.columns import columns_of, encoded_image
from cjepa_kernels.train.data.folder_listing import walk_files
from cjepa_kernels.train.data.image_decoding import EncodedImage, why_unreadable
from cjepa_kernels.train.data.split_names import listed, split_files

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetTable:
    """The rows of several Parquet files, one after the other."""

    files: tuple[Path, ...]
    lengths: tuple[int, ...]  # rows of each file
    schema: pa.Schema

    @classmethod
    def open(cls, files: Sequence[Path]) -> ParquetTable:
        """Read the schemas of some files; their rows are not read yet.

        A file that cannot be read, or that has other columns than the first one, is a ValueError.
        """
        lengths, schemas = [], []
        for file in files:
            with _clear_errors(file), pq.ParquetFile(file) as opened:
                lengths.append(opened.metadata.num_rows)
                schemas.append(opened.schema_arrow)
            names = schemas[-1].names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"data.source: {str(file)!r} has several columns {listed(twice)}")
            here, first = columns_of(schemas[-1]), columns_of(schemas[0])
            if set(here) != set(first):
                raise ValueError(
                    f"data.source: the columns of {str(file)!r} are {listed(here)}, those of "
                    f"{str(files[0])!r} are {listed(first)}; expected the same, with the same "
                    "names of classes"
                )
        return cls(tuple(files), tuple(lengths), schemas[0])

    def __len__(self) -> int:
        return sum(self.lengths)

    def values(self, column: str) -> list[Any]:
        """Read a whole column, one Python value a row."""
        values: list[Any] = []
        for file in self.files:
            with _clear_errors(file):
                values += pq.read_table(file, columns=[column]).column(column).to_pylist()
        return values

    def read_images(self, column: str, rows: Sequence[int]) -> Iterator[EncodedImage]:
        """Yield the images of some rows, which ascend, of a column."""
        first = 0
        for file, length in zip(self.files, self.lengths, strict=True):
            begin, end = bisect_left(rows, first), bisect_left(rows, first + length)
            yield from _images_of_file(file, column, [row - first for row in rows[begin:end]])
            first += length


def _images_of_file(file: Path, column: str, rows: Sequence[int]) -> Iterator[EncodedImage]:
    if not rows:
        return
    wanted, first = iter(rows), 0
    row = next(wanted)
    with _clear_errors(file), pq.ParquetFile(file) as opened:
        for piece in opened.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
            values = piece.column(column)
            while row < first + len(values):
                yield encoded_image(values[row - first].as_py(), f"row {row} of {file}")
                if (row := next(wanted, -1)) < 0:
                    return
            first += len(values)


def find_parquet_files(location: Path) -> dict[str, list[Path]]:
    """Find the Parquet files of each split of a file or folder; a file is ``"train"``.

    A location without any is a FileNotFoundError. Files whose splits are not clear are a
    ValueError.
    """
    if location.is_file():
        return {"train": [location]}
    if not location.is_dir():
        raise FileNotFoundError(f"data.source: no file or directory {str(location)!r}")
    everything = list(walk_files(location, {}))
    files = [file for file in everything if file.suffix.lower() == ".parquet"]
    if not files:
        names = listed(str(file.relative_to(location)) for file in everything)
        raise FileNotFoundError(
            f"data.source: expected train.parquet (and test.parquet) in {str(location)!r}, found "
            f"{names}"
        )
    return split_files(location, files, ".parquet")


@contextmanager
def _clear_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        cause = why_unreadable(file)
        reason = f"the file {cause}" if cause else lines[0]
        raise ValueError(f"data.source: cannot read {str(file)!r}: {reason}") from error
