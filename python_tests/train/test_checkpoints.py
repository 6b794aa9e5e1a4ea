"""Test that damaged checkpoints and results are detected, and that a kill loses no checkpoint."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from kill_and_resume import kill_and_resume
from train_experiments import tiny, weights

from cjepa_kernels import files
from cjepa_kernels.train import checksummed_json, runner
from cjepa_kernels.train.loop.checkpoints import (
    AtomicCheckpointIO,
    DamagedCheckpointError,
    read_checkpoint,
    remedy,
)
from cjepa_kernels.train.loop.run_directory import RunResult, encode_result, load_result

SMALL_CHECKPOINT = {
    "state_dict": {"weight": torch.randn(3, 2), "steps": torch.arange(3)},
    "experiment": {"seed": 0, "betas": [0.9, 0.95]},
    "global_step": 12,
}
RESULT = RunResult(
    run_dir=Path(),
    history=[{"epoch": 1.0, "loss": 0.9891743, "term_ratio": float("inf")}],
    evaluation={"mean/knn": 83.25},
    findings=[{"rule": "collapse", "epoch": 1, "message": "µ", "evidence": "0.1 < 0.2"}],
    seconds=1.5,
    data="blake2b:00",
    finished="2026-11-27 18:00 UTC",
)


def same(left: Any, right: Any) -> bool:
    """Return whether two values are bitwise equal, with the same types and order of keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


