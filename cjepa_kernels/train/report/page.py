"""The report of a comparison: one HTML file without scripts and without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image
from torch import Tensor

from cjepa_kernels.files import atomic_write
from cjepa_kernels.train.data.dataset import Dataset
from cjepa_kernels.train.evaluation.comparison import (
    ARM_TITLES,
    METRIC_TITLES,
    Comparison,
    TextTable,
    labels_per_class,
    notes_of,
    pair_title,
    text_tables,
)
from cjepa_kernels.train.evaluation.probes import FeatureExtractor
from cjepa_kernels.train.report import figures
from cjepa_kernels.train.report.style import STYLE

Array = npt.NDArray[np.float32]

_QUERIES = 10
_NEIGHBOURS = 8
_MAX_GALLERY = 10_000  # training images that neighbours are looked for in
_MAX_SIDE = 64  # larger pictures are scaled down, to keep the file small
_TRAINED = ("jepa", "contrastive", "cjepa")


def write_report(
    comparison: Comparison,
    dataset: Dataset,
    extractors: Mapping[str, FeatureExtractor],
    path: Path,
) -> None:
    """Write the report of a comparison as one self-contained HTML file.

    Args:
        comparison: What was measured.
        dataset: The images that the encoders are shown on.
        extractors: One frozen encoder per arm, and optionally ``"untrained"``; arms without one
            are left out of the pictures.
        path: File to write; it is replaced as a whole or not at all.

    Raises:
        ValueError: If an extractor's name is not that of an arm.
    """
    unknown = [name for name in extractors if name not in ARM_TITLES]
    if unknown:
        raise ValueError(
            f"extractors must be named among {', '.join(ARM_TITLES)}, got {', '.join(unknown)}"
        )
    title = f"C-JEPA compared on {comparison.dataset}"
    sections = [
        _headline(comparison, title),
        _data(comparison),
        _results(comparison),
        _curves(comparison),
        _robustness(comparison),
        _projections(dataset, extractors, comparison),
        _neighbours(dataset, extractors, comparison),
        _findings(comparison),
        _details(comparison),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    atomic_write(path, page)


def _headline(comparison: Comparison, title: str) -> str:
    seeds = len(comparison.seeds)
    trainer = comparison.config.get("trainer", {})
    sizes = comparison.probes.get("all")
    tested = "" if sizes is None else f", accuracies of {sizes.test_images:,} test images"
    parts = [f"<h1>{escape(title)}</h1>"]
    parts.append(
        f'<p class="lead">{len(comparison.arms)} arms x {seeds} seed{"s" * (seeds > 1)}, '
        f"{trainer.get('epochs', '?')} epochs each{tested}. The arms of a seed share "
        "initialisation, data order, views, masks and budget; they differ in the weights of the "
        "loss terms alone.</p>"
    )
    tiles = []
    for key, label in (
        ("mean/few_label", "few-label probe, mean-pooled"),
        ("mean/knn", "k-NN, mean-pooled"),
        ("cls/few_label", "few-label probe, CLS"),
        ("cls/knn", "k-NN, CLS"),
    ):
        against = [
            f"<li><b>{by_metric[key].format(signed=True)}</b> "
            f"against {escape(ARM_TITLES[pair.partition(' - ')[2]])}</li>"
            for pair, by_metric in comparison.paired.items()
            if pair.startswith("cjepa - ") and key in by_metric
        ]
        if against:
            tiles.append(f'<div class="tile"><span>{label}</span><ul>{"".join(against)}</ul></div>')
    if tiles:
        spread = "mean ± sample standard deviation" if seeds > 1 else "the one difference"
        parts.append(
            f'<div class="tiles">{"".join(tiles)}</div>\n<p class="caption">C-JEPA minus each of '
            f"the other arms, in points: {spread} of the {seeds} paired "
            f"difference{'s' * (seeds > 1)}. The notes "
            '<a href="#results">below the tables</a> give the sampling error of the test set.</p>'
        )
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _data(comparison: Comparison) -> str:
    if comparison.data is None:
        body = "<p>This record does not hold what was understood of the data.</p>"
    else:
        lines = "".join(f"<li>{escape(line)}</li>" for line in comparison.data.lines())
        body = f"<ul>{lines}</ul>"
    return _section("Data", body, "data")


def _section(title: str, body: str, anchor: str) -> str:
    return f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>'


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _html_table(columns, [(row[0], [*map(escape, row[1:])], "") for row in rows])


def _text_table(table: TextTable) -> str:
    rows: list[tuple[str, Sequence[str], str]] = [
        (
            row[0],
            [
                f"<b>{escape(cell)}</b>" if table.is_best(number, column) else escape(cell)
                for column, cell in enumerate(row)
            ][1:],
            "",
        )
        for number, row in enumerate(table.rows)
    ]
    rows += [(row[0], [*map(escape, row[1:])], "difference") for row in table.differences]
    return _html_table(table.columns, rows, caption=table.title)


def _html_table(
    columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str], str]], *, caption: str = ""
) -> str:
    """A table from the title, the cells in HTML and the class of each row."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = []
    for title, cells, kind in rows:
        texts = "".join(f"<td>{cell}</td>" for cell in cells)
        attribute = f' class="{kind}"' if kind else ""
        body.append(f'<tr{attribute}><th scope="row">{escape(title)}</th>{texts}</tr>')
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{above}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _results(comparison: Comparison) -> str:
    texts = text_tables(comparison)
    notes = "".join(f"<li>{escape(note)}</li>" for note in notes_of(texts))
    figure = _figure(
        figures.paired_figure(comparison),
        "Each dot is one seed, each line joins the runs of one seed; the dotted line is the probe "
        "on raw pixels.",
    )
    return _section(
        "Results",
        f'<div class="grid">{"".join(map(_text_table, texts))}</div>\n'
        f'<ul class="caption">{notes}</ul>\n'
        f'<p class="caption">{_probes(comparison)}</p>\n{figure}',
        "results",
    )


