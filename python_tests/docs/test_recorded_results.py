"""The recorded results meet their targets; what documents say of them is in test_figures.py."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import load
from figures import ROOT, record

from cjepa_kernels.bench.plots import drawable
from cjepa_kernels.plot_style import svg
from cjepa_kernels.train.evaluation.comparison import load_comparison
from cjepa_kernels.train.loop import advisor

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


def test_the_whole_loss_misses_no_target() -> None:
    targets = record("bench/results/cjepa_loss_cpu.json")["targets"]
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
    """What ``make bench-record`` wrote."""
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
    drawn = {path: svg(draw) for path, draw in load("pictures").pictures().items()}
    assert len(drawn) == 4
    for path, text in drawn.items():
        assert text == path.read_text(encoding="utf-8"), path.name


def test_picture_of_the_readme_is_that_of_the_records() -> None:
    pictures = load("pictures")
    draw = pictures.pictures()[pictures.DOCS / "images" / "headline.svg"]
    path = ROOT / "docs/images/headline.svg"
    assert svg(draw) == path.read_text(encoding="utf-8")
