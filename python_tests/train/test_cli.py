"""Test the results, the error messages and the exit codes of the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")

from typer.testing import CliRunner, Result

from cjepa_kernels.cli.application import app
from cjepa_kernels.train import compare as compare_module

EXPERIMENT = """
data: {source: digits, train_size: 64, test_size: 40}
model: {dim: 16, heads: 2, predictor_dim: 8, predictor_heads: 2}
trainer: {epochs: 1, batch_size: 32}
evaluation: {few_labels: 2, few_label_draws: 1, knn_k: 3, robustness: false}
logging: {tensorboard: true, progress_bar: false}
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "small.yaml"
    file.write_text(EXPERIMENT)
    return file


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_then_probe(experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained = run("train", "--config", experiment, "--out", out, "seed=3")
    assert trained.exit_code == 0, trained.output
    assert "linear probe" in trained.stdout
    assert "seed 3" in trained.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.yaml", "checkpoints", "metrics.csv", "tensorboard", "result.json", "log.txt")
    }
    assert list((out / "tensorboard").glob("events*"))
    numbers = out / "probe.json"
    probed = run("probe", out / "checkpoints" / "last.ckpt", "--json", numbers)
    assert probed.exit_code == 0, probed.output
    stored = json.loads((out / "result.json").read_text())
    assert json.loads(numbers.read_text())["evaluation"] == stored["evaluation"]
    other = run("probe", out, "evaluation.knn_k=1", "data.test_size=50", "trainer.threads=1")
    assert other.exit_code == 0, other.output


def test_default_directory_follows_the_experiment(experiment: Path, tmp_path: Path) -> None:
    for overrides, count in (([], 1), ([], 1), (["seed=1"], 2)):
        result = run("train", "--config", experiment, *overrides)
        assert result.exit_code == 0, result.output
        assert len(list((tmp_path / "runs").glob("small-*"))) == count


def test_default_directory_of_a_comparison_follows_its_options(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories: list[Path] = []
    monkeypatch.setattr(
        compare_module, "compare", lambda _, **options: directories.append(options["out_dir"])
    )
    for options in ([], [], ["--transfer"], ["--seeds", "0"]):
        assert run("compare", "--config", experiment, *options).exit_code == 0
    assert directories[0] == directories[1]
    assert len(set(directories)) == 3


@pytest.mark.parametrize("override", ["model.dim=128", "seed=9", "trainer.epochs=3"])
def test_probe_refuses_what_it_would_ignore(override: str, experiment: Path) -> None:
    result = run("probe", "any.ckpt", override)
    assert result.exit_code == 2
    assert f"got {override!r}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["trainer.epoch=2"], "trainer.epoch: unknown key", id="key"),
        pytest.param(["loss.contrastive_wight=2"], "contrastive_weight", id="loss-key"),
        pytest.param(["trainer.batch_size=65"], "trainer.batch_size", id="batch"),
        pytest.param(["data.source=parquet:absent"], "'absent'", id="data"),
        pytest.param(["data.source=dgits"], "did you mean 'digits'", id="misspelt"),
        pytest.param(["trainer.precision=16-mixed"], "trainer.precision", id="precision"),
        pytest.param(["optimizer.learning_rate=1e3", "trainer.epochs=3"], "loss is", id="nan"),
    ],
)
def test_user_error_is_one_message_and_code_2(
    arguments: Sequence[str], message: str, experiment: Path
) -> None:
    result = run("train", "--config", experiment, *arguments)
    assert result.exit_code == 2
    # The error comes after the lines of the epochs.
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["train", "--config", "absent.yaml"], "absent.yaml", id="config"),
        pytest.param(["probe", "absent.ckpt"], "absent.ckpt", id="checkpoint"),
        pytest.param(["compare", "--config", "small.yaml", "--seeds", "0,x"], "'0,x'", id="seeds"),
    ],
)
def test_missing_file_or_bad_option(
    arguments: Sequence[str], message: str, experiment: Path
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_compare_hands_over_its_options(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def record(config: Any, **options: Any) -> None:
        calls.append({"epochs": config.trainer.epochs, **options})

    monkeypatch.setattr(compare_module, "compare", record)
    options = ["--seeds", "4,5", "--workers", "1", "--transfer", "--out", "there"]
    result = run("compare", "--config", experiment, *options, "trainer.epochs=2")
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert (call["epochs"], list(call["seeds"]), call["workers"]) == (2, [4, 5], 1)
    assert call["transfer"] is True
    assert call["out_dir"] == Path("there")


def test_info_lists_versions_and_back_ends() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in ("cjepa_kernels", "torch", "lightning", "chunked", "reference", "_C"):
        assert word in result.stdout
