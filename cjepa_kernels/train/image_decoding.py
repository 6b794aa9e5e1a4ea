"""Encoded images of any format to one uint8 tensor."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

_PROGRESS_FROM_IMAGES = 5000
_SIXTEEN_BITS = 2**16 - 1


@dataclass(frozen=True)
class EncodedImages:
    """Images before decoding, and where in the source each one is."""

    records: datasets.Dataset
    column: str
    split: str  # of the source
    rows: Sequence[int]  # (N,) row of each record in that split

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield each image, opened, with the place that errors name."""
        for row, record in zip(self.rows, self.records, strict=True):
            place, value = f"row {row} of split {self.split!r}", record[self.column]
            if value is None or (value["bytes"] is None and value["path"] is None):
                raise ValueError(f"data.image_column: {place} has no image, it is null")
            if value["path"] is not None:
                place += f" ({value['path']})"
            try:
                if value["bytes"] is not None:
                    yield place, Image.open(io.BytesIO(value["bytes"]))
                else:
                    with Image.open(value["path"]) as image:
                        yield place, image
            except OSError as error:
                raise ValueError(f"data.image_column: {place} is not an image: {error}") from error


@dataclass(frozen=True)
class ImageLayout:
    """What every decoded image has in common."""

    mode: str  # "L" or "RGB"
    size: tuple[int, int]  # width, height
    resize: bool

    @classmethod
    def of(cls, parts: Iterable[EncodedImages], image_size: int | None) -> ImageLayout:
        """Find the layout of some images.

        Reads the headers alone, so that a set which does not fit fails before it is decoded.

        Args:
            parts: Images to decode.
            image_size: Side to resize to, or None to keep the images as they are.

        Returns:
            The layout: grey only if every image is.

        Raises:
            ValueError: If a row is no image or holds floating-point pixels, or sizes differ
                without ``image_size``.
        """
        modes, sizes = set(), set()
        for part in parts:
            for place, image in part:
                if image.mode == "F":
                    raise ValueError(
                        f"data.image_column: {place} has floating-point pixels (mode 'F') of "
                        "unknown range; convert the images to 8 or 16 bits"
                    )
                modes.add(image.mode)
                sizes.add(image.size)
        if image_size is None and len(sizes) > 1:
            examples = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
            raise ValueError(
                f"data.image_size: the images have {len(sizes)} different sizes ({examples}, ...); "
                "set data.image_size to resize them all to one square"
            )
        size = sizes.pop() if image_size is None else (image_size, image_size)
        grey = all(mode in ("1", "L", "LA") or _is_wide(mode) for mode in modes)
        return cls("L" if grey else "RGB", size, image_size is not None)

    def decode(self, part: EncodedImages, name: str, show_progress: bool) -> Tensor:
        """Decode images; 16-bit pixels are rescaled to 8 bits.

        Args:
            part: Images to decode.
            name: What the progress bar calls them.
            show_progress: Whether a large part shows a progress bar on stderr.

        Returns:
            (N, C, H, W) uint8.

        Raises:
            ValueError: If an image is damaged or has more than 16 bits.
        """
        width, height = self.size
        channels = 1 if self.mode == "L" else 3
        decoded = np.empty((len(part), height, width, channels), dtype=np.uint8)
        images: Iterable[tuple[str, Image.Image]] = part
        if show_progress and len(part) >= _PROGRESS_FROM_IMAGES:
            images = track(
                images,
                f"decoding {name} images",
                total=len(part),
                console=Console(stderr=True),
                transient=True,
            )
        for row, (place, image) in enumerate(images):
            try:
                image.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"data.image_column: {place} is damaged: {error}") from error
            if _is_wide(image.mode):
                image = _to_eight_bits(image, place)
            converted = image.convert(self.mode)
            if self.resize and converted.size != self.size:
                # Crops the centre to a square first, so that nothing is distorted.
                converted = ImageOps.fit(converted, self.size, Image.Resampling.BICUBIC)
            decoded[row] = np.asarray(converted).reshape(height, width, channels)
        return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()


def _is_wide(mode: str) -> bool:
    return mode == "I" or mode.startswith("I;16")


def _to_eight_bits(image: Image.Image, place: str) -> Image.Image:
    """Rescale; Pillow's own conversion clips at 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > _SIXTEEN_BITS:
        raise ValueError(
            f"data.image_column: {place} has 32-bit pixels (mode {image.mode!r}), expected values "
            f"0..{_SIXTEEN_BITS}, got {pixels.min()}..{pixels.max()}"
        )
    return Image.fromarray(np.rint(pixels / (_SIXTEEN_BITS / 255)).astype(np.uint8))
