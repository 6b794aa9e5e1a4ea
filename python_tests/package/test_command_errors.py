"""The command line reports each error in one line, ends with status 2 and leaves no files."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")

import torch
from typer.testing import CliRunner, Result

from cjepa_kernels.bench import cli as bench_cli
from cjepa_kernels.cli.application import app
from cjepa_kernels.cli.command_errors import describe
from cjepa_kernels.files import atomic_path, atomic_write, check_directory, check_file, write_file
from cjepa_kernels.train import runner
from cjepa_kernels.train.config import ConfigurationError, ExperimentConfig, config_to_dict
from cjepa_kernels.train.loop.checkpoints import AtomicCheckpointIO
from cjepa_kernels.train.loop.worker_pool import JobDefectError
from cjepa_kernels.train.reported_error import ReportedError

EXPERIMENT = "data: {source: digits, train_size: 64, test_size: 40}\n"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a directory with an experiment and with a file where a directory is needed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    (tmp_path / "file").write_text("in the way")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def error_lines(result: Result) -> list[str]:
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "no command 'trian', did you mean 'train'?"),
        ("frobnicate", "no command 'frobnicate'; known: bench, compare, "),
        ("--wrong", "no such option: --wrong"),
        ("train", "missing option '--config' (see "),
        ("train --config", "option '--config' requires an argument"),
        ("tune --rows many", "invalid value for '--rows'"),
        ("tune --dtype fp64", "--dtype: expected one of bf16, fp16, fp32, got 'fp64'"),
        ("tune", "tune needs an NVIDIA GPU"),
        ("train --config absent.yaml", "no configuration file 'absent.yaml'"),
        ("train --config .", "no configuration file '.'"),
        ("train --config small.yaml seed", "override 'seed': expected key=value"),
        ("train --config small.yaml --out file", "--out: expected a directory to write to, got"),
        ("train --config small.yaml --out file/x", "file' is a file"),
        ("compare --config small.yaml --out file/x/y", "file' is a file"),
        ("train --config small.yaml --out /proc/x/y", "'/proc/x/y': No such file or directory"),
        ("probe x --json .", "--json: expected a file to write to, got '.': it is a directory"),
        ("probe x --json file/x", "--json: expected a file to write to, got 'file/x': "),
        ("probe absent", "no checkpoint 'absent'"),
        ("bench --out file", "--out: expected a directory to write to, got 'file'"),
        ("bench --out /proc/x", "'/proc/x': No such file or directory"),
        ("bench --sizes x", "--sizes: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    command: str, message: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "load_dataset", lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr(bench_cli, "run", lambda *_: pytest.fail("the work began"))
    result = run(*command.split())
    (line,) = error_lines(result)
    assert message in line
    assert result.exit_code == 2
    assert sorted(path.name for path in workspace.iterdir()) == ["file", "small.yaml"]


def test_each_mistake_of_a_configuration_has_its_line(workspace: Path) -> None:
    result = run("train", "--config", "small.yaml", "seed=-1", "trainer.epochs=0", "lo=1")
    assert [line.partition(":")[0] for line in error_lines(result)] == [
        "seed",
        "trainer.epochs",
        "lo",
    ]
    assert result.exit_code == 2


def test_debug_shows_the_traceback_and_keeps_the_status(workspace: Path) -> None:
    result = run("train", "--config", "small.yaml", "seed=-1", "--debug")
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: seed: ")
    assert result.exit_code == 2


def test_a_defect_is_one_line_that_keeps_its_traceback(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("tempfile.tempdir", str(workspace))
    monkeypatch.setattr(runner, "load_encoder", fail)
    result = run("probe", "x")
    (line,) = error_lines(result)
    assert line.startswith("IndexError: list index out of range: this is a defect")
    assert result.exit_code == 1
    (saved,) = workspace.glob("cjepa-error-*.txt")
    assert str(saved) in line
    assert "in fail" in saved.read_text()


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        ({"depth": 10**9}, (1, 8, 8), "model.depth: expected less than or equal to 256"),
        ({"dim": 8192, "depth": 256}, (1, 8, 8), "at most 1,000,000,000 parameters"),
        ({"dim": 1024, "depth": 64}, (1, 8, 8), "Missing key(s) in state_dict"),
        ({}, (10**9, 8, 8), "Missing key(s) in state_dict"),
        ({}, (1, 10**9, 10**9), "expected at most 16,384 patches an image"),
    ],
    ids=["depth", "parameters", "large", "channels", "pixels"],
)
def test_a_checkpoint_of_an_enormous_model_is_refused_at_once(
    model: dict[str, int], shape: tuple[int, int, int], message: str, workspace: Path
) -> None:
    experiment = {**config_to_dict(ExperimentConfig())}
    experiment["model"] |= model
    torch.save({"experiment": experiment, "image_shape": list(shape), "state_dict": {}}, "x.ckpt")
    begin = time.monotonic()
    (line,) = error_lines(run("probe", "x.ckpt"))
    assert line.startswith("x.ckpt is not a checkpoint of this program: ")
    assert message in line
    # The error takes 0.1 s. Allocating the memory of such a model would take far longer.
    assert time.monotonic() - begin < 10


def test_a_cpu_is_not_flooded_with_processes(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    overrides = ["trainer.devices=8", "trainer.batch_size=64"]
    (line,) = error_lines(run("train", "--config", "small.yaml", "--out", "run", *overrides))
    assert line.startswith("trainer.devices: each device of trainer.accelerator='cpu' is a process")
    assert line.endswith("4 CPU cores, got 8")
    assert not (workspace / "run").exists()


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_is_one_line_without_a_place_in_the_source(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ValueError("no data")

    monkeypatch.setattr(runner, "load_dataset", load)
    result = run("train", "--config", "small.yaml", "loss.vicreg_weight=0.5", "loss.type=cjepa")
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: loss.vicreg_weight: ignored with type 'cjepa'")
    assert error == "error: no data"


def test_without_arguments_the_help_is_shown() -> None:
    result = run()
    assert (result.exit_code, "Usage" in result.output) == (0, True)


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), ["/a/b: no space left on "]),
        (OSError("no errno"), ["no errno"]),
        (MemoryError(), ["out of memory"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 B"), ["out of memory: Def"]),
        (torch.OutOfMemoryError("CUDA out of memory."), ["out of memory: CUDA out"]),
        (ValueError("the keys:\n  a: 1\n  b: 2\n"), ["the keys: a: 1; b: 2"]),
        (ConfigurationError("f", ["a: x", "b: y\nz"]), ["a: x", "b: y; z"]),
        (OSError("jepa-seed0: [Errno 28] No space left on device: '/a'"), ["jepa-seed0: No space"]),
        (ReportedError("jepa-seed0: the loss is nan"), ["jepa-seed0: the loss is nan"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ["broken pipe"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_lines_of_errors(error: Exception, lines: list[str]) -> None:
    described = describe(error)
    assert described is not None
    assert len(described) == len(lines)
    assert all(a.startswith(b) for a, b in zip(described, lines, strict=True)), described


@pytest.mark.parametrize(
    "error",
    [
        IndexError(),
        AssertionError(),
        RuntimeError("x"),
        KeyError(1),
        JobDefectError("jepa-seed0 failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_exceptions_are_defects(error: Exception) -> None:
    assert describe(error) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_standard_output_that_takes_nothing() -> None:
    """A full disk is an error. A pipe that its reader has closed, as in ``| head -1``, is not."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "from cjepa_kernels.cli import main; main(['info'])"
    command = [sys.executable, "-W", "ignore", "-c", code]
    with open("/dev/full", "wb") as full:
        to_full, to_closed_pipe = (
            subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
            for stdout in (full, writing)
        )
    os.close(writing)
    assert to_full.communicate()[1] == "error: no space left on device\n"
    assert to_full.returncode == 2
    assert to_closed_pipe.communicate()[1] == ""
    assert to_closed_pipe.returncode == 1


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Limit each file of this process to ``size`` bytes, as on a disk that is almost full.

    Meanwhile Python keeps no bytecode of what it imports: it would keep a part of it.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    keeps_none = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        sys.dont_write_bytecode = keeps_none
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["checkpoint", "text"])
def test_a_disk_that_gets_full_is_named_and_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    file.write_text("old")
    write = {
        "checkpoint": lambda: AtomicCheckpointIO().save_checkpoint(
            {"w": torch.ones(100_000)}, file
        ),
        "text": lambda: atomic_write(file, "x" * 100_000),
    }[kind]
    with full_disk(4096), pytest.raises(OSError, match=r"last\.ckpt") as info:
        write()
    assert info.value.errno == errno.EFBIG
    assert "partial" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert file.read_text() == "old"


