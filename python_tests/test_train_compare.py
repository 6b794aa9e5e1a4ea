"""Arms x seeds end to end on a small scale, and the statistics by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from rich.console import Console

from cjepa_kernels.train import compare as compare_module
from cjepa_kernels.train import runner
from cjepa_kernels.train.compare import arm_config, compare
from cjepa_kernels.train.comparison import (
    ArmRun,
    Comparison,
    Summary,
    comparison_markdown,
    load_comparison,
    paired_differences,
    save_comparison,
    text_tables,
)
from cjepa_kernels.train.config import ExperimentConfig, apply_overrides
from cjepa_kernels.train.run_directory import RunResult
from cjepa_kernels.train.worker_pool import JobError

SMALL = apply_overrides(
    ExperimentConfig(),
    [
        "data.train_size=160",
        "data.test_size=60",
        "trainer.epochs=2",
        "trainer.batch_size=32",
        "model.dim=16",
        "model.depth=1",
        "model.heads=2",
        "model.predictor_dim=8",
        "model.predictor_heads=2",
        "evaluation.few_label_draws=2",
        "logging.tensorboard=false",
    ],
)


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, str]:
    out = tmp_path_factory.mktemp("comparison")
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        comparison = compare(
            SMALL, seeds=[0, 1], out_dir=out, workers=2, transfer=True, console=console
        )
    return comparison, out, captured.get()


def test_runs_of_a_seed_differ_in_the_weights_alone() -> None:
    configs = {arm: arm_config(SMALL, arm, 7) for arm in ("cjepa", "jepa", "contrastive")}
    base = configs["cjepa"].model_dump()
    assert base["seed"] == 7
    for arm, key in (("jepa", "contrastive_weight"), ("contrastive", "jepa_weight")):
        changed = configs[arm].model_dump()
        assert changed["loss"][key] == 0
        changed["loss"][key] = base["loss"][key]
        assert changed == base
    assert SMALL.loss["contrastive_weight"] == 0.1


def test_transfer_leaves_classes_out() -> None:
    assert arm_config(SMALL, "jepa", 0, transfer=True).data.pretrain_classes == "half"
    chosen = apply_overrides(SMALL, ["data.pretrain_classes=[1, 2]"])
    assert arm_config(chosen, "jepa", 0, transfer=True).data.pretrain_classes == [1, 2]


def test_everything_is_measured(compared: tuple[Comparison, Path, str]) -> None:
    comparison, out, _ = compared
    assert [(run.arm, run.seed) for run in comparison.runs] == [
        (arm, seed) for seed in (0, 1) for arm in ("cjepa", "jepa", "contrastive")
    ]
    for run in comparison.runs:
        assert len(run.history) == 2
        assert math.isfinite(run.evaluation["mean/transfer_knn"])
        assert run.seconds > 0
        assert not Path(run.directory).is_absolute()
        assert (out / run.directory / "result.json").is_file()
    assert len(comparison.baselines["untrained"]) == 2
    assert len(comparison.baselines["pixels"]) == 1
    assert "pixels/transfer_linear" in comparison.baselines["pixels"][0]


def test_arms_share_their_start(compared: tuple[Comparison, Path, str]) -> None:
    # Before the first step the arms are one model on one batch, so their first epoch is close.
    comparison, _, _ = compared
    for seed in (0, 1):
        first = {r.arm: r.history[0]["contrastive_loss"] for r in comparison.runs if r.seed == seed}
        assert first["cjepa"] == pytest.approx(first["jepa"], rel=0.2)
        assert first["cjepa"] != first["jepa"]


def test_paired_differences_are_those_of_the_runs(compared: tuple[Comparison, Path, str]) -> None:
    comparison, _, _ = compared
    values = {
        arm: [run.evaluation["mean/knn"] for run in comparison.arm_runs(arm)]
        for arm in comparison.arms
    }
    a, b = (x - y for x, y in zip(values["cjepa"], values["jepa"], strict=True))
    paired = comparison.paired["cjepa - jepa"]["mean/knn"]
    assert paired.values == pytest.approx((a, b))
    assert paired.mean == pytest.approx((a + b) / 2)
    assert paired.std == pytest.approx(abs(a - b) / math.sqrt(2))


def test_console_output(compared: tuple[Comparison, Path, str]) -> None:
    _, out, text = compared
    for title in ("Raw pixels", "Untrained encoder", "JEPA alone", "Contrastive alone"):
        assert title in text
    assert "[9/9] finished" in text
    lines = text.splitlines()
    assert lines[0] == "Data: digits."
    assert lines[1] == "160 training images and 60 test images of 10 classes."
    assert "10 are visible (62 %), 4 are predicted (25 %)" in text
    for run in (out / "runs").iterdir():
        assert (
            (run / "log.txt").read_text(encoding="utf-8").startswith("Data: digits.\n160 training")
        )
    assert f"Report: {out / 'report.html'}" in text


def test_files(compared: tuple[Comparison, Path, str]) -> None:
    comparison, out, _ = compared
    assert load_comparison(out / "comparison.json").to_json() == comparison.to_json()
    assert (out / "comparison.md").read_text() == comparison_markdown(comparison)
    assert (out / "report.html").stat().st_size > 50_000
    assert not list(out.rglob("*.partial"))


def test_environment_is_recorded(compared: tuple[Comparison, Path, str]) -> None:
    environment = compared[0].environment
    assert set(environment) >= {"date", "command", "commit", "device", "threads per run"}
    assert environment["versions"]["torch"]
    assert environment["threads per run"] == 1


def test_recorded_command_is_one_that_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/venv/bin/cjepa", "/somewhere/cjepa_kernels/train/cli.py"):
        monkeypatch.setattr("sys.argv", [program, "compare", "--seeds", "0"])
        assert compare_module.environment(SMALL)["command"] == "cjepa compare --seeds 0"


def test_second_call_trains_nothing_and_one_worker_agrees(
    compared: tuple[Comparison, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, out, _ = compared
    alone = compare(
        SMALL,
        seeds=[1],
        arms=["jepa"],
        out_dir=tmp_path,
        workers=1,
        transfer=True,
        console=quiet(),
    )
    (run,) = alone.runs
    same = next(r for r in comparison.runs if (r.arm, r.seed) == ("jepa", 1))
    assert (run.history, run.evaluation) == (same.history, same.evaluation)
    assert alone.baselines["untrained"][0] == comparison.baselines["untrained"][1]
    assert alone.paired == {}

    monkeypatch.setattr(compare_module, "evaluate", _must_not_run)
    monkeypatch.setattr(compare_module, "evaluate_pixels", _must_not_run)
    monkeypatch.setattr(runner.L.Trainer, "fit", _must_not_run)
    again = compare(SMALL, seeds=[0, 1], out_dir=out, workers=1, transfer=True, console=quiet())
    assert again.runs == comparison.runs
    assert again.baselines == comparison.baselines


def _must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a finished part was computed again")


def test_failing_run_is_named_and_finished_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runner.train

    def fail_on_jepa(config: ExperimentConfig, *args: Any, **kwargs: Any) -> RunResult:
        if config.loss["contrastive_weight"] == 0:
            raise ArithmeticError("diverged")
        return train(config, *args, **kwargs)

    monkeypatch.setattr(runner, "train", fail_on_jepa)
    with pytest.raises(JobError, match=r"^jepa-seed0 failed: ArithmeticError: diverged$"):
        compare(SMALL, seeds=[0], out_dir=tmp_path, workers=1, console=quiet())
    assert (tmp_path / "runs" / "cjepa-seed0" / "result.json").is_file()
    assert not (tmp_path / "runs" / "contrastive-seed0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": [1, 1]}, "seeds must be distinct, got 1, 1"),
        ({"seeds": [-1]}, "seeds must be integers >= 0, got -1"),
        ({"seeds": [True]}, "seeds must be integers >= 0, got True"),
        ({"arms": []}, "arms must hold at least one"),
        ({"arms": ["jeppa"]}, "no arm 'jeppa', did you mean 'jepa'?"),
        ({"arms": ["jepa", "jepa"]}, "arms must be distinct"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:30],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(SMALL, **{"seeds": [0], "out_dir": tmp_path, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.contrastive_weight=0", "loss.contrastive_weight must be above 0"),
        ("loss.jepa_weight=0.0", "loss.jepa_weight must be above 0"),
        ("loss.type=hjepa", "loss.type must be cjepa, or loss.use_contrastive true"),
        ("trainer.devices=2", "trainer.devices must be 1"),
        ("loss.temprature=1", "temprature"),
        ("trainer.batch_size=100000", "trainer.batch_size: expected at most"),
    ],
)
def test_experiments_that_do_not_compare(override: str, message: str, tmp_path: Path) -> None:
    config = apply_overrides(SMALL, [override])
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(config, seeds=[0], out_dir=tmp_path, workers=2)
    assert not list(tmp_path.iterdir())


def test_directory_of_another_experiment(compared: tuple[Comparison, Path, str]) -> None:
    _, out, _ = compared
    other = apply_overrides(SMALL, ["optimizer.learning_rate=0.005"])
    with pytest.raises(ValueError, match=r"(?s)runs.cjepa-seed0.*optimizer\.learning_rate"):
        compare(other, seeds=[0, 1], out_dir=out, workers=1, transfer=True, console=quiet())


def test_summary_by_hand() -> None:
    summary = Summary.of([1.0, 2.0, 6.0])
    assert summary.mean == 3
    assert summary.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert summary.format() == "3.0 ± 2.6"
    assert summary.format(signed=True) == "+3.0 ± 2.6"
    assert Summary.of([2.0]).format() == "2.0"
    with pytest.raises(ValueError, match="at least one number"):
        Summary.of([])


def test_paired_differences_by_hand() -> None:
    first = [{"a": 5.0, "b": 1.0}, {"a": 9.0, "b": 1.0}]
    second = [{"a": 1.0, "c": 1.0}, {"a": 7.0, "c": 1.0}]
    assert paired_differences(first, second) == {"a": Summary.of([4.0, 2.0])}
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_differences(first, second[:1])


def example(seeds: tuple[int, ...] = (0,)) -> Comparison:
    def evaluation(value: float) -> dict[str, float]:
        metrics = ("few_label", "knn", "linear", "linear_robust")
        return {f"{f}/{m}": value for f in ("mean", "cls", "pixels") for m in metrics}

    runs = [
        ArmRun(arm, seed, "runs/x", [{"loss": math.nan}], evaluation(value), [], 1.0)
        for seed in seeds
        for arm, value in (("cjepa", 80.0 + seed), ("jepa", 70.0))
    ]
    return Comparison(
        dataset="blobs",
        arms=("cjepa", "jepa"),
        seeds=seeds,
        transfer=False,
        config={"seed": 0},
        runs=runs,
        baselines={"pixels": [evaluation(90.0)], "untrained": [evaluation(50.0)] * len(seeds)},
        paired={
            "cjepa - jepa": paired_differences(
                [r.evaluation for r in runs if r.arm == "cjepa"],
                [r.evaluation for r in runs if r.arm == "jepa"],
            )
        },
        environment={"versions": {"torch": "2"}, "commit": None},
    )


def test_rows_of_the_tables() -> None:
    (mean, cls) = text_tables(example((0, 2)))
    assert mean.columns == ("accuracy, %", "few-label", "k-NN", "linear", "robust")
    assert [row[:2] for row in mean.rows] == [
        ("Raw pixels", "90.0"),
        ("Untrained encoder", "50.0 ± 0.0"),
        ("JEPA alone", "70.0 ± 0.0"),
        ("C-JEPA", "81.0 ± 1.4"),
    ]
    assert cls.difference == ("C-JEPA − JEPA alone", *["+11.0 ± 1.4"] * 4)


def test_markdown_table_is_regular() -> None:
    lines = comparison_markdown(example()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 * (2 + 4 + 1)
    assert {line.count("|") for line in table} == {6}
    assert "- versions: torch 2" in lines


def test_json_round_trip_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    comparison = example()
    path = tmp_path / "comparison.json"
    save_comparison(comparison, path)
    assert "NaN" not in path.read_text()
    loaded = load_comparison(path)
    assert math.isnan(loaded.runs[0].history[0]["loss"])
    assert math.isnan(loaded.paired["cjepa - jepa"]["mean/knn"].std)
    assert loaded.to_json() == comparison.to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "comparison.json"),
        ("[]", "got list"),
        (json.dumps({"format": 99}), "got 99"),
        (json.dumps({"format": 1}), "incomplete: 'dataset'"),
    ],
    ids=["no-json", "list", "format", "incomplete"],
)
def test_damaged_json(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_comparison(path)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no comparison at .*absent\.json"):
        load_comparison(tmp_path / "absent.json")


def test_environment_is_that_of_the_first_start(
    compared: tuple[Comparison, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out, _ = compared
    monkeypatch.setattr("sys.argv", ["another", "command"])
    again = compare(SMALL, seeds=[0, 1], out_dir=out, workers=1, transfer=True, console=quiet())
    assert again.environment == first.environment
    assert again.to_json() == first.to_json()
    fewer = compare(SMALL, seeds=[0], out_dir=out, workers=1, transfer=True, console=quiet())
    assert fewer.environment["command"] == "another command"
