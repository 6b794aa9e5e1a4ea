"""Decoding images of any format into one uint8 tensor."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from torch import Tensor

_PROGRESS_FROM_IMAGES = 5000
_LFS_POINTER = b"version https://git-lfs"
_GREY_MODES = ("1", "L", "LA", "La")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_MODE_NAMES = {"1": "black and white", "L": "grey", "P": "palette"}  # others are names already
# The transposition that turns a stored image upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class EncodedImage(NamedTuple):
    """An image before decoding."""

    key: str  # the configuration key that errors name
    place: str  # where the image is, for errors
    content: bytes | Path | None  # the file's bytes, or where they are

    @property
    def where(self) -> str:
        """How an error about the image begins."""
        return f"{self.key}: {self.place}"


# A function that yields the images of some rows, which ascend.
ReadImages = Callable[[Sequence[int]], Iterator[EncodedImage]]


@dataclass(frozen=True)
class EncodedImages:
    """Some images of a source."""

    read: ReadImages
    rows: Sequence[int]  # (N,) ascending

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[EncodedImage]:
        return self.read(self.rows)


@dataclass
class Treatment:
    """What has to be done to images so that they are alike, counted."""

    images: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width, height
    turned: int = 0
    transparent: int = 0
    several_frames: int = 0
    wide: int = 0
    largest_wide_value: int = 0
    wide_colour: int = 0
    largest_wide_colour: int = 0  # of the upper 8 bits, which Pillow keeps

    def add(self, encoded: EncodedImage) -> None:
        """Count what is special about an image, of which the header is read.

        The pixels are read too if they have more than 8 bits. A damaged image is a ValueError, and
        so are pixels of unknown range.
        """
        wide_value = wide_colour = None
        with open_image(encoded) as image:
            if image.mode == "F":
                raise ValueError(
                    f"{encoded.where} has floating-point pixels (mode 'F') of unknown range; "
                    "convert the images to 8 or 16 bits"
                )
            orientation = _orientation(image)
            width, height = image.size
            if orientation > 4 and image.format != "TIFF":
                width, height = height, width
            mode, several_frames = image.mode, _has_several_frames(image)
            transparent = mode in _ALPHA_MODES or "transparency" in image.info
            if _is_wide(mode):
                _load(image, encoded.where)
                wide_value = int(_wide_pixels(image, encoded.where).max())
            elif _is_wide_colour(image):
                _load(image, encoded.where)
                pixels = np.atleast_3d(np.asarray(image))  # (H, W, C)
                colours = pixels.shape[2] - (mode in _ALPHA_MODES)
                wide_colour = int(pixels[..., :colours].max())
        self.images += 1
        self.modes[mode] += 1
        self.sizes[width, height] += 1
        self.turned += orientation > 1
        self.transparent += transparent
        self.several_frames += several_frames
        if wide_value is not None:
            self.wide += 1
            self.largest_wide_value = max(self.largest_wide_value, wide_value)
        if wide_colour is not None:
            self.wide_colour += 1
            self.largest_wide_colour = max(self.largest_wide_colour, wide_colour)


@dataclass(frozen=True)
class ImageLayout:
    """What every decoded image has in common."""

    mode: str  # "L" or "RGB"
    size: tuple[int, int]  # width, height
    resize: bool
    bit_depth: int  # of images with more than 8 bits: the largest value becomes white
    treatment: Treatment

    @classmethod
    def of(
        cls,
        parts: Iterable[EncodedImages],
        image_size: int | None,
        bit_depth: int | None = None,
        on_damage: Callable[[str], None] | None = None,
    ) -> ImageLayout:
        """Find the layout of some images; it is grey only if every image is.

        Only the headers are read, so that a set which does not fit fails before it is decoded.
        Images with more than 8 bits are decoded, because only their values say how many bits are
        in use.

        Args:
            parts: Images to decode.
            image_size: Side to resize to, or None to keep the images as they are.
            bit_depth: Bits in use of images with more than 8 bits, or None to find it out.
            on_damage: Called with the message of an image that cannot be opened, which is then
                left out. Default: the message is raised.

        Raises:
            ValueError: If a row is no image or holds pixels of unknown range, or sizes differ
                without ``image_size``.
        """
        treatment = Treatment()
        with _quiet_pillow():
            for image in (image for part in parts for image in part):
                try:
                    treatment.add(image)
                except ValueError as error:
                    if on_damage is None:
                        raise
                    on_damage(str(error))
        if not treatment.images:
            raise ValueError("data.source: none of the images can be opened")
        if image_size is None and len(treatment.sizes) > 1:
            examples = ", ".join(f"{w} x {h}" for w, h in sorted(treatment.sizes)[:3])
            raise ValueError(
                f"data.image_size: the images have {len(treatment.sizes)} different sizes "
                f"({examples}{', ...' if len(treatment.sizes) > 3 else ''}); set data.image_size "
                "to resize them all to one square"
            )
        _check_colour_depth(treatment, bit_depth)
        size = next(iter(treatment.sizes)) if image_size is None else (image_size, image_size)
        grey = all(mode in _GREY_MODES or _is_wide(mode) for mode in treatment.modes)
        return cls(
            mode="L" if grey else "RGB",
            size=size,
            resize=image_size is not None,
            bit_depth=bit_depth or max(8, treatment.largest_wide_value.bit_length()),
            treatment=treatment,
        )

    def decode(self, part: EncodedImages, name: str, show_progress: bool) -> Tensor:
        """Decode images to (N, C, H, W) uint8.

        Args:
            part: Images to decode.
            name: ``"train"`` or ``"test"``.
            show_progress: Whether a large part shows a progress bar on stderr.

        Raises:
            ValueError: If an image is damaged or does not fit the layout, or the memory does not
                suffice.
        """
        width, height = self.size
        channels = 1 if self.mode == "L" else 3
        try:
            decoded = np.empty((len(part), height, width, channels), dtype=np.uint8)
        except MemoryError as error:
            raise ValueError(
                f"data.image_size: {len(part)} images of {width} x {height} pixels do not fit "
                f"into memory: {error}; choose a smaller data.image_size or data.{name}_size"
            ) from error
        with _quiet_pillow():
            for row, image in enumerate(_tracked(part, name, show_progress)):
                decoded[row] = np.asarray(self._decode(image)).reshape(height, width, channels)
        return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()

    def find_damage(
        self, part: EncodedImages, name: str, show_progress: bool, on_damage: Callable[[str], None]
    ) -> None:
        """Decode every image, keep none, and report the message of each damaged one."""
        with _quiet_pillow():
            for image in _tracked(part, name, show_progress):
                try:
                    self._decode(image)
                except ValueError as error:
                    on_damage(str(error))

    def _decode(self, encoded: EncodedImage) -> Image.Image:
        where = encoded.where
        with open_image(encoded) as image:
            # Pillow turns TIFF files upright by itself.
            upright = None if image.format == "TIFF" else _UPRIGHT.get(_orientation(image))
            _load(image, where)
            narrow = self._to_eight_bits(image, where) if _is_wide(image.mode) else image
            try:
                converted = narrow.convert(self.mode)
            except ValueError as error:
                raise ValueError(
                    f"{where} has pixels of mode {image.mode!r}, which Pillow cannot convert to "
                    f"{self.mode!r}: {error}"
                ) from error
        if upright is not None:
            converted = converted.transpose(upright)
        if self.resize and converted.size != self.size:
            # This crops the centre to a square first, so that nothing is distorted.
            converted = ImageOps.fit(converted, self.size, Image.Resampling.BICUBIC)
        if converted.size != self.size:
            raise ValueError(
                f"{where} has {converted.size[0]} x {converted.size[1]} pixels once it is decoded, "
                f"its header says {self.size[0]} x {self.size[1]}"
            )
        return converted

    def _to_eight_bits(self, image: Image.Image, where: str) -> Image.Image:
        """Rescale the values, because Pillow's own conversion clips them at 255."""
        pixels, largest = _wide_pixels(image, where), 2**self.bit_depth - 1
        if pixels.max() > largest:
            raise ValueError(
                f"data.bit_depth: expected values of at most {largest}, which {self.bit_depth} "
                f"bits hold, {where.partition(': ')[2]} has {pixels.max()}"
            )
        return Image.fromarray(np.rint(pixels / (largest / 255)).astype(np.uint8))


