"""Test run directories: the lock, the check of the data, and the messages for finished runs."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")

from kill_and_resume import FORKS, cjepa
from train_experiments import TINY, tiny
from typer.testing import CliRunner

from cjepa_kernels.cli.application import app
from cjepa_kernels.train import compare as compare_module
from cjepa_kernels.train import runner
from cjepa_kernels.train.compare import compare
from cjepa_kernels.train.config import apply_overrides, config_from_dict, config_to_dict
from cjepa_kernels.train.data.dataset import Dataset, LabeledImages, load_dataset
from cjepa_kernels.train.data.fingerprint import fingerprint
from cjepa_kernels.train.loop import directory_lock
from cjepa_kernels.train.loop.directory_lock import LOCK_FILE, DirectoryLock, DirectoryLockedError
from cjepa_kernels.train.loop.run_directory import check_run_directory

DIGITS = load_dataset(tiny().data)


def changed(part: str, change: Callable[[LabeledImages], LabeledImages]) -> Dataset:
    parts = {"train": DIGITS.train, "test": DIGITS.test}
    parts[part] = change(parts[part])
    return Dataset(DIGITS.name, parts["train"], parts["test"], DIGITS.class_names)


def other_pixel(part: LabeledImages) -> LabeledImages:
    images = part.images.clone()
    images[3, 0, 2, 2] ^= 1
    return LabeledImages(images, part.labels)


def other_label(part: LabeledImages) -> LabeledImages:
    labels = part.labels.clone()
    labels[5] = (labels[5] + 1) % 10
    return LabeledImages(part.images, labels)


def other_order(part: LabeledImages) -> LabeledImages:
    return LabeledImages(part.images.flip(0), part.labels.flip(0))


def one_less(part: LabeledImages) -> LabeledImages:
    return LabeledImages(part.images[1:], part.labels[1:])


def other_shape(part: LabeledImages) -> LabeledImages:
    return LabeledImages(part.images.reshape(-1, 1, 4, 16), part.labels)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    "change",
    [other_pixel, other_label, other_order, one_less, other_shape],
    ids=lambda f: f.__name__,
)
def test_fingerprint_sees_every_change(
    part: str, change: Callable[[LabeledImages], LabeledImages]
) -> None:
    assert fingerprint(changed(part, change)) != fingerprint(DIGITS)


def test_fingerprint_is_that_of_the_values() -> None:
    copies = changed("train", lambda p: LabeledImages(p.images.clone(), p.labels.clone()))
    strided = changed(
        "test",
        lambda p: LabeledImages(p.images.transpose(2, 3).contiguous().transpose(2, 3), p.labels),
    )
    assert fingerprint(copies) == fingerprint(strided) == fingerprint(DIGITS)
    moved = changed("train", one_less)
    test = LabeledImages(
        torch.cat([DIGITS.train.images[:1], DIGITS.test.images]),
        torch.cat([DIGITS.train.labels[:1], DIGITS.test.labels]),
    )
    assert fingerprint(Dataset("digits", moved.train, test, ())) != fingerprint(DIGITS)


def test_other_data_are_refused_when_a_run_is_finished_and_when_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("trainer.epochs=1")
    first = runner.train(config, tmp_path, progress_bar=False)
    assert first.trained
    assert first.data == fingerprint(DIGITS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    with monkeypatch.context() as patch:
        other = changed("test", other_pixel)
        patch.setattr(runner, "load_dataset", lambda *args, **options: other)
        message = r"data: .* have changed since .*{}.*bring the former data back, or .*remove"
        with pytest.raises(ValueError, match=message.format("result.json")):
            runner.train(config, tmp_path, progress_bar=False)
        (tmp_path / "result.json").unlink()
        with pytest.raises(ValueError, match=message.format("last.ckpt")):
            runner.train(config, tmp_path, progress_bar=False)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == {path: data for path, data in before.items() if path.name != "result.json"}

    resumed = runner.train(config, tmp_path, progress_bar=False)
    assert resumed.evaluation == first.evaluation


def test_checkpoint_without_a_fingerprint_resumes_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("trainer.epochs=1")
    first = runner.train(config, tmp_path, progress_bar=False)
    (tmp_path / "result.json").unlink()
    file = tmp_path / "checkpoints" / "last.ckpt"
    stored = torch.load(file, weights_only=True)
    del stored["data"]
    torch.save(stored, file)
    assert runner.train(config, tmp_path, progress_bar=False).evaluation == first.evaluation
    assert "last.ckpt was written by an earlier version, which did not record its data" in (
        caplog.text
    )


def test_run_of_an_earlier_version_goes_on_by_its_own_configuration(tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    experiment = config_to_dict(tiny("masking.visible=10"))
    # Earlier versions did not write this key.
    assert "smoothl1_beta" not in experiment["loss"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(experiment))

    def check(visible: float, smoothl1_beta: float) -> None:
        config = apply_overrides(
            config_from_dict(experiment),
            [f"masking.visible={visible}", f"loss.smoothl1_beta={smoothl1_beta}"],
        )
        check_run_directory(config, run_dir)

    check(10, 1.0)
    with pytest.raises(ValueError, match="of another configuration") as info:
        check(0.625, 1.0)
    advice, *differences = str(info.value).splitlines()
    assert f"cjepa train --config '{run_dir}/config.yaml' --out '{run_dir}';" in advice
    assert differences == ["  masking.visible: 10 -> 0.625"]
    with pytest.raises(ValueError, match=r"loss\.smoothl1_beta: 1\.0 -> 0\.5"):
        check(10, 0.5)


def test_finished_run_says_that_nothing_was_trained(tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps({**TINY, "trainer": {**TINY["trainer"], "epochs": 1}}))
    arguments = ["train", "--config", str(file), "--out", str(tmp_path / "run")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "finished before" not in first.output
    assert [line[:11] for line in first.stderr.splitlines()] == ["epoch 1/1: "]
    finished = json.loads((tmp_path / "run" / "result.json").read_text())["finished"]
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    assert f"finished before, on {finished}; nothing was trained" in second.stdout
    assert second.stdout.endswith(first.stdout[first.stdout.index("experiment, seed 0") :])


def test_comparison_checks_its_finished_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_module, "write_report", lambda *args: None)
    config = tiny("trainer.epochs=1")

    def run_comparison() -> Any:
        return compare(config, seeds=[0], out_dir=tmp_path, arms=["cjepa", "jepa"], workers=1)

    first = run_comparison()
    assert "finished before" not in capsys.readouterr().out
    second = run_comparison()
    assert "2 of 2 runs were finished before, the last one on 20" in capsys.readouterr().out
    assert second.to_json() == first.to_json()

    # A damaged baseline is computed again. A damaged run is an error before any job starts.
    baseline = tmp_path / "baselines" / "pixels.json"
    sound_baseline = baseline.read_text()
    baseline.write_text(sound_baseline.replace('pixels/knn": ', 'pixels/knn": 1'))
    assert run_comparison().to_json() == first.to_json()
    assert baseline.read_text() == sound_baseline
    result = tmp_path / "runs" / "jepa-seed0" / "result.json"
    sound_result = result.read_text()
    result.write_text(sound_result.replace('"mean/knn": ', '"mean/knn": 1'))
    with pytest.raises(ValueError, match=r"jepa-seed0/result\.json is damaged.*checksum"):
        run_comparison()
    result.unlink()
    checkpoint = result.parent / "checkpoints" / "last.ckpt"
    sound_checkpoint = checkpoint.read_bytes()
    checkpoint.write_bytes(sound_checkpoint[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "run_jobs", lambda *args: pytest.fail("a job was started"))
        with pytest.raises(ValueError, match=r"jepa-seed0/checkpoints/last\.ckpt is damaged"):
            run_comparison()
    checkpoint.write_bytes(sound_checkpoint)
    result.write_text(sound_result)
    with monkeypatch.context() as patch:
        other = changed("train", other_label)
        patch.setattr(compare_module, "load_dataset", lambda *args, **options: other)
        with pytest.raises(ValueError, match=r"data: .*cjepa-seed0/result\.json"):
            run_comparison()
    monkeypatch.setattr(directory_lock, "_PATIENCE", 0.0)
    message = rf"in use by process {os.getpid()} on "
    with DirectoryLock(tmp_path), pytest.raises(DirectoryLockedError, match=message):
        run_comparison()


def test_second_process_on_a_directory_gets_one_line_and_touches_nothing(tmp_path: Path) -> None:
    config, run_dir, log = tmp_path / "experiment.json", tmp_path / "run", tmp_path / "log"
    config.write_text(json.dumps(TINY))
    run_dir.mkdir()
    half_written = run_dir / ".last.ckpt.0123456789ab.partial"
    with DirectoryLock(run_dir):
        half_written.write_text("half of the first process's checkpoint")
        second = cjepa("train", "--config", config, "--out", run_dir, log=log)
        second.join()
        assert second.exitcode == 2
        (line,) = log.read_text().splitlines()
        assert line.startswith(f"error: '{run_dir}' is in use by process {os.getpid()} on ")
        assert {path.name for path in run_dir.iterdir()} == {LOCK_FILE, half_written.name}
    assert not (run_dir / LOCK_FILE).exists()
    third = cjepa("train", "--config", config, "--out", run_dir, "trainer.epochs=1", log=log)
    third.join()
    assert third.exitcode == 0, log.read_text()
    assert not half_written.exists()


def hold_lock(directory: Path) -> None:
    DirectoryLock(directory).__enter__()
    (directory / "held").touch()
    time.sleep(60)


def test_lock_ends_with_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_lock, "_PATIENCE", 0.0)
    process = FORKS.Process(target=hold_lock, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(DirectoryLockedError, match=f"process {process.pid} on "):
        DirectoryLock(tmp_path).acquire()
    process.kill()
    process.join()
    assert (tmp_path / LOCK_FILE).exists()
    with DirectoryLock(tmp_path):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_lock_waits_for_what_is_about_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DirectoryLock(tmp_path)
    first.acquire()
    monkeypatch.setattr(directory_lock.time, "sleep", lambda seconds: first.release())
    with DirectoryLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_lock_is_created_late_and_for_the_first_rank_alone(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "run"
    with DirectoryLock(directory) as lock:
        assert not directory.exists()
        lock.acquire()
        lock.acquire()
        assert (directory / LOCK_FILE).exists()
        with DirectoryLock(directory, wanted=False) as other_rank:
            other_rank.acquire()
        assert (directory / LOCK_FILE).exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_gets_a_note(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(directory_lock.fcntl, "flock", flock)
    with DirectoryLock(tmp_path) as lock:
        lock.acquire()
    assert caplog.text.count("has no locks") == 1
