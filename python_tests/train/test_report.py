"""Test that the report is self-contained, well-formed, complete, and safe against hostile names."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("lightning")

from cjepa_kernels.train.data.dataset import Dataset, LabeledImages
from cjepa_kernels.train.data.summary import DataSummary, ImageSize, PatchCounts
from cjepa_kernels.train.evaluation.comparison import ArmRun, Comparison, paired_differences
from cjepa_kernels.train.evaluation.probes import ProbeSizes
from cjepa_kernels.train.loop.advisor import NOTES
from cjepa_kernels.train.report.figures import project
from cjepa_kernels.train.report.page import nearest_neighbours, write_report

ARMS = ("cjepa", "jepa", "contrastive")
VOID = {"meta", "img", "br", "link", "input"}
HOSTILE = "<script>alert('x')</script>&"


class PageChecker(HTMLParser):
    """Collect tags, ids and references, and check that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids[str(values["id"])] += 1
        if tag == "img":
            self.images.append(values)
        self.links += [str(values[k]) for k in ("src", "href", "xlink:href") if values.get(k)]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def images(count: int, channels: int, seed: int) -> LabeledImages:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 256, (count, channels, 6, 6), generator=random)
    return LabeledImages(pixels.to(torch.uint8), labels)


def dataset(channels: int = 1) -> Dataset:
    return Dataset("blobs", images(30, channels, 0), images(12, channels, 1), ("a", HOSTILE, "c"))


def extract(pixels: Tensor) -> tuple[Tensor, Tensor]:
    flat = pixels.flatten(1).float()
    return flat, flat.sqrt()


SUMMARY = DataSummary(
    source="blobs",
    train=30,
    test=12,
    classes=("a", HOSTILE, "c"),
    class_counts={
        name: dict.fromkeys(("a", HOSTILE, "c"), n) for name, n in (("train", 10), ("test", 4))
    },
    label_column=None,
    image_column=None,
    ignored_columns=("id",),
    labels_from="folders",
    image_size=ImageSize(6, 6, 1),
    test_from="a folder",
    patches=PatchCounts(9, 4, 2),
    notes=("two images were left out.",),
    warnings=(),
)
SIZES = ProbeSizes(
    train_images=30, test_images=12, fewest_labels=8, most_labels=10, draws=4, neighbours=7
)


def comparison(*, robust: bool = True, findings: bool = True, sizes: bool = True) -> Comparison:
    random = np.random.RandomState(0)

    def evaluation() -> dict[str, float]:
        metrics = ["few_label", "knn", "linear"]
        if robust:
            metrics += [f"linear_{k}_{s}" for k in ("noise", "blur", "shift") for s in (1, 2, 3)]
            metrics.append("linear_robust")
        return {f"{f}/{m}": 50 + 9 * random.rand() for f in ("mean", "cls") for m in metrics}

    keys = ("jepa_loss", "contrastive_loss", "contrastive_accuracy", "term_ratio")
    keys += ("contrastive_pos_sim", "contrastive_neg_sim", "cls_effective_rank")
    finding: dict[str, str | float] = {
        "rule": "contrastive_at_chance",
        "epoch": 3,
        "message": f"try {HOSTILE}",
        "evidence": "accuracy 0.21",
        "note": NOTES["contrastive_at_chance"],
    }
    runs = [
        ArmRun(
            arm,
            seed,
            directory=f"runs/{arm}-seed{seed}",
            history=[{key: float(random.rand()) for key in keys} for _ in range(4)],
            evaluation=evaluation(),
            findings=[finding] if findings and arm == "cjepa" else [],
            seconds=2.0,
        )
        for seed in (0, 1)
        for arm in ARMS
    ]
    by_arm = {arm: [run.evaluation for run in runs if run.arm == arm] for arm in ARMS}
    pixels = {k.replace("mean", "pixels"): v for k, v in evaluation().items() if "mean" in k}
    return Comparison(
        dataset="blobs",
        arms=ARMS,
        seeds=(0, 1),
        transfer=False,
        config={"seed": 0, "data": {"source": HOSTILE}, "trainer": {"epochs": 4}},
        runs=runs,
        baselines={"pixels": [pixels], "untrained": [evaluation(), evaluation()]},
        paired={
            f"cjepa - {other}": paired_differences(by_arm["cjepa"], by_arm[other])
            for other in ("jepa", "contrastive")
        },
        environment={"date": "2020-01-01", "versions": {"torch": "2"}, "commit": None},
        data=SUMMARY if sizes else None,
        probes={"all": SIZES} if sizes else {},
    )


