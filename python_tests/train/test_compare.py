"""Run small comparisons of arms and seeds end to end, and check the statistics by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from rich.console import Console

from cjepa_kernels.train import compare as compare_module
from cjepa_kernels.train import runner
from cjepa_kernels.train.compare import arm_config, compare
from cjepa_kernels.train.config import ExperimentConfig, apply_overrides
from cjepa_kernels.train.evaluation.comparison import (
    ArmRun,
    Comparison,
    Summary,
    load_comparison,
    paired_differences,
    save_comparison,
)
from cjepa_kernels.train.evaluation.probes import ProbeSizes
from cjepa_kernels.train.evaluation.uncertainty import difference_margin, wilson
from cjepa_kernels.train.loop.run_directory import RunResult
from cjepa_kernels.train.loop.worker_pool import JobError
from cjepa_kernels.train.report.tables import comparison_markdown, rich_tables, text_tables

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
    """Compare all arms with two seeds; return the result, its directory and the console output."""
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


def test_sizes_are_those_of_the_data(compared: tuple[Comparison, Path, str]) -> None:
    comparison, out, text = compared
    assert comparison.data is not None
    assert (comparison.data.train, comparison.data.test) == (160, 60)
    all_classes, transfer = comparison.probes["all"], comparison.probes["transfer"]
    assert (all_classes.train_images, all_classes.test_images) == (160, 60)
    assert (all_classes.fewest_labels, all_classes.most_labels) == (10, 10)
    assert all_classes.neighbours == transfer.neighbours == 10
    assert (transfer.train_images, transfer.test_images) == (80, 30)
    saved = json.loads((out / "comparison.json").read_text())["data"]
    assert {"train", "test", "classes", "class_counts", "image_size", "test_from"} <= set(saved)
    assert "(60 test images, 2 seeds)" in text
    assert "(30 test images, 2 seeds)" in text
    page = (out / "comparison.md").read_text()
    for line in comparison.data.lines():
        assert f"- {line}" in page


def test_arms_share_their_start(compared: tuple[Comparison, Path, str]) -> None:
    # All arms of a seed start from the same weights and see the same batches, so their losses in
    # the first epoch are close.
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
    assert "10 are visible (62.5 %), 4 are predicted (25 %)" in text
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
    for program in ("/venv/bin/cjepa", "/somewhere/cjepa_kernels/cli/__main__.py"):
        monkeypatch.setattr("sys.argv", [program, "compare", "--seeds", "0"])
        assert compare_module.environment(SMALL)["command"] == "cjepa compare --seeds 0"


def test_second_call_trains_nothing_and_one_worker_agrees(
    compared: tuple[Comparison, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, out, _ = compared
    one_worker = compare(
        SMALL,
        seeds=[1],
        arms=["jepa"],
        out_dir=tmp_path,
        workers=1,
        transfer=True,
        console=quiet(),
    )
    (run,) = one_worker.runs
    expected = next(r for r in comparison.runs if (r.arm, r.seed) == ("jepa", 1))
    assert (run.history, run.evaluation) == (expected.history, expected.evaluation)
    assert one_worker.baselines["untrained"][0] == comparison.baselines["untrained"][1]
    assert one_worker.paired == {}

    monkeypatch.setattr(compare_module, "evaluate", _must_not_run)
    monkeypatch.setattr(compare_module, "evaluate_pixels", _must_not_run)
    monkeypatch.setattr(runner.L.Trainer, "fit", _must_not_run)
    repeated = compare(SMALL, seeds=[0, 1], out_dir=out, workers=1, transfer=True, console=quiet())
    assert repeated.runs == comparison.runs
    assert repeated.baselines == comparison.baselines


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
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(apply_overrides(SMALL, [override]), seeds=[0], out_dir=tmp_path, workers=2)
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
    """Build a comparison of two arms that does not record the sizes of the data."""

    def evaluation(value: float) -> dict[str, float]:
        metrics = ("few_label", "knn", "linear", "linear_robust")
        return {f"{f}/{m}": value for f in ("mean", "cls", "pixels") for m in metrics}

    runs = [
        ArmRun(
            arm,
            seed,
            directory="runs/x",
            history=[{"loss": math.nan}],
            evaluation=evaluation(value),
            findings=[],
            seconds=1.0,
        )
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
    assert cls.differences == [("C-JEPA − JEPA alone", *["+11.0 ± 1.4"] * 4)]
    # The number of test images is unknown, so no arm counts as the best one.
    assert mean.best == (None,) * 4
    assert mean.title == "Mean-pooled patch features (2 seeds)"
    assert mean.notes == [
        "± is the sample standard deviation over 2 seeds.",
        "This record does not hold the numbers of training and test images. Without them the "
        "sampling error of the test set is unknown, so no cell is in bold.",
    ]


def sized(values: dict[str, tuple[float, ...]], images: int, fewest: int = 10) -> Comparison:
    """Build a comparison of arms from their accuracies, one per seed, on ``images`` test images."""
    seeds = tuple(range(len(next(iter(values.values())))))
    keys = [f"{f}/{m}" for f in ("mean", "cls") for m in ("few_label", "knn", "linear")]
    runs = [
        ArmRun(
            arm,
            seed,
            directory="runs/x",
            history=[],
            evaluation=dict.fromkeys(keys, accuracies[seed]),
            findings=[],
            seconds=1.0,
        )
        for seed in seeds
        for arm, accuracies in values.items()
    ]
    by_arm = {arm: [run.evaluation for run in runs if run.arm == arm] for arm in values}
    baseline = {f"{f}/{m}": 99.0 for f in ("mean", "cls", "pixels") for m in ("few_label", "knn")}
    return Comparison(
        dataset="blobs",
        arms=tuple(values),
        seeds=seeds,
        transfer=False,
        config={"seed": 0},
        runs=runs,
        baselines={"pixels": [baseline], "untrained": [baseline] * len(seeds)},
        paired={
            f"cjepa - {other}": paired_differences(by_arm["cjepa"], by_arm[other])
            for other in values
            if other != "cjepa"
        },
        environment={},
        probes={
            "all": ProbeSizes(
                train_images=300,
                test_images=images,
                fewest_labels=fewest,
                most_labels=10,
                draws=10,
                neighbours=10,
            )
        },
    )


def bold_cells(comparison: Comparison) -> set[str]:
    return set(re.findall(r"\*\*([^*|]+)\*\*", text_tables(comparison)[0].markdown()))


AHEAD = {"cjepa": (88.0, 88.2), "jepa": (70.0, 70.1), "contrastive": (94.0, 94.1)}


def test_bold_is_the_arm_that_is_ahead_whichever_it_is() -> None:
    assert bold_cells(sized(AHEAD, images=10_000)) == {"94.0 ± 0.1"}


@pytest.mark.parametrize(
    ("values", "images"),
    [
        (AHEAD, 40),
        ({**AHEAD, "contrastive": (88.0, 100.0)}, 10_000),
        ({arm: accuracies[:1] for arm, accuracies in AHEAD.items()}, 10_000),
        ({"cjepa": (60.0, 60.0), "jepa": (40.0, 40.0), "contrastive": (20.0, 20.0)}, 5),
        ({"cjepa": (60.0, 60.0)}, 10_000),
    ],
    ids=["few-images", "seeds-differ", "one-seed", "five-images", "one-arm"],
)
def test_nothing_is_bold_within_the_noise(
    values: dict[str, tuple[float, ...]], images: int
) -> None:
    assert bold_cells(sized(values, images)) == set()


def test_a_small_test_set_stands_beside_its_deviation() -> None:
    values = {"cjepa": (60.0, 60.0), "jepa": (60.0, 60.0), "contrastive": (40.0, 40.0)}
    comparison = sized(values, images=5, fewest=8)
    table = text_tables(comparison)[0]
    assert table.title == "Mean-pooled patch features (5 test images, 2 seeds)"
    assert table.notes[:2] == [
        "± is the sample standard deviation over 2 seeds.",
        "The probes are fitted on 300 training images (few-label: 8 to 10 labels per class) and "
        "tested on 5 test images. One test image is 20 percentage points.",
    ]
    assert table.notes[-1] == (
        "The sampling error of the test set comes on top: with 5 test images, an accuracy of "
        "60.0 % (few-label, mean-pooled patch features) has a 95 % interval of 23.1 to 88.2 % "
        "(Wilson)."
    )
    page = comparison_markdown(comparison)
    console = Console(width=100)
    with console.capture() as captured:
        for rich_table in rich_tables(comparison):
            console.print(rich_table)
    for text in (page, captured.get()):
        assert "5 test images, 2 seeds" in text
    for note in table.notes:
        assert f"- {note}" in page
    (row,) = [line for line in page.splitlines() if "C-JEPA − Contrastive alone" in line][:1]
    assert row == "| C-JEPA − Contrastive alone | +20.0 ± 0.0 | +20.0 ± 0.0 | +20.0 ± 0.0 | - |"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("sup_con", "trained with the labels of the training images"), ("dcl", "term is DCL")],
)
def test_tables_say_which_contrastive_loss_was_trained(kind: str, words: str) -> None:
    values = {"cjepa": (60.0,), "jepa": (60.0,), "contrastive": (40.0,)}
    comparison = sized(values, images=5)
    assert words not in comparison_markdown(comparison)
    other = replace(comparison, config={**comparison.config, "loss": {"contrastive_type": kind}})
    assert words in comparison_markdown(other)


def test_the_terminal_has_the_same_cells_in_bold() -> None:
    console = Console(width=120, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(rich_tables(sized(AHEAD, images=10_000))[0])
    text = captured.get()
    assert len(re.findall(r"\x1b\[1m *94\.0 ± 0\.1", text)) == 3
    assert not re.search(r"\x1b\[1m *88\.1", text)


def test_wilson_interval_by_hand() -> None:
    assert wilson(60.0, 5) == pytest.approx((23.07, 88.24), abs=0.01)
    assert wilson(100.0, 5) == pytest.approx((56.55, 100.0), abs=0.01)
    assert wilson(0.0, 5) == pytest.approx((0.0, 43.45), abs=0.01)
    assert wilson(50.0, 10_000) == pytest.approx((49.02, 50.98), abs=0.01)


def test_margin_of_a_difference_by_hand() -> None:
    first, second = (80.0, 82.0, 84.0), (70.0, 73.0, 73.0)
    # The differences per seed are 10, 9 and 11, so their standard deviation is 1. The two-sided
    # 95 % quantile of Student's t with 2 degrees of freedom is 4.302653.
    seed_margin = 4.302653 * 1.0 / math.sqrt(3)
    p, q = (0.82 * 100 + 1) / 102, (0.72 * 100 + 1) / 102
    image_margin = 100 * 1.959964 * math.sqrt((p * (1 - p) + q * (1 - q)) / 102)
    expected = math.hypot(seed_margin, image_margin)
    assert difference_margin(first, second, 100) == pytest.approx(expected, rel=1e-5)
    assert difference_margin((80.0,), (70.0,), 100) == math.inf
    # The sampling error of the five test images remains even if all seeds agree exactly.
    assert difference_margin((60.0, 60.0), (40.0, 40.0), 5) > 40


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
    assert (loaded.data, loaded.probes) == (None, {})


def test_sizes_survive_the_json(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    save_comparison(sized(AHEAD, images=40), path)
    assert load_comparison(path).probes == sized(AHEAD, images=40).probes


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
    repeated = compare(SMALL, seeds=[0, 1], out_dir=out, workers=1, transfer=True, console=quiet())
    assert repeated.environment == first.environment
    assert repeated.to_json() == first.to_json()
    fewer = compare(SMALL, seeds=[0], out_dir=out, workers=1, transfer=True, console=quiet())
    assert fewer.environment["command"] == "another command"
