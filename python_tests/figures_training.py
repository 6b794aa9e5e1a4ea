"""What the records of the training program say in the documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from documents import ROOT
from figures import record

from cjepa_kernels.train.comparison import (
    Comparison,
    Summary,
    comparison_markdown,
    load_comparison,
    text_tables,
)
from cjepa_kernels.train.config import load_config
from cjepa_kernels.train.vit import VisionTransformer

GUIDE, README, RESULTS = "docs/training.md", "README.md", "docs/results"
Texts = Iterator[tuple[str, str]]


def comparison(name: str) -> Comparison:
    return load_comparison(Path(ROOT / RESULTS / f"{name}.json"))


def pages_of_comparisons() -> Texts:
    for name in ("digits", "digits-transfer", "cifar10"):
        yield f"{RESULTS}/{name}.md", comparison_markdown(comparison(name))
    leads = {"digits": "Mean-pooled patch features:", "cifar10": "where both terms count:"}
    for name, lead in leads.items():
        table = text_tables(comparison(name))[0]
        lines = (table.columns, *table.rows, tuple(f"**{cell}**" for cell in table.difference))
        yield README, "\n".join([lead, *(f"| {' | '.join(cells)} |" for cells in lines)])


COUNTS = {3: "three", 4: "four", 5: "five"}


def settings() -> Texts:
    """How many seeds and epochs, and of which data."""
    digits, transfer, cifar = map(comparison, ("digits", "digits-transfer", "cifar10"))
    epochs, short, seeds = epochs_of(digits), epochs_of(cifar), len(digits.seeds)
    assert epochs_of(transfer) == epochs
    yield README, f"budget, {seeds} seeds each, {epochs} epochs, frozen features"
    data, size = cifar.config["data"], cifar.config["trainer"]["batch_size"]
    images = f"{data['train_size']:,}"
    yield (
        README,
        f"{images} images of CIFAR-10 (`cjepa compare --config configs/cifar10.yaml --seeds "
        f"{','.join(map(str, cifar.seeds))}`, {short} epochs",
    )
    page = f"{RESULTS}/cifar10.md"
    yield page, f"{images} training images"
    yield page, f"test images, {short} epochs, batches of {size}"
    yield page, f"the training set for {short} epochs"
    yield page, f"epochs against {short}; large batches against {size}"
    batch = digits.config["trainer"]["batch_size"]
    yield f"{RESULTS}/digits.md", f"test images, {epochs} epochs, batches of {batch}"
    yield f"{RESULTS}/digits-transfer.md", f"The budget is {epochs} epochs of half the images"
    yield "docs/start.md", f"on 8 × 8 digits, {COUNTS[seeds]} seeds each"
    rows = record(f"{RESULTS}/tuning.json")["rows"]
    (seeds,) = {len(row["seeds"]) for row in rows}
    yield f"{RESULTS}/tuning.md", f"C-JEPA on digits, {epochs} epochs, {seeds} seeds each"


def epochs_of(content: Comparison) -> int:
    (epochs,) = {len(run.history) for run in content.runs}
    assert epochs == content.config["trainer"]["epochs"]
    return epochs


def gains() -> Texts:
    """How to read the tables: gains in points, paired by seed."""
    digits, transfer, cifar = map(comparison, ("digits", "digits-transfer", "cifar10"))

    def over(content: Comparison, other: str, metric: str) -> Summary:
        return content.paired[f"cjepa - {other}"][metric]

    def points(content: Comparison, other: str, *metrics: str) -> list[str]:
        return [f"{over(content, other, metric).mean:.1f}" for metric in metrics]

    few, near = points(digits, "jepa", "mean/few_label", "mean/knn")
    times = {
        round(over(digits, "jepa", f"cls/{m}").mean / over(digits, "jepa", f"mean/{m}").mean)
        for m in ("few_label", "knn")
    }
    assert times == {2}
    yield (
        f"{RESULTS}/digits.md",
        f"{few} points on the few-label probe and {near} on k-NN of mean-pooled features, paired "
        "by seed, and twice that on CLS",
    )
    metrics = ("few_label", "knn", "linear", "linear_robust")
    apart = max(over(digits, "contrastive", f"mean/{metric}").mean for metric in metrics)
    yield f"{RESULTS}/digits.md", f"alone, it comes within {apart:.1f} points of C-JEPA"
    few, near, cls_few, cls_near = points(
        transfer,
        "jepa",
        *(f"{of}/transfer_{metric}" for of in ("mean", "cls") for metric in ("few_label", "knn")),
    )
    yield (
        f"{RESULTS}/digits-transfer.md",
        f"ahead of JEPA alone by {few} points on the few-label probe and {near} on k-NN of "
        f"mean-pooled features, and by {cls_few} and {cls_near} on CLS",
    )
    left_out = over(transfer, "jepa", "mean/transfer_linear")
    none = f"there is no difference (−{-left_out.mean:.1f} ± {left_out.std:.1f})"
    yield f"{RESULTS}/digits-transfer.md", none
    linear, nearest = (over(cifar, "jepa", f"mean/{metric}") for metric in ("linear", "knn"))
    yield (
        f"{RESULTS}/cifar10.md",
        f"gains {linear.mean:.1f} points (± {linear.std:.1f} over {COUNTS[len(cifar.seeds)]} "
        f"seeds, paired), k-NN {nearest.mean:.1f}",
    )
    both = points(
        cifar, "contrastive", *(f"{of}/{m}" for of in ("mean", "cls") for m in ("linear", "knn"))
    )
    yield (
        f"{RESULTS}/cifar10.md",
        "C-JEPA is {} points above the contrastive term alone on the linear probe of mean-pooled "
        "features and {} on k-NN; on CLS, {} and {}".format(*both),
    )
    minutes = [run.seconds / 60 for run in cifar.runs]
    took = f"A run takes {min(minutes):.0f} to {max(minutes):.0f} minutes on one core"
    yield f"{RESULTS}/cifar10.md", took


def parameters() -> Texts:
    config = load_config(ROOT / "configs" / "cifar10.yaml")
    encoder = VisionTransformer(config.model, (3, 32, 32), torch.zeros(3), torch.ones(3))
    count = f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} million"
    yield README, f"an encoder of {count} parameters"
    yield f"{RESULTS}/cifar10.md", f"86 million parameters, against {count}; hundreds"


def guide() -> Texts:
    """What our own runs showed, in the table of findings."""
    digits, cifar = comparison("digits"), comparison("cifar10")
    pixels = digits.baselines["pixels"][0]["pixels/linear"]
    yield GUIDE, f"on digits raw pixels alone reach {pixels:.0f} %"

    def histories(content: Comparison, key: str) -> list[list[float]]:
        return [[epoch[key] for epoch in run.history] for run in content.arm_runs("cjepa")]

    def ends(content: Comparison, key: str) -> list[float]:
        return [values[-1] for values in histories(content, key)]

    accuracy = [statistics.mean(ends(c, "contrastive_accuracy")) for c in (digits, cifar)]
    tuning = {r["setting"]: r for r in record(f"{RESULTS}/tuning.json")["rows"]}
    recipe, low = (
        statistics.mean(tuning[name]["contrastive_accuracy"])
        for name in ("weight 0.1, temperature 0.1", "temperature 0.07")
    )
    yield (
        GUIDE,
        f"healthy runs ended at {accuracy[0]:.2f} (digits) and {accuracy[1]:.2f} (CIFAR-10); "
        f"temperature 0.07 raised it by {low - recipe:.2f} and left",
    )
    early = [max(values) for values in histories(digits, "term_ratio")]
    end, cifar_end = ends(digits, "term_ratio"), ends(cifar, "term_ratio")
    heavy = statistics.mean(tuning["weight 0.2"]["term_ratio"])
    yield (
        GUIDE,
        f"digits reached {min(early):.2f}–{max(early):.2f} early and ended at "
        f"{statistics.mean(end):.1f}, CIFAR-10 ended at {min(cifar_end):.1f}–{max(cifar_end):.1f}, "
        f"digits with weight 0.2 at {heavy:.2f}",
    )
    positive, negative = (histories(digits, f"contrastive_{k}_sim") for k in ("pos", "neg"))
    gap = [
        statistics.mean(p[i] - n[i] for p, n in zip(positive, negative, strict=True))
        for i in (0, 9, 39)
    ]
    yield GUIDE, "{:.2f}, {:.2f}, {:.2f} at epochs 1, 10, 40 on digits".format(*gap)
    shared = record(f"{RESULTS}/tuning.json")["one mask for both views"]
    apart = tuning["weight 0.1, temperature 0.1"]
    yield (
        GUIDE,
        f"accuracy {shared['accuracy_at_epoch_7']:.2f} at epoch 7, few-label probe "
        f"{shared['mean/few_label']:.1f} instead of {apart['mean/few_label'][0]:.1f}",
    )
    spread = {
        arms: [
            run.evaluation["cls/std"]
            for c in (digits, cifar)
            for arm in arms
            for run in c.arm_runs(arm)
        ]
        for arms in (("cjepa", "contrastive"), ("jepa",))
    }
    with_term, alone = spread.values()
    yield (
        GUIDE,
        f"CLS spread ended at {math.floor(100 * min(with_term)) / 100:.2f} or above with the "
        f"contrastive term, at {min(alone):.1f} to {max(alone):.1f} with JEPA alone",
    )


def tuning() -> Texts:
    page = f"{RESULTS}/tuning.md"
    content = record(f"{RESULTS}/tuning.json")
    probes = ("mean/few_label", "mean/knn", "cls/few_label", "cls/knn")
    ends = ("contrastive_accuracy", "term_ratio", "gap")
    table = [
        "| setting | few-label, mean-pooled | k-NN, mean-pooled | few-label, CLS | k-NN, CLS "
        "| accuracy at the end | ratio of the terms | pos − neg |"
    ]
    for r in content["rows"]:
        cells = [
            *(f"{statistics.mean(r[k]):.1f} ± {statistics.stdev(r[k]):.1f}" for k in probes),
            *(f"{statistics.mean(r[k]):.2f}" for k in ends),
        ]
        table.append(f"| {r['setting']} | {' | '.join(cells)} |")
    yield page, "\n".join(table)
    means = [[statistics.mean(r[k]) for r in content["rows"]] for k in probes]
    assert max(max(of) - min(of) for of in means) <= 2
    yield page, "stay within two points of each other on every probe"
    yield "docs/faq.md", "moved a probe by more than two points"
    rows = {r["setting"]: r for r in content["rows"]}
    first = rows["weight 0.1, temperature 0.1"]
    deviation = max(statistics.stdev(r[k]) for r in rows.values() for k in probes)
    yield page, f"the deviation between seeds is up to {deviation:.1f}"
    accuracy = {name: statistics.mean(r["contrastive_accuracy"]) for name, r in rows.items()}
    low, high = min(accuracy.values()), max(accuracy.values())
    gain = accuracy["temperature 0.07"] - accuracy[first["setting"]]
    yield (
        page,
        f"Accuracy stays between {low:.2f} and {high:.2f}. Temperature 0.07, the guide's advice "
        f"below 0.8, raises it by {gain:.2f}.",
    )
    ratio = statistics.mean(rows["weight 0.2"]["term_ratio"])
    yield page, f"A ratio of the terms above 1 (weight 0.2 ends at {ratio:.2f})"
    shared = content["one mask for both views"]
    yield (
        page,
        f"accuracy {shared['accuracy_at_epoch_7']:.2f} at epoch 7 and "
        f"{shared['contrastive_accuracy']:.2f} at the end, contrastive loss "
        f"{shared['contrastive_loss']:.2f}; few-label {shared['mean/few_label']:.1f} on "
        f"mean-pooled features and {shared['cls/few_label']:.1f} on CLS, against "
        f"{first['mean/few_label'][0]:.1f} and {first['cls/few_label'][0]:.1f} with independent "
        f"masks, while the linear probe with all labels ({shared['mean/linear']:.1f} against "
        f"{first['mean/linear'][0]:.1f}) hides it",
    )


def expected() -> Texts:
    """Page and text of everything above."""
    for texts in (pages_of_comparisons, settings, gains, parameters, guide, tuning):
        yield from texts()
