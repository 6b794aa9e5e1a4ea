"""Test how images of every mode and bit depth are decoded, and how damaged images are reported."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from image_sets import encode, grey, png_chunk, png_file
from PIL import Image

from cjepa_kernels.train.config import DataConfig, config_from_dict
from cjepa_kernels.train.data.dataset import load_dataset
from cjepa_kernels.train.data.summary import inspect_data

TWELVE_BITS = np.tile(np.array([0, 16, 1000, 2048, 4000, 4095], np.uint16), (4, 1))
AS_EIGHT_BITS = [0, 1, 62, 128, 249, 255]


def write(tmp_path: Path, *files: bytes, suffix: str = "png") -> str:
    """Write a folder of two classes with the same images in both splits, and return its source."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for row, content in enumerate(files):
                (folder / f"{row}.{suffix}").write_bytes(content)
    return f"imagefolder:{tmp_path / 'set'}"


def read(source: str, **options: Any) -> tuple[np.ndarray[Any, Any], str]:
    """Return the training images of the first class, (N, H, W, C), and the notes on them."""
    dataset = load_dataset(DataConfig(source=source, **options))
    images = dataset.train.images[dataset.train.labels == 0]
    return images.permute(0, 2, 3, 1).numpy(), "\n".join(dataset.reading.notes)


def error_message(source: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"^data\.") as raised:
        load_dataset(DataConfig(source=source, **options))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", "int32")],
    ids=["png", "tiff", "I"],
)
def test_twelve_bits_in_sixteen_keep_their_range(tmp_path: Path, kind: str, dtype: str) -> None:
    wide = encode(TWELVE_BITS.astype(dtype), kind)
    images, notes = read(write(tmp_path, wide, grey(7, (6, 4))))
    assert images[0, 0, :, 0].tolist() == AS_EIGHT_BITS
    assert np.unique(images[1]).tolist() == [7]
    assert "4 images of more than 8 bits: the largest value is 4095, 12 bits" in notes
    colour = encode(Image.new("RGB", (6, 4), (1, 2, 3)))
    images, _ = read(write(tmp_path, wide, colour))
    assert images[0, 0].tolist() == [[value] * 3 for value in AS_EIGHT_BITS]


def test_one_scale_for_all_images(tmp_path: Path) -> None:
    # A dark image stays dark next to an image that uses all twelve bits.
    dark = np.full((4, 6), 16, np.uint16)
    images, _ = read(write(tmp_path, encode(dark), encode(TWELVE_BITS)))
    assert np.unique(images[0]).tolist() == [1]


def test_bit_depth_can_be_said(tmp_path: Path) -> None:
    source = write(tmp_path, encode(TWELVE_BITS))
    images, notes = read(source, bit_depth=16)
    assert images[0, 0, :, 0].tolist() == [0, 0, 4, 8, 16, 16]
    assert "16 bits" in notes
    message = error_message(source, bit_depth=10)
    assert message.startswith("data.bit_depth: expected values of at most 1023")
    assert "train/a/0.png has 4095" in message
    with pytest.raises(ValueError, match=r"data\.bit_depth"):
        load_dataset(DataConfig(source="digits", bit_depth=12))


def test_big_endian_tiff(tmp_path: Path) -> None:
    height, width = TWELVE_BITS.shape
    tags = (
        (256, 4, width), (257, 4, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 134),
        (277, 3, 1), (278, 4, height), (279, 4, 2 * height * width), (339, 3, 1),
    )  # fmt: skip
    entries = b"".join(
        tag.to_bytes(2, "big")
        + kind.to_bytes(2, "big")
        + (1).to_bytes(4, "big")
        + (value << 16 if kind == 3 else value).to_bytes(4, "big")
        for tag, kind, value in tags
    )
    content = b"MM\0*\0\0\0\x08" + len(tags).to_bytes(2, "big") + entries + bytes(4)
    file = content + TWELVE_BITS.astype(">u2").tobytes()
    images, _ = read(write(tmp_path, file, suffix="tif"))
    assert images[0, 0, :, 0].tolist() == AS_EIGHT_BITS


@pytest.mark.parametrize(("channels", "colour_type"), [(3, 2), (2, 4), (4, 6)])
def test_sixteen_bit_colours(tmp_path: Path, channels: int, colour_type: int) -> None:
    def file(value: int) -> bytes:
        pixels = np.full((4, 6, channels), value, ">u2")
        if channels in (2, 4):
            pixels[..., -1] = 65535
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        return png_file(6, 4, bits=16, colour_type=colour_type, rows=rows)

    images, notes = read(write(tmp_path, file(40000)))
    assert np.unique(images).tolist() == [40000 >> 8]
    assert "4 images of 16 bits per colour" in notes
    source = write(tmp_path, file(4000))
    message = error_message(source)
    assert message.startswith("data.bit_depth: of colour images with 16 bits")
    assert "12 bits are in use" in message
    assert np.unique(read(source, bit_depth=16)[0]).tolist() == [4000 >> 8]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = np.arange(4 * 6, dtype=np.uint8).reshape(4, 6) * 10
    # Each entry is how a camera with this EXIF orientation stores the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    colour = np.repeat(stored[..., None], 3, axis=2)
    options = {"lossless": True} if kind == "WEBP" else {}
    source = write(tmp_path, encode(colour, kind, exif=exif, **options), suffix=kind.lower())
    images, notes = read(source)
    assert np.array_equal(images[0, ..., 0], upright)
    assert ("4 images are turned upright" in notes) == (orientation > 1)


