"""Test how image folders are divided into training and test images, whatever their names are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from image_sets import grey, grey_values, write_folder

from cjepa_kernels.train.config import DataConfig
from cjepa_kernels.train.data.dataset import load_dataset


def read(source: Path | str, kind: str = "imagefolder:", **options: Any) -> tuple[Any, Any]:
    """Return the grey values by class, for the training set and for the test set."""
    dataset = load_dataset(DataConfig(source=f"{kind}{source}", **options))
    return tuple(grey_values(p, dataset.class_names) for p in (dataset.train, dataset.test))


def error_message(root: Path | str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read(root)
    message = str(raised.value)
    assert message.startswith("data.source: ")
    assert "\n" not in message
    return message


# A folder that is given by its plain path must be read in the same way.
@pytest.mark.parametrize("kind", ["imagefolder:", ""])
def test_classes_called_as_splits_stay_in_their_split(tmp_path: Path, kind: str) -> None:
    root = write_folder(
        tmp_path / "set",
        {
            "train/apple": [1, 2],
            "train/train": [3, 4],
            "train/test": [5],
            "train/test_tube": [6],
            "test/apple": [11],
            "test/train": [12, 13],
            "test/test": [14],
            "test/test_tube": [15],
        },
    )
    train, test = read(root, kind)
    assert train == {"apple": [1, 2], "train": [3, 4], "test": [5], "test_tube": [6]}
    assert test == {"apple": [11], "train": [12, 13], "test": [14], "test_tube": [15]}


@pytest.mark.parametrize("kind", ["imagefolder:", ""])
def test_names_that_contain_a_split_decide_nothing(tmp_path: Path, kind: str) -> None:
    root = write_folder(
        tmp_path / "train_and_test",
        {"train_station": range(10), "test_tube": range(10, 20), "validation-set": range(20, 30)},
    )
    for row in range(10):
        (root / "train_station" / f"{row}.png").rename(
            root / "train_station" / f"{('train', 'test', 'x')[row % 3]}_{row}.png"
        )
    train, test = read(root, kind)
    for name, values in (
        ("train_station", range(10)),
        ("test_tube", range(10, 20)),
        ("validation-set", range(20, 30)),
    ):
        assert sorted(train[name] + test[name]) == list(values)
        assert (len(train[name]), len(test[name])) == (8, 2)


@pytest.mark.parametrize(
    ("training", "testing"),
    [("Train", "Test"), ("Training", "Testing"), ("TRAIN", "VAL"), ("train", "Validation")],
)
def test_splits_under_other_spellings(tmp_path: Path, training: str, testing: str) -> None:
    root = write_folder(
        tmp_path,
        {
            f"{training}/a": [1, 2],
            f"{training}/b": [3],
            f"{testing}/a": [4],
            f"{testing}/b": [5, 6],
        },
    )
    assert read(root) == ({"a": [1, 2], "b": [3]}, {"a": [4], "b": [5, 6]})


def test_validation_is_left_out_beside_a_test_set(tmp_path: Path) -> None:
    parts = {
        f"{split}/{name}": [n] for n, split in enumerate(("train", "val", "test")) for name in "ab"
    }
    dataset = load_dataset(DataConfig(source=f"imagefolder:{write_folder(tmp_path, parts)}"))
    assert grey_values(dataset.train, dataset.class_names) == {"a": [0], "b": [0]}
    assert grey_values(dataset.test, dataset.class_names) == {"a": [2], "b": [2]}
    assert dataset.reading.test_from == "the folder 'test'"
    assert dataset.reading.notes == ("Splits that are not used: val.",)


def test_training_folder_alone_is_divided(tmp_path: Path) -> None:
    train, test = read(
        write_folder(tmp_path, {"train/train": range(5), "train/test": range(5, 10)})
    )
    assert sorted(train["train"] + test["train"]) == list(range(5))
    assert (len(test["train"]), len(test["test"])) == (1, 1)


UNCLEAR: dict[str, tuple[dict[str, list[int]], tuple[str, ...]]] = {
    "unknown-split": (
        {"train/a": [1], "train/b": [1], "heldout/a": [1]},
        ("train/ beside heldout/", "all are classes"),
    ),
    "class": ({"train": [1], "bus": [1], "car": [1]}, ("train/ beside bus/, car/",)),
    "two-classes": ({"train": [1], "test": [1]}, ("no class folders", "train/train")),
    "unknown-class": (
        {"train/cat": [1], "train/dog": [1], "test/unknown": [1]},
        ("'unknown'", "training classes are cat, dog"),
    ),
    "case-of-a-class": (
        {"train/Cat": [1], "train/Dog": [1], "test/cat": [1], "test/Dog": [1]},
        ("'cat' (the nearest training class is 'Cat')",),
    ),
    "loose": ({"a": [1], "b": [1], ".": [1]}, ("(0.png) beside its class folders",)),
    "loose-in-split": (
        {"train/a": [1], "train/b": [1], "train": [1]},
        ("train' holds image files (0.png)",),
    ),
    "flat": ({".": [1, 2]}, ("2 images and no class folders", "a folder for each class")),
    "one-class": ({"a": [1, 2]}, ("the images of one class ('a')",)),
    "splits-in-classes": (
        {"cat/train": [1], "cat/test": [1], "dog/train": [1], "dog/test": [1]},
        ("the class folder", "cat' holds test/, train/"),
    ),
    "parent": ({"set/train/a": [1], "set/train/b": [1]}, ("holds train/", "set' meant?")),
    "empty": ({"a": [1], "b": [1], "c": []}, ("no images in the class folder", "c'")),
    "no-training": ({"test/a": [1], "test/b": [1]}, ("no split 'train', only test",)),
    "nothing": ({}, ("found nothing",)),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_what_is_unclear_is_shown(tmp_path: Path, kind: str) -> None:
    images, words = UNCLEAR[kind]
    message = error_message(write_folder(tmp_path, images))
    for word in words:
        assert word in message


def test_two_spellings_of_one_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {f"{s}/{c}": [1] for s in ("train", "training") for c in "ab"})
    assert "both 'train' and 'training'" in error_message(root)


def test_links_are_followed(tmp_path: Path) -> None:
    target = write_folder(tmp_path / "elsewhere", {"n01": range(5), "n02": range(5, 10)})
    root = tmp_path / "set"
    root.mkdir()
    for name in ("n01", "n02"):
        (root / name).symlink_to(target / name)
    train, test = read(root)
    assert sorted(train["n01"] + test["n01"]) == list(range(5))
    write_folder(root, {"n03": range(10, 15)})
    os.symlink(target / "n01" / "0.png", root / "n03" / "linked.png")
    train, test = read(root)
    assert set(train) == {"n01", "n02", "n03"}
    assert sorted(train["n03"] + test["n03"]) == [0, 10, 11, 12, 13, 14]
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "train").symlink_to(target)
    assert sum(len(values) for values in read(tree)[0].values()) == 8


@pytest.mark.parametrize(
    ("link", "to", "words"),
    [
        pytest.param("loop", ".", "loop' is the same folder as", id="root"),
        pytest.param("a/loop", "a", "a/loop' is the same folder as", id="itself"),
        pytest.param("c", "a", "c' is the same folder as", id="class-twice"),
        pytest.param("c", "absent", "c' is a symbolic link that leads nowhere", id="broken"),
    ],
)
def test_links_that_cannot_be_meant(tmp_path: Path, link: str, to: str, words: str) -> None:
    root = write_folder(tmp_path / "set", {"a": range(5), "b": range(5)})
    (root / link).symlink_to((root / to).resolve())
    assert words in error_message(root)


def test_a_test_image_that_is_a_link_to_a_training_image(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a": [1], "train/b": [2], "test/a": [3], "test/b": []})
    (root / "test" / "b" / "x.png").symlink_to(root / "train" / "b" / "0.png")
    message = error_message(root)
    assert "test/b/x.png' is the same file as the training image" in message
    (root / "test" / "b" / "x.png").unlink()
    os.link(root / "train" / "b" / "0.png", root / "test" / "b" / "x.png")
    assert "is the same file" in error_message(root)


def test_hidden_and_system_files_are_left_out(tmp_path: Path) -> None:
    root = write_folder(
        tmp_path, {"a": range(5), "b": range(5, 10), ".cache": [1], "__MACOSX": [1]}
    )
    for name in (".DS_Store", "a/Thumbs.db", "a/desktop.ini", "a/._0.png", "a/notes.txt"):
        (root / name).write_text("no image")
    dataset = load_dataset(DataConfig(source=f"imagefolder:{root}"))
    assert len(dataset.train.labels) + len(dataset.test.labels) == 10
    assert dataset.reading.notes == ("Files that are no images and were left out: 1 .txt.",)


def test_all_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a/images": range(5), "b": range(5, 10), "b/x.png": [77]})
    dataset = load_dataset(DataConfig(source=f"imagefolder:{root}"))
    assert dataset.class_names == ("a", "b")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 11
    assert "2 class folders hold folders (such as a/images)" in dataset.reading.notes[0]


def test_suffixes_in_any_case_and_files_that_are_none(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": range(5), "b": range(5, 10)})
    (root / "a" / "0.png").rename(root / "a" / "0.PNG")
    assert sum(len(values) for part in read(root) for values in part.values()) == 10
    os.mkfifo(root / "a" / "pipe.png")
    assert "pipe.png' is neither a file nor a folder" in error_message(root)


@pytest.mark.parametrize(
    ("name", "decoy"), [("we[i]rd", "weird"), ("a*b", "axb"), ("what?", "whatX"), ("[", "x")]
)
def test_every_character_of_a_path_stands_for_itself(tmp_path: Path, name: str, decoy: str) -> None:
    write_folder(tmp_path / decoy, {"a": [200] * 5, "b": [200] * 5})
    root = write_folder(tmp_path / name, {f"[{name}": range(5), "b": range(5, 10)})
    train, test = read(root)
    assert sorted(train[f"[{name}"] + test[f"[{name}"]) == list(range(5))
    assert read(root, "") == (train, test)


def test_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set", {"a": range(5), "b": range(5, 10)})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/set") == read("~/set", "") == read(tmp_path / "set")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(grey(1))
    assert "a file, expected a directory" in error_message(tmp_path / "x.png")


def test_a_folder_has_no_columns(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": range(5), "b": range(5)})
    with pytest.raises(ValueError, match=r"data\.label_column: a folder .* 'label'"):
        read(root, label_column="label")


def test_a_script_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "mydata"
    folder.mkdir()
    (folder / "mydata.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ValueError, match=r"neither images nor Parquet.*'mydata\.py' is not run"):
        read(folder, "")
    (folder / "README.md").write_text("---\nconfigs:\n- data_files: x\n---\n")
    with pytest.raises(ValueError, match=r"data\.source: cannot read .*scripts are no longer"):
        read(folder, "")