def _probes(comparison: Comparison) -> str:
    """What the columns of the tables are."""
    evaluation = comparison.config.get("evaluation", {})
    sizes = comparison.probes.get("all")
    if sizes is None:
        labels = f"at most {evaluation.get('few_labels', 10)} labels per class"
        draws = evaluation.get("few_label_draws", 10)
        neighbours = f"at most {evaluation.get('knn_k', 10)}"
    else:
        labels, draws = labels_per_class(sizes), sizes.draws
        neighbours = str(sizes.neighbours)
    return (
        "Accuracy on the test images of probes on frozen features, in per cent. <b>few-label</b>: "
        f"logistic regression on {labels}, mean of {draws} fixed draws. <b>k-NN</b>: {neighbours} "
        "nearest training features by cosine. <b>linear</b>: logistic regression on all training "
        "labels. <b>robust</b>: the same on corrupted test images, mean of nine corruptions. The "
        "last rows of a table pair the arms seed by seed, so their deviation is that of the "
        "difference."
    )


def _curves(comparison: Comparison) -> str:
    caption = (
        "Epoch means; lines are means over seeds, bands reach from the lowest to the highest seed. "
        "In the similarity panel the upper line of an arm is the positives, the thinner lower one "
        "the negatives: the gap between them is what should grow. An arm that leaves a term out "
        "of its loss still monitors it. Above the dotted line the contrastive term outweighs the "
        "JEPA term. Effective rank counts the directions that the CLS features use: near 1 they "
        "have collapsed."
    )
    return _section("Training", _figure(figures.curves_figure(comparison), caption), "training")


