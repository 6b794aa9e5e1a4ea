"""What the records of the training program say in the documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from documents import ROOT
from figures import record

from cjepa_kernels.train.config import config_from_dict, load_config
from cjepa_kernels.train.data.dataset import load_dataset
from cjepa_kernels.train.evaluation.comparison import (
    ArmRun,
    Comparison,
    Summary,
    comparison_markdown,
    load_comparison,
    text_tables,
)
from cjepa_kernels.train.loop import advisor
from cjepa_kernels.train.model.vit import VisionTransformer

COMPARISONS = ("digits", "digits-transfer", "cifar10")
GUIDE, README, RESULTS = "docs/training.md", "README.md", "docs/results"
Texts = Iterator[tuple[str, str]]


def comparison(name: str) -> Comparison:
    return load_comparison(Path(ROOT / RESULTS / f"{name}.json"))


def pages_of_comparisons() -> Texts:
    for name in COMPARISONS:
        yield f"{RESULTS}/{name}.md", comparison_markdown(comparison(name))
    leads = {"digits": "Mean-pooled patch features:", "cifar10": "where both terms count:"}
    for name, lead in leads.items():
        yield README, f"{lead}\n\n{text_tables(comparison(name))[0].markdown()}"


COUNTS = {3: "three", 4: "four", 5: "five"}


def settings() -> Texts:
    """How many seeds and epochs, and of which data."""
    digits, transfer, cifar = map(comparison, ("digits", "digits-transfer", "cifar10"))
    epochs, short, seeds = epochs_of(digits), epochs_of(cifar), len(digits.seeds)
    assert epochs_of(transfer) == epochs
    data = config_from_dict(digits.config, origin="digits.json").data
    tested = len(load_dataset(data).test.labels)
    yield README, f"Accuracy on {tested} test images, mean ± standard deviation over the seeds"
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


def recorded_runs() -> Iterator[tuple[str, ArmRun, float]]:
    """Every run of the recorded comparisons: its record, itself, and its warm-up in epochs."""
    for name in COMPARISONS:
        content = comparison(name)
        warmup = epochs_of(content) * content.config["optimizer"]["warmup_fraction"]
        for run in content.runs:
            yield name, run, warmup


def smooth(history: list[dict[str, float]], warmup: float, key: str, since: int) -> list[float]:
    """What the advisor judges, epoch by epoch: medians, from ``since`` epochs after warm-up on."""
    values = [
        row["contrastive_pos_sim"] - row["contrastive_neg_sim"] if key == "gap" else row[key]
        for row in history
    ][math.floor(warmup) :]
    ends = range(max(since, advisor.WINDOW), len(values) + 1)
    return [statistics.median(values[end - advisor.WINDOW : end]) for end in ends]


def extremes(arms: tuple[str, ...], key: str, since: int, records: str = "") -> tuple[float, float]:
    """Lowest and highest of these over the recorded comparisons."""
    found = [
        value
        for name, run, warmup in recorded_runs()
        if run.arm in arms and records in ("", name)
        for value in smooth(run.history, warmup, key, since)
    ]
    return min(found), max(found)


def up(value: float) -> str:
    """Two digits, rounded up: no value is above."""
    return f"{math.ceil(100 * value) / 100:.2f}"


def down(value: float) -> str:
    """Two digits, rounded down: no value is below."""
    return f"{math.floor(100 * value) / 100:.2f}"


def guide() -> Texts:
    """What our own runs showed, in the table of findings, which the advisor's notes repeat."""
    digits, cifar = comparison("digits"), comparison("cifar10")
    pixels = digits.baselines["pixels"][0]["pixels/linear"]
    yield GUIDE, f"on digits raw pixels alone reach {pixels:.0f} %"
    for note in advisor.NOTES.values():
        yield GUIDE, note
    for text in notes_of_advisor():
        assert any(text in note for note in advisor.NOTES.values()), text
    positive, negative = (
        [[row[f"contrastive_{k}_sim"] for row in run.history] for run in digits.arm_runs("cjepa")]
        for k in ("pos", "neg")
    )
    gap = [
        statistics.mean(p[i] - n[i] for p, n in zip(positive, negative, strict=True))
        for i in (0, 9, 39)
    ]
    yield GUIDE, "{:.2f}, {:.2f}, {:.2f} at epochs 1, 10, 40 on digits".format(*gap)
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
        f"The spread of CLS ended at {down(min(with_term))} or above with the contrastive term, "
        f"and at {min(alone):.1f} to {max(alone):.1f} with JEPA alone",
    )
    probes = ("mean/few_label", "mean/knn", "cls/few_label", "cls/knn")
    runs = {run["setting"]: run for run in record(f"{RESULTS}/advisor.json")["runs"]}
    table = [
        "| setting | few-label, mean-pooled | k-NN, mean-pooled | few-label, CLS | k-NN, CLS |"
    ]
    for name, evaluation in (
        ("the recipe, weight 0.1", digits.arm_runs("cjepa")[0].evaluation),
        *((name, run["evaluation"]) for name, run in runs.items()),
    ):
        table.append(f"| {name} | {' | '.join(f'{evaluation[key]:.1f}' for key in probes)} |")
    yield GUIDE, "\n".join(table)


