"""Encoded images of any format to one uint8 tensor."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor

_PROGRESS_FROM_IMAGES = 5000


@dataclass(frozen=True)
class ImageLayout:
    """What every decoded image has in common."""

    column: str
    mode: str  # "L" or "RGB"
    size: tuple[int, int]  # width, height
    resize: bool

    @classmethod
    def of(
        cls, parts: dict[str, datasets.Dataset], column: str, image_size: int | None
    ) -> ImageLayout:
        """Find the layout of some images.

        Reads the headers alone, so that a set which does not fit fails before it is decoded.

        Args:
            parts: Rows to decode, by the name that errors call them.
            column: The image column.
            image_size: Side to resize to, or None to keep the images as they are.

        Returns:
            The layout: grey only if every image is.

        Raises:
            ValueError: If a row is no image, or sizes differ without ``image_size``.
        """
        modes, sizes = set(), set()
        for name, part in parts.items():
            for image in _open_images(part, column, name):
                modes.add(image.mode)
                sizes.add(image.size)
        if image_size is None and len(sizes) > 1:
            examples = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
            raise ValueError(
                f"data.image_size: the images have {len(sizes)} different sizes ({examples}, ...); "
                "set data.image_size to resize them all to one square"
            )
        size = sizes.pop() if image_size is None else (image_size, image_size)
        grey = all(mode in ("1", "L", "LA", "I", "I;16", "F") for mode in modes)
        return cls(column, "L" if grey else "RGB", size, image_size is not None)

    def decode(self, part: datasets.Dataset, name: str, show_progress: bool) -> Tensor:
        """Decode images.

        Args:
            part: Rows to decode.
            name: What errors and the progress bar call them.
            show_progress: Whether a large part shows a progress bar on stderr.

        Returns:
            (N, C, H, W) uint8.

        Raises:
            ValueError: If an image is damaged.
        """
        width, height = self.size
        channels = 1 if self.mode == "L" else 3
        decoded = np.empty((len(part), height, width, channels), dtype=np.uint8)
        images: Iterable[Image.Image] = _open_images(part, self.column, name)
        if show_progress and len(part) >= _PROGRESS_FROM_IMAGES:
            images = track(
                images,
                f"decoding {name} images",
                total=len(part),
                console=Console(stderr=True),
                transient=True,
            )
        for row, image in enumerate(images):
            try:
                converted = image.convert(self.mode)
            except OSError as error:
                raise ValueError(
                    f"data.source: image {row} of the {name} set is damaged: {error}"
                ) from error
            if self.resize and converted.size != self.size:
                # Crops the centre to a square first, so that nothing is distorted.
                converted = ImageOps.fit(converted, self.size, Image.Resampling.BICUBIC)
            decoded[row] = np.asarray(converted).reshape(height, width, channels)
        return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()


def _open_images(part: datasets.Dataset, column: str, name: str) -> Iterator[Image.Image]:
    for row, record in enumerate(part):
        value = record[column]
        try:
            if value["bytes"] is not None:
                yield Image.open(io.BytesIO(value["bytes"]))
            else:
                with Image.open(value["path"]) as image:
                    yield image
        except (UnidentifiedImageError, OSError, TypeError, KeyError) as error:
            raise ValueError(
                f"data.image_column: row {row} of the {name} set is not an image: {error}"
            ) from error