def _robustness(comparison: Comparison) -> str:
    figure = figures.robustness_figure(comparison)
    if not figure:
        return ""
    caption = (
        "The linear probe, fitted on clean training images, on corrupted test images: Gaussian "
        "noise of 10, 20, 30 % of the pixel range; Gaussian blur of 4, 8, 12 % of the side; "
        "translation by 6, 12.5, 19 % of the side. A flatter line is a more robust representation."
    )
    return _section("Robustness", _figure(figure, caption), "robustness")


def _both_features(extract: FeatureExtractor, images: Tensor) -> dict[str, Array]:
    cls, mean = extract(images)
    return {"mean": mean.float().cpu().numpy(), "cls": cls.float().cpu().numpy()}


def _projections(
    dataset: Dataset, extractors: Mapping[str, FeatureExtractor], comparison: Comparison
) -> str:
    shown = {
        row: _both_features(extractors[row], dataset.test.images)
        for row in ("untrained", *_TRAINED)
        if row in extractors
    }
    if not shown or len(dataset.test.images) < 4:
        return ""
    labels = dataset.test.labels.numpy()
    shown_images = min(len(labels), figures.MAX_POINTS)
    caption = (
        f"t-SNE of the features of {shown_images:,} test images (seed {comparison.seeds[0]} of "
        "each arm), coloured by class, which no encoder has seen. Compact clusters of one colour "
        "mean that neighbours share a class; distances between clusters and their sizes mean "
        "nothing."
    )
    svg = figures.projection_figure(shown, labels, dataset.class_names)
    return _section("Feature space", _figure(svg, caption), "features")


def _image(pixels: Tensor) -> str:
    """A data URI of one uint8 image (C, H, W)."""
    array = pixels.permute(1, 2, 0).numpy()
    if array.shape[2] not in (1, 3):
        array = array[:, :, :1]
    picture = Image.fromarray(
        array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array)
    )
    if max(picture.size) > _MAX_SIDE:
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def nearest_neighbours(queries: Array, gallery: Array, k: int) -> npt.NDArray[np.int64]:
    """Indices of the nearest gallery features, by cosine after the gallery's mean is subtracted.

    Args:
        queries: (n, D), fp32.
        gallery: (N, D), fp32.
        k: Neighbours per query, at most N of them are returned.

    Returns:
        (n, min(k, N)), int64, nearest first.
    """
    mean = gallery.mean(axis=0)
    a = torch.nn.functional.normalize(torch.from_numpy(queries - mean), dim=1)
    b = torch.nn.functional.normalize(torch.from_numpy(gallery - mean), dim=1)
    found: npt.NDArray[np.int64] = (a @ b.T).topk(min(k, len(b)), dim=1).indices.numpy()
    return found


def _neighbours(
    dataset: Dataset, extractors: Mapping[str, FeatureExtractor], comparison: Comparison
) -> str:
    test, train, names = dataset.test, dataset.train, dataset.class_names
    classes = torch.unique(test.labels)[:_QUERIES]
    queries = torch.tensor([int((test.labels == c).nonzero()[0]) for c in classes])
    gallery = torch.arange(len(train.images))
    if len(gallery) > _MAX_GALLERY:
        kept = np.random.RandomState(0).permutation(len(gallery))[:_MAX_GALLERY]
        gallery = torch.from_numpy(np.sort(kept))
    blocks = []
    for arm in _TRAINED:
        if arm not in extractors:
            continue
        query_features = _both_features(extractors[arm], test.images[queries])["mean"]
        gallery_features = _both_features(extractors[arm], train.images[gallery])["mean"]
        found = nearest_neighbours(query_features, gallery_features, _NEIGHBOURS)
        strips, hits = [], 0
        for query, row in zip(queries.tolist(), found, strict=True):
            label = int(test.labels[query])
            name = escape(names[label])
            cells = [f'<img class="query" alt="query: {name}" src="{_image(test.images[query])}">']
            for index in gallery[torch.from_numpy(row)].tolist():
                same = int(train.labels[index]) == label
                hits += same
                found_name = escape(names[int(train.labels[index])])
                kind = "same" if same else "other"
                cells.append(
                    f'<span class="{kind}" title="{found_name}">'
                    f'<img alt="{found_name}" src="{_image(train.images[index])}"></span>'
                )
            strips.append(f'<div class="strip">{"".join(cells)}</div>')
        blocks.append(
            f"<div><h3>{ARM_TITLES[arm]}</h3>{''.join(strips)}"
            f'<p class="caption">{hits} of these {found.size} neighbours have the class of the '
            "query.</p></div>"
        )
    if not blocks:
        return ""
    caption = (
        f"Left: one test image of each of {len(classes)} classes, the same for all encoders "
        f"(seed {comparison.seeds[0]}). Right: its {min(_NEIGHBOURS, len(gallery))} nearest "
        'training images by cosine of the mean-pooled features. <span class="key same">Solid '
        "frame</span>: same class. "
        '<span class="key other">Dashed frame</span>: another class.'
    )
    grid = f'<div class="grid">{"".join(blocks)}</div>'
    return _section("Nearest neighbours", f'{grid}<p class="caption">{caption}</p>', "neighbours")