@contextmanager
def open_image(encoded: EncodedImage) -> Iterator[Image.Image]:
    """Open an image; only its header is read.

    Where there is no image that Pillow can read, a ValueError says where.
    """
    where, content = encoded.where, encoded.content
    if content is None:
        raise ValueError(f"{where} has no image, it is null")
    try:
        if isinstance(content, bytes):
            image = Image.open(io.BytesIO(content))
        else:
            image = Image.open(content)
    except UnidentifiedImageError as error:
        cause = why_unreadable(content)
        what = f": it {cause}" if cause else " that Pillow can read"
        raise ValueError(f"{where} is not an image{what}") from error
    except OSError as error:
        what = f"cannot be read: {error.strerror}" if error.strerror else f"is damaged: {error}"
        raise ValueError(f"{where} {what}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{where} is refused: {error}; remove the file or make it smaller"
        ) from error
    except Exception as error:
        # Pillow's readers fail on damaged headers with whatever their parsing raises.
        raise ValueError(f"{where} is damaged: {error}") from error
    with image:
        yield image


def treatment_lines(layout: ImageLayout) -> list[str]:
    """Say in sentences how images that differ are made alike."""
    treatment, (width, height) = layout.treatment, layout.size
    lines = []
    others = treatment.images - treatment.sizes[layout.size]
    if others:
        sizes = sorted(size for size in treatment.sizes if size != layout.size)
        span = " to ".join(f"{w} x {h}" for w, h in dict.fromkeys((sizes[0], sizes[-1])))
        cropped = sum(count for (w, h), count in treatment.sizes.items() if w != h)
        crop = f", {cropped:,} of them after cutting out their central square" if cropped else ""
        lines.append(
            f"{_images(others)} of another size ({span}) {_are(others)} resized to "
            f"{width} x {height} pixels{crop}."
        )
    converted = Counter[str]()
    for mode, count in treatment.modes.items():
        base = mode.rstrip("Aa") if mode in _ALPHA_MODES else mode
        if base != layout.mode and not (_is_wide(mode) and layout.mode == "L"):
            converted[_MODE_NAMES.get(base, "grey of 16 bits" if _is_wide(mode) else base)] += count
    if converted:
        target = "grey" if layout.mode == "L" else "colour (RGB)"
        what = ", ".join(f"{count:,} {name}" for name, count in sorted(converted.items()))
        lines.append(f"Images that are converted to {target}: {what}.")
    changes = {
        f"{_are(treatment.turned)} turned upright as their EXIF orientation says": treatment.turned,
        "may be transparent: the transparency is dropped, the colours below it are kept": (
            treatment.transparent
        ),
        "with several frames or pages: the first one is taken": treatment.several_frames,
        f"of more than 8 bits: the largest value is {treatment.largest_wide_value}, "
        f"{layout.bit_depth} bits are taken to be in use (data.bit_depth), and "
        f"0..{2**layout.bit_depth - 1} becomes 0..255": treatment.wide,
        "of 16 bits per colour: the upper 8 bits are kept": treatment.wide_colour,
    }
    lines += [f"{_images(count)} {change}." for change, count in changes.items() if count]
    return lines