def test_exif_orientation_decides_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    stored = encode(np.zeros((4, 6), np.uint8), "JPEG", exif=exif)
    images, _ = read(
        write(tmp_path, stored, encode(np.zeros((6, 4), np.uint8), "JPEG"), suffix="jpg")
    )
    assert images.shape == (2, 6, 4, 1)
    garbage = encode(np.zeros((4, 6), np.uint8), "JPEG", exif=b"Exif\0\0garbage garbage")
    assert read(write(tmp_path, garbage, garbage, suffix="jpg"))[0].shape == (2, 4, 6, 1)


@pytest.mark.parametrize(
    ("image", "kind", "pixel", "note"),
    [
        (Image.new("L", (6, 4), 9), "PNG", [9], ""),
        (Image.new("1", (6, 4), 1), "PNG", [255], "converted to grey: 4 black and white"),
        (Image.new("LA", (6, 4), (9, 0)), "PNG", [9], "4 images may be transparent"),
        (Image.new("RGBA", (6, 4), (1, 2, 3, 0)), "PNG", [1, 2, 3], "4 images may be transparent"),
        (Image.new("RGB", (6, 4), (1, 2, 3)).convert("P"), "PNG", None, "(RGB): 4 palette"),
        (Image.new("RGBA", (6, 4), (10, 20, 30, 0)), "GIF", [10, 20, 30], "may be transparent"),
        (Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "TIFF", [255, 0, 0], "(RGB): 4 CMYK"),
        (Image.new("YCbCr", (6, 4), (100, 128, 128)), "TIFF", [100] * 3, "(RGB): 4 YCbCr"),
    ],
    ids=["L", "1", "LA", "RGBA", "P", "transparent-gif", "CMYK", "YCbCr"],
)
def test_modes(
    tmp_path: Path, image: Image.Image, kind: str, pixel: list[int] | None, note: str
) -> None:
    images, notes = read(write(tmp_path, encode(image, kind), suffix=kind.lower()))
    expected = pixel or list(image.convert("RGB").getpixel((0, 0)))
    assert images[0, 0, 0].tolist() == expected
    assert note in notes
    assert bool(notes) == bool(note)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_is_taken(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), (value, 0, 0)) for value in (50, 100, 150)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    images, notes = read(write(tmp_path, file, suffix=kind.lower()))
    assert images[0, 0, 0].tolist() == [50, 0, 0]
    assert "4 images with several frames or pages: the first one is taken." in notes


def test_other_sizes_are_resized_and_said(tmp_path: Path) -> None:
    source = write(tmp_path, grey(7, (6, 4)), grey(9, (8, 8)), grey(11, (4, 4)))
    images, notes = read(source, image_size=4)
    assert images.shape == (3, 4, 4, 1)
    assert [int(image[0, 0, 0]) for image in images] == [7, 9, 11]
    assert notes == (
        "8 images of another size (6 x 4 to 8 x 8) are resized to 4 x 4 pixels, 4 of them after "
        "cutting out their central square."
    )
    assert "3 different sizes (4 x 4, 6 x 4, 8 x 8)" in error_message(source)


NOISE = np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8)
GOOD = encode(NOISE)
TEXT = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2_000_000))
DAMAGED = {
    "bomb": (
        png_file(20000, 20000, bits=8, colour_type=2, rows=b""),
        "is refused: Image size (400000000 pixels)",
    ),
    "text": (GOOD[:33] + TEXT + GOOD[33:], "is damaged: Decompressed data too large"),
    "text-after-pixels": (GOOD[:-12] + TEXT + GOOD[-12:], "is damaged: Decompressed data too"),
    "truncated": (GOOD[:-900], "is damaged: image file is truncated"),
    "truncated-jpeg": (encode(NOISE, "JPEG")[:-500], "is damaged: image file is truncated"),
    "empty": (b"", "is not an image: it is empty"),
    "text-file": (b"hello", "is not an image that Pillow can read"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "fetch the files with `git lfs pull`"),
    "header": (GOOD[:20], "is damaged: Truncated File Read"),
    "float": (encode(np.zeros((4, 6), np.float32), "TIFF"), "has floating-point pixels"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.filterwarnings("error")
def test_damage_names_the_file(tmp_path: Path, kind: str) -> None:
    content, words = DAMAGED[kind]
    source = write(tmp_path, GOOD)
    bad = tmp_path / "set" / "test" / "b" / "bad.png"
    bad.write_bytes(content)
    message = error_message(source, image_size=8)
    assert message.startswith(f"data.source: {bad} ")
    assert words in message


@pytest.mark.filterwarnings("error")
def test_large_images_give_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The images have 2400 pixels. For more than 1500 Pillow warns, for more than 3000 it refuses.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    assert read(write(tmp_path, GOOD), image_size=4)[0].shape == (1, 4, 4, 3)


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, GOOD)
    bad = tmp_path / "set" / "train" / "b" / "0.png"
    image_open = Image.open

    def refuse(file: Any) -> Image.Image:
        if file == bad:
            raise PermissionError(13, "Permission denied", str(file))
        return image_open(file)

    monkeypatch.setattr(Image, "open", refuse)
    assert error_message(source) == f"data.source: {bad} cannot be read: Permission denied"


def test_verification_finds_every_damaged_image(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD)
    expected = set()
    for name, (content, words) in DAMAGED.items():
        file = tmp_path / "set" / ("train" if "t" in name else "test") / "a" / f"{name}.png"
        file.write_bytes(content)
        expected.add((str(file), words))
    config = config_from_dict({"data": {"source": source, "image_size": 8}})
    messages: list[str] = []
    inspected = inspect_data(config, verify=True, on_damage=messages.append)
    assert inspected.damage == tuple(messages)
    assert len(messages) == len(DAMAGED)
    for file, words in expected:
        assert sum(file in message and words in message for message in messages) == 1
    assert (
        inspect_data(
            config_from_dict({"data": {"source": write(tmp_path / "good", GOOD)}}), verify=True
        ).damage
        == ()
    )
