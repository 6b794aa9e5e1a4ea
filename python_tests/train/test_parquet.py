"""Test how Parquet files are read: their splits, image and label columns, and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasets")

import datasets
from image_sets import grey, grey_values, write_table

from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.data.dataset import load_dataset

TWO_CLASSES = ["x", "y"] * 5


def read(source: Path | str, **options: Any) -> Any:
    return load_dataset(DataConfig(source=f"parquet:{source}", **options))


def values_of(source: Path | str, **options: Any) -> tuple[Any, Any]:
    dataset = read(source, **options)
    return tuple(grey_values(p, dataset.class_names) for p in (dataset.train, dataset.test))


def error_message(source: Path | str, **options: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read(source, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


def write_split(folder: Path, names: list[str]) -> Path:
    """Write files of two images each, with grey values that increase from file to file."""
    for number, name in enumerate(names):
        write_table(folder / name, [2 * number, 2 * number + 1], label=["x", "y"])
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "test.parquet"],
        ["Training.parquet", "Testing.parquet"],
        ["train.parquet", "validation.parquet"],
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
        ["plain_text/train-00000-of-00001.parquet", "plain_text/val-00000-of-00001.parquet"],
        [
            "data/train-00000-of-00001-0123456789abcdef.parquet",
            "data/test-00000-of-00001-fedcba9876543210.parquet",
        ],
        ["default/train/0000.parquet", "default/test/0000.parquet"],
        ["Train/part-0.parquet", "Valid/part-0.parquet"],
        ["train-station.parquet", "test-tube.parquet"],
    ],
    ids=lambda names: names[0],
)
def test_layouts_of_two_splits(tmp_path: Path, names: list[str]) -> None:
    root = write_split(tmp_path, names)
    assert values_of(root) == ({"x": [0], "y": [1]}, {"x": [2], "y": [3]})
    by_path = load_dataset(DataConfig(source=str(root)))
    assert grey_values(by_path.test, by_path.class_names) == {"x": [2], "y": [3]}


def test_shards_follow_one_another(tmp_path: Path) -> None:
    names = [f"train-{n:05d}-of-00012.parquet" for n in range(12)]
    root = write_split(tmp_path, [*names, "test.parquet"])
    train, test = values_of(root)
    assert train == {"x": list(range(0, 24, 2)), "y": list(range(1, 24, 2))}
    assert test == {"x": [24], "y": [25]}
    chosen = read(root, train_size=6).train
    assert len(chosen.labels) == 6
    assert [int(image[0, 0, 0]) % 2 for image in chosen.images] == chosen.labels.tolist()
    (root / names[7]).unlink()
    assert "every file of one numbered set, each once, found train-00000" in error_message(root)


def test_numbered_files_without_a_split_are_one_set(tmp_path: Path) -> None:
    train, test = values_of(write_split(tmp_path, [f"part-{n}.parquet" for n in range(5)]))
    assert sorted(train["x"] + test["x"]) == [0, 2, 4, 6, 8]
    assert (len(test["x"]), len(test["y"])) == (1, 1)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train.parquet", "heldout.parquet"], "found heldout.parquet, train.parquet"),
        (["cifar_train.parquet", "cifar_test.parquet"], "found cifar_test.parquet, cifar_train"),
        (["a/train.parquet", "b/train.parquet"], "several folders with .parquet files: a, b"),
        (["train.parquet", "old/test.parquet"], "beside folders with more of them"),
        (["test.parquet"], "no split 'train', only test"),
        (["train.parquet", "training.parquet"], "both 'train' and 'training'"),
        (["train.parquet", "train-00000-of-00001.parquet"], "every file of one numbered set"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_unclear_is_shown(tmp_path: Path, names: list[str], words: str) -> None:
    assert words in error_message(write_split(tmp_path, names))


def test_every_character_of_a_path_stands_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["train.parquet", "test.parquet"]
    expected = ({"x": [0], "y": [1]}, {"x": [2], "y": [3]})
    assert values_of(write_split(tmp_path / "we[i]*?", names)) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    write_split(tmp_path / "set", names)
    assert values_of("~/set") == expected
    file = write_table(tmp_path / "x[1].parquet", range(10), label=TWO_CLASSES)
    write_table(tmp_path / "x1.parquet", range(100, 110), label=TWO_CLASSES)
    train, test = values_of(file)
    assert sorted(train["x"] + test["x"]) == [0, 2, 4, 6, 8]


def test_the_label_is_taken_and_not_the_only_integer(tmp_path: Path) -> None:
    file = write_table(tmp_path / "t.parquet", range(10), id=list(range(10)), label=TWO_CLASSES)
    dataset = read(file)
    assert dataset.class_names == ("x", "y")
    assert dataset.reading.label_column == "label"
    assert dataset.reading.image_column == "image"
    assert dataset.reading.ignored_columns == ("id",)
    assert dataset.reading.labels_from == "the column 'label' (string)"


@pytest.mark.parametrize("name", ["label", "labels", "fine_label", "class", "target", "Label"])
@pytest.mark.parametrize(
    "values", [TWO_CLASSES, [3, 4] * 5, [True, False] * 5], ids=["str", "int", "bool"]
)
def test_usual_names_of_labels(tmp_path: Path, name: str, values: list[Any]) -> None:
    columns = {name: values, "number": list(range(10)), "caption": ["text"] * 10}
    dataset = read(write_table(tmp_path / "t.parquet", range(10), **columns))
    assert dataset.reading.label_column == name
    assert dataset.class_names == tuple(str(value) for value in sorted(set(values)))


def test_only_other_column_is_the_label(tmp_path: Path) -> None:
    index = {"__index_level_0__": list(range(10))}
    dataset = read(write_table(tmp_path / "t.parquet", range(10), kind=TWO_CLASSES, **index))
    assert dataset.reading.label_column == "kind"
    assert dataset.reading.ignored_columns == ()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        pytest.param(
            {"id": list(range(10)), "name": TWO_CLASSES},
            ("none is of type ClassLabel", "id (int64), name (string)", "data.label_column"),
            id="none",
        ),
        pytest.param(
            {"label": TWO_CLASSES, "fine_label": [1, 2] * 5},
            ("label, fine_label could all be", "label (string), fine_label (int64)"),
            id="two",
        ),
        pytest.param({"id": list(range(10))}, ("'id' holds another value in each",), id="id"),
        pytest.param({}, ("no column beside the images", "Training needs a class"), id="no-labels"),
        pytest.param({"label": [0.5] * 10}, ("none is of type", "label (double)"), id="float"),
        pytest.param(
            {"label": [0] * 8 + [None, -1]},
            ("'label' of the split", "missing labels in 2 of 10 rows", "first of them is row 8"),
            id="missing",
        ),
        pytest.param({"label": TWO_CLASSES, "mask": [b"x"] * 10}, None, id="struct-before-binary"),
    ],
)
def test_unclear_columns_are_listed(
    tmp_path: Path, columns: dict[str, Any], words: tuple[str, ...] | None
) -> None:
    bare = words is None
    message = error_message(write_table(tmp_path / "t.parquet", range(10), bare=bare, **columns))
    for word in words or ("more than one column of encoded images", "mask (binary)"):
        assert word in message
    if "fine_label" in columns:
        dataset = read(tmp_path / "t.parquet", label_column="fine_label")
        assert dataset.class_names == ("1", "2")
        assert dataset.reading.ignored_columns == ("label",)


def test_class_label_by_its_type(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "id": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["b", "a", "unused"]),
        }
    )
    records = {
        "image": [{"bytes": grey(value), "path": None} for value in range(10)],
        "id": list(range(10)),
        "kind": [0, 1] * 5,
    }
    datasets.Dataset.from_dict(records, features=features).to_parquet(tmp_path / "t.parquet")
    dataset = read(tmp_path / "t.parquet")
    assert dataset.reading.labels_from == "the column 'kind' (ClassLabel)"
    assert dataset.class_names == ("b", "a", "unused")
    train = grey_values(dataset.train, dataset.class_names)
    assert all(value % 2 == 0 for value in train["b"])
    assert all(value % 2 == 1 for value in train["a"])


def test_class_labels_of_other_order_are_matched_by_name(tmp_path: Path) -> None:
    for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        )
        records = {
            "image": [{"bytes": grey(ord(name)), "path": None} for name in names],
            "label": [0, 1],
        }
        table = datasets.Dataset.from_dict(records, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    train, test = values_of(tmp_path)
    assert train == test == {"a": [ord("a")], "b": [ord("b")]}


def test_test_classes_that_training_does_not_know(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", range(4), label=["x", "y"] * 2)
    write_table(tmp_path / "test.parquet", range(2), label=["x", "Y"])
    message = error_message(tmp_path)
    assert message.startswith("data.label_column: test images of classes without a training image")
    assert "'Y' (the nearest training class is 'y')" in message


def test_plain_binary_images(tmp_path: Path) -> None:
    train, test = values_of(
        write_table(tmp_path / "t.parquet", range(10), bare=True, label=TWO_CLASSES)
    )
    assert sorted(train["x"] + test["x"]) == [0, 2, 4, 6, 8]
    categories = pa.array(TWO_CLASSES).dictionary_encode()
    table = pa.table({"jpg": [grey(value) for value in range(10)], "class": categories})
    pq.write_table(table, tmp_path / "d.parquet")
    assert values_of(tmp_path / "d.parquet") == (train, test)


def test_rows_of_many_pieces_and_groups(tmp_path: Path) -> None:
    labels = [str(row % 4) for row in range(200)]
    table = pa.table({"image": [grey(row) for row in range(200)], "label": labels})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=70)
    write_table(tmp_path / "test.parquet", [0], label=["0"])
    train, _ = values_of(tmp_path)
    assert train == {str(k): list(range(k, 200, 4)) for k in range(4)}
    few = read(tmp_path, train_size=8).train
    assert [int(image[0, 0, 0]) % 4 for image in few.images] == few.labels.tolist()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = write_table(tmp_path / "t.parquet", range(10), label=TWO_CLASSES)
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[60:300] = b"\xff" * 240
    for content, words in (
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (sound[: len(sound) // 2], "cannot read"),
        (bytes(damaged), "cannot read"),
    ):
        file.write_bytes(content)
        message = error_message(file)
        assert "t.parquet" in message
        assert words in message


def test_files_of_one_split_have_the_same_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "train-0.parquet", range(4), label=["x", "y"] * 2)
    write_table(tmp_path / "train-1.parquet", range(4), kind=["x", "y"] * 2)
    message = error_message(tmp_path)
    assert "train-1.parquet' are image" in message
    assert "kind (string), those of" in message


def test_a_plain_path_with_images_and_tables_is_not_guessed(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", range(10), label=TWO_CLASSES)
    assert len(load_dataset(DataConfig(source=str(tmp_path))).train.labels) == 8
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0.png").write_bytes(grey(0))
    with pytest.raises(ValueError, match=r"train\.parquet.*0\.png") as raised:
        load_dataset(DataConfig(source=str(tmp_path)))
    assert f"'parquet:{tmp_path}' or 'imagefolder:{tmp_path}'" in str(raised.value)
    assert len(read(tmp_path).train.labels) == 8


def test_saved_data_sets(tmp_path: Path) -> None:
    records = {"image": [grey(value) for value in range(10)], "label": TWO_CLASSES}
    table = datasets.Dataset.from_dict(records)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "Test": table}).save_to_disk(tmp_path / "two")
    undivided = load_dataset(DataConfig(source=str(tmp_path / "one")))
    assert (len(undivided.train.labels), len(undivided.test.labels)) == (8, 2)
    divided = load_dataset(DataConfig(source=str(tmp_path / "two")))
    assert grey_values(divided.test, divided.class_names) == {
        "x": [0, 2, 4, 6, 8],
        "y": [1, 3, 5, 7, 9],
    }