def _check_colour_depth(treatment: Treatment, bit_depth: int | None) -> None:
    """Refuse 16-bit colours of which Pillow would keep a few bits only."""
    if not treatment.wide_colour or bit_depth == 16:
        return
    used = 8 + treatment.largest_wide_colour.bit_length()
    if bit_depth is not None or used < 16:
        raise ValueError(
            "data.bit_depth: of colour images with 16 bits Pillow keeps only the upper 8, and "
            f"{bit_depth or used} bits are in use; convert the images to 8 bits, or set "
            "data.bit_depth to 16 if they are only dark"
        )


def _load(image: Image.Image, where: str) -> None:
    try:
        image.load()
    except Exception as error:
        # A damaged file can make Pillow's readers fail in any way.
        raise ValueError(f"{where} is damaged: {error}") from error


def _is_wide(mode: str) -> bool:
    return mode == "I" or mode.startswith("I;16")


def _is_wide_colour(image: Image.Image) -> bool:
    return any(
        ";16" in str(argument)
        for tile in getattr(image, "tile", ())
        for argument in (tile.args if isinstance(tile.args, tuple) else (tile.args,))
    )


def _wide_pixels(image: Image.Image, where: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 2**16 - 1:
        raise ValueError(
            f"{where} has 32-bit pixels (mode {image.mode!r}), expected values 0..{2**16 - 1}, got "
            f"{pixels.min()}..{pixels.max()}"
        )
    return pixels


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 without one, of an image that is not loaded yet."""
    exif_keys = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")
    if image.format == "PNG" and not any(key in image.info for key in exif_keys):
        return 1  # Pillow would decode the image to look behind its pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in _UPRIGHT else 1
    except Exception:
        return 1  # other programs ignore metadata that cannot be read, too


def _has_several_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        return False  # only the first frame is used, and decoding shows whether it is damaged


def why_unreadable(content: bytes | Path) -> str | None:
    """Say why a file holds no data: the end of a sentence, or None if that is not known."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            content = file.read(32)
    if not content:
        return "is empty"
    if content.startswith(_LFS_POINTER):
        return "is a pointer of Git LFS; fetch the files with `git lfs pull`"
    return None


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings, which name no file; an image that is damaged is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _tracked(part: EncodedImages, name: str, show_progress: bool) -> Iterable[EncodedImage]:
    if not show_progress or len(part) < _PROGRESS_FROM_IMAGES:
        return part
    return track(
        part,
        f"decoding {name} images",
        total=len(part),
        console=Console(stderr=True),
        transient=True,
    )


def _images(count: int) -> str:
    return f"{count:,} image" + ("" if count == 1 else "s")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