def test_a_disk_that_gets_full_in_training_is_one_line(workspace: Path) -> None:
    overrides = ["model.dim=16", "model.heads=2", "trainer.epochs=1", "logging.progress_bar=false"]
    with full_disk(20_000):
        result = run("train", "--config", "small.yaml", "--out", "run", *overrides)
    last = result.stderr.splitlines()[-1]  # The line of the epoch comes before.
    assert last == "error: run/checkpoints/last.ckpt: file too large"
    assert "Traceback" not in result.output
    assert result.exit_code == 2


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic_path(tmp_path / "file"):
        (tmp_path / "absent").read_text()


def test_outputs_are_tried_and_nothing_is_left(tmp_path: Path) -> None:
    check_directory("--out", tmp_path / "new" / "deep")
    check_file("--json", tmp_path / "new" / "a.json")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(ValueError, match=r"--out: .*symbolic link to nothing"):
        check_directory("--out", tmp_path / "dangling")
    with pytest.raises(ValueError, match=r"--out: .*File name too long"):
        check_directory("--out", tmp_path / ("n" * 300))
    with pytest.raises(ValueError, match=r"--json: .*null byte"):
        check_file("--json", tmp_path / "a\0b")
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to(real)
    check_file("--json", link)
    write_file(link, json.dumps({"a": 1}))
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_file("--json", pipe)
    write_file(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
