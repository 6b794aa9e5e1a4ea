"""Small image files, image folders and Parquet files that tests write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode(image: Image.Image | np.ndarray[Any, Any], kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG file of one grey value."""
    return encode(Image.new("L", size, value))


def png_chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_file(width: int, height: int, *, bits: int, colour_type: int, rows: bytes) -> bytes:
    """Assemble a PNG file that Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def write_folder(root: Path, images: Mapping[str, Iterable[int]]) -> Path:
    """Write grey images: each folder gets one file 0.png, 1.png, ... for each grey value."""
    for folder, values in images.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for row, value in enumerate(values):
            (root / folder / f"{row}.png").write_bytes(grey(value))
    return root


def write_table(
    file: Path,
    values: Sequence[int],
    *,
    image: str = "image",
    bare: bool = False,
    **columns: Sequence[Any],
) -> Path:
    """Write a Parquet file of grey images and other columns."""
    encoded = [grey(value) for value in values]
    content: dict[str, Any] = {
        image: encoded if bare else [{"bytes": data, "path": None} for data in encoded],
        **columns,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(content), file)
    return file


def grey_values(part: Any, class_names: Sequence[str]) -> dict[str, list[int]]:
    """The grey values that were read for the images of each class."""
    values: dict[str, list[int]] = {}
    for image, label in zip(part.images, part.labels.tolist(), strict=True):
        values.setdefault(class_names[label], []).append(int(image[0, 0, 0]))
    return values