def notes_of_advisor() -> Iterator[str]:
    """What the records say in the notes of the advisor."""
    trained, alone = ("cjepa", "contrastive"), ("jepa",)
    patience = advisor.PATIENCE
    chance = math.log(2 * 64 - 1)
    assert all(comparison(name).config["trainer"]["batch_size"] == 64 for name in COMPARISONS)
    highest = extremes(trained, "contrastive_loss", patience)[1] / chance
    lowest = extremes(alone, "contrastive_loss", patience)[0] / chance
    assert highest < advisor.AT_CHANCE_LOSS < lowest
    low_accuracy = extremes(trained, "contrastive_accuracy", patience)[0] * (2 * 64 - 1)
    no_accuracy = extremes(alone, "contrastive_accuracy", patience)[1] * (2 * 64 - 1)
    assert no_accuracy < advisor.AT_CHANCE_ACCURACY < low_accuracy
    yield (
        f"{patience} epochs after warm-up, runs that train the term were at {up(highest)} of the "
        f"loss at chance or below, and JEPA alone, which does not train it, at {down(lowest)} or "
        "above"
    )
    ends = [
        run.history[-1]["contrastive_accuracy"]
        for _, run, _ in recorded_runs()
        if run.arm in trained
    ]
    yield f"runs that probed well ended at {down(min(ends))} to {up(max(ends))}"
    best = extremes(trained, "contrastive_accuracy", 0)[1]
    assert best < advisor.HIGH_ACCURACY
    yield f"no run that probed well went beyond {up(best)}"
    ratios = [
        max(extremes(("cjepa",), "term_ratio", 0, name)[1] for name in names)
        for names in (("digits", "digits-transfer"), ("cifar10",))
    ]
    runs = {run["setting"]: run for run in record(f"{RESULTS}/advisor.json")["runs"]}
    heavy, fast = runs["weight 2"], runs["learning rate 0.1"]
    most = max(smooth(heavy["history"], heavy["warmup_epochs"], "term_ratio", 0))
    assert max(*ratios, most) < advisor.DOMINATING_RATIO
    yield (
        f"the recipes reached ratios of {ratios[0]:.1f} (digits) and {ratios[1]:.1f} (CIFAR-10), "
        f"and weight 2 on digits a ratio of {most:.1f}"
    )
    collapsed = max(smooth(fast["history"], fast["warmup_epochs"], "term_ratio", 0))
    assert collapsed > advisor.DOMINATING_RATIO
    yield f"went beyond {advisor.DOMINATING_RATIO:g}"
    window = patience + advisor.WINDOW

    def gaps(arms: tuple[str, ...]) -> list[tuple[float, float]]:
        """(gap, growth over the patience) wherever the rule judges them."""
        found = []
        for _, run, warmup in recorded_runs():
            if run.arm in arms:
                values = smooth(run.history, warmup, "gap", advisor.WINDOW)
                found += [(now, now - values[i]) for i, now in enumerate(values[patience:])]
        return found

    narrow = min(gap for gap, _ in gaps(trained))
    widest = max(gap for gap, _ in gaps(alone))
    slowest = min(growth for gap, growth in gaps(trained) if gap < 0.5)
    fastest = max(growth for _, growth in gaps(alone))
    assert widest < advisor.SEPARATED_GAP < narrow
    assert fastest < advisor.MIN_GAP_GROWTH < slowest
    yield (
        f"from {window} epochs after warm-up on, runs that train the term had a gap of "
        f"{down(narrow)} or more; where it was below 0.5 it still grew by {down(slowest)} or more. "
        f"JEPA alone had a gap of {up(widest)} at most, which grew by {up(fastest)} at most"
    )
    shared = record(f"{RESULTS}/tuning.json")["one mask for both views"]
    tuned = {row["setting"]: row for row in record(f"{RESULTS}/tuning.json")["rows"]}
    apart = tuned["weight 0.1, temperature 0.1"]["mean/few_label"][0]
    assert shared["accuracy_at_epoch_7"] > advisor.SHORTCUT_ACCURACY
    yield (
        f"accuracy {shared['accuracy_at_epoch_7']:.2f} at epoch 7, few-label probe "
        f"{shared['mean/few_label']:.1f} instead of {apart:.1f}"
    )
    everyone = (*trained, *alone)
    similar = extremes(everyone, "contrastive_neg_sim", 0)[1]
    narrowest = extremes(everyone, "cls_std", 0)[0]
    assert similar < advisor.COLLAPSE_SIMILARITY
    assert narrowest > advisor.COLLAPSE_STD
    recipe = comparison("digits").arm_runs("cjepa")[0].evaluation
    equal = max(smooth(fast["history"], fast["warmup_epochs"], "contrastive_neg_sim", 0))
    yield (
        f"the negative similarity of the recorded comparisons was {up(similar)} at most, and the "
        f"spread of CLS {down(narrowest)} or more. A learning rate of 0.1 collapsed them: a "
        f"negative similarity of {equal:.2f}, few-label probe "
        f"{fast['evaluation']['mean/few_label']:.1f} instead of {recipe['mean/few_label']:.1f}"
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
