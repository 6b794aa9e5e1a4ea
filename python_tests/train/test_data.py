"""Test the data sources (digits, Parquet files, image folders) and their error messages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

import datasets
from PIL import Image
from sklearn.datasets import load_digits

from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.data.dataset import (
    balanced_subset,
    channel_statistics,
    load_dataset,
    pretrain_indices,
    resolve_pretrain_classes,
)

COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250))


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(colour: tuple[int, ...] | int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(
    file: Path,
    labels: Sequence[Any],
    *,
    sizes: Sequence[tuple[int, int]] = ((6, 4),),
    typed: bool = True,
    encoded: Sequence[bytes] | None = None,
) -> None:
    if encoded is None:
        encoded = [png(COLOURS[row % 3], sizes[row % len(sizes)]) for row, _ in enumerate(labels)]
    records = {"picture": [{"bytes": b, "path": None} for b in encoded], "kind": list(labels)}
    features = None
    if typed:
        features = datasets.Features(
            {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(records, features=features).to_parquet(file)


def load(source: str, **options: Any) -> Any:
    return load_dataset(DataConfig(source=source, **options))


def test_digits_are_the_stratified_split() -> None:
    dataset = load("digits")
    assert dataset.train.images.shape == (1347, 1, 8, 8)
    assert dataset.test.images.shape == (450, 1, 8, 8)
    assert dataset.image_shape == (1, 8, 8)
    assert dataset.train.images.dtype == torch.uint8
    counts = torch.bincount(dataset.test.labels)
    assert counts.min() >= 43
    assert counts.max() <= 46
    original = load_digits()
    rows = {
        (image.tobytes(), label)
        for image, label in zip(
            np.rint(original.images * 255 / 16).astype(np.uint8), original.target, strict=True
        )
    }
    loaded = [
        (image.numpy().tobytes(), int(label))
        for part in (dataset.train, dataset.test)
        for image, label in zip(part.images[:, 0], part.labels, strict=True)
    ]
    assert len(loaded) == 1797
    assert set(loaded) == rows


def test_subset_is_fixed_and_balanced() -> None:
    dataset = load("digits", train_size=100, test_size=50)
    assert torch.bincount(dataset.train.labels).tolist() == [10] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [5] * 10
    repeated = load("digits", train_size=100, test_size=50)
    assert torch.equal(dataset.train.images, repeated.train.images)
    labels = torch.tensor([0] * 50 + [1] * 3)
    assert torch.bincount(labels[balanced_subset(labels, 20, key="size")]).tolist() == [17, 3]


def test_parquet_directory_with_both_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 2, 1])
    write_parquet(tmp_path / "set" / "test.parquet", [2, 0])
    dataset = load(f"parquet:{tmp_path / 'set'}")
    assert dataset.train.images.shape == (4, 3, 4, 6)
    assert dataset.train.labels.tolist() == [0, 1, 2, 1]
    assert dataset.test.labels.tolist() == [2, 0]
    assert dataset.class_names == ("a", "b", "c")
    assert [tuple(image[:, 0, 0].tolist()) for image in dataset.train.images[:3]] == list(COLOURS)


def test_single_parquet_file_is_divided_with_every_class(tmp_path: Path) -> None:
    write_parquet(tmp_path / "all.parquet", ["x", "y", "z"] * 10, typed=False)
    dataset = load(f"parquet:{tmp_path / 'all.parquet'}", label_column="kind")
    assert dataset.class_names == ("x", "y", "z")
    assert torch.bincount(dataset.train.labels).tolist() == [8, 8, 8]
    assert torch.bincount(dataset.test.labels).tolist() == [2, 2, 2]
    for part in (dataset.train, dataset.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert tuple(image[:, 0, 0].tolist()) == COLOURS[int(label)]


def test_untyped_integer_labels_are_found_and_numbered(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", [10, 20, 10, 20], typed=False)
    write_parquet(tmp_path / "set" / "test.parquet", [20], typed=False)
    dataset = load(f"parquet:{tmp_path / 'set'}")
    assert dataset.class_names == ("10", "20")
    assert dataset.test.labels.tolist() == [1]


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    encoded = [png(value, mode="L") for value in (10, 20, 30)]
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 2], encoded=encoded)
    write_parquet(tmp_path / "set" / "test.parquet", [0], encoded=encoded[:1])
    dataset = load(f"parquet:{tmp_path / 'set'}")
    assert dataset.train.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert dataset.image_shape == (1, 4, 6)


def test_image_folder_and_resizing(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for row in range(2):
                (folder / f"{row}.png").write_bytes(png(COLOURS[label], (8 + 2 * row, 8)))
    with pytest.raises(ValueError, match=r"data\.image_size.*2 different sizes.*10 x 8"):
        load(f"imagefolder:{tmp_path / 'set'}")
    dataset = load(f"imagefolder:{tmp_path / 'set'}", image_size=4)
    assert dataset.train.images.shape == (4, 3, 4, 4)
    assert dataset.class_names == ("cat", "dog")
    for image, label in zip(dataset.test.images, dataset.test.labels, strict=True):
        assert tuple(image[:, 2, 2].tolist()) == COLOURS[int(label)]


def test_local_directory_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 2, 1])
    write_parquet(tmp_path / "set" / "test.parquet", [2, 0])
    assert load(str(tmp_path / "set")).train.labels.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("parquet:absent", r"no file or directory 'absent'", id="parquet"),
        pytest.param("imagefolder:absent", r"no directory: 'absent'", id="folder"),
        pytest.param("./no-such-dataset", r"no file or directory '\./no-such-dataset'", id="path"),
    ],
)
def test_missing_source_is_named(source: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load(source)


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("dgits", "digits"),
        ("Digits", "digits"),
        ("parqet:x", "parquet:PATH"),
        ("imagefoldr:x", "imagefolder:PATH"),
    ],
)
def test_misspelt_source_is_not_looked_up(
    source: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up the name")
    )
    with pytest.raises(ValueError, match=rf"{source}.*did you mean '{nearest}'"):
        load(source)


def test_unreachable_name_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match=r"nothing found for 'owner/name' \(no route"):
        load("owner/name")


def test_directory_without_a_training_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"train\.parquet.*notes\.txt"):
        load(f"parquet:{tmp_path}")


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"data\.source: cannot read"):
        load(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"image_column": "pictures"}, r"image_column.*did you mean 'picture'", id="image"
        ),
        pytest.param({"label_column": "label"}, r"label_column.*'label'", id="label"),
        pytest.param(
            {"label_column": "picture"},
            r"label_column: expected integers.*'picture'",
            id="not-a-label",
        ),
        pytest.param(
            {"image_column": "kind"}, r"image_column: expected encoded.*'kind'", id="not-an-image"
        ),
        pytest.param({"train_size": 31}, r"train_size.*at most the 30.*31", id="size"),
    ],
)
def test_bad_column_or_size(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1, 2] * 10)
    write_parquet(tmp_path / "set" / "test.parquet", [0, 1, 2])
    with pytest.raises(ValueError, match=message):
        load(f"parquet:{tmp_path / 'set'}", **options)


def test_damaged_image_names_its_row(tmp_path: Path) -> None:
    good = png(COLOURS[0])
    for bad, message in ((b"junk", "is not an image"), (good[:-30], "is damaged")):
        write_parquet(tmp_path / "set" / "train.parquet", [0, 1], encoded=[good, bad])
        write_parquet(tmp_path / "set" / "test.parquet", [0], encoded=[good])
        with pytest.raises(ValueError, match=rf"row 1 of .*train\.parquet {message}"):
            load(f"parquet:{tmp_path / 'set'}")


def test_bad_image_of_a_divided_file_names_its_row_there(tmp_path: Path) -> None:
    encoded: list[Any] = [png(COLOURS[row % 3]) for row in range(30)]
    for row in (3, 17, 29):
        for bad in (None, b"junk"):
            damaged = [*encoded[:row], bad, *encoded[row + 1 :]]
            write_parquet(tmp_path / "all.parquet", [0, 1, 2] * 10, encoded=damaged, typed=False)
            problem = "has no image" if bad is None else "is not an image"
            with pytest.raises(ValueError, match=rf"row {row} of .*all\.parquet {problem}"):
                load(f"parquet:{tmp_path / 'all.parquet'}")


def test_null_record_names_its_row(tmp_path: Path) -> None:
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    records = {"picture": [{"bytes": png(COLOURS[0]), "path": None}, None], "kind": [0, 1]}
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(records, features=features).to_parquet(
            tmp_path / "set" / f"{split}.parquet"
        )
    with pytest.raises(ValueError, match=r"row 1 of .*train\.parquet has no image"):
        load(f"parquet:{tmp_path / 'set'}", label_column="kind")


def tiff(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="TIFF")
    return buffer.getvalue()


def load_images(tmp_path: Path, encoded: Sequence[bytes]) -> Any:
    for split in ("train", "test"):
        write_parquet(tmp_path / "set" / f"{split}.parquet", [0, 1], encoded=encoded)
    return load(f"parquet:{tmp_path / 'set'}").train.images


@pytest.mark.parametrize("encode", ["I;16", "I"])
def test_sixteen_bits_are_rescaled(encode: str, tmp_path: Path) -> None:
    values = [0, 128, 129, 257, 30000, 65535]
    wide = np.full((4, 6), values, dtype=np.uint16 if encode == "I;16" else np.int32)
    encoded = tiff(wide)
    assert Image.open(io.BytesIO(encoded)).mode == encode
    images = load_images(tmp_path, [encoded, png(7, mode="L")])
    assert images.shape == (2, 1, 4, 6)
    assert images[0, 0, 0].tolist() == [0, 0, 1, 1, 117, 255]
    assert images[1].unique().tolist() == [7]
    coloured = load_images(tmp_path, [encoded, png(COLOURS[0])])
    assert coloured[0, :, 0, 5].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [(np.full((4, 6), 0.5, np.float32), "F"), (np.full((4, 6), 70000, np.int32), "I")],
    ids=["float", "32-bit"],
)
def test_pixels_of_unknown_range_are_refused(pixels: Any, mode: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"row 1 of .*train\.parquet .*mode '{mode}'"):
        load_images(tmp_path, [png(7, mode="L"), tiff(pixels)])


def test_too_few_images_to_divide(tmp_path: Path) -> None:
    write_parquet(tmp_path / "all.parquet", [0, 0, 1])
    with pytest.raises(ValueError, match="too few images"):
        load(f"parquet:{tmp_path / 'all.parquet'}")


@pytest.mark.parametrize("option", ["image_size", "image_column", "label_column"])
def test_digits_take_no_columns_or_size(option: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{option}"):
        load("digits", **{option: 16 if option == "image_size" else "x"})


def test_pretraining_classes_select_images() -> None:
    dataset = load("digits", train_size=100, test_size=50)
    all_classes = DataConfig()
    assert resolve_pretrain_classes(all_classes, dataset) is None
    assert pretrain_indices(all_classes, dataset).tolist() == list(range(100))
    half = DataConfig(pretrain_classes="half")
    assert resolve_pretrain_classes(half, dataset) == (0, 1, 2, 3, 4)
    chosen = pretrain_indices(DataConfig(pretrain_classes=[7, 2]), dataset)
    assert sorted(dataset.train.labels[chosen].unique().tolist()) == [2, 7]
    assert len(chosen) == 20


@pytest.mark.parametrize(
    ("classes", "message"),
    [([0, 10], r"0\.\.9.*\[0, 10\]"), (list(range(10)), "must be left out")],
    ids=["unknown", "all"],
)
def test_bad_pretraining_classes(classes: list[int], message: str) -> None:
    dataset = load("digits", train_size=100, test_size=50)
    with pytest.raises(ValueError, match=message):
        resolve_pretrain_classes(DataConfig(pretrain_classes=classes), dataset)


def test_channel_statistics_match_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 5, 7), dtype=torch.uint8, generator=generator)
    images[:, 2] = 9
    rows = torch.tensor([1, 4, 9])
    mean, std = channel_statistics(images, rows)
    expected = images[rows].numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, expected.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], expected.std((0, 2, 3))[:2], rtol=1e-6)
    assert std[2] == 1.0