def _findings(comparison: Comparison) -> str:
    grouped: dict[tuple[str, str], list[tuple[int, dict[str, str | float]]]] = {}
    for run in comparison.runs:
        for finding in run.findings:
            grouped.setdefault((run.arm, str(finding["rule"])), []).append((run.seed, finding))
    if not grouped:
        return _section("Advisor", "<p>No run gave the advisor a reason to speak.</p>", "advisor")
    items = []
    for (arm, rule), found in sorted(grouped.items()):
        first = found[0][1]
        evidence = "".join(
            f"<li>seed {seed}, epoch {finding['epoch']}: {escape(str(finding['evidence']))}</li>"
            for seed, finding in found
        )
        note = escape(str(first.get("note", "")))
        items.append(
            f'<article class="finding"><h3>{ARM_TITLES[arm]}: {escape(rule.replace("_", " "))}</h3>'
            f"<p>{escape(str(first['message']))}</p><ul>{evidence}</ul>"
            + (f'<p class="caption">What measured runs showed: {note}</p>' if note else "")
            + "</article>"
        )
    intro = (
        "<p>What the tuning guide says about the numbers of each run. A finding is a hint; the "
        "note below it tells how far it held in runs that were measured.</p>"
    )
    return _section("Advisor", intro + "".join(items), "advisor")


def _details(comparison: Comparison) -> str:
    blocks = []
    for pair, differences in comparison.paired.items():
        by_seed: list[tuple[str, ...]] = [
            (_metric_name(key), value.format(signed=True), *(f"{v:+.1f}" for v in value.values))
            for key, value in differences.items()
        ]
        columns = ("metric", "difference", *(f"seed {seed}" for seed in comparison.seeds))
        blocks.append(
            _fold(f"All paired differences: {pair_title(pair)}", _table(columns, by_seed))
        )
    config = yaml.safe_dump(comparison.config, sort_keys=False, allow_unicode=True)
    blocks.append(_fold("Configuration", f"<pre>{escape(config)}</pre>"))
    seconds = sum(run.seconds for run in comparison.runs)
    facts = [(key, _plain(value)) for key, value in comparison.environment.items()]
    facts.append(("training time, all runs", f"{seconds:.0f} s"))
    blocks.append(_fold("Environment", _definitions(facts), is_open=True))
    return _section("Details", "".join(blocks), "details")


def _metric_name(key: str) -> str:
    features, _, metric = key.partition("/")
    return f"{features}: {METRIC_TITLES.get(metric, metric.replace('_', ' '))}" + (
        " (transfer)" if metric.startswith("transfer_") else ""
    )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def _definitions(items: list[tuple[str, str]]) -> str:
    pairs = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in items)
    return f"<dl>{pairs}</dl>"


def _fold(title: str, body: str, *, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary>{escape(title)}</summary>{body}</details>"