def test_flipped_bit_of_a_checkpoint_never_gives_other_contents(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL_CHECKPOINT, file)
    content = file.read_bytes()
    assert same(read_checkpoint(file), SMALL_CHECKPOINT)
    rng = random.Random(0)
    places = rng.sample(range(len(content)), len(content) // 3)
    flips = [(place, rng.randrange(8)) for place in places]
    # The file attributes in the archive's central directory have no checksum, so each of their bits
    # is flipped as well.
    entry = content.find(b"PK\x01\x02")
    while entry >= 0:
        flips += [(entry + 38 + byte, bit) for byte in range(4) for bit in range(8)]
        entry = content.find(b"PK\x01\x02", entry + 1)
    messages = []
    for place, bit in flips:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            loaded = read_checkpoint(file)
        except DamagedCheckpointError as error:
            messages.append(str(error))
        else:
            assert same(loaded, SMALL_CHECKPOINT), (place, bit)
    assert all(str(file) in message for message in messages)
    assert not any("weights_only=False" in message for message in messages)
    # A third of such a small file is padding between the records, where a flip changes nothing.
    assert len(messages) > len(flips) / 2


@pytest.mark.parametrize("end", [0, 1, 100, -1], ids=["empty", "1 byte", "100 bytes", "all but 1"])
def test_cut_off_checkpoint(end: int, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL_CHECKPOINT, file)
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt is damaged"):
        read_checkpoint(file)


@pytest.mark.parametrize("content", [[1, 2], Path("x")], ids=["list", "object"])
def test_sound_file_that_is_no_checkpoint(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "other.ckpt"
    torch.save(content, file)
    with pytest.raises(DamagedCheckpointError, match=r"other\.ckpt is not a checkpoint") as caught:
        read_checkpoint(file)
    assert "weights_only=False" not in str(caught.value)


def test_flipped_bit_of_a_result_never_gives_other_numbers(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    content = encode_result(RESULT).encode()
    file.write_bytes(content)
    expected = load_result(tmp_path)
    assert expected.history == RESULT.history
    rng = random.Random(0)
    messages = []
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            loaded = load_result(tmp_path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert loaded == expected, place
    assert all(str(file) in message for message in messages)
    assert len(messages) > len(content) / 2


def test_result_of_an_earlier_version_is_read_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads(encode_result(RESULT))
    for key in ("checksum", "data", "finished"):
        del document[key]
    (tmp_path / "result.json").write_text(json.dumps(document))
    loaded = load_result(tmp_path)
    assert (loaded.history, loaded.data) == (RESULT.history, None)
    assert loaded.finished.endswith("UTC")
    assert "result.json was written by an earlier version" in caplog.text


def test_json_keeps_its_checksum_through_another_layout() -> None:
    text = checksummed_json.encode({"b": 0.1, "a": [1, None, "µ"]})
    reordered = json.dumps(dict(sorted(json.loads(text).items())), ensure_ascii=False)
    assert checksummed_json.decode(reordered) == ({"b": 0.1, "a": [1, None, "µ"]}, True)
    with pytest.raises(ValueError, match="checksum"):
        checksummed_json.decode(text.replace("0.1", "0.2"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        checksummed_json.encode({"loss": float("nan")})


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_kill_at_every_step_of_saving_leaves_sound_checkpoints(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Saving changes the directory in several calls, and each trial is killed before one of them. A
    # killed process does not remove its temporary file, so unlink does nothing here.
    storage = AtomicCheckpointIO()

    class Killed(BaseException):
        pass

    def save(directory: Path, kill_before: int) -> int:
        calls = 0

        def counted(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= kill_before:
                    raise Killed
                return function(*args, **options)

            return call

        def no_link(*args: Any) -> None:
            raise PermissionError

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "link", counted(os.link) if links else no_link)
            patch.setattr(files.os, "replace", counted(os.replace))
            patch.setattr(files, "_sync", counted(files._sync))
            patch.setattr(Path, "unlink", lambda *args, **options: None)
            try:
                storage.save_checkpoint({"epoch": 3}, directory / "last.ckpt")
            except Killed:
                return calls
        return 0

    for step in range(1, 10):
        directory = tmp_path / str(step)
        for epoch in (1, 2):
            storage.save_checkpoint({"epoch": epoch}, directory / "last.ckpt")
        assert read_checkpoint(directory / "previous.ckpt") == {"epoch": 1}
        killed = save(directory, step)
        last = read_checkpoint(directory / "last.ckpt")["epoch"]
        previous = read_checkpoint(directory / "previous.ckpt")["epoch"]
        assert (last, previous) in ((2, 1), (2, 2), (3, 2))
        # The next save succeeds, whatever files the kill left behind.
        storage.save_checkpoint({"epoch": 4}, directory / "last.ckpt")
        assert read_checkpoint(directory / "last.ckpt") == {"epoch": 4}
        assert read_checkpoint(directory / "previous.ckpt")["epoch"] == last
        if not killed:
            assert (last, previous) == (3, 2)
            # All earlier steps were killed.
            assert step >= 5
            break
    else:
        pytest.fail("every save was killed")


def test_damaged_last_checkpoint_offers_the_one_before(tmp_path: Path) -> None:
    config = tiny("trainer.epochs=3")
    # The space in the name must be quoted in the command that the message gives.
    run_dir = tmp_path / "a run"
    first = runner.train(config, run_dir, progress_bar=False)
    expected = weights(run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    state = stored["state_dict"]
    weight = next(v for name, v in state.items() if name.startswith("target_") and v.ndim == 2)
    content = bytearray(last.read_bytes())
    # This flips one bit of a weight.
    content[content.index(weight.numpy().tobytes()) + 2] ^= 1
    last.write_bytes(content)

    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: its record '\w+/data/\d+' is"):
        runner.load_encoder(run_dir)
    # A finished run reads only its result. Without the result it has to read the checkpoint.
    (run_dir / "result.json").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged.*end of epoch 2, run mv ") as info:
        runner.train(config, run_dir, progress_bar=False)
    message = str(info.value)
    command = message[message.index("mv ") : message.index(" and start the same")]
    subprocess.run(command, shell=True, check=True)
    resumed = runner.train(config, run_dir, progress_bar=False)
    assert (resumed.history, resumed.evaluation) == (first.history, first.evaluation)
    for name, value in weights(run_dir).items():
        assert torch.equal(value, expected[name]), name


def test_remedy_of_a_finished_run_removes_its_result(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for epoch in (0, 1):
        AtomicCheckpointIO().save_checkpoint(
            {"epoch": epoch}, run_dir / "checkpoints" / "last.ckpt"
        )
    (run_dir / "result.json").touch()
    last, previous = (str(run_dir / "checkpoints" / f"{n}.ckpt") for n in ("last", "previous"))
    commands = f"{shlex.join(['mv', previous, last])} && rm {run_dir / 'result.json'}"
    assert f"end of epoch 1, run {commands} and start" in remedy(run_dir)
    Path(previous).write_bytes(b"damaged too")
    assert "previous.ckpt" not in remedy(run_dir)
    assert f"rm -r {run_dir / 'checkpoints'} {run_dir / 'result.json'}" in remedy(run_dir)


def test_lost_last_checkpoint_is_not_a_new_run(tmp_path: Path) -> None:
    config = tiny()
    runner.train(config, tmp_path, progress_bar=False)
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is missing.*end of epoch 1, run mv "):
        runner.train(config, tmp_path, progress_bar=False)


def test_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        config = tiny("trainer.epochs=1", f"seed={int(name == 'b')}")
        runner.train(config, tmp_path / name, progress_bar=False)
    (tmp_path / "b" / "result.json").unlink()
    checkpoint = Path("checkpoints") / "last.ckpt"
    (tmp_path / "a" / checkpoint).replace(tmp_path / "b" / checkpoint)
    with pytest.raises(ValueError, match=r"(?s)another experiment.*seed: 0 -> 1"):
        runner.train(config, tmp_path / "b", progress_bar=False)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(("precision", "seed"), [("32-true", 3), ("bf16-mixed", 8)])
def test_kills_and_damages_never_change_the_numbers(
    precision: str, seed: int, tmp_path: Path
) -> None:
    config = tiny(f"trainer.precision={precision}", "trainer.epochs=6")
    trial = kill_and_resume(config, tmp_path, kills=3, seed=seed, damage=1.0)
    assert trial.kills >= 3
    assert trial.completed >= 1
    assert trial.damaged
