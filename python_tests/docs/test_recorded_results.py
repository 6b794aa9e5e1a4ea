"""The recorded results meet their targets, and they support the advisor's thresholds."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import load
from repository import ROOT

from cjepa_kernels.bench.plots import drawable
from cjepa_kernels.plot_style import svg
from cjepa_kernels.train.evaluation.comparison import ArmRun, load_comparison
from cjepa_kernels.train.loop import advisor
from docs import draw_results
from docs.generate_figures import record

COMPARISONS = ["digits", "digits-transfer", "cifar10"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_has_seeds_and_arms(name: str) -> None:
    comparison = load_comparison(ROOT / "docs" / "results" / f"{name}.json")
    assert len(comparison.seeds) >= 3
    assert {run.arm for run in comparison.runs} == {"cjepa", "jepa", "contrastive"}


def test_recorded_gains_meet_the_targets() -> None:
    digits = load_comparison(ROOT / "docs" / "results" / "digits.json").paired["cjepa - jepa"]
    assert digits["mean/few_label"].mean >= 5
    assert digits["mean/knn"].mean >= 3
    assert digits["cls/few_label"].mean > 2 * digits["mean/few_label"].mean
    assert digits["cls/knn"].mean > 2 * digits["mean/knn"].mean
    cifar = load_comparison(ROOT / "docs" / "results" / "cifar10.json").paired["cjepa - jepa"]
    assert cifar["mean/linear"].mean >= 4


def test_tuning_moves_no_probe_by_more_than_two_points() -> None:
    rows = record("docs/results/tuning.json")["rows"]
    for probe in ("mean/few_label", "mean/knn", "cls/few_label", "cls/knn"):
        means = [statistics.mean(row[probe]) for row in rows]
        assert max(means) - min(means) <= 2


def test_rules_of_the_advisor_are_those_of_the_guide() -> None:
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for rule in (
        f"above {advisor.AT_CHANCE_LOSS} of log(2B − 1) and the accuracy below "
        f"{advisor.AT_CHANCE_ACCURACY:g} / (2B − 1), both of chance, {advisor.PATIENCE} epochs",
        f"accuracy > {advisor.HIGH_ACCURACY}:",
        f"above {advisor.DOMINATING_RATIO:g} times the weighted JEPA term",
        f"is below {advisor.SEPARATED_GAP} and grew by less than {advisor.MIN_GAP_GROWTH} over "
        f"{advisor.PATIENCE} epochs",
        f"It judges medians of {advisor.WINDOW} epochs",
    ):
        assert rule in guide
    findings = guide[guide.index("| finding | rule |") :]
    assert re.findall(r"^\| `(\w+)` \|", findings, re.MULTILINE)[: len(advisor.NOTES)] == list(
        advisor.NOTES
    )


# Arms that train the contrastive term, and the arm that does not.
TRAINED, ALONE = ("cjepa", "contrastive"), ("jepa",)
# Accuracy at chance. Every recorded comparison has a batch size of 64.
AT_CHANCE = 1 / (2 * 64 - 1)


def recorded_runs(arms: tuple[str, ...], *names: str) -> Iterator[tuple[ArmRun, float]]:
    """Each run of some arms in recorded comparisons (default: all), and its warm-up in epochs."""
    for name in names or COMPARISONS:
        comparison = load_comparison(ROOT / "docs" / "results" / f"{name}.json")
        trainer = comparison.config["trainer"]
        assert trainer["batch_size"] == 64
        warmup = trainer["epochs"] * comparison.config["optimizer"]["warmup_fraction"]
        yield from ((run, warmup) for arm in arms for run in comparison.arm_runs(arm))


def medians(
    history: list[dict[str, float]], warmup: float, key: str, since: int = 0
) -> list[float]:
    """The medians that the advisor judges, if they end ``since`` epochs after warm-up or later."""
    values = [
        row["contrastive_pos_sim"] - row["contrastive_neg_sim"] if key == "gap" else row[key]
        for row in history[math.floor(warmup) :]
    ]
    ends = range(max(since, advisor.WINDOW), len(values) + 1)
    return [statistics.median(values[end - advisor.WINDOW : end]) for end in ends]


def judged(arms: tuple[str, ...], key: str, since: int = 0, *names: str) -> list[float]:
    """The medians of a metric in all runs of some arms, in one list."""
    runs = recorded_runs(arms, *names)
    return [value for run, warmup in runs for value in medians(run.history, warmup, key, since)]


def gaps(arms: tuple[str, ...]) -> list[tuple[float, float]]:
    """The gap and its growth over ``PATIENCE`` epochs, at every epoch that the advisor judges."""
    gaps_and_growths = []
    for run, warmup in recorded_runs(arms):
        values = medians(run.history, warmup, "gap")
        later = values[advisor.PATIENCE :]
        gaps_and_growths += [(now, now - values[start]) for start, now in enumerate(later)]
    return gaps_and_growths


def up(value: float) -> str:
    """The value, rounded up to two decimals."""
    return f"{math.ceil(100 * value) / 100:.2f}"


def down(value: float) -> str:
    """The value, rounded down to two decimals."""
    return f"{math.floor(100 * value) / 100:.2f}"


def advisor_run(setting: str) -> Any:
    """A run that was recorded for the advisor, with a fault or an unusual setting."""
    return next(r for r in record("docs/results/advisor.json")["runs"] if r["setting"] == setting)


def of_run(setting: str, key: str) -> list[float]:
    run = advisor_run(setting)
    return medians(run["history"], run["warmup_epochs"], key)


def evidence() -> Iterator[tuple[str, bool, str]]:
    """Rules of the advisor, each with its evidence in the recorded runs.

    Yields:
        The rule, whether its threshold separates the recorded groups, and a text that its note must
        contain.
    """
    patience = advisor.PATIENCE
    highest = max(judged(TRAINED, "contrastive_loss", patience)) / -math.log(AT_CHANCE)
    lowest = min(judged(ALONE, "contrastive_loss", patience)) / -math.log(AT_CHANCE)
    accuracies = [
        [value / AT_CHANCE for value in judged(arms, "contrastive_accuracy", patience)]
        for arms in (TRAINED, ALONE)
    ]
    ends = [run.history[-1]["contrastive_accuracy"] for run, _ in recorded_runs(TRAINED)]
    yield (
        "contrastive_at_chance",
        highest < advisor.AT_CHANCE_LOSS < lowest
        and max(accuracies[1]) < advisor.AT_CHANCE_ACCURACY < min(accuracies[0]),
        f"{patience} epochs after warm-up, runs that train the term were at {up(highest)} of the "
        "loss at chance or below, and JEPA alone, which does not train it, at "
        f"{down(lowest)} or above",
    )
    yield (
        "contrastive_at_chance",
        True,
        f"runs that probed well ended at {down(min(ends))} to {up(max(ends))}",
    )
    best = max(judged(TRAINED, "contrastive_accuracy"))
    yield (
        "high_accuracy",
        best < advisor.HIGH_ACCURACY,
        f"no run that probed well went beyond {up(best)}",
    )
    digits, cifar = (
        max(judged(("cjepa",), "term_ratio", 0, *names)) for names in (COMPARISONS[:2], ["cifar10"])
    )
    heavy = max(of_run("weight 2", "term_ratio"))
    collapsed = max(of_run("learning rate 0.1", "term_ratio"))
    yield (
        "contrastive_dominates",
        max(digits, cifar, heavy) < advisor.DOMINATING_RATIO < collapsed,
        f"the recipes reached ratios of {digits:.1f} (digits) and {cifar:.1f} (CIFAR-10), and "
        f"weight 2 on digits a ratio of {heavy:.1f}",
    )
    trained, alone = gaps(TRAINED), gaps(ALONE)
    narrow, widest = min(trained)[0], max(alone)[0]
    slowest = min(growth for gap, growth in trained if gap < 0.5)
    fastest = max(growth for _, growth in alone)
    yield (
        "gap_not_growing",
        widest < advisor.SEPARATED_GAP < narrow and fastest < advisor.MIN_GAP_GROWTH < slowest,
        f"from {patience + advisor.WINDOW} epochs after warm-up on, runs that train the term had "
        f"a gap of {down(narrow)} or more; where it was below 0.5 it still grew by "
        f"{down(slowest)} or more. JEPA alone had a gap of {up(widest)} at most, which grew by "
        f"{up(fastest)} at most",
    )
    tuning = record("docs/results/tuning.json")
    shared, recipe = tuning["one mask for both views"], tuning["rows"][0]
    yield (
        "shared_mask_shortcut",
        shared["accuracy_at_epoch_7"] > advisor.SHORTCUT_ACCURACY,
        f"accuracy {shared['accuracy_at_epoch_7']:.2f} at epoch 7, few-label probe "
        f"{shared['mean/few_label']:.1f} instead of {recipe['mean/few_label'][0]:.1f}",
    )
    similar = max(judged(TRAINED + ALONE, "contrastive_neg_sim"))
    narrowest = min(judged(TRAINED + ALONE, "cls_std"))
    equal = max(of_run("learning rate 0.1", "contrastive_neg_sim"))
    few_label = advisor_run("learning rate 0.1")["evaluation"]["mean/few_label"]
    run, _ = next(recorded_runs(("cjepa",), "digits"))
    yield (
        "collapse",
        similar < advisor.COLLAPSE_SIMILARITY < equal and narrowest > advisor.COLLAPSE_STD,
        f"the negative similarity of the recorded comparisons was {up(similar)} at most, and the "
        f"spread of CLS {down(narrowest)} or more. A learning rate of 0.1 collapsed them: a "
        f"negative similarity of {equal:.2f}, few-label probe {few_label:.1f} instead of "
        f"{run.evaluation['mean/few_label']:.1f}",
    )


def test_thresholds_of_the_advisor_lie_between_the_recorded_groups() -> None:
    rules = list(evidence())
    assert {rule for rule, _, _ in rules} == set(advisor.NOTES)
    for rule, separates, text in rules:
        assert separates, rule
        assert text in advisor.NOTES[rule]


def test_the_whole_loss_misses_no_target() -> None:
    targets = record("bench/results/prediction_loss_cpu.json")["targets"]
    assert not [entry for entry in targets if entry["verdict"] == "missed"]


def test_the_cpu_kernel_misses_the_targets_that_the_page_lists() -> None:
    targets = record("bench/results/nt_xent_cpu.json")["targets"]
    judged = [row for row in targets if row["part"] == "targets" and row["target"] is not None]
    assert len(judged) == 10
    assert sum(row["verdict"] != "met" for row in judged) == 7
    assert all(row["verdict"] == "met" for row in targets if row["part"] == "small")


def test_the_stages_of_the_cpu_kernel_are_three_tables() -> None:
    assert len(record("bench/results/cpu_kernel_stages.json")["tables"]) == 3


def test_the_ring_meets_its_target_and_sends_what_the_formulas_say() -> None:
    measured = record("bench/results/distributed_cpu.json")
    work = {(row["M_r"], row["D"], row["name"]): row["work"] for row in measured["rows"]}
    large = {size[:2] for size in work if size[0] >= 1024}
    assert large
    for size in large:
        assert work[(*size, "ring")] <= 0.6 * work[(*size, "strips")]
    for row in measured["counts"]:
        assert row["counted"] == row["formula"]


def recorded_comparisons() -> list[Path]:
    """The records that ``make bench-record`` wrote."""
    paths = sorted((ROOT / "docs" / "results").glob("*.json"))
    return [path for path in paths if "roofs" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", recorded_comparisons(), ids=lambda path: path.stem)
def test_page_of_a_comparison_is_that_of_its_json(path: Path) -> None:
    writer = load("record")
    results: dict[str, Any] = json.loads(path.read_text())
    assert writer.device_name(results) == path.stem
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert page == writer.page_of(results)
    images = re.findall(r"\]\((\.\./images/[^)]+)\)", page)
    assert len(images) == len(drawable(results)) >= 3
    assert all((path.parent / image).exists() for image in images)
    assert not results["environment"]["commit"].endswith("-dirty")


@pytest.mark.parametrize("path", recorded_comparisons(), ids=lambda path: path.stem)
def test_plots_of_a_comparison_are_those_of_its_json(path: Path) -> None:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    drawn = {f"bench_{path.stem}_{name}.svg": draw for name, (_, draw) in drawable(results).items()}
    images = ROOT / "docs" / "images"
    assert {image.name for image in images.glob(f"bench_{path.stem}_*.svg")} == set(drawn)
    for name, draw in drawn.items():
        assert svg(draw) == (images / name).read_text(encoding="utf-8"), name


def test_every_plot_is_of_a_comparison() -> None:
    names = {path.stem for path in recorded_comparisons()}
    for image in (ROOT / "docs" / "images").glob("bench_*.svg"):
        assert image.stem.removeprefix("bench_").rpartition("_")[0] in names


def test_pictures_of_the_other_pages_are_those_of_their_records() -> None:
    drawn = {path: svg(draw) for path, draw in draw_results.pictures().items()}
    assert len(drawn) == 5
    for path, text in drawn.items():
        assert text == path.read_text(encoding="utf-8"), path.name


def test_picture_of_the_readme_is_that_of_the_records() -> None:
    draw = draw_results.pictures()[draw_results.DOCS / "images" / "headline.svg"]
    path = ROOT / "docs/images/headline.svg"
    assert svg(draw) == path.read_text(encoding="utf-8")
