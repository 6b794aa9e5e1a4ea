"""Test the command ``cjepa data``, and that a run begins with the same summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from documents import DOCS, ROOT
from image_sets import encode, grey, write_folder, write_table
from train_experiments import tiny
from typer.testing import CliRunner

from cjepa_kernels.cli.application import app
from cjepa_kernels.train import runner
from cjepa_kernels.train.config import config_from_dict
from cjepa_kernels.train.data.dataset import load_dataset
from cjepa_kernels.train.data.summary import summarize

CONFIG = str(ROOT / "configs" / "cjepa.yaml")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "--config", CONFIG, *arguments], catch_exceptions=False)


def test_digits_as_the_guide_shows_them() -> None:
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    command = "    $ cjepa data --config configs/cjepa.yaml\n"
    block = text[text.index(command) + len(command) :].partition("\n\n")[0]
    shown = [line.removeprefix("    ") for line in block.splitlines()]
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.splitlines() == shown


def test_json_alone_on_stdout(tmp_path: Path) -> None:
    root = write_table(tmp_path / "t.parquet", range(20), id=list(range(20)), label=["x", "y"] * 10)
    result = invoke(f"data.source=parquet:{root}", "--json", "--verify")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["train"] == 16
    assert content["test"] == 4
    assert content["classes"] == ["x", "y"]
    assert content["class_counts"] == {"train": {"x": 8, "y": 8}, "test": {"x": 2, "y": 2}}
    assert (content["label_column"], content["image_column"]) == ("label", "image")
    assert content["ignored_columns"] == ["id"]
    assert content["image_size"] == {"width": 4, "height": 4, "channels": 1}
    assert content["test_from"].startswith("a random fifth of the source (4 of 20 images,")
    assert content["patches"] == {"total": 4, "visible": 3, "predicted": 1}
    assert content["damaged"] == []


def test_every_damaged_image_is_reported(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {f"{s}/{c}": range(40) for s in ("train", "test") for c in "ab"})
    bad = [root / split / "a" / f"{row}.png" for split in ("train", "test") for row in range(0, 30)]
    for file in bad:
        file.write_bytes(b"damaged")
    options = [f"data.source=imagefolder:{root}", "model.patch_size=1"]
    result = invoke(*options, "--verify")
    assert result.exit_code == 2
    for file in bad:
        assert result.stderr.count(f"{file} ") == 1
    assert "error: 60 of 160 images cannot be decoded" in result.stderr
    content = json.loads(invoke(*options, "--verify", "--json").stdout)
    assert len(content["damaged"]) == 60
    # Without --verify the command ends at the first damaged image.
    first = invoke(*options)
    assert first.exit_code == 2
    assert first.stderr.count("\n") == 1
    assert str(bad[0].parent) in first.stderr


def test_masks_that_do_not_fit_the_images_are_an_error_after_the_summary(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": range(5), "b": range(5)})
    result = invoke(f"data.source=imagefolder:{root}", "model.patch_size=3")
    assert result.exit_code == 2
    assert "8 training images and 2 test images of 2 classes." in result.stdout
    assert "error: model.patch_size: expected a divisor" in result.stderr


def test_few_patches_of_many_are_a_warning(tmp_path: Path) -> None:
    files = [encode(image) for image in _noise(10)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for row, content in enumerate(files[:5] if name == "a" else files[5:]):
            (tmp_path / name / f"{row}.png").write_bytes(content)
    source = f"data.source=imagefolder:{tmp_path}"
    text = invoke(source, "masking.visible=10", "masking.predicted=4").stdout
    assert "An image has 256 patches: 10 are visible (3.9 %), 4 are predicted (1.6 %)." in text
    assert "Warning: only 10 of 256 patches are visible (masking.visible: 10)" in text
    assert "Warning: only 4 of 256 patches are predicted (masking.predicted: 4)" in text
    text = invoke(source).stdout
    assert "256 patches: 160 are visible (62.5 %), 64 are predicted (25 %)" in text
    assert "Warning" not in text


def _noise(count: int) -> Any:
    import numpy as np

    return np.random.RandomState(0).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_classes_without_images_and_subsets_are_said(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a": range(9), "train/b": range(9), "test/a": range(4)})
    text = invoke(
        f"data.source=imagefolder:{root}", "data.train_size=6", "data.pretrain_classes=[1]"
    ).stdout
    assert "6 training images and 4 test images of 2 classes." in text
    assert "a (3 + 4), b (3 + 0)" in text
    assert "The labels come from the names of the class folders." in text
    assert "6 of the 18 training images are used" in text
    assert "Pretraining sees 3 images, those of the classes b." in text
    assert "Warning: there is no test image of b." in text


def test_a_run_begins_with_the_same_lines(tmp_path: Path) -> None:
    config = tiny()
    summaries: list[Any] = []
    runner.train(config, tmp_path / "run", on_summary=summaries.append, progress_bar=False)
    lines = summarize(config, load_dataset(config.data)).lines()
    assert [summary.lines() for summary in summaries] == [lines]
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    assert log[: len(lines)] == lines
    assert log[len(lines)].startswith("epoch 1: ")


def test_reading_twice_gives_the_same_summary(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"a": range(5), "b": range(5)})
    (root / "a" / "x.png").write_bytes(grey(1, (8, 8)))
    config = config_from_dict({"data": {"source": f"imagefolder:{root}", "image_size": 8}})
    content = json.loads(
        invoke(f"data.source=imagefolder:{root}", "data.image_size=8", "--json").stdout
    )
    decoded = summarize(config, load_dataset(config.data)).to_dict()
    assert content == json.loads(json.dumps(decoded))
    assert content["notes"] == ["10 images of another size (4 x 4) are resized to 8 x 8 pixels."]


@pytest.mark.skipif(os.name != "posix", reason="needs file names of arbitrary bytes")
def test_names_that_cannot_be_printed(tmp_path: Path) -> None:
    root = tmp_path / "set"
    names = (b"a\nb", b"caf\xe9", "cafe\u0301".encode(), b"[bold]c\x1b[31m")
    for name in names:
        folder = os.path.join(os.fsencode(root), name)
        os.makedirs(folder)
        for row in range(5):
            Path(os.fsdecode(os.path.join(folder, b"%d.png" % row))).write_bytes(grey(row))
    config = config_from_dict({"data": {"source": f"imagefolder:{root}"}})
    lines = summarize(config, load_dataset(config.data)).lines()
    shown = set(lines[2].partition(": ")[2].removesuffix(".").split(", "))
    readable = ("a\\nb", "caf\ufffd", "caf\xe9", "[bold]c\\x1b[31m")
    assert shown == {f"{name} (4 + 1)" for name in readable}
    assert all(line.isprintable() for line in lines)
    result = invoke(f"data.source=imagefolder:{root}")
    assert result.exit_code == 0
    assert "[bold]c\\x1b[31m (4 + 1)" in result.stdout