def read(path: Path) -> tuple[str, PageChecker]:
    page = path.read_text(encoding="utf-8")
    checker = PageChecker()
    checker.feed(page)
    assert checker.open == []
    return page, checker


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PageChecker]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    extractors = dict.fromkeys((*ARMS, "untrained"), extract)
    write_report(comparison(), dataset(), extractors, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return read(path)


def test_it_needs_no_network_and_no_scripts(page: tuple[str, PageChecker]) -> None:
    text, checker = page
    assert checker.tags["script"] == checker.tags["link"] == 0
    assert all(link.startswith(("data:", "#")) for link in checker.links)
    assert not re.search(r"url\((?!#)|@import", text)


def test_ids_are_unique_and_references_resolve(page: tuple[str, PageChecker]) -> None:
    text, checker = page
    assert {name: n for name, n in checker.ids.items() if n > 1} == {}
    referenced = set(re.findall(r"url\(#([^)]+)\)", text))
    referenced |= {link[1:] for link in checker.links if link.startswith("#")}
    assert referenced
    assert referenced <= set(checker.ids)


def test_every_section_is_there(page: tuple[str, PageChecker]) -> None:
    _, checker = page
    sections = {"data", "results", "training", "robustness", "features", "neighbours", "advisor"}
    assert sections | {"details"} <= set(checker.ids)
    assert checker.tags["svg"] == checker.tags["figure"] == 4
    assert checker.tags["figcaption"] == 4


def test_numbers_are_those_of_the_comparison(page: tuple[str, PageChecker]) -> None:
    text, _ = page
    for pair in ("cjepa - jepa", "cjepa - contrastive"):
        paired = comparison().paired[pair]["mean/few_label"]
        assert f"<td>{paired.format(signed=True)}</td>" in text


def text_of(checker: PageChecker) -> str:
    return " ".join("".join(checker.text).split())


def test_tiles_compare_with_both_other_arms(page: tuple[str, PageChecker]) -> None:
    text, checker = page
    tiles = re.findall(r'<div class="tile">(.*?)</div>', text)
    assert len(tiles) == 4
    for tile, key in zip(
        tiles, ("mean/few_label", "mean/knn", "cls/few_label", "cls/knn"), strict=True
    ):
        for other, title in (("jepa", "JEPA alone"), ("contrastive", "Contrastive alone")):
            value = comparison().paired[f"cjepa - {other}"][key].format(signed=True)
            assert f"<b>{value}</b> against {title}" in tile
    assert "of the 2 paired differences" in text_of(checker)


def test_sizes_are_those_of_the_sets(page: tuple[str, PageChecker]) -> None:
    text = text_of(page[1])
    assert "accuracies of 12 test images" in text
    assert "Mean-pooled patch features (12 test images, 2 seeds)" in text
    assert "30 training images and 12 test images of 3 classes" in text
    assert f"a (10 + 4), {HOSTILE} (10 + 4), c (10 + 4)" in text
    assert "logistic regression on 8 to 10 labels per class, mean of 4 fixed draws" in text
    assert "k-NN: 7 nearest training features" in text
    assert "fitted on 30 training images (few-label: 8 to 10 labels per class)" in text
    assert "tested on 12 test images. One test image is 8.3 percentage points." in text


def test_the_summary_of_the_data_survives_json() -> None:
    for summary in (SUMMARY, replace(SUMMARY, patches=None)):
        saved = json.loads(json.dumps(summary.to_dict()))
        assert DataSummary.from_dict(saved) == summary


def test_every_arm_is_in_every_table_and_figure(page: tuple[str, PageChecker]) -> None:
    text, _ = page
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL))
    for name in ("results", "training", "robustness", "features", "neighbours"):
        for title in ("JEPA alone", "Contrastive alone", "C-JEPA"):
            assert title in sections[name], (name, title)


def test_bold_is_the_best_arm_and_no_row(page: tuple[str, PageChecker]) -> None:
    text, _ = page
    assert "tr.main" not in text
    # With 12 test images no difference between the arms exceeds the noise.
    assert "<td><b>" not in text
    assert "In a column without bold, no arm is ahead beyond the noise" in text


def test_an_old_record_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(comparison(sizes=False), dataset(), {}, path)
    text = text_of(read(path)[1])
    assert "This record does not hold what was understood of the data." in text
    assert "This record does not hold the numbers of training and test images." in text
    assert "at most 10 labels per class" in text
    assert "test images, 2 seeds" not in text


def test_neighbours_are_marked(page: tuple[str, PageChecker]) -> None:
    _, checker = page
    # The page shows a query and its eight neighbours for each of three encoders and three classes.
    # Every image has an alternative text.
    assert len(checker.images) == 3 * 3 * 9
    assert all(image["alt"] for image in checker.images)
    assert sum("query" in str(image.get("class")) for image in checker.images) == 9


def test_findings_carry_their_notes(page: tuple[str, PageChecker]) -> None:
    _, checker = page
    text = "".join(checker.text)
    assert NOTES["contrastive_at_chance"] in text
    assert "seed 0, epoch 3: accuracy 0.21" in text
    assert "seed 1, epoch 3: accuracy 0.21" in text


def test_names_are_escaped(page: tuple[str, PageChecker]) -> None:
    text, checker = page
    assert "<script" not in text
    assert HOSTILE in "".join(checker.text)


def test_colours_follow_the_page(page: tuple[str, PageChecker]) -> None:
    text, _ = page
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert "#010203" not in text
    assert "#040506" not in text


def test_a_comparison_with_less_in_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    small = comparison(robust=False, findings=False)
    write_report(small, dataset(channels=3), {}, path)
    _, checker = read(path)
    assert "robustness" not in checker.ids
    assert "features" not in checker.ids
    assert checker.images == []
    assert "No run gave the advisor a reason to speak." in "".join(checker.text)


def test_colour_images(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(comparison(), dataset(channels=3), {"cjepa": extract}, path)
    _, checker = read(path)
    assert len(checker.images) == 3 * 9


def test_unknown_arm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got teacher"):
        write_report(comparison(), dataset(), {"teacher": extract}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_nearest_neighbours_by_hand() -> None:
    gallery = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=np.float32) + 10
    queries = np.array([[11, 10.1], [9.9, 5]], dtype=np.float32)
    neighbours = nearest_neighbours(queries, gallery, 2)
    assert neighbours.tolist() == [[0, 1], [3, 2]]
    assert nearest_neighbours(queries, gallery, 9).shape == (2, 4)


def test_projection_is_deterministic_and_keeps_neighbours() -> None:
    random = np.random.RandomState(0)
    centres = random.standard_normal((2, 16)) * 8
    features = (centres.repeat(20, axis=0) + random.standard_normal((40, 16))).astype(np.float32)
    points = project(features)
    assert (points == project(features)).all()
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert ((distances.argmin(1) < 20) == (np.arange(40) < 20)).mean() > 0.95


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_projection_of_collapsed_features(distinct: int) -> None:
    random = np.random.RandomState(0)
    values = random.standard_normal((distinct, 5)).astype(np.float32)
    points = project(values[np.arange(24) % distinct])
    assert points.shape == (24, 2)
    assert np.isfinite(points).all()
